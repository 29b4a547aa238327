"""Drills on several hosts: break a layout on a Ray cluster in every way that its nodes can fail, and see what it does.

python benchmarks/nodes_drills.py [NAME ...] --output results/nodes-drills.json     (needs root, see tests/hosts.py)

Hosts are namespaces of this machine, with two logical GPUs each. A layout of four takes two of them; where there is a
third one, it is the spare. Several drills follow one another in a run where the run survives them.
Recorded of each: whether it ended as stated, seconds from the fault to its message and from there until the run went
on, and what was left on any host. Where nothing may be lost there is no message: seconds from the fault to the next
step.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hosts import Host, Hosts, Run, why_not  # noqa: E402

from colocate.config import FAIL, MISSING, PASS  # noqa: E402
from colocate.preflight import find_packages  # noqa: E402

TINY = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2, "hidden_size": 128}
TINY |= {"intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000}
LAYOUT = ["--num-gpus", "4", "--tensor-parallel-size", "2", "--dtype", "float32", "--max-tokens", "8"]
LAYOUT += ["--prompts-per-step", "4", "--group-size", "4", "--load-format", "dummy"]
LEFT_S = 60  # that hosts have to end what a run has left
OTHER_JOB = """
import ray, time

@ray.remote(num_gpus=1, num_cpus=0)
class OtherJob:
    def start(self):
        print("started")

ray.init("{}", log_to_driver=False)
job = OtherJob.remote()
ray.get(job.start.remote())
print("taken", flush=True)
time.sleep(600)
"""
# What a drill itself puts on a host.
NOT_LEFT = re.compile("/dev/shm/filler|ray::OtherJob")


def kill(host: Host, title: str) -> None:
    """SIGKILL to the last process of a host whose command line begins so."""
    pids = [pid for pid, text in host.processes().items() if re.match(title, text)]
    host.run("kill", "-9", str(pids[-1]))


def cut_for(host: Host, seconds: float) -> None:
    host.cut()
    threading.Timer(seconds, host.join).start()


@dataclasses.dataclass(frozen=True)
class Drill:
    """message: a regular expression of the line that tells of it; "": there is none, since nothing may be lost.

    ending: one of a line after it, with which the run ends.
    """

    fault: str
    expected: str
    strike: Callable[[Hosts], object]
    message: str = ""
    ending: str = ""


SECOND = r"host2 \(10\.77\.0\.2\)"
GONE = rf"the node {SECOND} (is gone|does not answer)"
DRILLS = {
    "worker": Drill(
        "SIGKILL to a worker of the engine on the other node",
        "the engine is rebuilt there",
        lambda hosts: kill(hosts[1], "ray::RayWorkerProc"),
        rf"lost engine 1: .* has ended on {SECOND}",
    ),
    "trainer": Drill(
        "SIGKILL to a trainer on the other node",
        "all trainers go on from another one's state, which travels through Ray",
        lambda hosts: kill(hosts[1], "ray::RayTrainingActor"),
        rf"lost trainer .: .* has ended on {SECOND}",
    ),
    "engine": Drill(
        "SIGKILL to the engine's own actor on the other node",
        "the engine is rebuilt with its workers",
        lambda hosts: kill(hosts[1], "ray::MyLLM"),
        rf"lost engine 1: .* has ended on {SECOND}",
    ),
    "cut-20": Drill(
        "the other node's link is cut for 20 s",
        "the run waits, and loses nothing",
        lambda hosts: cut_for(hosts[1], 20),
    ),
    "raylet": Drill(
        "SIGKILL to the raylet of the other node; there is a spare one",
        "its part of the layout moves to the spare node",
        lambda hosts: kill(hosts[1], ".*/raylet/raylet "),
        GONE,
    ),
    "node-spare": Drill(
        "all processes of the other node are killed at once; there is a spare one",
        "its part of the layout moves to the spare node",
        lambda hosts: hosts[1].kill(),
        GONE,
    ),
    "node-smaller": Drill(
        "all processes of the other node are killed at once; --min-gpus 2",
        "the run goes on with half the layout",
        lambda hosts: hosts[1].kill(),
        GONE,
    ),
    "node": Drill(
        "all processes of the other node are killed at once; the trainers' shards are on both (--push auto: gather); "
        "there is a checkpoint",
        "the run ends, and says what is missing",
        lambda hosts: hosts[1].kill(),
        GONE,
        r"had shards of trainer 0 and trainer 1's replica",
    ),
    "cut-120": Drill(
        "the other node's link is cut for 120 s; --min-gpus 2",
        "the node counts as gone, and the run goes on with half the layout",
        lambda hosts: cut_for(hosts[1], 120),
        GONE,
    ),
    "other-package": Drill(
        "the other node has another version of transformers",
        "the run does not start, and names node, versions and what to type",
        lambda hosts: other_version(hosts[1], "transformers"),
        rf"{SECOND}: it has transformers 1\.2\.3, and the driver .* Try there: pip install transformers==",
    ),
    "no-model": Drill(
        "the other node has no model folder",
        "the run does not start, and names node and folder",
        lambda hosts: hosts[1].hide(Path(hosts.shared)),
        rf"{SECOND}: the model's folder .* is not there",
    ),
    "full-shm": Drill(
        "the other node's /dev/shm is full",
        "the run does not start, and says what to type",
        lambda hosts: hosts[1].run("fallocate", "-l", "1900M", "/dev/shm/filler"),
        rf"{SECOND}: its /dev/shm has .* MiB free, and 320 are needed",
    ),
    "second-job": Drill(
        "a second job on the same cluster has taken a GPU of the other node",
        "the run does not start, and names the nodes and their free GPUs",
        lambda hosts: second_job(hosts),
        r"has 3 free GPUs, and 4 are needed.* has 1 of 2 free",
    ),
}
SHARDS_ON_BOTH = ["--trainer", "fsdp", "--shard-size", "4"]
CHECKPOINT = ["--checkpoint", "{shared}/checkpoint", "--checkpoint-every", "2"]
# [(drills of one run, hosts, flags, exit code)]; those of START strike before it starts. {shared}: a folder
# that all hosts see.
RUNS = [
    (["worker", "trainer", "engine", "cut-20", "raylet"], 3, ["--max-restarts", "9", "--steps", "40"], PASS),
    (["node-spare"], 3, ["--steps", "40"], PASS),
    (["node-smaller"], 2, ["--steps", "40", "--min-gpus", "2"], PASS),
    (["node"], 2, ["--steps", "40", *SHARDS_ON_BOTH, *CHECKPOINT], FAIL),
    (["cut-120"], 2, ["--steps", "40", "--min-gpus", "2"], PASS),
    (["other-package"], 2, [], MISSING),
    (["no-model"], 2, [], MISSING),
    (["full-shm"], 2, [], MISSING),
    (["second-job"], 2, [], MISSING),
]
START = {"other-package", "no-model", "full-shm", "second-job"}


def other_version(host: Host, package: str) -> None:
    """Let a package say that it is version 1.2.3, on this host alone."""
    file = Path(importlib.metadata.distribution(package)._path) / "METADATA"
    text = re.sub(r"^Version: .*$", "Version: 1.2.3", file.read_text(), count=1, flags=re.MULTILINE)
    host.run("tee", "/tmp/METADATA", input=text)
    host.run("mount", "--bind", "/tmp/METADATA", str(file))


def second_job(hosts: Hosts) -> None:
    command = hosts[1].command(sys.executable, "-c", OTHER_JOB.format(hosts.address))
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS", "TMPDIR")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    job = subprocess.Popen(command, env=clean | hosts.env, cwd="/", **pipes)
    while "taken" not in job.stdout.readline():
        pass


def left_on(hosts: Hosts) -> dict[str, list[str]]:
    """{host: what a run has left}, of those that live, after LEFT_S at most."""
    end = time.monotonic() + LEFT_S
    while True:
        found = {host.name: host.left() for host in hosts.hosts if host.outer.poll() is None}
        found = {name: [f for f in rest if not NOT_LEFT.match(f)] for name, rest in found.items()}
        found = {name: rest for name, rest in found.items() if rest}
        if not found or time.monotonic() > end:
            return found
        time.sleep(1)


def play(names: list[str], count: int, flags: list[str], code: int) -> list[dict]:
    """One run. Rows of the report."""
    shared = Path(tempfile.mkdtemp(dir="/var/tmp"))
    model = shared / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY))
    struck: dict[str, float] = {}

    def strike(name: str, hosts: Hosts) -> None:
        print(f"  --- {name}: {DRILLS[name].fault}", flush=True)
        struck[name] = time.monotonic()
        DRILLS[name].strike(hosts)

    try:
        with Hosts(count) as hosts:
            hosts[1].hide(ROOT, ".venv")
            hosts.shared = model
            for host in hosts.hosts:
                hosts.start_ray(host, 2)
            hosts.wait_for_gpus(2 * count)
            at = []
            for name in names:
                if name in START:
                    strike(name, hosts)
                else:  # three steps after the one before
                    at += [(r"\[step\] +\d+/", lambda: None)] * 3
                    at.append((r"\[step\] +\d+/", lambda name=name: strike(name, hosts)))
            flags = [flag.format(shared=shared) for flag in flags]
            run = Run(hosts, shared, *LAYOUT, *flags, "--model", str(model), at=at, seconds=560)
            if "cut-120" in names:
                time.sleep(max(0.0, struck["cut-120"] + 150 - time.monotonic()))  # it is back, and hears of it
            left = left_on(hosts)
    finally:
        shutil.rmtree(shared, ignore_errors=True)
    rows = []
    for name, following in itertools.zip_longest(names, names[1:]):
        drill = DRILLS[name]
        row = {"drill": name, "fault": drill.fault, "expected": drill.expected}
        row |= look(drill, run.lines, struck.get(name, math.inf), struck.get(following, math.inf), code == PASS)
        row["as_stated"] = row["as_stated"] and run.code == code
        row["left_behind"] = left
        rows.append(row)
        print(f"  === {json.dumps(row)}", flush=True)
    return rows


def look(drill: Drill, lines: list[tuple[float, str]], struck: float, end: float, goes_on: bool) -> dict:
    """How a drill went, by the lines from its strike to the next one: {"as_stated", "message_s", "back_s"}.

    lines: [(when, line)]. goes_on: whether the run has to.
    """

    def first(pattern: str, since: float = struck) -> float | None:
        return next((when for when, line in lines if since <= when < end and re.search(pattern, line)), None)

    if drill.message:
        began = message = first(drill.message)
        back = None if message is None else first("recovered in", message)
        as_stated = message is not None and (back is not None or not goes_on)
        as_stated = as_stated and (not drill.ending or first(drill.ending, message) is not None)
    else:
        began = struck
        message = None
        back = first(r"\[step\]")
        as_stated = back is not None and first(r"\[lost\]") is None
    message_s = None if message is None else round(message - struck, 1)
    return {"as_stated": as_stated, "message_s": message_s, "back_s": None if back is None else round(back - began, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(DRILLS)} (default: all)")
    parser.add_argument("--output", help="add the rows to this file, in place of older ones of the same drill")
    args = parser.parse_args()
    if unknown := {*args.names} - {*DRILLS}:
        parser.error(f"there is no drill {', '.join(sorted(unknown))}")
    if why := why_not():
        parser.error(why)
    old = []
    if args.output and Path(args.output).exists():
        old = json.loads(Path(args.output).read_text())["rows"]
    rows = {row["drill"]: row for row in old}
    for names, *rest in RUNS:
        if chosen := [name for name in names if name in (args.names or DRILLS)]:
            rows |= {row["drill"]: row for row in play(chosen, *rest)}
            if args.output:
                report = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "versions": find_packages()[0]}
                report |= {"hardware": {"gpus": [], "cpu_cores": os.cpu_count()}}
                report["rows"] = [rows[name] for name in DRILLS if name in rows]
                Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(row["as_stated"] and not row["left_behind"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
