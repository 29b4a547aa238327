"""A running layout that many tests share: real Ray, real vLLM, two trainers and one engine of two ranks.

It lives in a process of its own, since Ray's settings go into os.environ there. A test hands it a function, which gets
the `Shared` layout and returns plain data. Whatever the function did to it, the layout is brought back to how it was.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from unittest import mock

from running import ROOT, TINY, deadline, require_nothing_left, shape

import rlhf_colocate as rc
from benchmarks import drills, push_peers, soak
from benchmarks.traces import Traces
from colocate import checks, cluster, memory
from colocate.config import Stop
from colocate.preflight import preflight
from colocate.report import Report

LAYOUT = ["--num-gpus", "2", "--tensor-parallel-size", "2", "--dtype", "float32", "--steps", "2", "--max-tokens", "8"]
LAYOUT += ["--prompts-per-step", "4", "--group-size", "4", "--kl-coef", "0.1", "--offload-optimizer"]


class Shared(drills.Drilled, soak.Sampled, push_peers.PeerColocation):
    """What a run of the script leaves when it has passed, with its engine awake, before it closes."""

    engine_class = rc.MyLLM
    stale_after: int | None = None  # a step, after whose push the trainers go on from other weights

    def run(self, task: rc.Task) -> None:
        """The script's own start, proof and loop."""
        self.task = task
        self.first_config = self.config
        self.first_report = self.report
        rc.run(self, task)
        # The state that every test finds: that of a checkpoint, so that trainers can start again from it.
        self.first_checkpoint = self.folder / "checkpoint"
        self.save(self.first_checkpoint)
        self.weights = self.restore()[1]["weights"]
        self.heal()

    def start_ray(self) -> None:
        import psutil

        super().start_ray()
        ours = {process.pid for process in [psutil.Process(), *psutil.Process().children(recursive=True)]}
        sockets = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in ours]
        self.report.data["listening"] = sorted({c.laddr.ip for c in sockets})

    def push(self) -> dict:
        push = super().push()
        rollout = self.report.rollout
        if rollout and rollout["step"] == self.stale_after:
            self.fleet.ask(self.trainers, checks.perturb, version=self.version)
        return push

    def change(self, **settings) -> Report:
        """Other flags, and a new report, for this test."""
        config = dataclasses.replace(self.config, **settings)
        self.configure(config, Report(config, []))
        return self.report

    def configure(self, config: rc.Config, report: Report) -> None:
        self.config = config
        self.report = report
        self.fleet.report = report
        self.sleep_level = memory.SleepLevel(config.sleep_level, report)

    def heal(self) -> None:
        """Bring the layout back to how it was: the checkpoint's weights everywhere, the engine connected and awake."""
        self.configure(self.first_config, self.first_report)
        self.armed = ""
        self.control = ""
        self.stale_after = None
        self.checkpoint = self.first_checkpoint
        if not self.as_saved():
            self.disconnect(self.engines)
            self.restart_trainers()
            if not self.as_saved():
                raise RuntimeError("the weights are not those of the checkpoint any more")
        self.on_workers(drills.repair)
        self.connected = False
        self.push()
        self.elements()

    def as_saved(self) -> bool:
        """Whether the trainers have the checkpoint's weights, once they took them from their optimizers."""
        try:
            steps, metrics = self.restore()
        except Stop:
            return False
        return (steps, metrics["weights"]) == (self.first_config.steps, self.weights)

    def elements(self) -> int:
        """How many elements of the engine's parameters are the trainers'. Raises Stop if any is not."""
        found = rc.compare_elements(self)
        self.report.verified(0, found)
        return found["placement"]["checked"]

    def answers(self) -> list[dict]:
        """Greedy ones, to the proof's prompts."""
        return rc.every_engine_answers(self, self.task)


layout: Shared | None = None  # in the layout's own process
ending = contextlib.ExitStack()


def _start(arguments: list[str]) -> dict:
    global layout
    os.environ["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in (ROOT / "tests", ROOT / "benchmarks", ROOT))
    config = rc.Config.from_args(arguments)
    report = Report(config, arguments)
    folder = ending.enter_context(cluster.temporary_folder())
    config, model = preflight(config, report, folder)
    layout = ending.enter_context(Shared(config, model, report, folder))
    layout.run(rc.Task(config, model, rc.PROMPTS, rc.reward))
    return report.data


class NotHealed(Exception):
    """The layout is not as it was, so that no other test may use it."""


def _ask(function: Callable, *args):
    try:
        return function(layout, *args)
    finally:
        try:
            layout.heal()
        except Exception as error:
            raise NotHealed(f"{type(error).__name__}: {error}") from error


def _ask_last(function: Callable, *args):
    return function(layout, *args)


def _close() -> None:
    ending.close()


class Live:
    """The shared layout, seen from the tests. It starts when a test first needs it, or when it had to be ended."""

    def __init__(self, folder: Path):
        self.arguments = [*LAYOUT, *shape(folder, **TINY, tie_word_embeddings=True)]
        self.pool: concurrent.futures.ProcessPoolExecutor | None = None

    def start(self) -> None:
        if self.pool:
            return
        self.traces = Traces()
        resource_tracker.ensure_running()  # for all processes to come, so that it is none of the layout's
        spawn = multiprocessing.get_context("spawn")
        self.pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn)
        try:
            with mock.patch.dict(os.environ, self.traces.env):  # for the process, which begins now
                self.report = self._wait(_start, self.arguments)
        except Exception:
            self._kill()
            raise

    def __call__(self, function: Callable, *args):
        """function(layout, *args), of a test's module, in the layout's process. Its result, or its exception."""
        self.start()
        return self._wait(_ask, function, *args)

    def last(self, function: Callable, *args):
        """The same for something that the layout does not survive. Then it is closed."""
        self.start()
        try:
            return self._wait(_ask_last, function, *args)
        finally:
            self.close()

    def close(self) -> None:
        """End the layout, and look at what is left."""
        if self.pool:
            self._wait(_close)
            self.pool.shutdown()
            self.pool = None
            require_nothing_left(self.traces)

    def _wait(self, function: Callable, *args):
        """What a function returns or raises in there. A layout that is late or not healed is killed: nothing hangs."""
        try:
            return self.pool.submit(function, *args).result(deadline(300))
        except (TimeoutError, concurrent.futures.BrokenExecutor, NotHealed):
            self._kill()
            raise

    def _kill(self) -> None:
        if self.pool:
            self.traces.end()
            self.pool.shutdown()
            self.pool = None
            self.traces.left(deadline(10))
