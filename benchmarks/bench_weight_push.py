"""Time a push of new weights, in turns on one layout: our two ways, their peers, and the floors.

python benchmarks/bench_weight_push.py --shape Qwen2.5-0.5B --num-gpus 1 --tensor-parallel-size 1 --output out.json

Methods: simple, recorded, bucket, vllm, vllm-packed (see push_peers.py). Floors: an actor's no-op (one Ray round trip
to every engine), a no-op through vLLM's collective_rpc as well, a push of nothing (the same messages as a push's), and
a device-to-device copy of as many bytes as the largest shard has. Each takes its turn after a change of all weights, so
all find processes and GPU as idle as the others do. Every push brings fresh values, and every parameter element is
compared bitwise after it. Times are of whole calls as the driver sees them, in milliseconds; the reset of the prefix
cache is a number of its own.

With --trainer fsdp the push is out of shards. It has a second floor then: what lies on other GPUs, at the rate of a
plain copy over NVLink. With --push gather, beside it, the trainers gather the weights for each push anew: the times
have that in them. The peers want all weights at once: they take part with a --bucket-mb that holds them.

--soak N: N more recorded pushes. The trainers overwrite all weights as soon as each has answered, while the workers
look for an element of the next values. (What grows over many pushes is for soak.py.)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])

import push_peers  # noqa: E402
from push_peers import PeerColocation, milliseconds  # noqa: E402
from shapes import SHAPES, write_shape  # noqa: E402
from tables import METHODS, layout  # noqa: E402

from colocate import checks, cluster  # noqa: E402
from colocate.config import Config, Stop  # noqa: E402
from colocate.preflight import preflight  # noqa: E402
from colocate.report import Report, command_line, summary  # noqa: E402


def bench(colocation: PeerColocation, pushes: int, warmup: int, only: list[str]) -> list[dict]:
    """One row per method. Raises Stop on a push that does not verify."""
    on_workers = colocation.on_workers
    methods = [method for method in colocation.prepare() if method in {*only, "recorded"}]
    connect = colocation.report.data["connect"]
    floors = {
        "actor": lambda: colocation.fleet.ask(colocation.engines, "__ray_ready__"),
        "rpc": lambda: on_workers("push_peers:noop"),
    }
    times: dict[str, list[float]] = {}  # by method or part, milliseconds
    first: dict[str, float] = {}

    def count(name: str, ms: float) -> None:
        first.setdefault(name, ms)
        times.setdefault(name, []).append(ms)

    for i in range(warmup + pushes):
        if i == warmup:
            times.clear()
        for name, call in floors.items():
            colocation.change_weights(checks.perturb)
            count(name, milliseconds(call, 1)[0])
        colocation.change_weights(checks.perturb)
        count("nothing", colocation.push_nothing_ms())
        for method in methods[i % len(methods) :] + methods[: i % len(methods)]:
            colocation.change_weights(checks.perturb)
            colocation.compare_replicas()
            push = colocation.push_by(method)
            count(method, push["wall_ms"])
            if method == "recorded":
                count("reset", push["reset_ms"])
                count("in_worker", max(w["copy_ms"] for w in push["workers"]))
            elements = compare(colocation, method)
    median = {name: statistics.median(ms) for name, ms in times.items()}
    copy = max(on_workers("push_peers:device_copy_ms", 20))
    replay = max(on_workers("push_peers:replay_ms", 20))
    shard = max(w["bytes"] for w in connect["workers"])
    common = {
        "shard_bytes": shard,
        "device_copy_ms": copy,
        "device_copy_gb_s": 2 * shard / copy / 1e6,
        "noop_rpc_ms": median["rpc"],
        "noop_actor_ms": median["actor"],
        "noop_push_ms": median["nothing"],
        "noop_rpc_in_a_row_ms": statistics.median(milliseconds(floors["rpc"], 100)),
        "noop_actor_in_a_row_ms": statistics.median(milliseconds(floors["actor"], 100)),
        "noop_push_in_a_row_ms": statistics.median(colocation.push_nothing_ms() for _ in range(100)),
        "reset_prefix_cache_ms": median["reset"],
        "elements_verified": elements,  # of one worker, after each push
        "verified": True,
    }
    rows = []
    for method in methods:
        p95 = statistics.quantiles(times[method], n=20, method="inclusive")[-1]
        row = {"method": method, "wall_ms_p50": median[method], "wall_ms_p95": p95, "first_push_ms": first[method]}
        row["wall_ms"] = [round(ms, 3) for ms in times[method]]
        if method == "recorded":
            row["first_push_ms"] += connect["wall_ms"]
            if colocation.config.trainer == "fsdp":
                row |= {"local_floor_ms": copy, "nvlink_floor_ms": max(on_workers("push_peers:peer_copy_ms", 20))}
                row |= {"copy_ms": replay, "extra_mib": colocation.extra_gpu_bytes / 2**20}
                row |= {"remote_bytes": max(w["remote_bytes"] for w in connect["workers"])}
            row |= {"connect_ms": connect["wall_ms"], "extra_gpu_bytes": colocation.extra_gpu_bytes}
            row |= {f"connect_{k}": max(w[k] for w in connect["workers"]) for k in ("open_ms", "record_ms")}
            row |= {"copy_ms_p50": replay, "copy_gb_s": 2 * shard / replay / 1e6}
            row |= {"push_in_worker_ms": median["in_worker"]}
            row |= {"copies": sum(w["copies"] for w in connect["workers"]), "loaders": connect["workers"][0]["loaders"]}
        rows.append(row | common)
    return rows


def compare(colocation: PeerColocation, method: str) -> int:
    """Compare every element with the trainers'. Returns how many of one worker. Raises Stop if one is wrong."""
    found = colocation.compare()
    for kind in checks.COMPARED:
        check = checks.combine(found, kind)
        if not check["ok"]:
            raise Stop(f"{method}, version {colocation.version}: {kind}: {summary(check['wrong'])}")
    return found[-1]["placement"]["checked"]


def soak(colocation: PeerColocation, pushes: int) -> dict:
    """Pushes in a row, each followed at once by the trainers' next write. Raises Stop if one tears."""
    import ray  # not before start_ray, which sets what Ray reads when it is imported

    trainers = [colocation.fleet.actors[name] for name in colocation.trainers]

    def write(value: float) -> list:
        colocation.version = next(colocation.versions)
        return [t.__ray_call__.remote(push_peers.fill, value, colocation.version) for t in trainers]

    values = [float(i % 100 + 1) for i in range(pushes + 1)]  # exact in bf16
    ray.get(write(values[0]), timeout=colocation.config.timeout)
    times = []
    for i in range(pushes):
        times += milliseconds(lambda: colocation.on_workers("push_weights", colocation.version), 1)
        writing = write(values[i + 1])
        if torn := max(colocation.on_workers("push_peers:torn", values[i])):
            raise Stop(f"push {i} of the soak: {torn} slices of a worker hold other values than were pushed")
        ray.get(writing, timeout=colocation.config.timeout)
    return {"soak_pushes": pushes, "soak_wall_ms_p50": statistics.median(times)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="opt-small")
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--trainer", choices=("replicated", "fsdp"), default="replicated")
    parser.add_argument("--shard-size", type=int, help="with --trainer fsdp")
    parser.add_argument("--push", choices=("recorded", "gather"), default="recorded", help="gather: of shards")
    parser.add_argument("--bucket-mb", type=int, default=256, help="with --push gather (default: 256)")
    parser.add_argument("--pushes", type=int, default=30, help="counted pushes per method (default: 30)")
    parser.add_argument("--warmup", type=int, default=3, help="pushes per method before them (default: 3)")
    every = tuple(METHODS)
    text = "beside recorded; default: all that run"
    parser.add_argument("--methods", nargs="+", choices=every, default=every, help=text)
    parser.add_argument("--soak", type=int, default=0, help="recorded pushes in a row afterwards (default: 0)")
    parser.add_argument("--output", required=True, help="JSON; rows are added to those already in it")
    args = parser.parse_args()
    if args.soak and args.trainer == "fsdp":
        parser.error("--soak is for --trainer replicated")
    counts = {"num_gpus": args.num_gpus, "tensor_parallel_size": args.tensor_parallel_size}
    sharding = {"trainer": args.trainer, "shard_size": args.shard_size, "push": args.push}
    sharding["bucket_mb"] = args.bucket_mb
    config = Config(load_format="dummy", steps=0, **counts, **sharding)
    report = Report(config)
    with report.verdict(), cluster.temporary_folder("bench-") as folder:
        shape = write_shape(args.shape, folder / args.shape)
        config, model = preflight(dataclasses.replace(config, model=str(shape)), report, folder)
        with PeerColocation(config, model, report, folder) as colocation:
            with colocation.stage("start"):
                colocation.start_ray()
                colocation.start([*colocation.trainers, *colocation.engines])
            rows = bench(colocation, args.pushes, args.warmup, args.methods)
            if args.soak:
                next(r for r in rows if r["method"] == "recorded").update(soak(colocation, args.soak))
    if report.exit_code:
        return report.exit_code
    output = Path(args.output)
    done = json.loads(output.read_text()) if output.exists() else {"rows": []}
    done |= {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "python": platform.python_version()}
    done |= {name: report.data[name] for name in ("versions", "hardware")}
    done.setdefault("commands", []).append(command_line("benchmarks/bench_weight_push.py", sys.argv[1:]))
    where = {"model": args.shape, "tp": args.tensor_parallel_size, "engines": config.num_engines}
    if config.trainer == "fsdp":
        where |= {"layout": layout(counts), "shard_size": config.replica_size, "push": config.push}
        if config.push == "gather":
            where["bucket_mb"] = config.bucket_mb
    done["rows"] += [where | row for row in rows]
    output.write_text(json.dumps(done, indent=1) + "\n")
    for row in rows:
        p50 = row["wall_ms_p50"]
        p95 = row["wall_ms_p95"]
        print(f"{args.shape} {row['method']:11} wall {p50:.2f} ms (p95 {p95:.2f}), first {row['first_push_ms']:.1f}")
        if row["method"] == "recorded":
            print(f"    { ({k: v for k, v in row.items() if k not in ('model', 'method')}) }")
    return 0


if __name__ == "__main__":
    sys.exit(main())
