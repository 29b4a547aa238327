"""Time `Learner.step` alone, on one GPU, with layers as they are and compiled.

    python benchmarks/bench_learner.py --output results/learner-1xh100.json

Random weights of published shapes, random tokens, new lengths at each step where they are uneven. Two steps of each
case are not counted. peak_gib is what torch has taken from the GPU at most, flop_share is 6 x parameters x tokens per
second over the GPU's peak.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from shapes import SHAPES  # noqa: E402
from tables import PEAK_FLOPS  # noqa: E402

from colocate.report import command_line  # noqa: E402

PROMPT_TOKENS = 16
WARM_UP = 2
COMPILED = {"compile": True}
# (model, sequences, completion tokens at most, lengths, counted steps, options of Learner)
CASES = [
    ("Qwen2.5-0.5B", 64, 256, "full", 12, {}),
    ("Qwen2.5-0.5B", 64, 256, "uneven", 12, {}),
    ("Qwen2.5-0.5B", 64, 256, "full", 12, COMPILED),
    ("Qwen2.5-0.5B", 64, 256, "uneven", 12, COMPILED),
    ("Qwen2.5-0.5B", 64, 256, "full", 6, COMPILED | {"gradient_checkpointing": True}),
    ("Qwen2.5-0.5B", 8, 4096, "full", 3, COMPILED),
    ("Qwen2.5-1.5B", 64, 256, "full", 4, COMPILED),
    ("Qwen2.5-3B", 64, 256, "full", 4, {}),
    ("Qwen2.5-3B", 64, 256, "full", 4, COMPILED),
]


def make_samples(
    sequences: int, tokens: int, lengths: str, generator, vocabulary: int = 150_000, logprob: float = -12.0
) -> list[dict]:
    """Sequences of random ids; uneven: completions of 8 tokens to all, evenly spread.

    logprob: the sampler's of each token, about what random weights give each word.
    """
    import torch

    found = []
    for i in range(sequences):
        count = tokens
        if lengths == "uneven":
            count = int(torch.randint(8, tokens + 1, (), generator=generator))
        ids = torch.randint(10, vocabulary, (PROMPT_TOKENS + count,), generator=generator).tolist()
        sample = {"prompt": ids[:PROMPT_TOKENS], "tokens": ids[PROMPT_TOKENS:], "logprobs": [logprob] * count}
        found.append(sample | {"advantage": (-1.0) ** i})
    return found


def make_model(shape: dict, device, dtype):
    """A transformers model of a shape of SHAPES with seeded random weights; on the device, which is quick at that."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from colocate.attention import attention_for

    shape = dict(shape)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    attention = attention_for(config, device, dtype)
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def run_case(name: str, sequences: int, tokens: int, lengths: str, steps: int, extra: dict) -> dict:
    """Time one case. Returns its row; on a lack of GPU memory it says so in place of times."""
    import torch

    from colocate.learner import Learner

    device = torch.device("cuda")
    options = {"learning_rate": 1e-5, "epsilon": 0.2, "kl_coef": 0.0, "offload": False} | extra
    model = make_model(SHAPES[name], device, torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(1)
    seconds = []
    counts = []
    row = {"model": name, "sequences": sequences, "completion_tokens": tokens, "lengths": lengths}
    row |= {"options": extra, "steps": steps}
    try:
        learner = Learner(model, **options)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_UP + steps):
            samples = make_samples(sequences, tokens, lengths, generator)
            total = sum(len(s["tokens"]) for s in samples)
            torch.cuda.synchronize()
            start = time.perf_counter()
            learner.step(samples, total)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            counts.append(total + sequences * PROMPT_TOKENS)
    except torch.OutOfMemoryError:
        return row | {"failed": "out of GPU memory"}
    counted = seconds[WARM_UP:]
    mean = statistics.fmean(counted)
    computed = statistics.fmean(counts[WARM_UP:])
    row |= {"step_s_mean": mean, "step_s_p50": statistics.median(counted), "step_s_max": max(counted)}
    row |= {"first_step_s": seconds[0], "peak_gib": torch.cuda.max_memory_reserved() / 2**30}
    row |= {"tokens_per_s": computed / mean, "flop_share": 6 * parameters * computed / mean / PEAK_FLOPS}
    row |= {"attention": model.config._attn_implementation, "route": str(learner.route)}
    row |= {"tokens_per_micro_batch": learner.tokens_per_micro_batch}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="write rows, hardware, versions, command and date to this file")
    parser.add_argument("--only", default="", help="only models whose name holds this")
    args = parser.parse_args()
    import torch
    import transformers

    rows = []
    for case in CASES:
        if args.only in case[0]:
            rows.append(run_case(*case))
            print(json.dumps(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    if args.output:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["transformers"] = transformers.__version__
        report = {"hardware": f"1 x {torch.cuda.get_device_name()}", "versions": versions}
        command = command_line("benchmarks/bench_learner.py", sys.argv[1:])
        report |= {"date": datetime.date.today().isoformat(), "command": command, "rows": rows}
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
