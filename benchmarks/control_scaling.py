"""How the control of a layout grows with its GPUs: real Ray, stub actors that hold nothing, logical GPUs.

python benchmarks/control_scaling.py [GPUS ...] --output results/control-scaling.json     (default: 8 16 32 64)

Of each layout, with engines of TP=2: seconds of the placement and of the actors' start; milliseconds of one call to all
engines by `Fleet.ask` and by Ray alone, in turns, of the watch's round over all processes, and of a recovery without
the start of what was lost. beyond_ray_ms: the median of the pairs' differences, between its quartiles, in CPU time of
the driver's thread, since processes that share cores blur the time on the clock. The lines that are fitted say how each
grows with the number of engines, GPUs or processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from colocate.config import Config, Lost  # noqa: E402
from colocate.fleet import Fleet  # noqa: E402
from colocate.preflight import installed  # noqa: E402
from colocate.report import Report  # noqa: E402

TP = 2
CALLS = 100


class Stub:
    """An engine or a trainer, seen from the driver."""

    def report_device_id(self) -> dict:
        return {"pid": os.getpid(), "gpu": ""}

    def push(self, version: int, handles: dict | None = None) -> dict:
        """What MyLLM.push returns, for two workers."""
        return {"workers": [{"version": version, "bytes": 0}] * TP, "wake_ms": 0, "reset_ms": 0, "wake_kv_ms": 0}


def milliseconds(*functions: Callable[[], object], times: int = CALLS) -> list[list[tuple[float, float]]]:
    """So many calls of each, in turns: (on the clock, of this thread's CPU)."""
    found: list[list[tuple[float, float]]] = [[] for _ in functions]
    for _ in range(times):
        for function, each in zip(functions, found, strict=True):
            start = time.perf_counter(), time.thread_time()
            function()
            each.append((1e3 * (time.perf_counter() - start[0]), 1e3 * (time.thread_time() - start[1])))
    return found


def on_the_clock(calls: list[tuple[float, float]]) -> float:
    return statistics.median(wall for wall, _ in calls)


def measure(gpus: int) -> dict:
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    engines = [f"engine {e}" for e in range(gpus // TP)]
    trainers = [f"trainer {t}" for t in range(gpus)]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"include_dashboard": False, "object_store_memory": 128 * 2**20, "log_to_driver": False}
    ray.init("local", num_gpus=gpus, num_cpus=2, runtime_env={"env_vars": env}, logging_level="error", **options)
    try:
        start = time.perf_counter()
        group = placement_group([{"GPU": 1}] * gpus, strategy="STRICT_PACK")
        group.wait(60)
        placed = time.perf_counter() - start
        fleet = Fleet(Report(Config(), []), {}, 600)

        def new_actor(name: str):
            kind, number = name.split()
            bundle = int(number) * (TP if kind == "engine" else 1)
            where = PlacementGroupSchedulingStrategy(group, bundle)
            return ray.remote(Stub).options(num_cpus=0, num_gpus=0.4, scheduling_strategy=where).remote()

        start = time.perf_counter()
        for name in [*engines, *trainers]:
            fleet.add(name, new_actor(name))
        everyone = [*fleet.actors]
        fleet.note(everyone, fleet.ask(everyone, "report_device_id"))
        started = time.perf_counter() - start
        call = ("push", 1, None)
        actors = [fleet.actors[name] for name in engines]
        alone = lambda: ray.get([actor.push.remote(*call[1:]) for actor in actors])  # noqa: E731
        bare, asked = milliseconds(alone, lambda: fleet.ask(engines, *call))
        pairs = zip(bare, asked, strict=True)
        low, beyond, high = statistics.quantiles([ours - rays for (_, rays), (_, ours) in pairs], n=4)
        (watched,) = milliseconds(fleet.watch.ended, times=20)
        os.kill(fleet.reports[engines[-1]][0]["pid"], 9)
        start = time.perf_counter()
        try:
            while True:
                fleet.ask(everyone, "report_device_id")
        except Lost as lost:
            noticed = time.perf_counter() - start
            with fleet.stage("recover"):
                gone = fleet.find_all_lost(lost)
                fleet.end(gone)
        recovered = time.perf_counter() - start
        row = {"gpus": gpus, "engines": len(engines), "processes": len(everyone), "placement_s": placed}
        row |= {"start_s": started, "bare_call_ms": on_the_clock(bare), "ask_ms": on_the_clock(asked)}
        row |= {"beyond_ray_ms": beyond, "beyond_ray_quartiles": [low, high], "watch_ms": on_the_clock(watched)}
        return row | {"noticed_s": noticed, "recovery_s": recovered, "lost": sorted(gone)}
    finally:
        ray.shutdown()


def fit(rows: list[dict], x: str, y: str) -> dict:
    """The least-squares line y = constant + slope * x."""
    line = statistics.linear_regression([row[x] for row in rows], [row[y] for row in rows])
    return {"x": x, "y": y, "constant": line.intercept, "slope": line.slope}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpus", nargs="*", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--output")
    args = parser.parse_args()
    rows = []
    for gpus in args.gpus:
        rows.append(measure(gpus))
        print(json.dumps(rows[-1]), flush=True)
    pairs = [("gpus", "placement_s"), ("engines", "bare_call_ms"), ("engines", "ask_ms"), ("engines", "beyond_ray_ms")]
    pairs += [("processes", "watch_ms"), ("processes", "recovery_s")]
    fits = [fit(rows, *pair) for pair in pairs] if len(rows) > 1 else []
    for one in fits:
        print(f"{one['y']} = {one['constant']:.4f} + {one['slope']:.6f} per {one['x']}")
    report = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "rows": rows, "fits": fits}
    report |= {"versions": installed("ray"), "hardware": {"gpus": [], "cpu_cores": os.cpu_count()}}
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
