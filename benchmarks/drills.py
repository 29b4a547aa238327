"""Fault drills: break a running layout in every way that we know of, and see that it does what it promises.

python benchmarks/drills.py [NAME ...] --output results/drills-rehearsal.json [flags]   (--help lists the drills)

Each drill has one fault, at a moment of one RLHF step. Faults that a run survives follow one another in a single run,
which must end with PASS; the others end theirs. The negative controls are among these: a broken push, and the check
that must fail (`FAULTS`).
The runner starts the script in a process of its own, with a layout that the drills break (`Drilled`), reads when the
lines of the fault and of the message appear, and looks for what is left behind: processes, files in /dev/shm and in the
temporary folder, GPU memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
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
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rlhf_colocate as rc  # noqa: E402
from benchmarks.traces import Traces  # noqa: E402
from colocate import checks, verify  # noqa: E402
from colocate.config import FAIL, MISSING, PASS, Stop  # noqa: E402
from colocate.preflight import find_gpus  # noqa: E402

TWO = ("--num-gpus", "2", "--tensor-parallel-size", "2")
ONE = ("--num-gpus", "1", "--tensor-parallel-size", "1")
# Of a push and of a rollout, where a drill sets them; times --patience.
DEADLINE_S = 4
ROLLOUT_DEADLINE_S = 20
BUSY_S = 15  # longer than a recovery waits for an actor that may be stuck
RUN_LIMIT_S = 590
FILLER = "/dev/shm/drill"


@dataclasses.dataclass(frozen=True)
class Drill:
    """moment: the method of Colocation at whose call the fault happens, in the first step that was not yet drilled.

    "last push": the one after the last step. Those that come before the loop, too, are in EARLY.
    """

    fault: str
    expected: str
    moment: str
    says: str  # regular expression of the line that must follow the fault
    then: str = ""  # of one that must come after it, before the run goes on
    run: str = ""  # drills of one run share its name; "": it has a run of its own
    code: int = PASS
    gpu: bool = False


EARLY = ("handles", "perturb", "restore")
LOST = r"\[lost\] .*"
RESCUED = r"\[lost\] all trainers start again from trainer 0's state after step \d+$"
RESTARTED = r"\[lost\] all trainers start again from the checkpoint \S+$"
REPLACED = r"\[lost\] replacing engine \d$"
ENDED = r"\(pid \d+( on \S+)?\) has ended"
STOPPED = r"engine 0 rank \d \(pid \d+ on \S+\) is stopped"
DRILLS = {
    # One run with two trainers and one engine of two ranks, which survives all of these. On one GPU, those of the
    # engine can be asked for by name, with --num-gpus 1 --tensor-parallel-size 1.
    "kill-worker-proof": Drill(
        fault="SIGKILL to the engine's last rank after the proof of the push, before the first step",
        expected="the engine is replaced, and the loop begins",
        moment="restore",
        says=LOST + r"lost engine 0: .*engine 0 rank \d " + ENDED,
        then=REPLACED,
        run="survive",
    ),
    "kill-worker-idle": Drill(
        fault="SIGKILL to the engine's last rank between two steps",
        expected="the engine is replaced",
        moment="generate",
        says=LOST + r"lost engine 0: .*engine 0 rank \d " + ENDED,
        then=REPLACED,
        run="survive",
    ),
    "kill-worker-rollout": Drill(
        fault="SIGKILL to the engine's last rank while it generates",
        expected="the engine is replaced, and the step is done again",
        moment="generate",
        says=LOST + r"lost engine 0: .*engine 0 rank \d " + ENDED,
        then=REPLACED,
        run="survive",
    ),
    "kill-worker-push": Drill(
        fault="SIGKILL to the engine's last rank when the others have their weights and it has not",
        expected="the engine is replaced, and everything is pushed again",
        moment="push",
        says=LOST + r"push: lost engine 0: .*engine 0 rank \d " + ENDED,
        then=REPLACED,
        run="survive",
    ),
    "kill-engine": Drill(
        fault="SIGKILL to the engine's own actor",
        expected="the engine is replaced with its workers",
        moment="generate",
        says=LOST + "lost engine 0: .*engine 0 " + ENDED,
        then=REPLACED,
        run="survive",
    ),
    "stop-worker": Drill(
        fault="SIGSTOP to the engine's last rank before a push",
        expected=f"named at the deadline ({DEADLINE_S} s), and the engine is replaced",
        moment="push",
        says=LOST + rf"no answer from engine 0 within [\d.]+ s: {STOPPED}",
        then=REPLACED,
        run="survive",
    ),
    "stop-worker-rollout": Drill(
        fault="SIGSTOP to the engine's last rank while it generates",
        expected=f"named at the deadline ({ROLLOUT_DEADLINE_S} s), and the engine is replaced",
        moment="generate",
        says=LOST + rf"no answer from engine 0 within [\d.]+ s: {STOPPED}",
        then=REPLACED,
        run="survive",
    ),
    "kill-trainer-idle": Drill(
        fault="SIGKILL to trainer 1 between two steps",
        expected="all trainers go on from trainer 0's state",
        moment="generate",
        says=LOST + "lost trainer 1: trainer 1 " + ENDED,
        then=RESCUED,
        run="survive",
    ),
    "kill-trainer-push": Drill(
        fault="SIGKILL to trainer 1 during a push",
        expected="all trainers go on from trainer 0's state, and push again",
        moment="push",
        says=LOST + "lost trainer 1: trainer 1 " + ENDED,
        then=RESCUED,
        run="survive",
    ),
    "kill-trainer-train": Drill(
        fault="SIGKILL to trainer 1 in the middle of an optimizer step",
        expected="all trainers go on from trainer 0's state; from the last checkpoint if that hangs in NCCL",
        moment="train",
        says=LOST + "learn: lost trainer 1: trainer 1 " + ENDED,
        run="survive",
    ),
    "kill-trainer-reply": Drill(
        fault="SIGKILL to trainer 1 between its optimizer step and its reply",
        expected="all trainers go on from trainer 0's state, with the metrics of the step that it has done",
        moment="train",
        says=LOST + "learn: lost trainer 1: trainer 1 " + ENDED,
        then=RESCUED,
        run="survive",
    ),
    "push-asleep": Drill(
        fault="a push to a sleeping engine",
        expected="refused by the engine; the run goes on",
        moment="push",
        says=r"refused: engine 0 \(push_weights\): RuntimeError: the engine's weights are asleep",
        run="survive",
    ),
    "torn-push": Drill(
        fault="the engine's last rank fails in a push, after the others have their weights",
        expected="the engine refuses to generate until a whole push has landed",
        moment="push",
        says=r"refused: engine 0 \(generate\): RuntimeError: the engine is at version None",
        run="survive",
    ),
    "kill-worker-last": Drill(
        fault="SIGKILL to the engine's last rank after the last step, before its push",
        expected="the engine is replaced, and gets that push",
        moment="last push",
        says=LOST + r"lost engine 0: .*engine 0 rank \d " + ENDED,
        then=REPLACED,
        run="survive",
    ),
    # Another one with two trainers and two engines of one rank each, and without a checkpoint.
    "kill-one-engine": Drill(
        fault="SIGKILL to the worker of one of two engines before a push",
        expected="that engine is replaced, the other stays, and everything is pushed to both",
        moment="push",
        says=LOST + r"lost engine 1: engine 1 rank 0 " + ENDED,
        then=r"\[lost\] replacing engine 1$",
        run="no-checkpoint",
    ),
    "kill-worker-busy": Drill(
        fault=f"SIGKILL to an engine's worker while a trainer is busy for {BUSY_S} s, without a checkpoint",
        expected="only the engine is replaced: the trainers are waited for",
        moment="train",
        says=LOST + "learn: lost engine 0: engine 0 rank 0 " + ENDED,
        then=REPLACED,
        run="no-checkpoint",
    ),
    "kill-trainer-twice": Drill(
        fault="SIGKILL to trainer 1, and to trainer 0 while both are replaced, without a checkpoint",
        expected="all trainers go on from trainer 0's state, which was saved before the second",
        moment="join_trainers",
        says=LOST + "lost trainer 0: trainer 0 ",  # without its pid: it has not reported yet
        then=r"\[lost\] all trainers start again from the checkpoint saved$",
        run="no-checkpoint",
    ),
    "kill-worker-twice": Drill(
        fault="SIGKILL to an engine's worker, and to the one that starts in its place",
        expected="the engine is replaced once more",
        moment="start",
        says=LOST + "start: lost engine 0: engine 0",
        then=REPLACED,
        run="no-checkpoint",
    ),
    # Another one, whose two trainers hold a shard each, with one engine of two ranks.
    "missing-piece": Drill(
        fault="a trainer's piece of one weight is not sent",
        expected="the connection is refused, and the weight named; the run goes on",
        moment="push",
        says=r"refused: engine 0 \(connect_weights\): HandleError: .*missing: \S+, but \d+ of \d+ elements",
        run="shards",
    ),
    "moved-piece": Drill(
        fault="a trainer's piece of one weight is sent as if it began a row earlier",
        expected="the connection is refused, and the weight named; the run goes on",
        moment="push",
        says=r"refused: engine 0 \(connect_weights\): HandleError: .*overlapping, or outside of it: pieces of \S+ ",
        run="shards",
    ),
    "swapped-pieces": Drill(
        fault="the trainers' pieces of one weight are sent under each other's place",
        expected="they are loaded, and the check 'transport' fails; the run goes on with the right ones",
        moment="push",
        says=r"noticed: transport: \S+\[0, 0\]",
        run="shards",
    ),
    "stale-shard": Drill(
        fault="trainer 1's version is not the one that is pushed, trainer 0's is",
        expected="the push is refused; the run goes on",
        moment="push",
        says=r"refused: engine 0 \(push_weights\): HandleError: .*a trainer has weights at version \d+ then \d+",
        run="shards",
    ),
    "kill-shard": Drill(
        fault="SIGKILL to trainer 1, which holds a shard, before a rollout",
        expected="all trainers go on from the last checkpoint",
        moment="generate",
        says=LOST + "lost trainer 1: trainer 1 " + ENDED,
        then=RESTARTED,
        run="shards",
    ),
    "kill-shard-train": Drill(
        fault="SIGKILL to trainer 1, which holds a shard, in the middle of an optimizer step",
        expected="all trainers go on from the last checkpoint",
        moment="train",
        says=LOST + "learn: lost trainer 1: trainer 1 " + ENDED,
        then=RESTARTED,
        run="shards",
    ),
    # One with two replicas of two shards each.
    "kill-shard-of-set": Drill(
        fault="SIGKILL to trainer 1, which holds a shard of the first of two replicas",
        expected="all trainers go on from the other replica's state",
        moment="generate",
        says=LOST + "lost trainer 1: trainer 1 " + ENDED,
        then=r"\[lost\] all trainers start again from trainer 2 and trainer 3's state after step \d+$",
        run="replicas",
    ),
    # Each of the others has a run of its own, which most of them end.
    "kill-gcs": Drill(
        fault="SIGKILL to Ray's gcs_server, which keeps its state",
        expected="the run says so, and ends",
        moment="generate",
        says=r"FAIL: lost Ray: Ray's gcs_server \(pid \d+\) has ended",
        code=FAIL,
    ),
    "kill-raylet": Drill(
        fault="SIGKILL to the raylet, parent of all actors' processes",
        expected="the run says so, and ends",
        moment="generate",
        says=r"FAIL: lost Ray: Ray's raylet \(pid \d+\) has ended",
        code=FAIL,
    ),
    "stale-handle": Drill(
        fault="a trainer starts again, and the engine is not connected to the new one",
        expected="the push is refused",
        moment="generate",
        says=r"FAIL: engine 0 \(push\): HandleError: .*version",
        code=FAIL,
    ),
    "no-restarts": Drill(
        fault="SIGKILL to a trainer, with --max-restarts 0",
        expected="the run ends",
        moment="generate",
        says="FAIL: .*lost trainer 1: trainer 1 " + ENDED,
        code=FAIL,
    ),
    "last-trainer": Drill(
        fault="SIGKILL to the only trainer, without a checkpoint",
        expected="the run says that the state is gone, and ends",
        moment="generate",
        says="FAIL: no whole replica is left, and no checkpoint",
        code=FAIL,
    ),
    "last-trainer-checkpoint": Drill(
        fault="SIGKILL to the only trainer, with --checkpoint-every 1",
        expected="a new one goes on from the checkpoint",
        moment="train",
        says=LOST + "lost trainer 0: trainer 0 " + ENDED,
    ),
    "nan-gradient": Drill(
        fault="a reward that is NaN",
        expected="the step is refused, with the weights unchanged",
        moment="train",
        says="FAIL: .*gradient norm of nan",
        code=FAIL,
    ),
    "nan-weight": Drill(
        fault="a NaN in one weight of all trainers' optimizers",
        expected="the weight is named, and the push refused",
        moment="train",
        says=r"FAIL: .*NaN or Inf in \S+: push refused",
        code=FAIL,
    ),
    "drifted-replicas": Drill(
        fault="one weight of one trainer's optimizer changes",
        expected="the weight is named, and the push refused",
        moment="train",
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
        expected="the engine dies of it, its queues being there; the run says what it needs to replace it, and ends",
        moment="generate",
        says=r"FAIL: /dev/shm has \d+ MiB free, .* Try: mount",
        code=FAIL,
    ),
    "oom-wake": Drill(
        fault="no GPU memory is left when the engine wakes up",
        expected="the run says so, with what to type, and ends",
        moment="push",
        says="FAIL: .*Out of GPU memory in the stage 'push'. Try: ",
        code=FAIL,
        gpu=True,
    ),
}
# The negative controls: {drill: (what is done, the check that must fail)}.
FAULTS = {
    "drop-tensor": ("one weight is not sent", "push"),
    "swap-tensors": ("two weights of one shape are sent under each other's name", "transport"),
    "flip-element": ("one bit of one loaded parameter is flipped", "placement"),
    "wrong-tp-slice": ("rank 0 loads rank 1's slice of one weight", "placement"),
    "damage-beside": ("a buffer is damaged that no push brings, such as a rotary cache", "beside"),
    "drift-replica": ("the last trainer's weights differ from the others'", "replicas"),
    "skip-push": ("nothing is copied, and the engines are told that it was", "changed"),
}
for name, (fault, check) in FAULTS.items():
    DRILLS[name] = Drill(
        fault=fault,
        expected=f"the check {check!r} fails",
        moment="handles" if name in ("drop-tensor", "swap-tensors") else "perturb",
        says=r"FAIL: .*HandleError: .*missing: \w" if name == "drop-tensor" else f"FAIL: (.*; )?{check}: ",
        code=FAIL,
    )
KILL_TRAINER_1 = ("kill-trainer-idle", "no-restarts", "kill-shard", "kill-shard-of-set")  # before a rollout
PIECES = ("missing-piece", "moved-piece", "swapped-pieces")  # what a push out of shards must notice
# What the script is started with, by run; {tmp} is a folder of the run's own.
DEADLINES = ("--stage-timeout", "push={push_s:g},rollout={rollout_s:g}")
SHARDS = ("--trainer", "fsdp", "--shard-size", "2")
CHECKPOINT = ("--checkpoint", "{tmp}/checkpoint", "--checkpoint-every", "1")
FLAGS = {
    # A save compares replicas.
    "survive": [*TWO, "--steps", "13", "--max-restarts", "12", "--sleep-level", "2", *CHECKPOINT, *DEADLINES],
    "no-checkpoint": ["--num-gpus", "2", "--tensor-parallel-size", "1", "--steps", "6", "--max-restarts", "10"],
    "shards": [*TWO, *SHARDS, "--steps", "7", "--max-restarts", "2", *CHECKPOINT],
    "replicas": ["--num-gpus", "4", "--tensor-parallel-size", "2", *SHARDS, "--steps", "3"],
    "stale-handle": [*ONE, "--steps", "3", *CHECKPOINT],
    "no-restarts": [*TWO, "--steps", "3", "--max-restarts", "0"],
    "last-trainer-checkpoint": [*ONE, "--steps", "3", *CHECKPOINT],
    "nan-weight": [*ONE, "--steps", "2"],  # weights are looked at in the first and the last step
    "drifted-replicas": [*TWO, "--steps", "2"],
    "oom-wake": [*ONE, "--steps", "3", "--sleep-level", "2"],
    "corrupt-handle": [*ONE, "--steps", "0"],
    **{name: [*TWO, "--steps", "0"] for name in FAULTS},
}


# ---------------------------------------------------------------------------------------------------------------------
# In a worker, a trainer, an engine
# ---------------------------------------------------------------------------------------------------------------------


def disturb(worker, kind: str, seconds: float = 0) -> None:
    """Let the last rank's next push wait for so many seconds ("wait"), be stopped ("stop"), or fail ("fail")."""
    if worker.rank != worker.parallel_config.tensor_parallel_size - 1:
        return

    def disturbed(version: int) -> dict:
        del worker.push_weights
        if kind == "fail":
            raise RuntimeError("the drill's error")
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(seconds)
        return worker.push_weights(version)

    worker.push_weights = disturbed


def corrupt(worker, messages: dict, fault: str) -> None:
    """Damage what rank 0 has, as a broken push or sleep would: "flip-element", "wrong-tp-slice" or "damage-beside"."""
    import rlhf_utils

    if worker.rank != 0:
        return
    parameters = dict(worker.get_model().named_parameters())
    if fault == "damage-beside":
        tensor = next(iter(verify.beside(worker).values()))
        worker.__dict__.setdefault("undamaged", (tensor, tensor.clone()))
        tensor.add_(1)
        return
    if fault == "flip-element":
        parameter = next(p for p in parameters.values() if p.dim() == 2)
        parameter.data.view(verify.BITS[parameter.dtype.itemsize])[0, 0] ^= 1  # the last row may be padding
        return
    tp_size = worker.parallel_config.tensor_parallel_size
    with rlhf_utils.open_pieces(messages, rlhf_utils.device_uuid(worker.device), worker.device) as weights:
        for name, parameter in parameters.items():
            weight = rlhf_utils.whole(weights[name]) if name in weights else None
            # A row-parallel layer: its columns are cut, and nothing else is done to them.
            if weight is not None and parameter.shape == (weight.shape[0], weight.shape[-1] // tp_size) != weight.shape:
                parameter.data.copy_(weight.chunk(tp_size, 1)[1])
                return
    raise RuntimeError("no weight is cut in columns. Try: --tensor-parallel-size 2")


def repair(worker) -> None:
    """Undo "damage-beside", and look anew."""
    if undamaged := worker.__dict__.pop("undamaged", None):
        tensor, before = undamaged
        tensor.copy_(before)
    verify.first_look(worker)


def spoil(trainer, value: float) -> None:
    """Change one element of the first weight, which is the embedding's, in the optimizer."""
    trainer.learner.masters[0][7, 3] = value


def stay_busy(trainer, seconds: float) -> None:
    time.sleep(seconds)


def pretend_version(trainer, version: int) -> None:
    trainer.version.fill_(version)


def die_before_reply(trainer) -> None:
    """The next step is done, but its metrics are never sent."""
    trainer.state = lambda: os.kill(os.getpid(), signal.SIGKILL)


def believe_in_push(engine, version: int) -> None:
    """Else it would refuse to generate."""
    engine.version = version


def fill_gpu(trainer) -> None:
    """Take all GPU memory but 200 MiB."""
    import torch

    trainer.ballast = []
    while (free := torch.cuda.mem_get_info()[0]) > 200 * 2**20:
        trainer.ballast.append(torch.empty(min(free - 150 * 2**20, 2**30), dtype=torch.uint8, device="cuda"))


# ---------------------------------------------------------------------------------------------------------------------
# In the driver: the script's own layout, with the faults in it
# ---------------------------------------------------------------------------------------------------------------------


class Drilled(rc.Colocation):
    """A layout that is broken by these drills, one in each RLHF step, beginning with the second.

    patience: factor of all waits, on a machine that is busy with other things.
    """

    def __init__(self, *args, drills: Iterable[str] = (), patience: float = 1):
        super().__init__(*args)
        self.to_come = [*drills]
        self.patience = patience
        self.rollouts = 0
        self.armed = ""  # the drill whose moment comes next
        self.control = ""  # the negative control that breaks every push from now on
        self.last_rank = f"engine 0 rank {self.config.tensor_parallel_size - 1}"
        if self.to_come and DRILLS[self.to_come[0]].moment in EARLY:
            self.armed = self.to_come.pop(0)

    def strikes(self, moment: str) -> str:
        """The drill that is due at this moment, if any: only once."""
        if not self.armed or DRILLS[self.armed].moment != moment:
            return ""
        due = self.armed
        self.armed = ""
        self.announce(due)
        if due in FAULTS:
            self.control = due
        return due

    def announce(self, drill: str) -> None:
        """The line from which the runner counts the seconds to the message."""
        self.report("drill", f"{drill}: {DRILLS[drill].fault}")

    def kill(self, role: str, drill: str = "", after: float = 0.0, signum: int = signal.SIGKILL) -> None:
        """Send a process a signal. after: seconds, then the drill is announced anew."""
        watch = self.fleet.watch
        pid = next(m.pid for m in [*watch.members, *watch.ray] if m.role == role)

        def strike() -> None:
            self.announce(drill)
            os.kill(pid, signum)

        if after:
            threading.Timer(after, strike).start()
        else:
            os.kill(pid, signum)

    def on_workers(self, call: str | Callable, *args) -> list:
        """Functions of this file are called as such."""
        return super().on_workers(f"benchmarks.drills:{call.__name__}" if callable(call) else call, *args)

    def refused(self, method: str, *args, **options) -> None:
        try:
            self.fleet.ask(self.engines, method, *args, **options)
        except Stop as stop:
            self.report("drill", f"refused: {stop}")

    # --- the moments

    def start(self, names: list[str]) -> None:
        if drill := self.strikes("start"):

            def strike() -> None:
                while not (new := starting_worker(self)):
                    time.sleep(0.05)
                self.announce(drill)
                new.kill()

            threading.Thread(target=strike, daemon=True).start()
        super().start(names)

    def join_trainers(self) -> None:
        if self.strikes("join_trainers"):
            os.kill(self.fleet.ask(["trainer 0"], "report_device_id")[0]["pid"], signal.SIGKILL)
        super().join_trainers()

    def generate(self, prompts: list[list[int]], seed: int | None = None, **sampling) -> list[dict]:
        if seed is not None:  # a step's rollout, not the proof's questions
            self.begin_rollout()
        return super().generate(prompts, seed, **sampling)

    def begin_rollout(self) -> None:
        self.rollouts += 1
        if self.rollouts > 1 and self.to_come and not self.armed:
            self.armed = self.to_come.pop(0)
        drill = self.strikes("generate")
        if drill == "kill-worker-idle" or self.armed == "kill-worker-twice":
            self.kill(self.last_rank)
        elif drill == "kill-worker-rollout":
            self.kill(self.last_rank, drill, after=0.05)  # on an H100 a rollout takes 0.2 s
        elif drill == "stop-worker-rollout":
            self.kill(self.last_rank, drill, after=0.05, signum=signal.SIGSTOP)
        elif drill == "kill-engine":
            self.kill("engine 0")
        elif drill == "kill-gcs":
            self.kill("Ray's gcs_server")
        elif drill == "kill-raylet":
            self.kill("Ray's raylet")
        elif drill in KILL_TRAINER_1 or self.armed == "kill-trainer-twice":
            self.kill("trainer 1")
        elif drill == "last-trainer":
            self.kill("trainer 0")
        elif drill == "stale-handle":
            self.restart_trainers()
            self.report("drill", f"{drill}: the engine still has the old one's memory mapped")
        elif drill == "full-shm":
            fill(FILLER)

    def restart_trainers(self) -> None:
        """Start all trainers again from `checkpoint`, and leave the engines connected to the old ones."""
        self.fleet.end({*self.trainers})
        self.start(self.trainers)
        self.connected = True

    def train(self, samples: list[dict]) -> dict:
        drill = self.strikes("train")
        if drill == "nan-gradient":
            samples[0]["advantage"] = float("nan")
        elif drill == "nan-weight":
            self.fleet.ask(self.trainers, spoil, float("nan"))
        elif drill == "drifted-replicas":
            self.fleet.ask(self.trainers[-1:], spoil, 0.5)
        elif drill == "kill-worker-busy":
            self.fleet.actors["trainer 0"].__ray_call__.remote(stay_busy, BUSY_S)  # its step has to wait for that
            self.kill("engine 0 rank 0", drill, after=1)
        elif drill in ("kill-trainer-train", "kill-shard-train"):
            self.kill("trainer 1", drill, after=0.02)
        elif drill == "kill-trainer-reply":
            self.fleet.ask(["trainer 1"], die_before_reply)
        elif drill == "last-trainer-checkpoint":
            self.kill("trainer 0")
        return super().train(samples)

    def restore(self) -> tuple[int, dict]:
        state = super().restore()
        if self.strikes("restore"):
            self.kill(self.last_rank)
        return state

    def change_weights(self, method: str | Callable, **asked) -> dict:
        if method is checks.perturb and self.strikes("perturb") == "drift-replica":
            self.fleet.ask(self.trainers[-1:], checks.perturb, version=next(self.versions))
        return super().change_weights(method, **asked)

    def push(self) -> dict:
        if self.control == "skip-push":
            self.fleet.ask(self.engines, believe_in_push, self.version)
            return {}
        drill = self.strikes("push")
        steps = self.report.data.get("steps")
        if steps and steps[-1]["step"] == self.report.last:
            drill = drill or self.strikes("last push")
        if drill in ("kill-worker-push", "kill-trainer-push"):
            self.on_workers(disturb, "wait", 2 * self.patience)
            self.kill(self.last_rank if drill == "kill-worker-push" else "trainer 1", drill, after=1)
        elif drill == "kill-worker-last":
            self.kill(self.last_rank)
        elif drill == "kill-one-engine":
            self.kill("engine 1 rank 0")
        elif drill == "stop-worker":
            self.on_workers(disturb, "stop")
        elif drill == "push-asleep":
            self.refused("collective_rpc", "push_weights", -1)
        elif drill == "oom-wake":
            self.fleet.ask(self.trainers, fill_gpu)
        elif drill in PIECES:
            self.push_wrong_pieces(drill)
        elif drill == "stale-shard":
            self.fleet.ask(["trainer 1"], pretend_version, self.version - 1)
            self.fleet.ask(self.engines, "wake_up", "weights")
            self.refused("collective_rpc", "push_weights", self.version)
            self.fleet.ask(["trainer 1"], pretend_version, self.version)
        push = super().push()
        if drill == "torn-push":
            self.on_workers(disturb, "fail")
            self.refused("collective_rpc", "push_weights", self.version)
            self.refused("generate", [[11, 12]], self.version, None, max_tokens=1)
            push = super().push()
        if self.control in ("flip-element", "wrong-tp-slice", "damage-beside"):
            self.on_workers(corrupt, self.handles(), self.control)
        return push

    def push_wrong_pieces(self, drill: str) -> None:
        """Connect the engine to these, and push if it takes them. It is connected anew afterwards."""
        self.control = drill
        self.connected = False
        if drill == "swapped-pieces":
            super().push()
            wrong = rc.compare_elements(self)["transport"]["wrong"]
            self.report("drill", f"noticed: transport: {', '.join(next(iter(wrong.values()), []))}")
        else:
            self.refused("collective_rpc", "connect_weights", self.handles())
        self.control = ""
        self.connected = False

    def handles(self) -> dict[str, dict]:
        messages = super().handles()
        if self.strikes("handles") == "corrupt-handle":
            damage(messages)
        if self.control in ("drop-tensor", "swap-tensors"):
            misname(next(iter(messages.values())), self.control)
        if self.control in PIECES:
            misplace([*messages.values()], self.control)
        return messages


def starting_worker(colocation: rc.Colocation):
    """A worker's process, as soon as there is one that has not reported yet."""
    import psutil

    for process in colocation.fleet.watch.unreported():
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith("ray::RayWorkerProc"):  # vLLM's class
                return process
    return None


def damage(messages: dict[str, dict]) -> None:
    """Change the bytes of all handles, under a checksum that fits."""
    import rlhf_utils

    for message in messages.values():
        for storage in message["storages"]:
            if "path" in storage:
                storage["path"] = storage["path"].replace("fd/", "fd/9")
            for export in storage.get("exports", []):
                export["handle"] = bytes(b ^ 0x5A for b in export["handle"])
        message["checksum"] = rlhf_utils.checksum(message)


def misname(message: dict, fault: str) -> None:
    """Leave one weight out ("drop-tensor"), or exchange the names of two of one shape ("swap-tensors")."""
    import rlhf_utils

    weights = message["weights"]
    if fault == "drop-tensor":
        weights.pop(len(weights) // 2)
    else:
        first: dict[tuple, dict] = {}  # of each shape
        matrices = (w for w in weights if len(w["shape"]) == 2)
        twins = ((w, first.setdefault(tuple(w["shape"]), w)) for w in matrices)
        one, other = next((w, twin) for w, twin in twins if w is not twin)
        one["name"], other["name"] = other["name"], one["name"]
    message["checksum"] = rlhf_utils.checksum(message)


def misplace(messages: list[dict], drill: str) -> None:
    """Send wrong pieces of one weight: the first with equal pieces in two trainers' messages."""
    import rlhf_utils

    first, second = ({w["name"]: w for w in message["weights"]} for message in messages)
    name = next(n for n, w in first.items() if len(w["shape"]) == 2 and second[n]["shape"] == w["shape"])
    if drill == "missing-piece":
        messages[1]["weights"].remove(second[name])
    elif drill == "moved-piece":
        second[name]["start"][0] -= 1
    else:
        first[name]["start"], second[name]["start"] = second[name]["start"], first[name]["start"]
    for message in messages:
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
    traces = Traces()
    gpu = gpu_used_mib()
    lines: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory(prefix="drill-") as tmp:
        report = Path(tmp) / "report.json"
        limits = {"push_s": patience * DEADLINE_S, "rollout_s": patience * ROLLOUT_DEADLINE_S}
        flags = [f.format(tmp=tmp, **limits) for f in flags]
        drills = ["--play", ",".join(names), f"{patience:g}"]
        command = [sys.executable, __file__, *drills, *flags, "--output-json", str(report)]
        inside = Path(tmp) / "shm"
        if names[0].startswith("full-shm"):  # a /dev/shm of its own, which only its own processes can list
            size = 100 if names[0] == "full-shm-start" else 1000
            mount = f"mount -t tmpfs -o size={size}m tmpfs /dev/shm || exit 99"
            steps = f'{mount}; "$@"; code=$?; rm -f {FILLER}; ls -A /dev/shm > {inside}; exit $code'
            command = ["unshare", "--mount", "sh", "-c", steps, "sh", *command]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        start = time.monotonic()
        with subprocess.Popen(command, env=os.environ | traces.env, **options) as process:
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
        weights = done["steps"][-1].get("weights") if done.get("steps") else None  # their digest, after the last step
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
    usage = "%(prog)s [NAME ...] [--output FILE] [flags of rlhf_colocate.py]"
    text = f"{__doc__}\ndrills:\n{drills}"
    parser = argparse.ArgumentParser(usage=usage, description=text, formatter_class=formatter)
    parser.add_argument("--output", help="JSON; rows of the same drills that are in it already are replaced")
    parser.add_argument("--patience", type=float, default=1, help="stretch all deadlines by this factor (default: 1)")
    chosen = list(itertools.takewhile(lambda a: not a.startswith("-"), sys.argv[1:]))  # none: all that can be done here
    args, flags = parser.parse_known_args(sys.argv[1 + len(chosen) :])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends it as Ctrl-C does
    if unknown := [n for n in chosen if n not in DRILLS]:
        parser.error(f"no drill {', '.join(unknown)}; --help lists them")
    rows = []
    report = {}
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
        path = Path(args.output)
        done = json.loads(path.read_text()) if path.exists() else {"rows": []}
        done |= report | {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        done.setdefault("commands", []).append(" ".join(["python benchmarks/drills.py", *chosen, *flags]))
        by_name = {row["drill"]: row for row in (*done["rows"], *rows)}
        done["rows"] = [by_name[name] for name in DRILLS if name in by_name]
        path.write_text(json.dumps(done, indent=1) + "\n")
    return PASS if all(r["ok"] for r in rows) else FAIL


if __name__ == "__main__":
    if sys.argv[1:2] == ["--play"]:
        from benchmarks import drills  # under the name that Ray's and vLLM's processes know

        names, patience, *flags = sys.argv[2:]
        layout = functools.partial(drills.Drilled, drills=names.split(","), patience=float(patience))
        sys.exit(rc.main(flags, layout))
    sys.exit(main())
