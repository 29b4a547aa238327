"""A running layout that many tests share: real Ray, real vLLM, two trainers and one engine of two ranks.

It lives in a process of its own, since Ray's settings go into os.environ there. A test hands it a function, which gets
the `Shared` layout and returns plain data. Whatever the function did to it, the layout is brought back to how it was.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from unittest import mock

from running import ROOT, TINY, deadline, require_nothing_left, shape

import rlhf_colocate as rc
from benchmarks import drills
from benchmarks.traces import Traces

LAYOUT = ["--num-gpus", "2", "--tensor-parallel-size", "2", "--dtype", "float32", "--steps", "2", "--max-tokens", "8"]
LAYOUT += ["--prompts-per-step", "4", "--group-size", "4", "--kl-coef", "0.1", "--offload-optimizer"]


class FailingTrainer(drills.DrilledTrainer):
    def learn(self, samples: list[dict], total_tokens: int, version: int) -> dict[str, float]:
        if samples[0].pop("fails", False):
            raise OSError("the dog ate it")
        return super().learn(samples, total_tokens, version)


class Shared(rc.SabotagedColocation):
    """What a run of the script leaves when it has passed, with its engine awake, before it closes."""

    training_actor = FailingTrainer
    worker_extension = "drills.DrilledWorker"
    stale_after: int | None = None

    def start(self, report: dict) -> None:
        """Run the script's own start, proof and loop. The report is filled as its own is."""
        self.report = report
        self.first_config = self.config
        rc.run(self.config, self.log, report, self)
        self.versions = itertools.count(1_000)  # above all that a run of a few steps gives out: none comes twice
        # The state that every test finds: that of a checkpoint, so that trainers can start again from it.
        self.checkpoint = self.folder / "checkpoint"
        self.save(self.checkpoint)
        self.digests = self.check_replicas()

    def start_ray(self) -> None:
        import psutil

        super().start_ray()
        ours = {process.pid for process in [psutil.Process(), *psutil.Process().children(recursive=True)]}
        sockets = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in ours]
        self.listening = sorted({c.laddr.ip for c in sockets})

    def push(self, version: int) -> dict:
        pushed = super().push(version)
        if version == self.stale_after:  # the trainers go on from weights that the engine never saw
            self.on_trainers("perturb", version)
        return pushed

    def change(self, **settings) -> None:
        """Other flags, for this test."""
        self.config = dataclasses.replace(self.config, **settings)

    def heal(self) -> None:
        """Bring the layout back to how it was: the checkpoint's weights everywhere, the engine connected and awake."""
        self.config, self.state = self.first_config, "ready"
        self.stale_after, self.saved = None, self.checkpoint
        if self.on_trainers("progress")[0][0] != self.first_config.steps:
            self.rebuild_trainers(self.checkpoint)
        version = next(self.versions)
        self.on_trainers("restore", version)
        self.on_engines("wake_up", "weights")
        self.connect()
        self.push(version)
        self.on_engines("wake_up", "kv_cache")
        if self.check_replicas() != self.digests:
            raise RuntimeError("the weights are not those of the checkpoint any more")
        self.require_elements(self.digests, "after a test")


layout: Shared | None = None  # in the layout's own process
ending = contextlib.ExitStack()


def _start(arguments: list[str]) -> dict:
    global layout
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT)])
    scratch = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="live-")))
    config, log, report = rc.Config.from_args(arguments), rc.Log(), {"pushes": []}
    layout = Shared(*rc.preflight(config, log, report, scratch), log)
    ending.callback(layout.close)
    layout.start(report)
    return report | {"listening": layout.listening}


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
