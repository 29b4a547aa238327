"""Deadlines, the watch over processes, errors of workers, slopes: what can be said without Ray and vLLM."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from running import deadline, eventually

import rlhf_colocate as rc
from benchmarks.soak import slope
from colocate.config import USAGE, Stop, stage_timeouts
from colocate.fleet import Watch, remove
from rlhf_utils import ColocateWorkerExtension, HandleError, NotHandled, call_workers


def test_stage_timeouts():
    assert stage_timeouts(rc.Config()) == {}
    assert stage_timeouts(rc.Config(stage_timeout="push=5,rollout=0.5")) == {"push": 5, "rollout": 0.5}


@pytest.mark.parametrize("text", ["push", "push=", "push=soon", "push=-1", "push=0", "lunch=5", "=3"])
def test_a_wrong_stage_timeout_is_refused(text):
    with pytest.raises(Stop, match="STAGE=SECONDS") as stop:
        stage_timeouts(rc.Config(stage_timeout=text))
    assert stop.value.code == USAGE


@pytest.fixture
def sleeper():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def test_the_watch_tells_who_is_stopped_and_who_has_ended(sleeper):
    watch, part = Watch(), ("engine", 0)
    watch.add([(part, "engine 0 rank 1", sleeper.pid, "GPU-x"), (part, "engine 0 rank 2", os.getppid(), "GPU-y")])
    assert not watch.ended()
    sleeper.send_signal(signal.SIGSTOP)
    stopped = f"engine 0 rank 1 (pid {sleeper.pid} on GPU-x) is stopped"
    assert eventually(lambda: watch.describe({part}) == stopped) and not watch.ended()
    sleeper.kill()
    assert eventually(lambda: watch.ended() == {part})
    assert watch.describe({part}) == stopped.replace("is stopped", "has ended")
    watch.drop(part)
    assert not watch.ended() and watch.describe({part}) == "engine 0"


def test_only_what_a_run_has_made_is_removed_from_dev_shm():
    """A model, a checkpoint or an environment kept there is mapped as well."""
    name = f"rlhf-test-{os.getpid()}"
    before, after, folder = (Path(f"/dev/shm/{name}{end}") for end in ("-before", "-after", ""))
    child = "import mmap, sys\nopened = [open(f, 'r+b') for f in sys.argv[1:]]\n"
    child += "maps = [mmap.mmap(f.fileno(), 0) for f in opened]\nprint(len(maps), flush=True)\ninput()"
    try:
        folder.mkdir()
        before.write_bytes(b"x")
        watch = Watch()
        for file in (after, folder / "model.safetensors"):
            file.write_bytes(b"x")
        files = [str(f) for f in (before, after, folder / "model.safetensors")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", child, *files], **pipes) as process:
            assert process.stdout.readline() == "3\n"
            assert watch.shared_memory_files(process.pid) == {after.name}
            process.communicate("\n", timeout=deadline(30))
        remove({after.name, "was-never-there"})
        assert before.exists() and folder.exists() and not after.exists()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for file in (before, after):
            file.unlink(missing_ok=True)


class Rank(ColocateWorkerExtension):
    def __init__(self, error: Exception | None):
        self.error = error

    def push_weights(self, version: int) -> dict:
        if self.error:
            raise self.error
        return {"version": version}

    def record_weights(self) -> None:
        self.push_weights(7)


class Workers:
    """What vLLM does with a collective_rpc, with ranks that fail."""

    def __init__(self, *errors):
        self.errors = errors

    def collective_rpc(self, method, args):
        return [getattr(Rank(error), method)(*args) for error in self.errors]


def test_the_errors_of_all_ranks_reach_the_caller():
    assert call_workers(Workers(None, None), "push_weights", 3) == [{"version": 3}] * 2
    with pytest.raises(HandleError, match=r"^rank 1: stale$"):
        call_workers(Workers(None, HandleError("stale")), "push_weights", 3)
    with pytest.raises(HandleError, match=r"^rank 0 and 1: stale$"):
        call_workers(Workers(HandleError("stale"), HandleError("stale")), "push_weights", 3)
    with pytest.raises(RuntimeError, match=r"^rank 0: KeyError: 'x'; rank 1: stale$"):
        call_workers(Workers(KeyError("x"), HandleError("stale")), "push_weights", 3)
    with pytest.raises(NotHandled, match=r"^rank 0 and 1: odd$"):
        call_workers(Workers(NotHandled("odd"), NotHandled("odd")), "push_weights", 3)
    with pytest.raises(HandleError, match=r"^rank 0: odd; rank 1: stale$") as caught:
        call_workers(Workers(NotHandled("odd"), HandleError("stale")), "push_weights", 3)
    assert caught.type is HandleError


def test_a_function_is_called_with_the_worker():
    assert call_workers(Workers(None, None), "builtins:repr") == [mock.ANY] * 2
    assert call_workers(Workers(None, None), "builtins:isinstance", Rank) == [True, True]
    with pytest.raises(RuntimeError, match=r"rank 0: ModuleNotFoundError: .*nowhere"):
        call_workers(Workers(None), "nowhere:function")


def engine(workers: Workers) -> rc.MyLLM:
    made = rc.MyLLM.__new__(rc.MyLLM)
    made.llm, made.version, made.asleep = workers, 7, set()
    return made


def test_a_failed_push_poisons_the_engine_and_a_failed_look_does_not():
    healthy = engine(Workers(None))
    healthy._require_whole_weights()
    healthy.collective_rpc("builtins:repr")
    assert healthy.weights_version() == 7
    broken = engine(Workers(None, HandleError("stale")))
    with pytest.raises(HandleError):
        broken.collective_rpc("record_weights")
    assert broken.weights_version() == 7
    with pytest.raises(HandleError):
        broken.collective_rpc("push_weights", 8)
    assert broken.weights_version() is None
    with pytest.raises(RuntimeError, match="no whole push in it"):
        broken.generate([[1, 2]], 1)
    with pytest.raises(RuntimeError, match="no whole push in it"):
        broken.rollout([[1, 2]], 2, 1, [0])


def test_weights_that_moved_are_refused_before_they_get_a_version():
    """Engines have their memory mapped: a push would bring in what was there before."""
    trainer = rc.RayTrainingActor.__new__(rc.RayTrainingActor)
    trainer.model = torch.nn.Linear(2, 2)
    trainer.device = torch.device("cpu")
    trainer.version = torch.tensor(1)
    trainer.addresses = [p.data_ptr() for p in trainer.model.parameters()]
    with trainer._weights_change(2):
        trainer.model.weight.data.add_(1)
    assert int(trainer.version) == 2
    with pytest.raises(RuntimeError, match="moved"), trainer._weights_change(3):
        trainer.model.weight.data = trainer.model.weight.data + 1
    assert int(trainer.version) == -1


def test_a_push_to_sleeping_weights_is_refused():
    asleep = engine(Workers(None))
    asleep.asleep = {"weights", "kv_cache"}
    with pytest.raises(RuntimeError, match="needed wake_up"):
        asleep.collective_rpc("push_weights", 8)
    asleep.asleep = {"kv_cache"}
    assert asleep.collective_rpc("push_weights", 8)


def test_slope():
    flat = slope([5.0] * 40)
    assert flat["slope"] == flat["low"] == flat["high"] == 0
    rising = slope([3.0 * i + (i % 2) for i in range(100)])
    assert rising["low"] <= 3 <= rising["high"] and rising["low"] > 2.9
    noise = slope([float((i * 7919) % 13) for i in range(200)])
    assert noise["low"] < 0 < noise["high"]
