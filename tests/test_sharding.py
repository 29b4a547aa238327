"""Sharded trainers: FSDP2 on gloo against replicas, without vLLM."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from running import ROOT, deadline

from colocate import memory
from colocate.checkpoint import write_model
from colocate.config import MISSING, USAGE, Config, Stop, check_layout
from colocate.sharding import rank_of

sys.path.insert(0, str(ROOT / "benchmarks"))
from shard_scaling import shard_of

WORLD = 4
# {case: (family, trainers of a replica, options of Learner)}; with 0 none is sharded. Each case makes two steps.
TWICE = {"num_iterations": 2, "correction": "sequence", "weight_decay": 0.1, "lr_scheduler": "linear"}
TWICE |= {"scheduled_steps": 3, "temperature": 0.8}
CASES = {
    "qwen2 replicated": ("qwen2", 0, {"kl_coef": 0.1}),
    "qwen2 4": ("qwen2", 4, {"kl_coef": 0.1}),
    "qwen2 2": ("qwen2", 2, {"kl_coef": 0.1}),
    "llama replicated": ("llama", 0, {}),
    "llama 4": ("llama", 4, {"gradient_checkpointing": True}),
    "llama 1": ("llama", 1, {}),
    "opt replicated": ("opt", 0, TWICE),
    "opt 2": ("opt", 2, TWICE),
    "qwen3_moe replicated": ("qwen3_moe", 0, {}),
    "qwen3_moe 4": ("qwen3_moe", 4, {}),
    "llama-half replicated": ("llama-half", 0, {"kl_coef": 0.1}),
    "llama-half 2": ("llama-half", 2, {"kl_coef": 0.1}),
}
# Those whose weights engines read through a buffer: {case: its bytes}.
BUCKETS = {"qwen2 4": 12_000, "qwen3_moe 4": 100, "llama-half 2": 10**9}
# Those that save after the first step: {case: the replica that does}.
SAVES = {"qwen2 2": 1, "qwen2 replicated": 2}
# {case: (of which case's checkpoint it goes on, trainers of a replica)}: one step, which must be that case's second.
RESUMES = {
    "as it was": ("qwen2 2", 2),
    "other shards": ("qwen2 2", 4),
    "no shards": ("qwen2 2", 0),
    "shards of a replica's": ("qwen2 replicated", 2),
    "a replica's": ("qwen2 replicated", 0),
}
ALONE = {"one trainer": ("qwen2 2", 1)}
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 65}
FAMILIES = {
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 63, "tie_word_embeddings": True},
    "llama": {"num_key_value_heads": 2, "intermediate_size": 63},
    "opt": {"ffn_dim": 63, "word_embed_proj_dim": 32, "dropout": 0.0},
    "qwen3_moe": {"num_key_value_heads": 1, "head_dim": 8, "num_experts": 3, "num_experts_per_tok": 1}
    | {"moe_intermediate_size": 16, "intermediate_size": 32},
}


# ---------------------------------------------------------------------------------------------------------------------
# Flags, and what --trainer auto chooses
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shard_size": 3}, "--shard-size 3 does not divide 4 GPUs. Try: --shard-size 2"),
        ({"shard_size": 8}, "--shard-size 8 does not divide 4 GPUs. Try: --shard-size 4"),
        ({"shard_size": 0}, "--shard-size 0 must be at least 1"),
        ({"trainer": "replicated", "shard_size": 2}, "--trainer replicated has no shards, and --shard-size is 2"),
    ],
)
def test_shards_that_cannot_be_are_refused(settings, says):
    with pytest.raises(Stop) as stop:
        check_layout(Config(**settings))
    assert stop.value.code == USAGE and says in str(stop.value)


def choose(room: int, can_shard: bool = True, **settings) -> tuple[str, int, str]:
    """(trainer, trainers of a replica, note), where so many bytes are free for a trainer of 100 parameters."""

    def check(config: Config) -> None:
        if memory.trainer_bytes(config, 100)[1] > room:
            raise Stop("too large")

    config, note = memory.choose_trainer(Config(dtype="bfloat16", **settings), "GPT", can_shard, check)
    check_layout(config)
    return config.trainer, config.replica_size, note


def test_a_replica_is_as_small_as_memory_allows():
    """A parameter takes 18 bytes. Replicas are no smaller than an engine, which would read more of another GPU's."""
    eight = {"num_gpus": 8, "tensor_parallel_size": 2}
    fits = "a whole replica with its optimizer fits beside an engine"
    assert choose(1800, **eight) == ("replicated", 1, f"--trainer auto: replicated, as {fits}")
    why = "the smallest that fits beside an engine, as a whole replica does not"
    assert choose(1799, **eight) == ("fsdp", 2, f"--trainer auto: fsdp with --shard-size 2, {why}")
    assert choose(899, **eight)[:2] == ("fsdp", 4)
    assert choose(1, **eight)[:2] == ("fsdp", 8), "whose message says what is missing"
    assert choose(1799, num_gpus=8, tensor_parallel_size=4)[:2] == ("fsdp", 4)
    why_asked = "--trainer auto: fsdp with --shard-size 2, the smallest that fits beside an engine"
    assert choose(9999, trainer="fsdp", **eight) == ("fsdp", 2, why_asked.replace("auto", "fsdp"))
    assert choose(9999, shard_size=4, **eight) == ("fsdp", 4, "")
    assert choose(9999, push="gather", **eight) == ("fsdp", 2, why_asked), "which is of shards"
    assert choose(1, trainer="replicated", **eight) == ("replicated", 1, "")
    assert choose(1, num_gpus=1, tensor_parallel_size=1) == ("replicated", 1, "")
    assert choose(9999, num_gpus=1, tensor_parallel_size=1, trainer="fsdp")[:2] == ("fsdp", 1)


def test_a_model_whose_layers_are_not_found_is_not_sharded():
    assert choose(1, can_shard=False)[:2] == ("replicated", 1)
    for settings in ({"trainer": "fsdp"}, {"shard_size": 2}):
        with pytest.raises(Stop, match=r"those of GPT were not found\. Try: --trainer replicated") as stop:
            choose(1, can_shard=False, **settings)
        assert stop.value.code == USAGE


def test_bytes_per_parameter():
    fsdp = Config(dtype="bfloat16", trainer="fsdp", shard_size=2)
    replace = dataclasses.replace
    assert memory.trainer_bytes(fsdp, 200) == (1400, 1800)
    assert memory.trainer_bytes(replace(fsdp, offload_optimizer=True), 200) == (600, 1800), "masters stay"
    assert memory.trainer_bytes(replace(fsdp, steps=0), 200) == (600, 600)
    assert memory.trainer_bytes(replace(fsdp, kl_coef=0.1), 200) == (1600, 2400)
    gathered = replace(fsdp, push="gather")
    assert memory.trainer_bytes(gathered, 200) == (1800, 2200), "and a buffer, which holds all weights, 2 bytes each"
    assert memory.trainer_bytes(gathered, 10**9)[0] - memory.trainer_bytes(fsdp, 10**9)[0] == 256 * 10**6


TOPOLOGY = """ \t\x1b[4mGPU0\tGPU1\tGPU2\x1b[0m\t
 GPU0\tX\tOK\tCNS\t
 GPU1\tOK\tX\tOK\t
 GPU2\tOK\tOK\tX\t

Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
"""


def test_gpus_that_cannot_read_each_other_are_found():
    from colocate.preflight import walls_between

    lines = TOPOLOGY.splitlines()
    assert walls_between(lines, ["1", "0", "2"]) == {(1, 2)}
    for topology, indices in ((lines, ["1", "2"]), (lines, ["0"]), (["no table"], ["0", "1"])):
        assert walls_between(topology, indices) == set()


def test_shards_on_gpus_that_cannot_read_each_other_are_gathered():
    from colocate.preflight import choose_push

    config = Config(trainer="fsdp", shard_size=2, num_gpus=4)
    recorded = dataclasses.replace(config, push="recorded")
    assert choose_push(config, set()) == (recorded, "")
    assert choose_push(config, {(1, 2), (3, 0)}) == (recorded, ""), "of two replicas: no worker reads both"
    chosen, note = choose_push(config, {(1, 2), (3, 2)})
    assert chosen.push == "gather"
    assert note.startswith("--push auto: gather, since the GPUs of bundles 3 and 2 cannot read each other's memory")
    with pytest.raises(Stop, match="Try: --push gather") as stop:
        choose_push(recorded, {(3, 2)})
    assert stop.value.code == MISSING
    with pytest.raises(Stop, match="there are none") as stop:
        choose_push(Config(trainer="replicated", push="gather"), set())
    assert stop.value.code == USAGE


def test_shards_that_are_to_be_gathered_are_chosen_so_that_the_buffer_fits():
    from colocate.preflight import choose_push

    def check(config: Config) -> None:
        config, _ = choose_push(config, {(0, 1), (2, 3)})
        if memory.trainer_bytes(config, 100)[1] > 750:  # shards of 2: 900, and 200 for the buffer
            raise Stop("does not fit")

    chosen, _ = memory.choose_trainer(Config(num_gpus=4, tensor_parallel_size=1), "X", True, check)
    assert (chosen.trainer, chosen.shard_size) == ("fsdp", 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_a_model(family):
    from colocate.sharding import decoder_layers

    assert [type(layer).__name__.endswith("DecoderLayer") for layer in decoder_layers(model_of(family))] == [True] * 2


# ---------------------------------------------------------------------------------------------------------------------
# In a trainer
# ---------------------------------------------------------------------------------------------------------------------


def model_of(family: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    name, _, half = family.partition("-")
    config = AutoConfig.for_model(name, **COMMON, **FAMILIES[name], initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if half else torch.float32).eval()


def samples_of() -> list[dict]:
    """Seven, of unequal lengths: trainers need unequal numbers of micro-batches."""
    found = []
    for i in range(7):
        ids = [(7 * i + 3 * j) % 65 for j in range(4 + i)]
        logprobs = [-1.0 - (j % 5) for j in range(len(ids) - 2)]
        found.append({"prompt": ids[:2], "tokens": ids[2:], "logprobs": logprobs, "advantage": (-1.0) ** i})
    return found


def learn(folder: Path, case: str, family: str, size: int, options: dict, start: str = "") -> None:
    """Two steps, or one that goes on from the checkpoint of the case `start`. What this trainer has goes to a file."""
    import torch

    from colocate.learner import Learner, hold
    from rlhf_utils import Piece, checkpoint_tensors

    rank = torch.distributed.get_rank()
    world = torch.distributed.get_world_size()
    model = model_of(family)
    held = hold(model, torch.device("cpu"), size, BUCKETS.get(case))
    common = {"learning_rate": 1e-3, "epsilon": 0.2, "kl_coef": 0.0, "offload": False, "micro_batch_size": 1}
    learner = Learner(model, True, held=held, **common | options)
    addresses = [w.data_ptr() for w in held.memory.values()]
    if start:
        learner.load(folder / start)
    samples = samples_of()
    total = sum(len(s["tokens"]) for s in samples)
    rows = []
    for step in range(learner.steps, 2):
        rows.append(learner.step(samples[rank::world], total))
        if step == 0 and SAVES.get(case) == rank // (size or 1):
            (folder / case).mkdir(exist_ok=True)
            learner.save(folder / case)
            state = held.gather()
            if state is not None:
                write_model(model, str(folder / case), state)
    assert addresses == [w.data_ptr() for w in held.memory.values()], "changed in place"
    # What it computes with what it exports, which then is not what its optimizer has.
    with torch.no_grad():
        for tensor in held.memory.values():
            tensor.mul_(1.5)
        with held.computing_as_engines():
            scaled = model(torch.tensor([samples[0]["prompt"]])).logits
    learner.restore()
    pieces = {}
    for name, piece in checkpoint_tensors(model, held.memory):
        piece = Piece.of(piece)
        pieces[name] = (piece.tensor.clone(), piece.full, piece.start)
    rounds = gathered(model, held, BUCKETS[case]) if case in BUCKETS else []
    torch.save({"rows": rows, "scaled": scaled, "pieces": pieces, "rounds": rounds}, folder / f"{case}-{rank}.pt")


def gathered(model, held, bucket: int) -> list[dict]:
    """{weight: its values}, of each round."""
    from rlhf_utils import checkpoint_tensors

    weights = dict(checkpoint_tensors(model, held.exported(), held.round_of))
    rounds = []
    for number in held.rounds():
        rounds.append({n: piece.tensor.clone() for n, piece in weights.items() if piece.round == number})
    assert sum(map(len, rounds)) == len(weights)
    largest = max(p.numel() * held.memory[name].itemsize for name, p in held.parameters.items())
    assert held.buffer.nbytes <= max(bucket, -(-largest // 64) * 64), "no larger than it must be"
    return rounds


def trainer(folder: str, rank: int, world: int, port: int) -> None:
    import torch

    from colocate.learner import join_group

    join_group(rank, [f"127.0.0.1:{port}"] * world, 120, torch.device("cpu"), sharded=True)
    if world == WORLD:
        for case, (family, size, options) in CASES.items():
            learn(Path(folder), case, family, size, options)
        torch.distributed.barrier()
    for case, (start, size) in (RESUMES if world == WORLD else ALONE).items():
        family, _, options = CASES[start]
        learn(Path(folder), case, family, size, options, start)
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# What they have
# ---------------------------------------------------------------------------------------------------------------------


def test_trainers_beside_workers_of_one_tp_rank_have_neighbouring_ranks():
    assert [rank_of(i, 4, 2) for i in range(8)] == [0, 2, 1, 3, 4, 6, 5, 7]
    assert [rank_of(i, 2, 4) for i in range(4)] == [0, 1, 2, 3], "shards of one worker's GPU and of another's"
    for size, tp in ((2, 2), (4, 1), (4, 2), (8, 2), (8, 4)):
        by_scaling = [shard_of(gpu, tp, size, "by TP rank") for gpu in range(8)]
        assert [rank_of(i, size, tp) % size for i in range(8)] == by_scaling


def test_trainers_are_given_all_addresses_in_the_order_of_ranks():
    """Each looks up its own there, to find the network interface that it is on."""
    import rlhf_colocate as rc

    class Trainers:
        timeouts: ClassVar = {}

        def ask(self, names, call, each=(), **options):
            self.calls = each
            self.options = options
            return [f"host{i // 2}:{i}" for i in range(len(names))]

    layout = object.__new__(rc.Colocation)
    layout.config = Config(trainer="fsdp", shard_size=4, push="gather", steps=0)
    layout.trainers = [f"trainer {i}" for i in range(4)]
    layout.fleet = Trainers()
    layout.checkpoint_everywhere = None
    layout.join_trainers()
    ranks = [rank for (rank,) in layout.fleet.calls]
    assert ranks == [0, 2, 1, 3]
    for i, rank in enumerate(ranks):
        assert layout.fleet.options["addresses"][rank] == f"host{i // 2}:{i}"


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict]]:
    """{case: what each trainer has}. "folder": where checkpoints are."""
    import torch

    from colocate.cluster import free_port

    folder = tmp_path_factory.mktemp("sharding")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    for world in (WORLD, 1):
        port = free_port()
        call = "import sys, test_sharding; test_sharding.trainer(sys.argv[1], *map(int, sys.argv[2:]))"
        command = [sys.executable, "-W", "ignore", "-c", call, str(folder)]
        trainers = [subprocess.Popen([*command, str(rank), str(world), str(port)], env=env) for rank in range(world)]
        assert [t.wait(timeout=deadline(240)) for t in trainers] == [0] * world
    files = sorted(folder.glob("*.pt"))
    result: dict = {"folder": folder}
    for file in files:
        result.setdefault(file.stem.rpartition("-")[0], []).append(torch.load(file))
    return result


def weights(trainers: list[dict]) -> dict:
    """The weights that these trainers hold together."""
    from rlhf_utils import Piece, whole

    pieces: dict[str, list] = {}
    for one in trainers:
        for name, piece in one["pieces"].items():
            pieces.setdefault(name, []).append(Piece(*piece))
    return {name: whole(parts) for name, parts in pieces.items()}


def distance(one: dict, other: dict) -> float:
    """Between two models' weights: the largest distance of two tensors, as a part of how far two steps went.

    Keys' biases are left out: their gradient is 0 but for rounding, of which AdamW makes whole steps.
    """
    assert one.keys() == other.keys()
    names = [name for name in one if not name.endswith("k_proj.bias")]
    return max(float((one[n] - other[n]).norm() / (2e-3 * one[n].numel() ** 0.5)) for n in names)


@pytest.mark.parametrize("case", [case for case, (_, size, _) in CASES.items() if size])
def test_sharded_trainers_step_as_replicas_do(found, case):
    """Four trainers with unequal shards and unequal micro-batches; the gradient is clipped over all of them."""
    import torch

    family, size, _ = CASES[case]
    expected = found[f"{family} replicated"]
    for i, one in enumerate(found[case]):
        for row, wanted in zip(one["rows"], expected[0]["rows"], strict=True):
            assert row == pytest.approx(wanted, rel=1e-5, abs=1e-7)
        assert one["scaled"].dtype == expected[0]["scaled"].dtype
        torch.testing.assert_close(one["scaled"], expected[0]["scaled"], rtol=0, atol=1e-2)
        for name, (tensor, *_) in one["pieces"].items():
            assert torch.equal(tensor, found[case][i % size]["pieces"][name][0]), "replicas are bitwise the same"
    assert distance(weights(found[case][:size]), weights(expected[:1])) < 1e-2


@pytest.mark.parametrize("case", BUCKETS)
def test_shards_are_gathered_through_a_buffer(found, case):
    import torch

    expected = weights(found[case][: CASES[case][1]])
    nbytes = sum(tensor.nbytes for tensor in expected.values())
    for one in found[case]:
        assert (len(one["rounds"]) > 1) == (nbytes > BUCKETS[case])
        values = {name: tensor for part in one["rounds"] for name, tensor in part.items()}
        assert values.keys() == expected.keys()
        assert all(torch.equal(values[name], expected[name]) for name in values)


@pytest.mark.parametrize("case", [*RESUMES, *ALONE])
def test_a_state_goes_on_in_other_shards_and_in_none(found, case):
    """Saved by any replica. Bitwise where as many trainers make up a replica as when it was saved."""
    start, size = (RESUMES | ALONE)[case]
    went_on = found[start]
    exactly = CASES[start][1] == size
    for one in found[case]:
        assert (
            one["rows"] == [went_on[0]["rows"][1]]
            if exactly
            else one["rows"][0] == pytest.approx(went_on[0]["rows"][1], rel=1e-5, abs=1e-7)
        )
    apart = distance(weights(found[case][: size or 1]), weights(went_on[: CASES[start][1] or 1]))
    assert apart == 0 if exactly else apart < 1e-2


def test_the_checkpoint_of_shards_is_an_ordinary_one(found):
    """Its files, and the values that the trainers had after the first step, when it was written."""
    from transformers import AutoModelForCausalLM

    by_shards, by_replicas = (
        AutoModelForCausalLM.from_pretrained(found["folder"] / case).state_dict() for case in SAVES
    )
    assert json.loads((found["folder"] / "qwen2 2/config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    assert distance(by_shards, by_replicas) < 1e-2
