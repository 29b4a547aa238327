"""What a push out of FSDP2's shards reads over NVLink, and how long it takes at least: 2 to 8 GPUs, 0.5B to 70B.

    python benchmarks/shard_scaling.py --output results/shards-scaling.json       # a minute; vLLM's CPU build, no GPU

The plans are the product's own: `record_loaders` records vLLM's model of each tensor-parallel rank, and `CopyPlan` cuts
the copies by the shards. All tensors are on the meta device, so a 70B model takes no memory.

There is one trainer and one engine's worker on each GPU; an engine has neighbouring GPUs. Trainers form sets, and each
set has the whole model in shards: one set is FSDP, several are HSDP. A worker reads its own GPU's shard from memory and
the others of its set over NVLink. Which trainer holds which shard decides how much that is (ORDERS).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import tables  # noqa: E402
from shapes import SHAPES, write_shape  # noqa: E402

DENSE = [name for name, shape in SHAPES.items() if "num_experts" not in shape]
MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen2.5-32B", "Llama-3.1-70B")
GPUS = SIZES = (2, 4, 8)  # of one host; trainers in a set
TPS = (1, 2, 4, 8)
ORDERS = {
    "by GPU": "sets of neighbours, the first GPU's trainer has the first shard, and so on",
    "by TP rank": "first the trainers beside TP rank 0, then those beside rank 1, and so on: most of what a worker "
    "reads is then in its own GPU's shard",
}
NVLINK_GB_S = 359
ASSUMPTIONS = {
    "dtype": "bfloat16",
    "shards": "each weight cut along dimension 0 as torch.chunk does it, like FSDP2",
    "bound_ms": "the longer of both floors, of the GPU that needs longest; nothing is added for a start",
    "local_floor_ms": "one read and one write of all bytes by the GPU's own memory: what comes from peers is written "
    "there, and about as much is read there for them",
    "nvlink_floor_ms": "the remote bytes at nvlink_gb_s",
    "nvlink_gb_s": NVLINK_GB_S,
    "nvlink_gb_s_from": "plain copies of 5.4 GB of contiguous weights out of the other GPU's memory by CUDA IPC, both "
    "GPUs at once: two H100s with 18 NVLinks, torch 2.11, 2026-11-25",
    "orders": ORDERS,
}


def checkpoint(folder: Path) -> dict:
    """{weight: meta tensor} of the checkpoint that a trainer has, bf16."""
    import torch
    import transformers

    from rlhf_utils import checkpoint_tensors

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return dict(checkpoint_tensors(model))


def rank_model(folder: Path, tp: int, rank: int):
    """vLLM's model of one rank, on the meta device and without its peers; and the model's configuration."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    options = {"skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 64, "enforce_eager": True}
    config = EngineArgs(str(folder), tensor_parallel_size=tp, **options).create_engine_config()
    # Layers that are only made ask their groups for nothing else than this.
    parallel_state._TP = SimpleNamespace(world_size=tp, rank_in_group=rank)
    parallel_state._PP = SimpleNamespace(world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True)
    with set_current_vllm_config(config), torch.device("meta"), set_default_torch_dtype(torch.bfloat16):
        return initialize_model(config), config.model_config


def shards(weights: dict, size: int) -> list[dict]:
    """Per trainer of a set: {weight: [the Piece that it holds]}, as FSDP2 cuts them; a short weight has fewer."""
    from rlhf_utils import Piece

    held: list[dict] = [{name: [] for name in weights} for _ in range(size)]
    for name, weight in weights.items():
        row = 0
        for trainer, part in zip(held, weight.chunk(size), strict=False):
            trainer[name].append(Piece(part, tuple(weight.shape), (row, *[0] * (weight.dim() - 1))))
            row += len(part)
    return held


def bytes_read(folder: Path, tp: int, sizes: tuple[int, ...] = SIZES) -> dict[int, list[list[int]]]:
    """{shard size: for each TP rank, the bytes that a push copies out of each shard}."""
    import torch

    from rlhf_utils import VERSION, CopyPlan, Piece, record_loaders

    weights = checkpoint(folder)
    shapes = {name: (tuple(w.shape), w.dtype) for name, w in weights.items()}
    version = {VERSION: [Piece.of(torch.zeros((), dtype=torch.int64, device="meta"))]}
    held = {size: shards(weights, size) for size in sizes}
    found: dict[int, list[list[int]]] = {size: [] for size in sizes}
    for rank in range(tp):
        model, model_config = rank_model(folder, tp, rank)
        recording = record_loaders(model, model_config, shapes, tp)
        for size in sizes:
            found[size].append([CopyPlan(model, None, recording, h | version).nbytes for h in held[size]])
    return found


def shard_of(gpu: int, tp: int, size: int, order: str) -> int:
    """Which shard of its set the trainer on this GPU holds (see ORDERS)."""
    if order == "by GPU":
        return gpu % size
    block = max(tp, size)  # whole engines and whole sets
    engine, rank = divmod(gpu % block, tp)
    return (rank * (block // tp) + engine) * size // block


def worst_gpu(read: list[list[int]], gpus: int, order: str, memory_gb_s: float) -> dict:
    """What the GPU that needs longest reads, in bytes, and how long that takes at least. read: by TP rank and shard."""
    tp = len(read)
    found = []
    for gpu in range(gpus):
        by_shard = read[gpu % tp]
        local = by_shard[shard_of(gpu, tp, len(by_shard), order)]
        remote = sum(by_shard) - local
        memory_ms = round(2 * sum(by_shard) / memory_gb_s / 1e6, 3)
        nvlink_ms = round(remote / NVLINK_GB_S / 1e6, 3)
        row = {"local_bytes": local, "remote_bytes": remote, "local_floor_ms": memory_ms, "nvlink_floor_ms": nvlink_ms}
        found.append(row | {"bound_ms": max(memory_ms, nvlink_ms)})
    return max(found, key=lambda row: (row["bound_ms"], row["remote_bytes"]))


def scaling(name: str, folder: Path, memory_gb_s: float) -> list[dict]:
    """Rows of one model."""
    rows = []
    for tp in (tp for tp in TPS if SHAPES[name]["num_attention_heads"] % tp == 0):
        read = bytes_read(folder, tp)
        for gpus in (n for n in GPUS if n % tp == 0):
            for size in (n for n in SIZES if gpus % n == 0):
                for order in ORDERS:
                    row = {"model": name, "gpus": gpus, "tp": tp, "shard_size": size, "order": order}
                    rows.append(row | worst_gpu(read[size], gpus, order, memory_gb_s))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--models", nargs="+", choices=DENSE, default=MODELS, help="default: %(default)s")
    args = parser.parse_args()
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    from colocate.preflight import find_packages

    benches = tables.load("bench-*.json")
    rates = {row["copy_gb_s"]: name for name, r in benches.items() for row in r["rows"] if "copy_gb_s" in row}
    memory_gb_s = round(max(rates))
    source = f"results/{rates[max(rates)]}.json, copy_gb_s of the replay"
    report = {"command": " ".join(["python benchmarks/shard_scaling.py", *sys.argv[1:]])}
    report |= {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "versions": find_packages()[0]}
    report["assumptions"] = ASSUMPTIONS | {"memory_gb_s": memory_gb_s, "memory_gb_s_from": source}
    report["rows"] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            rows = scaling(name, write_shape(name, Path(folder) / name), memory_gb_s)
            report["rows"] += rows
            print(f"{name}: {len(rows)} layouts", flush=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
