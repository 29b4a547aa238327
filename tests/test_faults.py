"""Deadlines, the watch over processes, errors of workers, slopes: what can be said without Ray and vLLM."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from running import deadline, eventually

import rlhf_colocate as rc
from benchmarks.soak import slope
from colocate.config import USAGE, Stop, stage_timeouts
from colocate.fleet import Fleet
from colocate.report import Report
from colocate.watch import Watch, remove
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
    watch = Watch()
    watch.add([("engine 0", "engine 0 rank 1", sleeper.pid, "GPU-x")])
    watch.add([("engine 0", "engine 0 rank 2", os.getppid(), "GPU-y")])
    assert not watch.ended()
    sleeper.send_signal(signal.SIGSTOP)
    stopped = f"engine 0 rank 1 (pid {sleeper.pid} on GPU-x) is stopped"
    assert eventually(lambda: watch.describe({"engine 0"}) == stopped) and not watch.ended()
    assert watch.troubled({"engine 0"}) == {"engine 0"}
    sleeper.kill()
    assert eventually(lambda: watch.ended() == {"engine 0"})
    assert watch.describe({"engine 0"}) == stopped.replace("is stopped", "has ended")
    watch.drop("engine 0")
    assert not watch.ended() and watch.describe({"engine 0"}) == "engine 0"


def test_the_watch_knows_a_rank_from_the_engines_own_process(sleeper):
    fleet = Fleet(Report(rc.Config(), []), {}, 600)
    fleet.note(["trainer 0"], [{"pid": sleeper.pid, "gpu": "GPU-x"}])
    fleet.note(["engine 0"], [[{"pid": sleeper.pid, "gpu": "GPU-x", "tp_rank": 1, "engine_pid": os.getpid()}]])
    assert [(m.name, m.role, m.pid, m.gpu) for m in fleet.watch.members] == [
        ("trainer 0", "trainer 0", sleeper.pid, "GPU-x"),
        ("engine 0", "engine 0", os.getpid(), ""),
        ("engine 0", "engine 0 rank 1", sleeper.pid, "GPU-x"),
    ]


def test_an_out_of_memory_error_says_what_to_type():
    fleet = Fleet(Report(rc.Config(), []), {}, 600)
    error = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    hints = {"train": ("--tokens-per-micro-batch", "--gradient-checkpointing"), "wake KV": ("--offload-optimizer",)}
    for stage, flags in hints.items():
        with fleet.stage(stage):
            text = str(fleet._own_error({"trainer 0"}, "learn", error))
        assert f"Out of GPU memory in the stage {stage!r}. Try: " in text
        assert all(flag in text for flag in flags)
    with fleet.stage("rollout"):
        assert str(fleet._own_error({"trainer 0"}, "learn", error)).endswith(error)


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
            assert watch.files_of(process.pid) == {after.name}
            process.communicate("\n", timeout=deadline(30))
        remove({after.name, "was-never-there"})
        assert before.exists() and folder.exists() and not after.exists()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for file in (before, after):
            file.unlink(missing_ok=True)


class Rank(ColocateWorkerExtension):
    def __init__(self, error: Exception | None, version: int = 8):
        self.error = error
        self.version = version

    def push_weights(self, version: int) -> dict:
        if self.error:
            raise self.error
        return {"version": self.version}

    def record_weights(self) -> None:
        self.push_weights(0)


class Engine:
    """What vLLM does with a collective_rpc: it calls one rank after the other, and stops at the first exception."""

    def __init__(self, *ranks: Rank, prefix_cache_resets: bool = True):
        self.ranks = ranks
        self.prefix_cache_resets = prefix_cache_resets
        self.resets = 0

    def collective_rpc(self, method: str, args: tuple) -> list:
        return [getattr(rank, method)(*args) for rank in self.ranks]

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return self.prefix_cache_resets

    def wake_up(self, tags: list[str]) -> None:
        self.woken = [*getattr(self, "woken", []), *tags]

    def generate(self, prompts: list, params: list, use_tqdm: bool) -> list:
        return []


def with_errors(*errors: Exception | None) -> Engine:
    return Engine(*map(Rank, errors))


def test_the_errors_of_all_ranks_reach_the_caller():
    assert call_workers(with_errors(None, None), "push_weights", 3) == [{"version": 8}] * 2
    with pytest.raises(HandleError, match=r"^rank 1: stale$"):
        call_workers(with_errors(None, HandleError("stale")), "push_weights", 3)
    with pytest.raises(HandleError, match=r"^rank 0 and 1: stale$"):
        call_workers(with_errors(HandleError("stale"), HandleError("stale")), "push_weights", 3)
    with pytest.raises(RuntimeError, match=r"^rank 0: KeyError: 'x'; rank 1: stale$"):
        call_workers(with_errors(KeyError("x"), HandleError("stale")), "push_weights", 3)
    with pytest.raises(NotHandled, match=r"^rank 0 and 1: odd$"):
        call_workers(with_errors(NotHandled("odd"), NotHandled("odd")), "push_weights", 3)
    with pytest.raises(HandleError, match=r"^rank 0: odd; rank 1: stale$") as caught:
        call_workers(with_errors(NotHandled("odd"), HandleError("stale")), "push_weights", 3)
    assert caught.type is HandleError


def test_a_function_is_called_with_the_worker():
    assert call_workers(with_errors(None, None), "builtins:repr") == [mock.ANY] * 2
    assert call_workers(with_errors(None, None), "builtins:isinstance", Rank) == [True, True]
    with pytest.raises(RuntimeError, match=r"rank 0: ModuleNotFoundError: .*nowhere"):
        call_workers(with_errors(None), "nowhere:function")


@pytest.fixture
def without_vllm(monkeypatch):
    """Importing it takes ten seconds."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))


def actor(engine: Engine, version: int | None = 7, asleep: tuple[str, ...] = ()) -> rc.MyLLM:
    made = rc.MyLLM.__new__(rc.MyLLM)
    made.llm = engine
    made.version = version
    made.asleep = {*asleep}
    made.cached = True
    return made


def test_a_whole_push_is_a_version():
    healthy = actor(Engine(Rank(None), Rank(None)))
    pushed = healthy.push(8)
    assert [w["version"] for w in pushed["workers"]] == [8, 8] and pushed["reset_ms"] >= 0
    assert healthy.version == 8


@pytest.mark.parametrize(
    "engine, says",
    [
        (with_errors(None, HandleError("stale")), "^rank 1: stale$"),
        (Engine(Rank(None), Rank(None, version=6)), r"version \[6\], not 8"),
        (Engine(Rank(None), prefix_cache_resets=False), "prefix cache was not reset"),
    ],
)
def test_an_engine_without_a_whole_push_does_not_generate(without_vllm, engine, says):
    broken = actor(engine)
    with pytest.raises((HandleError, RuntimeError), match=says):
        broken.push(8)
    for version in (7, 8):
        with pytest.raises(RuntimeError, match="the engine is at version None"):
            broken.generate([[1, 2]], version, None)


def test_a_failed_look_does_no_harm():
    looked_at = actor(with_errors(None, HandleError("stale")))
    with pytest.raises(HandleError):
        looked_at.collective_rpc("record_weights")
    assert looked_at.version == 7


def test_an_engine_generates_at_one_version_only(without_vllm):
    with pytest.raises(RuntimeError, match=r"the engine is at version 7; .* at version 8 to generate"):
        actor(Engine()).generate([[1, 2]], 8, None)
    with pytest.raises(RuntimeError, match=r"the engine is asleep \(kv_cache\)"):
        actor(Engine(), asleep=("kv_cache",)).generate([[1, 2]], 7, None)


def test_sleeping_weights_are_not_written_and_a_push_wakes_them():
    asleep = actor(Engine(Rank(None)), asleep=("weights", "kv_cache"))
    with pytest.raises(RuntimeError, match="wake_up"):
        asleep.collective_rpc("push_weights", 8)
    pushed = asleep.push(8)
    assert asleep.llm.woken == ["weights", "kv_cache"] and not asleep.asleep
    assert all(pushed[name] >= 0 for name in ("wake_ms", "reset_ms", "wake_kv_ms"))


def test_a_push_that_fails_leaves_the_kv_cache_asleep():
    asleep = actor(Engine(Rank(HandleError("stale"))), asleep=("weights", "kv_cache"))
    with pytest.raises(HandleError):
        asleep.push(8)
    assert asleep.llm.woken == ["weights"] and asleep.asleep == {"kv_cache"}


def test_the_prefix_cache_is_reset_once_after_each_rollout(without_vllm):
    """Ahead of the push, while the trainers work; where that did not happen, in the push."""
    engine = actor(Engine(Rank(None)))
    engine.reset_prefix_cache()
    engine.push(8)
    assert engine.llm.resets == 1
    engine.generate([[1, 2]], 8, None)
    engine.push(8)
    assert engine.llm.resets == 2


def test_the_kv_cache_wakes_up_after_the_push():
    asleep = actor(Engine(), version=None, asleep=("kv_cache",))
    with pytest.raises(RuntimeError, match="after the push"):
        asleep.wake_up("kv_cache")


def test_slope():
    flat = slope([5.0] * 40)
    assert flat["slope"] == flat["low"] == flat["high"] == 0
    rising = slope([3.0 * i + (i % 2) for i in range(100)])
    assert rising["low"] <= 3 <= rising["high"] and rising["low"] > 2.9
    noise = slope([float((i * 7919) % 13) for i in range(200)])
    assert noise["low"] < 0 < noise["high"]
