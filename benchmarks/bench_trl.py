"""Time an RLHF step of rlhf_colocate.py beside one of TRL's GRPOTrainer in vLLM's colocate mode, on the same GPUs.

    pip install trl==1.16.0
    python benchmarks/bench_trl.py --output results/trl-1xh100.json

The same vLLM, model (random weights of a published shape), prompts, group, lengths, dtypes, optimizer and reward. Runs
take turns: ours, TRL, ours, TRL. Each is a process of its own with both kinds of lengths, one after the other: `full`,
all completions have --max-tokens; `uneven`, they end at fixed lengths, new ones at each step, the same on both sides.
The first two steps of each kind are not counted. What is timed: trl_sides.py. Runs that --only can name:

    ours          micro-batches packed by tokens, its default         ours-same     micro-batches as TRL's
    trl-fp32      float32 weights and bfloat16 autocast, its default  trl-bf16      bfloat16 weights
    trl-fp32-off  without its correction of the sampler's             trl-bf16-off
                  log-probabilities, which takes a forward pass

After each run its rows are added to --output: means over the counted steps, in seconds; peak_gib is what the fullest
GPU had in use at most in all these steps, by all processes; start_s from the command to the first step, ours with the
proof of the push; caches is "warm" if an earlier run of the side has filled its cache of compiled code.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import trl_sides  # noqa: E402
from shapes import SHAPES  # noqa: E402
from trl_sides import GROUP_SIZE, PROMPTS, WARM_UP, Settings  # noqa: E402

from colocate.model_folder import read_shapes  # noqa: E402
from colocate.preflight import find_gpus  # noqa: E402
from colocate.report import command_line  # noqa: E402

STARTED = time.time()
KINDS = {  # what --only names: fields of Settings
    "ours": {"micro_batch_size": None},
    "ours-same": {},
    "trl-fp32": {},
    "trl-fp32-off": {"correction": False},
    "trl-bf16": {"weights": "bfloat16"},
    "trl-bf16-off": {"weights": "bfloat16", "correction": False},
}
SAMPLE_S = 0.2
# Of a run whose side has not run yet, for --limit-s: the start with cold caches, and each step.
START_S = 110
STEP_S = 4


class GpuMemory(threading.Thread):
    """Reads from NVML what the fullest GPU has in use, every 0.2 s. Without NVML it reads nothing."""

    def __init__(self):
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float]] = []  # (seconds since the epoch, GiB)
        self.handles: list[ctypes.c_void_p] = []
        try:
            self.nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        count = ctypes.c_uint()
        if self.nvml.nvmlInit_v2() or self.nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return
        for i in range(count.value):
            handle = ctypes.c_void_p()
            if not self.nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(handle)):
                self.handles.append(handle)

    def used(self) -> float | None:
        """GiB, or None."""
        found = []
        for handle in self.handles:
            memory = (ctypes.c_ulonglong * 3)()  # total, free, used
            if not self.nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
                found.append(memory[2] / 2**30)
        return max(found, default=None)

    def run(self) -> None:
        while self.handles:
            used = self.used()
            if used is not None:
                self.samples.append((time.time(), used))
            time.sleep(SAMPLE_S)

    def peak(self, begin: float, end: float) -> float | None:
        return max((gib for at, gib in self.samples if begin <= at <= end), default=None)

    def settle(self, before: float | None) -> None:
        """Wait until no more memory is in use than before a run; for 20 s at most."""
        deadline = time.monotonic() + 20
        while before is not None and (self.used() or 0) > before + 0.5 and time.monotonic() < deadline:
            time.sleep(SAMPLE_S)


def command_of(kind: str, settings: Settings) -> list[str]:
    """The command line of a side's process. TRL has one process for each GPU, which torch's launcher starts."""
    side = kind.partition("-")[0]
    launcher = [sys.executable]
    if side == "trl" and settings.num_gpus > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(settings.num_gpus)]
    return [*launcher, str(ROOT / "benchmarks/trl_sides.py"), side, json.dumps(dataclasses.asdict(settings))]


def environment(side: str, caches: Path, trl_path: str | None) -> dict[str, str]:
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    if side == "trl" and trl_path:
        env["PYTHONPATH"] = os.pathsep.join([*filter(None, [env.get("PYTHONPATH")]), trl_path])
    return env


def run(command: list[str], env: dict[str, str], log: Path, seconds: float) -> str:
    """Run a side. Returns what went wrong with it, or nothing."""
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
            return f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            return f"not ended after {seconds:.0f} s"
        finally:
            if process.poll() is None:  # also after Ctrl-C, which a process group of its own does not hear
                process.send_signal(signal.SIGINT)  # ours takes its actors down
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def rows_of(report: dict, kind: str, settings: Settings, memory: GpuMemory) -> list[dict]:
    """A row for each kind of lengths. report: what a side wrote."""
    side, _, variant = kind.partition("-")
    paths = Path(settings.model).glob("*.safetensors")
    shapes = [shape for path in paths for shape in read_shapes(path).values()]
    each = WARM_UP + settings.steps
    rows = []
    for number, lengths in enumerate(settings.lengths):
        steps = report["steps"][number * each :][:each]
        counted = steps[WARM_UP:]
        walls = [step["step_s"] for step in counted]
        row = {"model": settings.shape, "gpus": settings.num_gpus, "tp": settings.tensor_parallel_size}
        row |= {"lengths": lengths, "side": side, "variant": variant or "default"}
        row |= {"step_s_mean": statistics.fmean(walls), "step_s_p50": statistics.median(walls)}
        row["step_s_max"] = max(walls)
        for part in ("rollout_s", "handover_s", "train_s", "score_s", "rest_s"):
            row[part] = statistics.fmean(step[part] for step in counted)
        row["peak_gib"] = memory.peak(steps[0]["begun"], steps[-1]["begun"] + steps[-1]["step_s"])
        row["start_s"] = report["steps"][0]["begun"] - settings.began
        tokens = [step["tokens"] for step in counted]
        row["tokens_per_s"] = sum(tokens) / sum(step["rollout_s"] for step in counted)  # of the rollout
        row |= {"steps": settings.steps, "tokens": statistics.fmean(tokens)}
        row["prompt_tokens"] = GROUP_SIZE * sum(map(len, PROMPTS))  # a token for each byte
        row["parameters"] = sum(map(math.prod, shapes))
        row["reward"] = [step["reward"] for step in steps]
        names = ("sleep", "micro_batch_size", "gpu_memory_utilization", "learning_rate", "seed")
        row |= {name: getattr(settings, name) for name in names}
        rows.append({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
        rows[-1]["learning_rate"] = settings.learning_rate
    return rows


def merge(output: Path, rows: list[dict], about: dict) -> None:
    """Add rows to those in the file. about: "hardware", "versions", "date", "command", of the newest rows."""
    done = json.loads(output.read_text()) if output.exists() else {"rows": []}
    own = {name: about[name] for name in ("hardware", "date", "command")}
    versions = done.get("versions", {}) | about["versions"]  # each side has packages that the other has not
    done = about | {"versions": versions, "rows": done["rows"] + [row | own for row in rows]}
    output.write_text(json.dumps(done, indent=1) + "\n")


def about(num_gpus: int, versions: dict[str, str]) -> dict:
    """What a file says beside its rows."""
    gpus = find_gpus()[:num_gpus]
    hardware = f"{num_gpus} x {gpus[0]['name']}" if gpus else f"no GPU, {os.cpu_count()} cores"
    command = command_line("benchmarks/bench_trl.py", sys.argv[1:])
    return {"hardware": hardware, "versions": versions, "date": f"{datetime.date.today()}", "command": command}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON; rows are added to those already in it")
    parser.add_argument("--only", nargs="+", choices=tuple(KINDS), default=["ours", "trl-fp32", "trl-bf16"])
    parser.add_argument("--repeats", type=int, default=2, help="times that each of them runs (default: 2)")
    parser.add_argument("--lengths", nargs="+", choices=("full", "uneven"), default=["full", "uneven"])
    parser.add_argument("--steps", type=int, default=10, help="counted steps of each kind of lengths (default: 10)")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="Qwen2.5-0.5B")
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--no-sleep", action="store_true", help="engines stay awake while trainers train")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a completion (default: 256)")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="TRL's, and ours-same's (default: 8)")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.4, help="the engines' (default: 0.4)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="default: 1e-5; for reward curves, 2.8e-3")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights, too (default: 0)")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="start no run that would not end by then")
    parser.add_argument("--trl-path", help="folder with trl and what it needs, if they are not installed")
    parser.add_argument("--folder", default="/tmp/bench-trl", help="for models, caches, logs (default: /tmp/bench-trl)")
    args = parser.parse_args(argv)
    n = args.num_gpus
    if args.steps < 1 or args.repeats < 1 or n < 1 or args.tensor_parallel_size < 1:
        parser.error("--steps, --repeats, --num-gpus and --tensor-parallel-size must be at least 1")
    if n % args.tensor_parallel_size:
        parser.error(f"--tensor-parallel-size {args.tensor_parallel_size} does not divide {n} GPUs. Try: 1")
    completions = GROUP_SIZE * len(PROMPTS)
    if args.micro_batch_size < 1 or completions % (args.micro_batch_size * n):
        found = f"--micro-batch-size {args.micro_batch_size} on {n} GPUs does not divide {completions} completions"
        parser.error(f"{found}. Try: --micro-batch-size 8 on 1, 2, 4 or 8 GPUs")
    return args


def settings_of(args: argparse.Namespace, kind: str, model: Path, output: Path) -> Settings:
    """Of one run that begins now. output: what the side writes."""
    names = {field.name for field in dataclasses.fields(Settings)} & set(vars(args))
    fields = {name: getattr(args, name) for name in names}
    fields |= {"lengths": tuple(args.lengths), "sleep": not args.no_sleep, **KINDS[kind]}
    fields |= {"model": str(model), "output": str(output), "began": time.time()}
    return Settings(**fields)


def require_trl(path: str | None) -> None:
    """End with exit code 3 if TRL is not where its side will look for it."""
    if (Path(path) / "trl").is_dir() if path else importlib.util.find_spec("trl"):
        return
    where = f"in {path}" if path else "installed"
    print(f"bench_trl.py: error: TRL is not {where}. Try: pip install trl==1.16.0, or --only ours", file=sys.stderr)
    sys.exit(3)


def make_model(args: argparse.Namespace, folder: Path) -> Path:
    """The folder of the model, which is written unless an earlier call has done it."""
    model = folder / f"{args.shape}-seed{args.seed}"
    done = folder / f"{args.shape}-seed{args.seed}.done"
    if not done.exists():
        settings = settings_of(args, "ours", model, done)
        command = [sys.executable, trl_sides.__file__, "model", json.dumps(dataclasses.asdict(settings))]
        subprocess.run(command, check=True)
        done.touch()
    return model


def tail(log: Path) -> str:
    """The last lines of a log, and errors from before them."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines[:-15] if re.search(r"\bError\b|Error:", line)]
    return "\n".join(f"    {line[:300]}" for line in [*errors[-5:], *lines[-15:]])


def describe(row: dict) -> str:
    names = ("rollout", "handover", "score", "train", "rest")
    parts = ", ".join(f"{name} {row[f'{name}_s']:.3f}" for name in names)
    peak = f", peak {row['peak_gib']:.1f} GiB" if row["peak_gib"] else ""
    times = f"step {row['step_s_mean']:.3f} s (median {row['step_s_p50']:.3f}, at most {row['step_s_max']:.3f})"
    return f"{times}: {parts}{peak}, {row['tokens_per_s']:.0f} tokens/s, start {row['start_s']:.0f} s"


def main() -> int:
    args = parse()
    if any(kind.startswith("trl") for kind in args.only):
        require_trl(args.trl_path)
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(args, folder)
    memory = GpuMemory()
    memory.start()
    longest: dict[str, float] = {}  # seconds that a run of this side has taken
    failed = False
    for number, kind in enumerate([kind for _ in range(args.repeats) for kind in args.only]):
        side = kind.partition("-")[0]
        settings = settings_of(args, kind, model, folder / f"{number}-{kind}.json")
        left = args.limit_s - (settings.began - STARTED)
        need = longest.get(side, START_S + STEP_S * settings.all_steps)
        if left < need:
            print(f"{kind}: left out: it may need {need:.0f} s, and --limit-s leaves {left:.0f}", flush=True)
            continue
        caches = folder / f"cache-{side}-{args.shape}-tp{args.tensor_parallel_size}"
        temperature = "warm" if caches.exists() else "cold"
        caches.mkdir(exist_ok=True)
        before = memory.used()
        log = folder / f"{number}-{kind}.log"
        problem = run(command_of(kind, settings), environment(side, caches, args.trl_path), log, min(left, 3600))
        took = time.time() - settings.began
        if problem:
            failed = True
            print(f"{kind}: {problem}, after {took:.0f} s. The end of {log}:\n{tail(log)}", flush=True)
        else:
            longest[side] = max(took, longest.get(side, 0))
            report = json.loads(Path(settings.output).read_text())
            rows = [row | {"caches": temperature} for row in rows_of(report, kind, settings, memory)]
            merge(Path(args.output), rows, about(args.num_gpus, report["versions"]))
            for row in rows:
                print(f"{kind}, {row['lengths']}: {describe(row)}", flush=True)
        memory.settle(before)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
