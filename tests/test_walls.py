"""Precautions that look like clutter until the day they are needed: each test fails without one. No Ray, no vLLM.

Others of the kind: all ranks are heard before an error is raised (test_faults.py); the version is read before and after
the copies (test_handles.py); what engines have mapped when trainers are replaced (test_live.py); one trainer that fails
is heard while the others wait for it (test_live.py).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import rlhf_colocate as rc
from colocate import cluster, fleet, sharding, trackers
from colocate.config import FAIL, USAGE, Config, Lost, Stop
from colocate.memory import SleepLevel
from colocate.report import Report, equal_groups
from colocate.watch import Watch

SAMPLES = [{"prompt": [1], "tokens": [2, 3], "reward": 0.5}]
METRICS = {"loss": 0.1, "grad_norm": 1.0, "logprob_gap": 0.0, "weights": "0123456789abcdef"}


@pytest.fixture
def ctrl_c():
    """Send this process SIGINT, and let it be handled."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def send() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # the handler runs between two instructions of Python

    yield send
    signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------------------------------
# Interrupts wait until Ray is gone
# ---------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_while_a_start_that_failed_is_cleared_away(monkeypatch, ctrl_c):
    ray = cluster.Cluster(Config(), Path(), rehearsal=True, watch=Watch())
    stopped = []

    def hold_ray(options: dict) -> None:
        ray.error = RuntimeError("no room")
        ray.started.set()

    def stop() -> None:
        ctrl_c()
        stopped.append(True)

    monkeypatch.setattr(cluster, "adopt_orphans", lambda: None)
    monkeypatch.setattr(ray, "options", lambda env: {})
    monkeypatch.setattr(ray, "_hold_ray", hold_ray)
    monkeypatch.setattr(ray, "stop", stop)
    with pytest.raises(KeyboardInterrupt):
        ray.start({}, (time.monotonic() + 60, 60, "--timeout "))
    assert stopped


def test_ctrl_c_while_the_layout_is_closed(ctrl_c):
    stopped = []

    def close(names: list[str], method: str) -> None:
        ctrl_c()

    colocation = bare(rc.Colocation, config=Config(), engines=["engine 0"], report=Report(Config(), []))
    colocation.fleet = SimpleNamespace(close=close)
    colocation.cluster = SimpleNamespace(running=lambda: True, stop=lambda: stopped.append(True))
    with pytest.raises(KeyboardInterrupt):
        colocation.__exit__(None, None, None)
    assert stopped


# ---------------------------------------------------------------------------------------------------------------------
# What a run that failed has to show
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def signals():
    """`verdict` sets handlers, for the rest of the process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def failing(**files: str) -> Report:
    """The report of a run that loses its engine after a step."""
    report = Report(Config(steps=3, **files), [])
    with report.verdict():
        with report.stage("train"):
            report.loop(0, 3)
            step(report, 1)
            report.step(3, METRICS)
        report.actor_spans = {"trainer 0": [("learn", 1000.0, 2.0)]}
        raise Stop("lost engine 0")
    return report


def test_an_evaluation_has_a_mean_its_error_and_samples(tmp_path, signals, capsys):
    pytest.importorskip("matplotlib")
    files = {"plot": str(tmp_path / "plot.png"), "metrics": str(tmp_path / "metrics.jsonl")}
    report = Report(Config(steps=3, **files), [])
    samples = [{"prompt": [1], "tokens": [2], "reward": r, "rewards": {"right": r, "none": None}} for r in (0, 1, 1, 0)]
    with report.verdict():
        report.loop(0, 3)
        assert report.evaluated(0, samples, str)
        step(report, 1)
        report.step(3, METRICS)
        assert not report.evaluated(1, samples, str), "not better than before"
        assert not report.evaluated(1, samples, str), "again, after a loss"
        assert report.evaluated(2, samples[1:3], str)
    rows = report.data["evals"]
    assert [(e["step"], e["n"], e["reward"], e["rewards"]) for e in rows] == [
        (0, 4, 0.5, {"right": 0.5}),
        (1, 4, 0.5, {"right": 0.5}),
        (2, 2, 1.0, {"right": 1.0}),
    ]
    assert rows[0]["se"] == pytest.approx((1 / 3 / 4) ** 0.5) and rows[2]["se"] == 0
    assert rows[0]["samples"][1] == {"prompt": "[1]", "answer": "[2]", "reward": 1}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"eval": {k: v for k, v in rows[0].items() if k != "samples"}} and lines[1]["step"] == 1
    assert (tmp_path / "plot.png").exists()
    assert "after step 0: reward 0.5000 ± 0.2887 (standard error) of 4 prompts" in capsys.readouterr().out


def test_groups_with_equal_rewards_are_counted():
    assert equal_groups([1, 1, 0, 1, 0, 0], 2) == 2


def tracked(name: str, folder: Path, monkeypatch) -> None:
    """Two lines of metrics, into a folder, without a network."""
    for variable in ("TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(variable, str(folder))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(folder)
    report = Report(Config(steps=3, report_to=name), [])
    with report.verdict():
        report.track()
        report.loop(0, 3)
        report.evaluated(0, SAMPLES, str)
        step(report, 1)
        report.step(3, METRICS)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_metrics_go_where_one_looks_at_curves(name, tmp_path, signals, monkeypatch, capfd):
    if not importlib.util.find_spec(name):  # not imported yet: it reads its variables then
        pytest.skip(f"{name} is not installed")
    tracked(name, tmp_path, monkeypatch)
    assert capfd.readouterr().out.endswith("PASS\n")
    assert any(file.is_file() for file in tmp_path.rglob("*")), "written here"
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path)).Reload()
        assert {"reward", "loss", "seconds/rollout", "eval/reward"} <= set(events.Tags()["scalars"])
        assert [(e.step, e.value) for e in events.Scalars("eval/reward")] == [(0, 0.5)]


def test_a_tracker_that_does_not_start_is_one_line(monkeypatch):
    def fail(config):
        raise OSError("no\nlogin")

    monkeypatch.setitem(trackers.KINDS, "wandb", fail)
    with pytest.raises(Stop, match=r"--report-to wandb does not start \(OSError: no login\)\. .* WANDB_MODE") as stop:
        trackers.start("wandb", {})
    assert stop.value.code == USAGE


def test_numbers_for_curves_have_names_with_slashes():
    line = {"step": 3, "reward": 0.5, "best": "text", "seconds": {"train": 2}, "gpu_used_gib": [1.0]}
    assert trackers.numbers(line) == {"reward": 0.5, "seconds/train": 2.0}


def test_a_run_that_failed_leaves_its_plot_its_trace_and_its_report(tmp_path, signals, capsys):
    pytest.importorskip("matplotlib")
    names = {"plot": "plot.png", "trace": "trace.json", "output_json": "report.json"}
    report = failing(**{flag: str(tmp_path / name) for flag, name in names.items()})
    assert report.exit_code == FAIL and capsys.readouterr().out.endswith("FAIL: lost engine 0\n")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    rows = [e["args"]["name"] for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if "args" in e]
    assert rows == ["stages", "trainer 0"]
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["verdict"] == "FAIL: lost engine 0" and len(data["steps"]) == 1


def test_a_file_that_cannot_be_written_does_not_hide_why_the_run_failed(tmp_path, signals):
    nowhere = str(tmp_path / "nowhere" / "trace.json")
    failing(trace=nowhere, output_json=str(tmp_path / "report.json"))
    verdict = json.loads((tmp_path / "report.json").read_text())["verdict"]
    assert verdict.startswith("FAIL: --trace was not written (") and nowhere in verdict
    assert verdict.endswith("; without that: FAIL: lost engine 0")


# ---------------------------------------------------------------------------------------------------------------------
# Engines have the weights mapped
# ---------------------------------------------------------------------------------------------------------------------


def bare(kind: type, **attributes):
    """An object of this class that was not initialized, but has these attributes."""
    made = kind.__new__(kind)
    made.__dict__.update(attributes)
    return made


@pytest.fixture
def trainer() -> rc.RayTrainingActor:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 2)
    made = bare(rc.RayTrainingActor, device=torch.device("cpu"), model=model, held=sharding.Whole(model))
    made.version = torch.zeros((), dtype=torch.int64)
    return made


def test_the_version_says_that_weights_are_changing(trainer):
    with trainer.changing_weights(7):
        assert int(trainer.version) == -1
        trainer.model.weight.data += 1
    assert int(trainer.version) == 7


def test_weights_that_are_not_changed_in_place_are_refused(trainer):
    with pytest.raises(RuntimeError, match="Change them in place"), trainer.changing_weights(7):
        trainer.model.weight.data = trainer.model.weight.data + 1
    assert int(trainer.version) == -1, "no engine may take them"


def test_weights_of_a_step_that_failed_are_no_version(trainer):
    with pytest.raises(OSError), trainer.changing_weights(7):
        raise OSError
    assert int(trainer.version) == -1


def test_a_replica_that_is_left_saves_whatever_its_rank(tmp_path):
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32))
    saves = SimpleNamespace(save=lambda folder: None)
    survivor = bare(rc.RayTrainingActor, model=model, held=sharding.Whole(model), learner=saves)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        survivor.save(str(tmp_path))
    finally:
        torch.distributed.destroy_process_group()
    assert (tmp_path / "model.safetensors").exists()


def recovering(lost: set[str], broken: set[str], trained: bool = True) -> list[str]:
    """What a recovery does, in order. broken: engines whose disconnect raises. trained: a step has begun before."""
    done = []
    watched = {*lost}

    def ask(names: list[str], method: str, *args, **_):
        assert not watched, "every answer would be taken for their loss"
        done.append(f"{args[0] if method == 'collective_rpc' else method} {', '.join(names)}")
        if "disconnect" in done[-1] and broken & {*names}:
            raise Stop("CUDA error: an illegal memory access was encountered")
        return [{"steps": 3, "interrupted": False}]

    def end(names: set[str]) -> None:
        watched.difference_update(names)
        done.append(f"end {', '.join(sorted(names))}")

    colocation = bare(rc.Colocation, config=Config(), folder=Path(), report=Report(Config(), []))
    colocation.report.data["losses"] = [{}]
    colocation.trainers = ["trainer 0", "trainer 1"]
    colocation.engines = ["engine 0", "engine 1"]
    colocation.trained = trained
    colocation.sleep_level = SleepLevel("auto", colocation.report)
    colocation.fleet = SimpleNamespace(
        find_all_lost=lambda loss: loss.names,
        ask=ask,
        end=end,
        deadline=lambda: (math.inf, 600, "--timeout "),
        require_alive=lambda what: None,
    )
    colocation.stage = lambda name: nullcontext()
    colocation.cluster = cluster.Cluster(Config(), Path(), rehearsal=True, watch=Watch())
    colocation.replicas = [["trainer 0"], ["trainer 1"]]
    colocation.save = lambda folder, by: done.append(f"save {', '.join(colocation.replicas[by])}")
    colocation.start = lambda names: done.append(f"start {', '.join(names)}")
    colocation.restore = lambda: (3, {})
    colocation.recover(Lost(lost, "lost", "rollout"))
    return done


def test_engines_disconnect_and_sleep_before_new_trainers_load():
    done = recovering({"trainer 1"}, set())
    start = done.index("start trainer 0, trainer 1")
    for engine in ("engine 0", "engine 1"):
        assert done.index(f"disconnect_weights {engine}") < done.index(f"sleep {engine}") < start
    assert done.index("end trainer 1") < done.index("save trainer 0") < done.index("end trainer 0") < start


@pytest.mark.parametrize("lost", [{"trainer 1"}, {"trainer 0", "trainer 1"}])
def test_before_the_first_step_there_is_no_state_to_save(lost):
    """It would replace what --checkpoint has; and without it, all trainers may be lost."""
    done = recovering(lost, set(), trained=False)
    assert "start trainer 0, trainer 1" in done and not any(action.startswith("save") for action in done)


def test_an_engine_that_cannot_disconnect_is_replaced_too(monkeypatch):
    monkeypatch.setattr(rc, "check_shared_memory", lambda *_: None)
    done = recovering({"trainer 1"}, {"engine 1"})
    assert "start engine 1, trainer 0, trainer 1" in done and "sleep engine 1" not in done


def test_engines_stay_connected_when_an_engine_is_lost(monkeypatch):
    monkeypatch.setattr(rc, "check_shared_memory", lambda *_: None)
    done = recovering({"engine 1"}, set())
    assert done == ["end engine 1", "start engine 1"]


# ---------------------------------------------------------------------------------------------------------------------
# Trainers depend on one another
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost, during, seconds",
    [
        ("trainer 1", "train", fleet.PING_S),  # the others may be in an all-reduce that never ends
        ("trainer 1", "rollout", 600),
        ("engine 0", "train", 600),  # the trainers are just busy, and have all that was learned
    ],
)
def test_how_long_a_busy_trainer_is_waited_for(lost, during, seconds, monkeypatch):
    gone, waited = find_all_lost(monkeypatch, Lost({lost}, "lost", during))
    assert gone == {lost, "trainer 0"}
    assert waited == pytest.approx(seconds, abs=2)


def test_a_trainer_lost_while_another_is_waited_for_ends_the_wait(monkeypatch):
    """An engine was lost in an optimizer step, which both trainers were in; half a minute later trainer 1 dies."""
    gone, waited = find_all_lost(monkeypatch, Lost({"engine 0"}, "lost", "train"), trainer_1_dies_after=30)
    assert gone == {"engine 0", "trainer 0", "trainer 1"}
    assert 30 <= waited <= 30 + 2 * fleet.PING_S + 2


def find_all_lost(monkeypatch, lost: Lost, trainer_1_dies_after: float = math.inf) -> tuple[set[str], float]:
    """(all that is lost, seconds until that was known). Trainer 0 never answers; trainer 1 is busy until it dies."""
    clock = [1000.0]
    monkeypatch.setattr(fleet, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def ping(names: set[str], patience: float) -> tuple[set[str], set[str]]:
        if "trainer 0" in names:
            clock[0] += patience
        dies = clock[0] - 1000 >= trainer_1_dies_after
        busy = {"trainer 0"} if dies or trainer_1_dies_after == math.inf else {"trainer 0", "trainer 1"}
        return names & {"trainer 1"} if dies else set(), names & busy

    layout = fleet.Fleet(Report(Config(), []), {}, 600)
    layout.actors = dict.fromkeys(["trainer 0", "trainer 1", "engine 0"])
    layout._ping = ping
    with layout.stage("recover"):
        gone = layout.find_all_lost(lost)
    return gone, clock[0] - 1000


def step(report: Report, number: int) -> None:
    report.step_seconds |= dict.fromkeys(("rollout", "sleep", "train"), 1.0)
    report.push_ms = 1.0
    report.sampled(number, SAMPLES, str, [0.0, 0.0])


def in_loop(steps: int = 3) -> Report:
    """A report of a run of so many steps, of which the first is done and the second is being trained."""
    report = Report(Config(steps=steps), [])
    report.loop(0, steps)
    step(report, 1)
    report.step(3, METRICS)
    step(report, 2)
    report.lost(Lost({"trainer 1"}, "lost trainer 1", "train"))
    return report


def test_a_step_whose_metrics_were_lost_with_a_trainer_is_complete():
    """It was done: the trainers' state, which `restore` returns, says so."""
    report = in_loop()
    report.goes_on(2, 5, METRICS | {"loss": 0.7})
    assert [(row["step"], row["version"], row["loss"]) for row in report.data["steps"]] == [(1, 3, 0.1), (2, 5, 0.7)]
    assert report.data["steps"][1]["tokens"] == 2


@pytest.mark.parametrize("done", [1, 0])
def test_steps_that_the_trainers_have_not_done_are_done_again(done):
    report = in_loop()
    report.goes_on(done, 5, METRICS)
    assert [row["step"] for row in report.data["steps"]] == [1][:done]


def test_a_loss_after_the_last_step_leaves_all_rows():
    report = in_loop(steps=2)
    report.step(4, METRICS)
    report.goes_on(2, 5, METRICS)
    assert [(row["step"], row["version"]) for row in report.data["steps"]] == [(1, 3), (2, 4)]


def test_a_loss_too_many_ends_the_run():
    lost = Lost({"engine 0"}, "lost engine 0", "push")
    fleet.require_restart(lost, 1, allowed=1)
    with pytest.raises(Stop, match=r"^lost engine 0; 1 of --max-restarts 1 are used up.*: --max-restarts 2$"):
        fleet.require_restart(lost, 2, allowed=1)
    with pytest.raises(Stop, match=r"^lost engine 0; --max-restarts is 0.*: --max-restarts 1$"):
        fleet.require_restart(lost, 1, allowed=0)
