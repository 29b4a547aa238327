"""Fault drills: break a running layout in every way that we know of, and see that it does what it promises.

python benchmarks/drills.py [NAME ...] --output results/drills-rehearsal.json [flags]   (--help lists the drills)

Each drill has one fault, at a moment of one RLHF step. Faults that a run survives follow one another in a single run,
which must end with PASS; the others end theirs. The runner starts the script as a subprocess, with its functions
wrapped so that the fault happens (`Drilled`), reads when the fault's and the message's lines appear, and looks for what
is left behind: processes, files in /dev/shm and in the temporary folder, GPU memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from traces import Traces  # noqa: E402

import rlhf_colocate as rc  # noqa: E402
import rlhf_utils  # noqa: E402
from colocate.config import FAIL, MISSING, PASS  # noqa: E402
from colocate.fleet import half_started  # noqa: E402
from colocate.preflight import find_gpus  # noqa: E402

TWO = ("--num-gpus", "2", "--tensor-parallel-size", "2")
ONE = ("--num-gpus", "1", "--tensor-parallel-size", "1")
PATIENCE = float(os.environ.get("RLHF_DRILLS_PATIENCE", "1"))  # --patience, in the script's processes
DEADLINE_S, ROLLOUT_DEADLINE_S = 4, 20  # of a push and of a rollout, where a drill sets them; times --patience
BUSY_S = 15  # longer than a recovery's patience with those who may be stuck
RUN_LIMIT_S = 590
FILLER = "/dev/shm/drill"


@dataclasses.dataclass(frozen=True)
class Drill:
    """moment: the method of Colocation at whose call the fault happens, in the first step that was not yet drilled."""

    fault: str
    expected: str
    moment: str
    says: str  # regular expression of the line that must follow the fault
    then: str = ""  # of one that must come after it, before the run goes on
    run: str = ""  # drills of one run share its name; "": it has a run of its own
    code: int = PASS
    gpu: bool = False


LOST = r"\[lost\] .*"
RESCUED = r"\[lost\] all training actors start again from training actor 0's state after step \d+$"
REBUILT = r"\[lost\] rebuilding engine \d$"
ENDED = r"\(pid \d+( on \S+)?\) has ended"
STOPPED = r"engine 0 rank \d \(pid \d+ on \S+\) is stopped"
DRILLS = {
    # One run with two trainers and one engine of two ranks, which survives all of these. On one GPU, those of the
    # engine can be asked for by name, with --num-gpus 1 --tensor-parallel-size 1.
    "kill-worker-idle": Drill(
        fault="SIGKILL to the engine's last rank between two steps",
        expected="the engine is rebuilt",
        moment="rollout",
        says=LOST + r"lost engine 0: .*engine 0 rank \d " + ENDED,
        then=REBUILT,
        run="survive",
    ),
    "kill-worker-rollout": Drill(
        fault="SIGKILL to the engine's last rank while it generates",
        expected="the engine is rebuilt, and the step is done again",
        moment="rollout",
        says=LOST + r"rollout: lost engine 0: .*engine 0 rank \d " + ENDED,
        then=REBUILT,
        run="survive",
    ),
    "kill-worker-push": Drill(
        fault="SIGKILL to the engine's last rank when the others have their weights and it has not",
        expected="the engine is rebuilt, and everything is pushed again",
        moment="push",
        says=LOST + r"push_weights: lost engine 0: .*engine 0 rank \d " + ENDED,
        then=REBUILT,
        run="survive",
    ),
    "kill-engine": Drill(
        fault="SIGKILL to the engine's own actor",
        expected="the engine is rebuilt with its workers",
        moment="rollout",
        says=LOST + "lost engine 0: .*engine 0 " + ENDED,
        then=REBUILT,
        run="survive",
    ),
    "stop-worker": Drill(
        fault="SIGSTOP to the engine's last rank before a push",
        expected=f"named at the deadline ({DEADLINE_S} s), and the engine is rebuilt",
        moment="push",
        says=LOST + rf"no answer from engine 0 within [\d.]+ s: {STOPPED}",
        then=REBUILT,
        run="survive",
    ),
    "stop-worker-rollout": Drill(
        fault="SIGSTOP to the engine's last rank while it generates",
        expected=f"named at the deadline ({ROLLOUT_DEADLINE_S} s), and the engine is rebuilt",
        moment="rollout",
        says=LOST + rf"no answer from engine 0 within [\d.]+ s: {STOPPED}",
        then=REBUILT,
        run="survive",
    ),
    "kill-trainer-idle": Drill(
        fault="SIGKILL to training actor 1 between two steps",
        expected="all trainers go on from training actor 0's state",
        moment="rollout",
        says=LOST + "lost training actor 1: training actor 1 " + ENDED,
        then=RESCUED,
        run="survive",
    ),
    "kill-trainer-push": Drill(
        fault="SIGKILL to training actor 1 during a push",
        expected="all trainers go on from training actor 0's state, and push again",
        moment="push",
        says=LOST + "lost training actor 1: training actor 1 " + ENDED,
        then=RESCUED,
        run="survive",
    ),
    "kill-trainer-train": Drill(
        fault="SIGKILL to training actor 1 in the middle of an optimizer step",
        expected="all trainers go on from training actor 0's state; from the last checkpoint if that hangs in NCCL",
        moment="learn",
        says=LOST + "learn: lost training actor 1: training actor 1 " + ENDED,
        run="survive",
    ),
    "push-asleep": Drill(
        fault="a push to a sleeping engine",
        expected="refused by the engine; the run goes on",
        moment="wake_up",
        says=r"refused: engine 0 \(push_weights\): RuntimeError: found the engine's weights asleep",
        run="survive",
    ),
    "torn-push": Drill(
        fault="the engine's last rank fails in a push, after the others have their weights",
        expected="the engine is poisoned: it refuses to generate until a whole push has landed",
        moment="push",
        says=r"refused: engine 0 \(generate\): RuntimeError: found the engine with no whole push in it",
        run="survive",
    ),
    # Another one with two trainers and two engines of one rank each, and without a checkpoint.
    "kill-one-engine": Drill(
        fault="SIGKILL to the worker of one of two engines before a push",
        expected="that engine is rebuilt, the other stays, and everything is pushed to both",
        moment="push",
        says=LOST + r"push_weights: lost engine 1: engine 1 rank 0 " + ENDED,
        then=r"\[lost\] rebuilding engine 1$",
        run="no-checkpoint",
    ),
    "kill-worker-busy": Drill(
        fault=f"SIGKILL to an engine's worker while a trainer is busy for {BUSY_S} s, without a checkpoint",
        expected="only the engine is rebuilt: the trainers are waited for",
        moment="learn",
        says=LOST + "learn: lost engine 0: engine 0 rank 0 " + ENDED,
        then=REBUILT,
        run="no-checkpoint",
    ),
    "kill-trainer-twice": Drill(
        fault="SIGKILL to training actor 1, and to training actor 0 while both are rebuilt, without a checkpoint",
        expected="all trainers go on from training actor 0's state, which was saved before the second",
        moment="build_learners",
        says=LOST + "lost training actor 0: training actor 0 " + ENDED,
        then=r"\[lost\] all training actors start again from the checkpoint saved-before$",
        run="no-checkpoint",
    ),
    "kill-worker-twice": Drill(
        fault="SIGKILL to an engine's worker, and to the one that starts in its place",
        expected="the engine is rebuilt once more",
        moment="rebuild_engines",
        says=LOST + "start: lost engine 0: engine 0",
        then=REBUILT,
        run="no-checkpoint",
    ),
    # Each of the others has a run of its own, which most of them end.
    "kill-gcs": Drill(
        fault="SIGKILL to Ray's gcs_server, which keeps its state",
        expected="the run says so, and ends",
        moment="rollout",
        says=r"FAIL: lost Ray: Ray's gcs_server \(pid \d+\) has ended",
        code=FAIL,
    ),
    "kill-raylet": Drill(
        fault="SIGKILL to the raylet, parent of all actors' processes",
        expected="the run says so, and ends",
        moment="rollout",
        says=r"FAIL: lost Ray: Ray's raylet \(pid \d+\) has ended",
        code=FAIL,
    ),
    "stale-handle": Drill(
        fault="a training actor starts again, and the engine is not connected to the new one",
        expected="the push is refused",
        moment="rollout",
        says=r"FAIL: engine 0 \(push_weights\): HandleError: .*the trainer has weights at version",
        code=FAIL,
    ),
    "no-restarts": Drill(
        fault="SIGKILL to a training actor, with --max-restarts 0",
        expected="the run ends",
        moment="rollout",
        says="FAIL: .*lost training actor 1: training actor 1 " + ENDED,
        code=FAIL,
    ),
    "last-trainer": Drill(
        fault="SIGKILL to the only training actor, without a checkpoint",
        expected="the run says that the state is gone, and ends",
        moment="rollout",
        says="FAIL: no training actor is left, and no checkpoint was written",
        code=FAIL,
    ),
    "last-trainer-checkpoint": Drill(
        fault="SIGKILL to the only training actor, with --checkpoint-every 1",
        expected="a new one goes on from the checkpoint",
        moment="learn",
        says=LOST + "lost training actor 0: training actor 0 " + ENDED,
    ),
    "nan-gradient": Drill(
        fault="a reward that is NaN",
        expected="the step is refused, with the weights unchanged",
        moment="learn",
        says="FAIL: .*a gradient norm of nan",
        code=FAIL,
    ),
    "nan-weight": Drill(
        fault="a NaN in one weight of all trainers",
        expected="the weight is named, and the push refused",
        moment="check_replicas",
        says=r"FAIL: .*found NaN or Inf in \S+; needed finite weights: push refused",
        code=FAIL,
    ),
    "drifted-replicas": Drill(
        fault="one weight of one trainer changes",
        expected="the weight is named, and the push refused",
        moment="check_replicas",
        says="FAIL: replicas: the trainers' weights differ, push refused: .*embed",
        code=FAIL,
    ),
    "corrupt-handle": Drill(
        fault="a handle's bytes are damaged, and its checksum is that of the damaged ones",
        expected="refused, before anything is overwritten",
        moment="handles",
        says="FAIL: .*HandleError: ",
        code=FAIL,
    ),
    "full-shm-start": Drill(
        fault="a /dev/shm of 100 MiB",
        expected="refused before anything starts, with what to type",
        moment="",
        says=r"error: /dev/shm has \d+ MiB free, .* Try: mount",
        code=MISSING,
    ),
    "full-shm": Drill(
        fault="/dev/shm fills up between two steps",
        expected="the engine dies of it, its queues being there; the run says what it needs to rebuild it, and ends",
        moment="rollout",
        says=r"FAIL: /dev/shm has \d+ MiB free, .* Try: mount",
        code=FAIL,
    ),
    "oom-wake": Drill(
        fault="no GPU memory is left when the engine wakes up",
        expected="the run says so, with what to type, and ends",
        moment="wake_up",
        says="FAIL: .*out of GPU memory at wake-up: .*type ",
        code=FAIL,
        gpu=True,
    ),
}
# What the script is started with, by run; {tmp} is a folder of the run's own.
DEADLINES = ("--stage-timeout", "push={push_s:g},rollout={rollout_s:g}")
CHECKPOINT = ("--checkpoint", "{tmp}/checkpoint", "--checkpoint-every", "1")
FLAGS = {
    "survive": [*TWO, "--steps", "13", "--max-restarts", "10", *CHECKPOINT, *DEADLINES],
    "no-checkpoint": ["--num-gpus", "2", "--tensor-parallel-size", "1", "--steps", "6", "--max-restarts", "10"],
    "stale-handle": [*ONE, "--steps", "3", *CHECKPOINT],
    "no-restarts": [*TWO, "--steps", "3", "--max-restarts", "0"],
    "last-trainer-checkpoint": [*ONE, "--steps", "3", *CHECKPOINT],
    "drifted-replicas": [*TWO, "--steps", "2"],
    "corrupt-handle": [*ONE, "--steps", "0"],
}


# ---------------------------------------------------------------------------------------------------------------------
# The faults: the script's own functions, wrapped
# ---------------------------------------------------------------------------------------------------------------------


class DrilledWorker(rlhf_utils.ColocateWorkerExtension):
    def disturb_push(self, kind: str) -> None:
        """Let the last rank's next push wait for two seconds (times --patience), or fail."""
        self._disturbance = kind if self.rank == self.parallel_config.tensor_parallel_size - 1 else ""

    def push_weights(self, version: int) -> dict:
        kind, self._disturbance = getattr(self, "_disturbance", ""), ""
        if kind == "wait":
            time.sleep(2 * PATIENCE)
        if kind == "fail":
            raise RuntimeError("the drill's error")
        return super().push_weights(version)


class DrilledTrainer(rc.RayTrainingActor):
    def learn(self, samples: list[dict], total_tokens: int, version: int) -> dict[str, float]:
        time.sleep(samples[0].pop("busy_s", 0))
        return super().learn(samples, total_tokens, version)

    def spoil(self, value: float) -> None:
        self.model.get_input_embeddings().weight.data[7, 3] = value

    def hog(self) -> float:
        """Take all GPU memory but 200 MiB. Returns what was taken, GiB."""
        import torch

        self.ballast = []
        while (free := torch.cuda.mem_get_info()[0]) > 200 * 2**20:
            self.ballast.append(torch.empty(min(free - 150 * 2**20, 2**30), dtype=torch.uint8, device="cuda"))
        return sum(t.nbytes for t in self.ballast) / 2**30


class Drilled(rc.Colocation):
    """A layout that is broken by the drills in $RLHF_DRILLS, one in each RLHF step, beginning with the second."""

    training_actor = DrilledTrainer
    worker_extension = "drills.DrilledWorker"

    def __init__(self, *args):
        super().__init__(*args)
        self.to_come = os.environ["RLHF_DRILLS"].split(",")
        self.rollouts, self.armed = 0, ""
        self.last_rank = f"engine 0 rank {self.config.tensor_parallel_size - 1}"
        if DRILLS[self.to_come[0]].moment == "handles":  # at once: the first connection
            self.armed = self.to_come.pop(0)

    def strikes(self, moment: str) -> str:
        """The drill that is due at this moment, if any: only once."""
        due = self.armed if self.armed and DRILLS[self.armed].moment == moment else ""
        if due:
            self.armed = ""
            self.announce(due)
        return due

    def announce(self, drill: str) -> None:
        """The line from which the runner counts the seconds to the message."""
        self.log("drill", f"{drill}: {DRILLS[drill].fault}")

    def kill(self, role: str, drill: str = "", after: float = 0.0, signum: int = signal.SIGKILL) -> None:
        """after: seconds, then the drill is announced anew."""
        pid = next(m.pid for m in [*self.watch.members, *self.watch.ray] if m.role == role)

        def strike() -> None:
            self.announce(drill)
            os.kill(pid, signum)

        threading.Timer(after, strike).start() if after else os.kill(pid, signum)

    def rollout(self, *args):
        self.rollouts += 1
        if self.rollouts > 1 and self.to_come and not self.armed:
            self.armed = self.to_come.pop(0)
        drill = self.strikes("rollout")
        if drill == "kill-worker-idle" or self.armed == "kill-worker-twice":
            self.kill(self.last_rank)
        elif drill == "kill-worker-rollout":
            self.kill(self.last_rank, drill, after=0.05)  # on an H100 a rollout takes 0.2 s
        elif drill == "stop-worker-rollout":
            self.kill(self.last_rank, drill, after=0.05, signum=signal.SIGSTOP)
        elif drill == "kill-engine":
            self.kill("engine 0")
        elif drill in ("kill-gcs", "kill-raylet"):
            self.kill({"kill-gcs": "Ray's gcs_server", "kill-raylet": "Ray's raylet"}[drill])
        elif drill in ("kill-trainer-idle", "no-restarts") or self.armed == "kill-trainer-twice":
            self.kill("training actor 1")
        elif drill == "last-trainer":
            self.kill("training actor 0")
        elif drill == "stale-handle":
            self.rebuild_trainers(self.saved)
            self.log("drill", f"{drill}: the engine still has the old one's memory mapped")
        elif drill == "full-shm":
            fill(FILLER)
        return super().rollout(*args)

    def push(self, version: int) -> dict:
        drill = self.strikes("push")
        if drill in ("kill-worker-push", "kill-trainer-push"):
            self.on_workers("disturb_push", "wait")
            self.kill(self.last_rank if drill == "kill-worker-push" else "training actor 1", drill, after=1)
        elif drill == "kill-one-engine":
            self.kill("engine 1 rank 0")
        elif drill == "stop-worker":
            self.kill(self.last_rank, signum=signal.SIGSTOP)
        elif drill == "torn-push":
            self.on_workers("disturb_push", "fail")
            for method, args in (("collective_rpc", ("push_weights", version)), ("generate", ([[11, 12]], 1))):
                self.refused(method, *args)
        return super().push(version)

    def refused(self, method: str, *args) -> None:
        try:
            self.on_engines(method, *args)
        except rc.Stop as stop:
            self.log("drill", f"refused: {stop}")

    def learn(self, samples: list[dict], version: int) -> dict:
        drill = self.strikes("learn")
        if drill == "nan-gradient":
            samples[0]["advantage"] = float("nan")
        elif drill == "kill-worker-busy":
            samples[0]["busy_s"] = BUSY_S
            self.kill("engine 0 rank 0", drill, after=1)
        elif drill == "kill-trainer-train":
            self.kill("training actor 1", drill, after=0.02)
        elif drill == "last-trainer-checkpoint":
            self.kill("training actor 0")
        return super().learn(samples, version)

    def rebuild_engines(self, indices: list[int]) -> None:
        if drill := self.strikes("rebuild_engines"):

            def strike() -> None:
                while not (new := half_started(self, "RayWorkerProc")):
                    time.sleep(0.05)
                self.announce(drill)
                new[0].kill()

            threading.Thread(target=strike, daemon=True).start()
        super().rebuild_engines(indices)

    def build_learners(self, resume: Path | None = None) -> int:
        if self.strikes("build_learners"):
            self.kill("training actor 0")
        return super().build_learners(resume)

    def check_replicas(self) -> dict[str, str]:
        drill = self.strikes("check_replicas")
        if drill == "nan-weight":
            self.on_trainers("spoil", float("nan"))
        elif drill == "drifted-replicas":
            self.ask(self.trainers[-1:], "spoil", 0.5)
        return super().check_replicas()

    def wake_up(self, tag: str) -> None:
        drill = self.strikes("wake_up")
        if drill == "push-asleep":
            self.refused("collective_rpc", "push_weights", -1)
        elif drill == "oom-wake":
            self.on_trainers("hog")
        super().wake_up(tag)

    def handles(self) -> dict[str, dict]:
        messages = super().handles()
        if self.strikes("handles"):
            damage(messages)
        return messages


def damage(messages: dict[str, dict]) -> None:
    """Change the bytes of all handles, under a checksum that fits."""
    for message in messages.values():
        for storage in message["storages"]:
            if "path" in storage:
                storage["path"] = storage["path"].replace("fd/", "fd/9")
            if "handle" in storage:
                storage["handle"] = bytes(b ^ 0x5A for b in storage["handle"])
        message["checksum"] = rlhf_utils.checksum(message)


def fill(path: str) -> None:
    """Write until the file system is full."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**20))
        except OSError:
            pass


# ---------------------------------------------------------------------------------------------------------------------
# The runner
# ---------------------------------------------------------------------------------------------------------------------


def runs(names: Iterable[str]) -> dict[str, list[str]]:
    """{run: the drills in it}."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(DRILLS[name].run or name, []).append(name)
    return found


def gpu_used_mib() -> float:
    return sum(gpu["total"] - gpu["free"] for gpu in find_gpus())


def play(names: list[str], flags: list[str], patience: float) -> tuple[list[dict], dict]:
    """One run with these drills, its deadlines times `patience`. Returns a row for each, and the script's report."""
    traces, gpu = Traces(), gpu_used_mib()
    lines: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory(prefix="drill-") as tmp:
        report = Path(tmp) / "report.json"
        limits = {"push_s": patience * DEADLINE_S, "rollout_s": patience * ROLLOUT_DEADLINE_S}
        flags = [f.format(tmp=tmp, **limits) for f in flags]
        command = [sys.executable, __file__, "--play", *flags, "--output-json", str(report)]
        inside = Path(tmp) / "shm"
        if names[0].startswith("full-shm"):  # a /dev/shm of its own, which only its own processes can list
            size = 100 if names[0] == "full-shm-start" else 1000
            mount = f"mount -t tmpfs -o size={size}m tmpfs /dev/shm || exit 99"
            steps = f'{mount}; "$@"; code=$?; rm -f {FILLER}; ls -A /dev/shm > {inside}; exit $code'
            command = ["unshare", "--mount", "sh", "-c", steps, "sh", *command]
        path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"RLHF_DRILLS": ",".join(names), "PYTHONPATH": path} | traces.env
        env["RLHF_DRILLS_PATIENCE"] = f"{patience:g}"
        start, options = time.monotonic(), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, env=env, start_new_session=True, **options) as process:
            alarm = threading.Timer(patience * RUN_LIMIT_S, os.killpg, (process.pid, signal.SIGKILL))
            alarm.start()
            try:
                for line in process.stdout:
                    lines.append((time.monotonic(), line.rstrip()))
                    print(f"    {line}", end="", flush=True)
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                raise
            finally:
                code = process.wait()
                alarm.cancel()
        seconds = time.monotonic() - start
        left = traces.left(patience * 10)
        done = json.loads(report.read_text()) if report.exists() else {}
        weights = done["steps"][-1]["weights"] if done.get("steps") else None  # their digest, after the last step
        if inside.exists():
            left["/dev/shm"] += inside.read_text().split()
    left["GPU MiB"] = max(0, gpu_used_mib() - gpu)
    common = {"exit_code": code, "left_behind": left, "run_s": round(seconds, 1), "weights": weights}
    return [outcome(name, lines, start, done.get("losses", []), common) for name in names], done


def outcome(name: str, lines: list[tuple[float, str]], start: float, losses: list[dict], common: dict) -> dict:
    """What a drill came to. lines: of the run's output, with the time of each; common: what holds for the whole run."""
    drill = DRILLS[name]
    struck = max((at for at, line in lines if f"[drill] {name}: " in line), default=None if drill.moment else start)
    row = {"drill": name, "fault": drill.fault, "expected": drill.expected}
    row |= {"seen": None, "seconds_to_message": None, "recovered_s": None} | common
    after = [(at, line) for at, line in lines if struck and at > struck]
    for at, line in after:
        if re.search(drill.says, line):
            row |= {"seen": re.sub(r"^ *[\d.]+s ", "", line), "seconds_to_message": round(at - struck, 2)}
            row["recovered_s"] = next((x.get("seconds") for x in losses if line.endswith(x["message"])), None)
            break
    on = next((i for i, (_, line) in enumerate(after) if "[lost] recovered in" in line), len(after))
    then = not drill.then or any(re.search(drill.then, line) for _, line in after[:on])
    ok = then and bool(row["seen"]) and row["exit_code"] == drill.code and not any(row["left_behind"].values())
    return row | {"ok": ok and bool(row["recovered_s"] or not drill.says.startswith(LOST))}


def main() -> int:
    drills = "\n".join(f"  {name:24} {d.fault}: {d.expected}" for name, d in DRILLS.items())
    formatter = argparse.RawDescriptionHelpFormatter
    usage, text = "%(prog)s [NAME ...] [--output FILE] [flags of rlhf_colocate.py]", f"{__doc__}\ndrills:\n{drills}"
    parser = argparse.ArgumentParser(usage=usage, description=text, formatter_class=formatter)
    parser.add_argument("--output", help="write the rows to this JSON file")
    parser.add_argument("--patience", type=float, default=1, help="stretch all deadlines by this factor (default: 1)")
    chosen = list(itertools.takewhile(lambda a: not a.startswith("-"), sys.argv[1:]))  # none: all that can be done here
    args, flags = parser.parse_known_args(sys.argv[1 + len(chosen) :])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends it as Ctrl-C does
    if unknown := [n for n in chosen if n not in DRILLS]:
        parser.error(f"no drill {', '.join(unknown)}; --help lists them")
    rows, report = [], {}
    for run, names in runs(chosen or [n for n in DRILLS if not DRILLS[n].gpu or find_gpus()]).items():
        print(f"{run}: {', '.join(names)}", flush=True)
        new, done = play(names, [*FLAGS.get(run, [*ONE, "--steps", "3"]), *flags], args.patience)
        report |= {k: done[k] for k in ("versions", "hardware") if done.get(k)}
        rows += new
        for row in new:
            print(f"{'ok    ' if row['ok'] else 'FAILED'} {row['drill']}: {row['seconds_to_message']} s: {row['seen']}")
            if not row["ok"]:
                print(f"       exit code {row['exit_code']}, left behind: {row['left_behind']}")
    if args.output:
        report |= {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "rows": rows}
        report["command"] = " ".join(["python benchmarks/drills.py", *chosen, *flags])
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    return PASS if all(r["ok"] for r in rows) else FAIL


if __name__ == "__main__":
    if sys.argv[1:2] == ["--play"]:
        import drills  # under the name that Ray's and vLLM's processes know

        rc.Colocation = drills.Drilled
        sys.exit(rc.main(sys.argv[2:]))
    sys.exit(main())
