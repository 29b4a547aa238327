"""Does anything grow? Many pushes and many steps of the RLHF loop, with what all processes hold sampled after each.

Before them come as many calls that do nothing, `collective_rpc("check_health")`: what grows with these is vLLM's and
Ray's own.

python benchmarks/soak.py --pushes 1000 --loop-steps 50 --output results/soak.json --num-gpus 2 [flags of the script]

Samples: resident memory, file descriptors and threads of the driver and of all trainers, engines and workers, by kind;
GPU memory in use on all GPUs; bytes of their files in /dev/shm. Reported for each: its slope per push or per step, with
the 95 % confidence interval. The slope is the least-squares line through the means of ten equal batches, which are far
enough apart to be taken as independent (batch means; t-distribution with 8 degrees of freedom). The first tenth of the
pushes and of the steps is warm-up: pools and caches grow to their size.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rlhf_colocate as rc  # noqa: E402
from colocate import checks, cluster  # noqa: E402
from colocate.config import Config  # noqa: E402
from colocate.preflight import preflight  # noqa: E402
from colocate.report import Report, command_line, print_table  # noqa: E402
from colocate.tasks import Task  # noqa: E402

BATCHES = 10
T_975 = 2.306  # t-distribution, 8 degrees of freedom


class Sampled(rc.Colocation):
    """A layout that samples what its processes hold, after each push and when told: as often as `begin` says."""

    taken = count = 0

    def begin(self, count: int) -> None:
        """Forget the samples, and make room for this many: what keeps them must not grow."""
        self.samples: dict[str, array.array] = {}
        self.count = count
        self.taken = 0

    def held(self) -> dict[str, float]:
        """{what: how much now}."""
        import psutil

        found: dict[str, float] = {}
        processes = [("driver", psutil.Process())]
        for member in self.fleet.watch.members:
            kind = "worker" if "rank" in member.role else member.name.split()[0]
            processes.append((kind, member.process))
        for kind, process in processes:
            with process.oneshot():
                numbers = (process.memory_info().rss, process.num_fds(), process.num_threads())
            for unit, number in zip(("resident bytes", "file descriptors", "threads"), numbers, strict=True):
                found[f"{kind} {unit}"] = found.get(f"{kind} {unit}", 0) + number
        used = self.on_workers("gpu_used_bytes")
        return found | {"GPU bytes": sum(used), "/dev/shm bytes": self.shared_memory_bytes()}

    def shared_memory_bytes(self) -> int:
        """Of all files in /dev/shm that the layout's processes have, or had, mapped: other programs use it, too."""
        watch = self.fleet.watch
        watch.note_files()
        total = 0
        for name in set().union(*watch.files.values()):
            with contextlib.suppress(FileNotFoundError):
                total += 512 * os.stat(f"/dev/shm/{name}").st_blocks
        return total

    def sample(self) -> None:
        if self.taken == self.count:
            return
        for name, number in self.held().items():
            self.samples.setdefault(name, array.array("d", [0.0]) * self.count)[self.taken] = number
        self.taken += 1

    def push(self) -> dict:
        push = super().push()
        self.sample()
        return push

    def slopes(self) -> dict[str, dict]:
        """Of all samples but the first tenth."""
        return {name: slope(list(values[self.count // 10 : self.taken])) for name, values in self.samples.items()}


def slope(values: list[float]) -> dict:
    """Growth per sample with its 95 % confidence interval, and the batches' means (see above)."""
    size = len(values) // BATCHES
    values = values[len(values) - BATCHES * size :]
    means = [statistics.fmean(values[i * size : (i + 1) * size]) for i in range(BATCHES)]
    x = [size * (i + 0.5) for i in range(BATCHES)]
    line = statistics.linear_regression(x, means)
    residuals = [m - line.slope * at - line.intercept for at, m in zip(x, means, strict=True)]
    spread = sum((at - statistics.fmean(x)) ** 2 for at in x)
    margin = T_975 * math.sqrt(sum(r * r for r in residuals) / (BATCHES - 2) / spread)
    found = {"slope": line.slope, "low": line.slope - margin, "high": line.slope + margin}
    return found | {"means": [round(m) for m in means], "last": values[-1]}


def soak(colocation: Sampled, task: Task, pushes: int) -> dict[str, dict]:
    """{"calls", "pushes", "steps": {"count", "seconds", "slopes"}}."""
    steps = colocation.config.steps
    done = {}

    @contextlib.contextmanager
    def soaked(kind: str, count: int, samples: int):
        """Sample what is done within, and add it to what is done."""
        colocation.report("soak", f"{count} {kind}")
        colocation.begin(samples)
        start = time.perf_counter()
        yield
        done[kind] = {"count": count, "seconds": time.perf_counter() - start, "slopes": colocation.slopes()}

    with soaked("calls", pushes, pushes):
        for _ in range(pushes):
            colocation.on_workers("check_health")
            colocation.sample()
    with soaked("pushes", pushes, pushes):
        for _ in range(pushes):
            colocation.change_weights(checks.perturb)
            colocation.push()
    before = rc.every_engine_answers(colocation, task)
    with soaked("steps", steps, steps + 1):  # the loop begins with a push, and ends with one
        rc.learn(colocation, task, before)
    return done


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--pushes", type=int, default=200, help="pushes in a row, before the loop (default: 200)")
    parser.add_argument("--loop-steps", type=int, default=20, help="steps of the RLHF loop (default: 20)")
    parser.add_argument("--output", required=True, help="write the slopes to this JSON file")
    args, flags = parser.parse_known_args()
    if args.pushes - args.pushes // 10 < BATCHES or args.loop_steps < BATCHES:
        counts = f"--pushes {args.pushes} --loop-steps {args.loop_steps}"
        parser.error(f"{counts} are too few for a slope. Try: --pushes {BATCHES + 1} --loop-steps {BATCHES}, or more")
    config = Config.from_args([*flags, "--steps", str(args.loop_steps), "--max-restarts", "0"])
    report = Report(config)
    with report.verdict(), cluster.temporary_folder("soak-") as folder:
        config, model = preflight(config, report, folder)
        task = Task(config, model, rc.PROMPTS, rc.reward)
        with Sampled(config, model, report, folder) as colocation:
            with colocation.stage("start"):
                colocation.start_ray()
                colocation.start([*colocation.trainers, *colocation.engines])
            done = soak(colocation, task, args.pushes)
    if report.exit_code:
        return report.exit_code
    result = {name: report.data[name] for name in ("versions", "hardware", "date")}
    result["command"] = command_line("benchmarks/soak.py", sys.argv[1:])
    result["layout"] = {"trainers": config.num_gpus, "engines": config.num_engines, "tp": config.tensor_parallel_size}
    Path(args.output).write_text(json.dumps(result | done, indent=1) + "\n")
    for kind, one in done.items():
        rows = []
        for what, s in one["slopes"].items():
            rows.append([what, *(f"{s[n]:.3g}" for n in ("slope", "low", "high")), f"{s['last']:.0f}"])
        print_table([kind, "slope", "95 % from", "to", "at the end"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
