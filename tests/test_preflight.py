"""What can be known before anything slow: one message, the right exit code, at once. No vLLM, no Ray, no GPU."""

from __future__ import annotations

import dataclasses
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlhf_colocate as rc
from colocate import config as cc
from colocate import preflight as rp
from colocate.config import MISSING, USAGE, Config, Stop

ROOT = Path(__file__).resolve().parent.parent


def script(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "rlhf_colocate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_help_is_quick_and_imports_nothing_heavy():
    start = time.perf_counter()
    done = script("--help")
    assert time.perf_counter() - start < 2
    assert done.returncode == 0
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in done.stdout
        assert len(field.metadata["help"]) > 10
    heavy = "import sys, rlhf_colocate; print({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True, cwd=ROOT).strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tensor-parallel-size", "3"], "type --tensor-parallel-size 2"),
        (["--num-gpus", "0"], "1 or more"),
        (["--trainer-gpu-share", "0.7"], "at most 1"),
        (["--gpu-memory-utilization", "1.5"], "between 0 and 1"),
        (["--num-gpus", "1", "--tensor-parallel-size", "1", "--inject", "wrong-tp-slice"], "--tensor-parallel-size 2"),
        (["--num-gpus", "1", "--tensor-parallel-size", "1", "--inject", "drift-replica"], "--num-gpus 2"),
        (["--output-json", "/no/such/folder/report.json"], "mkdir -p /no/such/folder"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, says):
    start = time.perf_counter()
    done = script(*arguments)
    assert time.perf_counter() - start < 20
    assert done.returncode == USAGE
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("rlhf_colocate.py: error: found ") and says in message
    assert "Traceback" not in done.stderr


def refused(code: int, says: str):
    class Refused:
        def __enter__(self):
            return self

        def __exit__(self, kind, error, _):
            assert kind is Stop, f"not refused: {error}"
            assert error.code == code and says in str(error), str(error)
            return True

    return Refused()


@pytest.mark.parametrize("n, tp", [(1, 1), (2, 1), (2, 2), (4, 2), (8, 4)])
def test_layouts_that_divide_are_accepted(n, tp):
    cc.check_layout(Config(num_gpus=n, tensor_parallel_size=tp))


def gpus(n: int, free: float = 80_000) -> list[dict]:
    return [{"index": str(i), "uuid": f"GPU-{i}", "name": "H100", "total": 81_559, "free": free} for i in range(n)]


def test_hardware(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert rp.check_hardware(Config(), gpus(4), False)["mode"] == "CUDA IPC"
    with refused(MISSING, "type --num-gpus 2 --tensor-parallel-size 2"):
        rp.check_hardware(Config(), gpus(2), False)
    with refused(MISSING, "no NVIDIA GPU"):
        rp.check_hardware(Config(), [], False)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        with monkeypatch.context() as m, refused(MISSING, f"unset {name}"):
            m.setenv(name, "max_split_size_mb:64, expandable_segments: True")
            rp.check_hardware(Config(), gpus(4), False)


def test_visible_gpus_keep_the_users_order(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    rows = "\n".join(f"{i}, GPU-aa{i}, NVIDIA H100, 81559, 81000" for i in range(8))
    tool.write_text(f"#!/bin/sh\ncat <<END\n{rows}\nEND\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(rp.find_gpus()) == 8
    for visible, expected in [("4,5,6,7", "4567"), ("3,1", "31"), ("GPU-aa2", "2"), ("", "")]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [g["index"] for g in rp.find_gpus()] == list(expected)


def trainer(gpu: str, torch: str = "2.13.0+cpu") -> dict:
    return {"gpu": gpu, "pid": 1, "torch": torch}


def worker(gpu: str, rank: int) -> dict:
    return {"gpu": gpu, "tp_rank": rank, "pid": 2, "torch": "2.13.0"}


def test_placement_is_a_bijection():
    engines = [[worker("b", 0), worker("a", 1)], [worker("c", 0), worker("d", 1)]]  # rank order is not bundle order
    rows = rc.match_placement([trainer(g) for g in "abcd"], engines)
    assert [(r["bundle"], r["gpu"], r["engine"], r["tp_rank"]) for r in rows] == [
        *((0, "a", 0, 1), (1, "b", 0, 0)),
        *((2, "c", 1, 0), (3, "d", 1, 1)),
    ]
    with pytest.raises(Stop, match="both have a worker on a"):
        rc.match_placement([trainer("a")], [[worker("a", 0)], [worker("a", 0)]])
    with pytest.raises(Stop, match="trainer 1 is on a"):
        rc.match_placement([trainer("a"), trainer("a")], [[worker("a", 0), worker("b", 1)]])
    with pytest.raises(Stop, match="worker on b, where there is no trainer"):
        rc.match_placement([trainer("a")], [[worker("a", 0), worker("b", 1)]])
    with pytest.raises(Stop, match="needed one version"):
        rc.match_placement([trainer("a", "2.12.0")], [[worker("a", 0)]])


def test_checks_fail_when_they_must():
    same, other = {"a": "1", "b": "2"}, {"a": "1", "b": "3"}
    assert rc.different_weights([same, same]) == []
    assert rc.different_weights([same, other]) == ["b"]
    assert rc.different_weights([same, {"a": "1"}]) == ["b"]

    assert rc.check_changed([True, True])["ok"]
    assert not rc.check_changed([False, False])["ok"], "a list of False is truthy, and must not pass"
    assert not rc.check_changed([])["ok"]

    def result(wrong, checked=5):
        return {"gpu": "g", "tp_rank": 0, "transport": {"checked": checked, "wrong": wrong}}

    assert rc.check_workers([result([]), result([])], "transport")["ok"]
    assert not rc.check_workers([result([]), result(["w"])], "transport")["ok"]
    assert not rc.check_workers([result([]), result([], checked=0)], "transport")["ok"], "nothing checked"


@pytest.mark.parametrize(
    ("old", "new", "trainers", "ok"),
    [
        (-5.0, -2.00, -2.01, True),
        (-5.0, -2.00, -2.90, False),  # the engine has other weights than the trainer
        (-2.0, -2.00, -2.01, False),  # nothing has moved
    ],
)
def test_behaviour(old, new, trainers, ok):
    before = [[{"prompt": [1, 2, 3], "logprobs": [old] * 4}]]
    after = [[{"prompt": [1, 2, 3], "logprobs": [new] * 4}]]
    assert rc.check_behaviour(before, after, [[[trainers] * 4]], tolerance=0.06)["ok"] is ok


@pytest.mark.parametrize("bad", [-3.0, float("nan")])
def test_behaviour_fails_for_a_single_bad_token(bad):
    before, new = [[{"prompt": [1] * 100, "logprobs": [-5.0] * 100}]], [-2.0] * 99
    after = [[{"prompt": [1] * 100, "logprobs": [*new, -2.0]}]]
    assert rc.check_behaviour(before, after, [[[*new, -2.0]]], tolerance=0.06)["ok"]
    assert not rc.check_behaviour(before, after, [[[*new, bad]]], tolerance=0.06)["ok"]


def engines_in(state: str) -> rc.Colocation:
    colocation = rc.Colocation.__new__(rc.Colocation)
    colocation.state = state
    return colocation


def test_a_step_of_the_loop_goes_through_all_states():
    colocation = engines_in("ready")
    for action in ("generate", "sleep", "wake weights", "push", "wake kv_cache", "generate"):
        with colocation.transition(action):
            pass
    assert colocation.state == "ready"


@pytest.mark.parametrize(
    "state, action",
    [
        ("asleep", "push"),
        ("asleep", "generate"),
        ("asleep", "wake kv_cache"),
        ("asleep", "sleep"),
        ("weights awake", "generate"),
        ("weights awake", "wake kv_cache"),
        ("weights pushed", "generate"),
        ("ready", "wake weights"),
    ],
)
def test_out_of_order_is_an_error_and_changes_nothing(state, action):
    colocation = engines_in(state)
    message = f"found the engines {state}, which allows .*; was asked for {action}"
    with pytest.raises(RuntimeError, match=message), colocation.transition(action):
        pytest.fail("it went ahead")
    assert colocation.state == state


def test_after_a_failure_the_engines_do_nothing_more():
    colocation = engines_in("weights awake")
    with pytest.raises(ValueError), colocation.transition("push"):
        raise ValueError("half-way")
    with pytest.raises(RuntimeError, match="broken: push failed"), colocation.transition("wake kv_cache"):
        pass


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--max-tokens", "2000"], "type --max-model-len 2048"),
        (["--group-size", "1"], "--group-size 8"),
        (["--prompts-per-step", "1"], "--prompts-per-step 2"),
        (["--steps", "-1"], "leave out --steps"),
        (["--learning-rate", "-1"], "leave out --learning-rate"),
        (["--resume", "nowhere"], "a folder that --checkpoint wrote"),
        (["--plot", "/no/where.png"], "mkdir -p /no"),
        (["--checkpoint-every", "5"], "type --checkpoint DIR"),
        (["--dtype", "float16"], "type --dtype bfloat16"),
        (["--checkpoint", "README.md"], "something else at --checkpoint"),
        (["--checkpoint", "tests"], "something else at --checkpoint"),
    ],
)
def test_a_loop_that_cannot_run_is_one_line_and_exit_code_2(arguments, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = script(*arguments)
    assert done.returncode == USAGE and says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (ROOT / "README.md").is_file() and (ROOT / "tests").is_dir()
