"""Time an optimizer step of sharded trainers, beside a bare FSDP2 loop of the same work, in turns on the same GPUs.

python benchmarks/bench_fsdp.py --shapes Qwen2.5-0.5B Qwen2.5-7B --num-gpus 2 --output results/fsdp-2xh100.json

Random weights of published shapes, random tokens; every trainer has as many sequences, all of one length. The bare loop
is what a short script would do: `fully_shard` on each layer, forward and backward passes of as many sequences at a time
as ours, the log-probabilities of all tokens as the loss, clip_grad_norm_, fused AdamW. Neither Ray nor vLLM is there.
Each side runs in processes of its own. Two steps are not counted. flop_share is 6 x parameters x tokens per second over
the GPUs' peak; peak_gib is what torch has taken from a GPU at most.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_learner import PROMPT_TOKENS, WARM_UP, make_model, make_samples  # noqa: E402
from shapes import SHAPES  # noqa: E402
from tables import PEAK_FLOPS  # noqa: E402

from colocate.cluster import free_port  # noqa: E402
from colocate.report import command_line  # noqa: E402

SIDES = ("ours", "bare")


def our_step(model, device, args):
    from colocate.learner import Learner
    from colocate.sharding import Shard

    held = Shard(model, args.num_gpus, device)
    options = {"tokens_per_micro_batch": args.micro_batch_size * (PROMPT_TOKENS + args.tokens)}
    options |= {"gradient_checkpointing": args.gradient_checkpointing, "offload": args.offload_optimizer}
    options |= {"compile": args.compile}
    learner = Learner(model, held=held, learning_rate=1e-5, epsilon=0.2, kl_coef=0.0, **options)
    return lambda samples, total: learner.step(samples, total)["grad_norm"]


def bare_step(model, device, args):
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
    if args.gradient_checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in (*model.model.layers, model):
        for p in module.parameters():
            if p.dtype != torch.float32:
                p.data = p.data.float()
        if args.compile and module is not model:
            module.compile()
        fully_shard(module, mp_policy=policy)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    world = torch.distributed.get_world_size()

    def step(samples: list[dict], total: int) -> float:
        for i in range(0, len(samples), args.micro_batch_size):
            part = samples[i : i + args.micro_batch_size]
            ids_BT = torch.tensor([s["prompt"] + s["tokens"] for s in part], device=device)
            advantage_B1 = torch.tensor([[s["advantage"]] for s in part], device=device)
            logits_BTV = model(input_ids=ids_BT, logits_to_keep=args.tokens + 1).logits[:, :-1]
            targets_BT = ids_BT[:, -args.tokens :]
            loss_BT = torch.nn.functional.cross_entropy(
                logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none"
            ).view_as(targets_BT)
            (world * (advantage_B1 * loss_BT).sum() / total).backward()  # FSDP takes the trainers' mean
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    return step


def run_side(args) -> None:
    """One trainer. The first prints a row as JSON."""
    import torch

    rank = args.rank
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    address = f"tcp://127.0.0.1:{args.port}"
    backend = "nccl" if on_gpu else "gloo"
    torch.distributed.init_process_group(backend, address, rank=rank, world_size=args.num_gpus)
    shape = json.loads(args.shape)
    model = make_model(shape, device, torch.bfloat16 if on_gpu else torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    step = (our_step if args.side == "ours" else bare_step)(model, device, args)
    own = args.sequences // args.num_gpus
    vocabulary = shape["vocab_size"]
    generator = torch.Generator().manual_seed(rank)
    samples = make_samples(own, args.tokens, "full", generator, vocabulary, logprob=-math.log(vocabulary))
    total = own * args.num_gpus * args.tokens
    seconds = []
    norms = []
    for _ in range(WARM_UP + args.steps):
        torch.distributed.barrier()
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        norms.append(step(samples, total))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    counted = seconds[WARM_UP:]
    computed = total + own * args.num_gpus * PROMPT_TOKENS
    row = {"step_s_mean": statistics.fmean(counted), "step_s_p50": statistics.median(counted), "steps": args.steps}
    row |= {"tokens_per_s": computed / row["step_s_mean"], "grad_norm": norms[0]}
    if on_gpu:
        row["flop_share"] = 6 * parameters * row["tokens_per_s"] / PEAK_FLOPS / args.num_gpus
        row["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
    if rank == 0:
        print(json.dumps(row), flush=True)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the usual way ("terminate called ...")


def play(args, side: str, shape: dict) -> dict:
    """Start the trainers of one side. Returns its row; what it says if it fails."""
    port = free_port()
    rest = [*sys.argv[1:], "--side", side, "--shape", json.dumps(shape), "--port", str(port)]
    commands = [[sys.executable, "-W", "ignore", __file__, *rest, "--rank", str(i)] for i in range(args.num_gpus)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    trainers = [subprocess.Popen(command, **pipes, env=env) for command in commands]
    outputs = [trainer.communicate() for trainer in trainers]
    if any(trainer.returncode for trainer in trainers):
        lines = [lines[-1] for _, errors in outputs if (lines := errors.strip().splitlines())]
        return {"failed": lines[0] if lines else "no message"}
    return json.loads(outputs[0][0].splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["Qwen2.5-0.5B"], help=f"of {', '.join(SHAPES)}, or JSON")
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=64, help="of a step, over all trainers")
    parser.add_argument("--tokens", type=int, default=256, help="of a completion")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="sequences at a time")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="layers by torch.compile, on both sides")
    parser.add_argument("--offload-optimizer", action="store_true", help="ours: moments are on the host between steps")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True, help="JSON; rows are added to those already in it")
    for name in ("--side", "--shape"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--port", "--rank"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args)
        return 0
    import torch

    gpus = torch.cuda.device_count()
    name = f"{args.num_gpus} x {torch.cuda.get_device_name()}" if gpus else f"no GPU, {os.cpu_count()} cores"
    report = json.loads(args.output.read_text()) if args.output.exists() else {"commands": [], "rows": []}
    report |= {"hardware": name, "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    report["date"] = datetime.date.today().isoformat()
    report["commands"].append(command_line("benchmarks/bench_fsdp.py", sys.argv[1:]))
    failed = False
    for text in args.shapes:
        for side in args.sides:
            row = play(args, side, SHAPES.get(text) or json.loads(text))
            failed = failed or "failed" in row
            case = {"side": side, "model": text, "gpus": args.num_gpus, "sequences": args.sequences}
            case |= {"tokens": args.tokens, "micro_batch_size": args.micro_batch_size}
            offload = args.offload_optimizer and side == "ours"
            case |= {"checkpointing": args.gradient_checkpointing, "compile": args.compile, "offload": offload}
            report["rows"].append(case | row)
            print(json.dumps(report["rows"][-1]), flush=True)
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
