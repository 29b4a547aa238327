"""What a step's rollout costs beside vLLM's own `LLM.generate`, for the same requests, in turns on one engine.

python benchmarks/bench_rollout.py --shape Qwen2.5-0.5B --output results/rollout-1xh100.json --max-tokens 256 \\
    --no-enforce-eager [flags of rlhf_colocate.py]

Ways to generate, each with what the one before it has:
    plain        LLM.generate in the engine's process, plain SamplingParams
    logprobs     with the sampled tokens' log-probabilities, which the loss needs
    flat         these as vLLM's FlatLogprobs, not as an object for each token
    seeds        with a seed for each prompt
    actor        MyLLM.generate in the engine's process: checks, and samples as plain lists
    colocation   Colocation.generate: the driver's call and Ray's transport of the samples

Every completion has --max-tokens tokens (`ignore_eos`). The engine is the loop's own, with the trainers beside it. The
prefix cache is reset before each call, outside of its time. One engine, one call at a time; two rounds are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])

from shapes import SHAPES, write_shape  # noqa: E402

import rlhf_colocate as rc  # noqa: E402
from colocate import cluster  # noqa: E402
from colocate.config import Config  # noqa: E402
from colocate.preflight import preflight  # noqa: E402
from colocate.report import Report, command_line, print_table  # noqa: E402
from colocate.tasks import Task  # noqa: E402

WARM_UP = 2
WAYS = {  # (SamplingParams beside the common ones, whether each prompt has a seed)
    "plain": ({}, False),
    "logprobs": ({"logprobs": 0}, False),
    "flat": ({"logprobs": 0, "flat_logprobs": True}, False),
    "seeds": ({"logprobs": 0, "flat_logprobs": True}, True),
}


# ---------------------------------------------------------------------------------------------------------------------
# In the engine: for `fleet.ask(engines, function, ...)`
# ---------------------------------------------------------------------------------------------------------------------


def reset(engine) -> None:
    engine.cached = True
    engine.reset_prefix_cache()


def generate(engine, way: str, prompts: list[list[int]], seed: int, sampling: dict) -> tuple[float, int]:
    """(seconds, completion tokens) of vLLM's own call."""
    from vllm import SamplingParams

    start = time.perf_counter()
    more, seeded = WAYS[way]
    options = {"detokenize": False} | sampling | more
    params = [SamplingParams(**options, seed=seed + 1000 * i if seeded else None) for i in range(len(prompts))]
    outputs = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return seconds, sum(len(done.token_ids) for output in outputs for done in output.outputs)


def generate_samples(engine, version: int, prompts: list[list[int]], seed: int, sampling: dict) -> tuple[float, int]:
    """The same of ours, in the engine's process."""
    start = time.perf_counter()
    seeds = [seed + 1000 * i for i in range(len(prompts))]
    groups = engine.generate(prompts, version, seeds, **sampling)
    seconds = time.perf_counter() - start
    return seconds, sum(len(sample["tokens"]) for group in groups for sample in group)


def settings(engine) -> dict:
    """What vLLM has chosen, of what matters here."""
    config = engine.llm.llm_engine.vllm_config
    scheduler = config.scheduler_config
    found = {name: getattr(scheduler, name) for name in ("max_num_seqs", "max_num_batched_tokens", "async_scheduling")}
    return found | {"v2_model_runner": bool(getattr(config, "use_v2_model_runner", False))}


# ---------------------------------------------------------------------------------------------------------------------
# In the driver
# ---------------------------------------------------------------------------------------------------------------------


def bench(colocation: rc.Colocation, task: Task, rounds: int) -> list[dict]:
    """One row for each way; the ways take turns."""
    config = colocation.config
    ask = colocation.fleet.ask
    sampling = {"n": config.group_size, "temperature": 1.0, "max_tokens": config.max_tokens, "ignore_eos": True}
    times: dict[str, list[float]] = {}
    counts: set[int] = set()
    for i in range(WARM_UP + rounds):
        if i == WARM_UP:
            times.clear()
        prompts = [p.token_ids for p in task.prompts(i)]
        seed = task.seed(i)
        for way in (*WAYS, "actor", "colocation"):
            ask(colocation.engines, reset)
            if way == "colocation":
                start = time.perf_counter()
                samples = colocation.generate(prompts, seed=seed, **sampling)
                seconds = time.perf_counter() - start
                tokens = sum(len(sample["tokens"]) for sample in samples)
            elif way == "actor":
                rest = (colocation.version, prompts, seed, sampling)
                seconds, tokens = ask(colocation.engines, generate_samples, *rest)[0]
            else:
                seconds, tokens = ask(colocation.engines, generate, way, prompts, seed, sampling)[0]
            times.setdefault(way, []).append(seconds)
            counts.add(tokens)
    (tokens,) = counts  # the same work in each call
    rows = []
    for way, seconds in times.items():
        row = {"way": way, "s_mean": statistics.fmean(seconds), "s_p50": statistics.median(seconds)}
        row["times_plain"] = statistics.median(s / p for s, p in zip(seconds, times["plain"], strict=True))
        row |= {"tokens": tokens, "tokens_per_s": tokens / row["s_p50"], "seconds": [round(s, 4) for s in seconds]}
        rows.append(row)
    return rows


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), default="opt-small", help="without --model (default: opt-small)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds (default: 10)")
    parser.add_argument("--output", required=True, help="write the rows to this JSON file")
    args, flags = parser.parse_known_args()
    one = ["--num-gpus", "1", "--tensor-parallel-size", "1"]
    config = Config.from_args([*one, *flags, "--steps", "1"])  # a loop's engine, which can sleep
    if config.num_engines != 1:
        parser.error("it takes one engine. Try: --num-gpus 1 --tensor-parallel-size 1")
    report = Report(config)
    with report.verdict(), cluster.temporary_folder("bench-") as folder:
        shape = "its own" if config.model else args.shape
        if not config.model:
            model = str(write_shape(args.shape, folder / args.shape))
            config = dataclasses.replace(config, model=model, load_format="dummy")
        config, model = preflight(config, report, folder)
        task = Task(config, model, rc.PROMPTS, rc.reward)
        with rc.Colocation(config, model, report, folder) as colocation:
            with colocation.stage("start"):
                colocation.start_ray()
                colocation.start([*colocation.trainers, *colocation.engines])
            rows = bench(colocation, task, args.rounds)
            chosen = colocation.fleet.ask(colocation.engines, settings)[0]
    if report.exit_code:
        return report.exit_code
    done = {name: report.data[name] for name in ("versions", "hardware", "date", "config")}
    done["command"] = command_line("benchmarks/bench_rollout.py", sys.argv[1:])
    done |= {"shape": shape, "engine": chosen, "rows": rows}
    Path(args.output).write_text(json.dumps(done, indent=1) + "\n")
    header = ["way", "median s", "mean s", "times plain", "tokens/s"]
    numbers = ("s_p50", "s_mean", "times_plain")
    print_table(header, [[r["way"], *(f"{r[n]:.3f}" for n in numbers), f"{r['tokens_per_s']:.0f}"] for r in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
