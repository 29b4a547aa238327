"""Time a push of new weights, in turns on one layout: the recorded copies, the simple way, and the floors of both.

python benchmarks/bench_weight_push.py --shape Qwen2.5-0.5B --num-gpus 1 --tensor-parallel-size 1 --output out.json

Floors: an actor's no-op (one Ray round trip to every engine), a no-op through vLLM's collective_rpc as well, and a
device-to-device copy of as many bytes as the largest shard has. Every push brings fresh values, and every parameter
element is compared bitwise after it. Times are of whole calls as the driver sees them, in milliseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])

from shapes import SHAPES, write_shape  # noqa: E402

import rlhf_colocate as rc  # noqa: E402
import rlhf_utils  # noqa: E402


class BenchWorkerExtension(rlhf_utils.ColocateWorkerExtension):
    """What the floors and the accounts need from the workers."""

    def noop(self) -> None:
        pass

    def used_bytes(self) -> int:
        """Of the GPU, by all processes; 0 on CPU."""
        import torch

        if self.device.type == "cpu":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def device_copy_ms(self, repeats: int) -> float:
        """Median time of a plain copy of up to 1 GiB, scaled to this worker's weights."""
        import torch

        shard = sum(p.nbytes for p in self.get_model().parameters())
        size = min(shard, 2**30)
        a = torch.empty(size, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        median = self._median_ms(functools.partial(b.copy_, a), repeats)
        del a, b
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return median * shard / size

    def replay_ms(self, repeats: int) -> float:
        """Median time of the recorded copies alone."""
        plan = self._plan
        return self._median_ms(plan.graph.replay if plan.graph else lambda: plan._copy(plan.copies), repeats)

    def _median_ms(self, call, repeats: int) -> float:
        """On the GPU between two events, on CPU of the call."""
        import torch

        if self.device.type == "cpu":
            return statistics.median(milliseconds(call, repeats))
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)


class BenchColocation(rc.Colocation):
    worker_extension = "bench_weight_push.BenchWorkerExtension"

    def push_by(self, method: str, step: int) -> dict:
        self.config = dataclasses.replace(self.config, push=method)
        return self.push(step)


def milliseconds(call, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def bench(colocation: BenchColocation, pushes: int, warmup: int, soak: int) -> list[dict]:
    """One row per method. Raises Stop on a push that does not verify."""
    on_engines = colocation.on_engines
    used = max(rc.flatten(on_engines("collective_rpc", "used_bytes")))
    connect = colocation.connect()
    connect_ms = connect["wall_ms"]
    extra = max(rc.flatten(on_engines("collective_rpc", "used_bytes"))) - used
    walls: dict[str, list[float]] = {"simple": [], "recorded": []}
    first, resets, step, checked = {}, [], 0, 0
    for i in range(warmup + pushes):
        for method in walls:
            step += 1
            digests = colocation.train(step)
            push = colocation.push_by(method, step)
            first.setdefault(method, push["wall_ms"])
            results = colocation.on_workers("verify_weights", colocation.handles(), digests)
            for kind in ("transport", "placement"):
                check = rc.check_workers(results, kind)
                if not check["ok"]:
                    raise rc.Stop(f"{method}, push {step}, {kind}: {rc.summary(check['wrong'])}")
            checked = check["checked"]  # of the placement: elements
            if i >= warmup:
                walls[method].append(push["wall_ms"])
                resets.append(push["reset_ms"])
    actor = milliseconds(lambda: on_engines("__ray_ready__"), 100)
    rpc = milliseconds(lambda: on_engines("collective_rpc", "noop"), 100)
    copy = max(rc.flatten(on_engines("collective_rpc", "device_copy_ms", 20)))
    replay = max(rc.flatten(on_engines("collective_rpc", "replay_ms", 20)))
    shard = max(w["bytes"] for w in connect["workers"])
    common = {
        "shard_bytes": shard,
        "device_copy_ms": copy,
        "device_copy_gb_s": 2 * shard / copy / 1e6,
        "noop_rpc_ms": statistics.median(rpc),
        "noop_actor_ms": statistics.median(actor),
        "reset_prefix_cache_ms": statistics.median(resets),
        "elements_verified": checked,
        "verified": True,
    }
    rows = []
    for method, times in walls.items():
        p95 = statistics.quantiles(times, n=20, method="inclusive")[-1]
        row = {"method": method, "wall_ms_p50": statistics.median(times), "wall_ms_p95": p95, **common}
        row["first_push_ms"] = first[method] + (connect_ms if method == "recorded" else 0)
        if method == "recorded":
            row |= {"copy_ms_p50": replay, "copy_gb_s": 2 * shard / replay / 1e6, "extra_gpu_bytes": extra}
            row |= {"copies": sum(w["copies"] for w in connect["workers"]), "loaders": connect["workers"][0]["loaders"]}
        rows.append(row)
    if soak:
        before = max(rc.flatten(on_engines("collective_rpc", "used_bytes")))
        times = milliseconds(lambda: on_engines("collective_rpc", "push_weights", step), soak)
        growth = max(rc.flatten(on_engines("collective_rpc", "used_bytes"))) - before
        rows[-1] |= {"soak_pushes": soak, "soak_gpu_growth_bytes": growth, "soak_wall_ms_p50": statistics.median(times)}
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="opt-small")
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--pushes", type=int, default=30, help="counted pushes per method (default: 30)")
    parser.add_argument("--warmup", type=int, default=3, help="pushes per method before them (default: 3)")
    parser.add_argument("--soak", type=int, default=0, help="recorded pushes in a row afterwards (default: 0)")
    parser.add_argument("--output", required=True, help="JSON; rows are added to those already in it")
    args = parser.parse_args()
    output, report, log = Path(args.output), {}, rc.Log()
    colocation = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends it as Ctrl-C does: nothing stays behind
    with tempfile.TemporaryDirectory(prefix="bench-push-") as scratch:
        model = write_shape(args.shape, Path(scratch) / args.shape)
        config = rc.Config(
            model=str(model),
            load_format="dummy",
            num_gpus=args.num_gpus,
            tensor_parallel_size=args.tensor_parallel_size,
        )
        try:
            colocation = BenchColocation(config, *rc.preflight(config, log, report, Path(scratch)))
            colocation.start_ray()
            colocation.start_actors()
            colocation.start_engines(colocation.on_trainers("report_device_id"))
            rows = bench(colocation, args.pushes, args.warmup, args.soak)
        except rc.Stop as stop:
            print(f"bench_weight_push.py: error: {stop}", file=sys.stderr)
            return stop.code
        except KeyboardInterrupt:
            return rc.INTERRUPTED
        finally:
            if colocation:
                colocation.close()
    layout = {"model": args.shape, "tp": args.tensor_parallel_size, "engines": config.num_engines}
    done = json.loads(output.read_text()) if output.exists() else {"rows": []}
    done |= {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "python": platform.python_version()}
    done |= {"versions": report["versions"], "hardware": report["hardware"]}
    command = ["python benchmarks/bench_weight_push.py", *sys.argv[1:]]
    done.setdefault("commands", []).append(" ".join(Path(c).name if c.endswith(".json") else c for c in command))
    done["rows"] += [layout | row for row in rows]
    output.write_text(json.dumps(done, indent=1) + "\n")
    for row in rows:
        p50, p95 = row["wall_ms_p50"], row["wall_ms_p95"]
        print(
            f"{args.shape} {row['method']:9} wall {p50:.2f} ms (p95 {p95:.2f}), copies {row.get('copy_ms_p50', 0):.2f}"
        )
    first = rows[0]
    print(
        f"floors: actor no-op {first['noop_actor_ms']:.2f} ms, collective_rpc no-op {first['noop_rpc_ms']:.2f} ms, "
        f"device copy {first['device_copy_ms']:.2f} ms"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
