"""Time a push of new weights, in turns on one layout: our two ways, their peers, and the floors.

python benchmarks/bench_weight_push.py --shape Qwen2.5-0.5B --num-gpus 1 --tensor-parallel-size 1 --output out.json

Methods: simple, recorded, bucket, vllm, vllm-packed (see push_peers.py). Floors: an actor's no-op (one Ray round trip
to every engine), a no-op through vLLM's collective_rpc as well, and a device-to-device copy of as many bytes as the
largest shard has. Each takes its turn after a training step, so all find processes and GPU as idle as the others do.
Every push brings fresh values, and every parameter element is compared bitwise after it. Times are of whole calls as
the driver sees them, in milliseconds.

--soak N: N more recorded pushes. The trainers overwrite all weights as soon as each has answered, while the workers
look for an element of the next values. (What grows over many pushes is for soak.py.)
"""

from __future__ import annotations

import argparse
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

from push_peers import PeerColocation, milliseconds  # noqa: E402
from shapes import SHAPES, write_shape  # noqa: E402

import rlhf_colocate as rc  # noqa: E402


def bench(colocation: PeerColocation, pushes: int, warmup: int) -> list[dict]:
    """One row per method. Raises Stop on a push that does not verify."""
    on_engines, on_workers = colocation.on_engines, colocation.on_workers
    colocation.prepare()
    methods = colocation.methods()
    used = max(on_workers("gpu_used_bytes"))
    connect = colocation.connect()
    extra = max(on_workers("gpu_used_bytes")) - used
    floors = {
        "actor": lambda: on_engines("__ray_ready__"),
        "rpc": lambda: on_workers("noop"),
    }
    times: dict[str, list[float]] = {}  # by method or part, milliseconds
    first, step = {}, 0

    def count(name: str, ms: float, i: int) -> None:
        first.setdefault(name, ms)
        if i >= warmup:
            times.setdefault(name, []).append(ms)

    for i in range(warmup + pushes):
        for name, call in floors.items():
            step += 1
            colocation.on_trainers("perturb", step)
            count(name, milliseconds(call, 1)[0], i)
        for method in methods[i % len(methods) :] + methods[: i % len(methods)]:
            step += 1
            colocation.on_trainers("perturb", step)
            start = time.perf_counter()
            push = colocation.push_by(method, step)
            count(method, push["wall_ms"], i)
            if method == "recorded":
                count("reset", push["reset_ms"], i)
                count("to_workers", 1e3 * (max(w["began"] for w in push["workers"]) - start), i)
                count("copy", max(w["copy_ms"] for w in push["workers"]), i)
            for checked, wrong in on_workers("compare", colocation.handles()):
                if wrong or not checked:
                    raise rc.Stop(f"{method}, push {step}: wrong elements: {rc.summary(wrong)}")
    median = {name: statistics.median(ms) for name, ms in times.items()}
    copy = max(on_workers("device_copy_ms", 20))
    replay = max(on_workers("replay_ms", 20))
    shard = max(w["bytes"] for w in connect["workers"])
    common = {
        "shard_bytes": shard,
        "device_copy_ms": copy,
        "device_copy_gb_s": 2 * shard / copy / 1e6,
        "noop_rpc_ms": median["rpc"],
        "noop_actor_ms": median["actor"],
        "noop_rpc_in_a_row_ms": statistics.median(milliseconds(floors["rpc"], 100)),
        "noop_actor_in_a_row_ms": statistics.median(milliseconds(floors["actor"], 100)),
        "reset_prefix_cache_ms": median["reset"],
        "elements_verified": checked,  # of one worker, after each push
        "verified": True,
    }
    rows = []
    for method in methods:
        p95 = statistics.quantiles(times[method], n=20, method="inclusive")[-1]
        row = {"method": method, "wall_ms_p50": median[method], "wall_ms_p95": p95, "first_push_ms": first[method]}
        row["wall_ms"] = [round(ms, 3) for ms in times[method]]
        if method == "recorded":
            row["first_push_ms"] += connect["wall_ms"]
            row |= {"connect_ms": connect["wall_ms"], "extra_gpu_bytes": extra}
            row |= {f"connect_{k}": max(w[k] for w in connect["workers"]) for k in ("open_ms", "record_ms")}
            row |= {"copy_ms_p50": replay, "copy_gb_s": 2 * shard / replay / 1e6}
            row |= {"to_workers_ms": median["to_workers"], "push_in_worker_ms": median["copy"]}
            row |= {"copies": sum(w["copies"] for w in connect["workers"]), "loaders": connect["workers"][0]["loaders"]}
        rows.append(row | common)
    return rows


def soak(colocation: PeerColocation, pushes: int) -> dict:
    """Pushes in a row, each followed at once by the trainers' next write. Raises Stop if one tears."""
    import ray  # not before start_ray, which sets what Ray reads when it is imported

    times = []
    for i in range(pushes):
        step, value = 1_000_000 + i, float(i % 100 + 1)  # exact in bf16
        if i == 0:
            colocation.on_trainers("fill", value, step)
        times += milliseconds(lambda: colocation.on_workers("push_weights", step), 1)  # noqa: B023
        next_write = [t.fill.remote(float((i + 1) % 100 + 1), step + 1) for t in colocation.trainers]
        if torn := max(colocation.on_workers("torn", value)):
            raise rc.Stop(f"push {i} of the soak: {torn} slices of a worker hold other values than were pushed")
        ray.get(next_write, timeout=colocation.config.timeout)
    return {"soak_pushes": pushes, "soak_wall_ms_p50": statistics.median(times)}


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
            steps=0,
            num_gpus=args.num_gpus,
            tensor_parallel_size=args.tensor_parallel_size,
        )
        try:
            colocation = PeerColocation(*rc.preflight(config, log, report, Path(scratch)))
            colocation.start_ray()
            colocation.start_actors()
            colocation.start_engines(colocation.on_trainers("report_device_id"))
            rows = bench(colocation, args.pushes, args.warmup)
            if args.soak:
                next(r for r in rows if r["method"] == "recorded").update(soak(colocation, args.soak))
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
        print(f"{args.shape} {row['method']:11} wall {p50:.2f} ms (p95 {p95:.2f}), first {row['first_push_ms']:.1f}")
        if row["method"] == "recorded":
            print(f"    { ({k: v for k, v in row.items() if k not in ('model', 'method')}) }")
    return 0


if __name__ == "__main__":
    sys.exit(main())
