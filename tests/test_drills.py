"""Fault drills with the real Ray and the real vLLM: the message, recovery where it is promised, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from running import LONG, ROOT, TINY, TOKENS, Run, deadline, patience, shape

from benchmarks.drills import DRILLS, FLAGS

# One of each kind: lost in a push, silent in one, lost in the middle of a step, before its reply, after the last step;
# what is only refused.
# benchmarks/drills.py plays all of them, for most of an hour. Some need no run of their own (test_live.py, the negative
# controls among them), or another layout (the last test here, test_nodes.py).
SURVIVED = ["kill-worker-push", "stop-worker", "kill-trainer-train", "kill-trainer-reply"]
SURVIVED += ["push-asleep", "torn-push", "kill-worker-last"]


def test_every_drill_is_recorded_and_has_gone_well():
    """As it is today. Those that need a GPU are recorded there."""
    rows = {row["drill"]: row for row in json.loads((ROOT / "results/drills-rehearsal.json").read_text())["rows"]}
    assert rows.keys() == {name for name, drill in DRILLS.items() if not drill.gpu}
    for name, row in rows.items():
        drill = DRILLS[name]
        assert (row["fault"], row["expected"], row["exit_code"]) == (drill.fault, drill.expected, drill.code)
        assert row["ok"] and not any(row["left_behind"].values()), name
    ends = {row["weights"] for name, row in rows.items() if DRILLS[name].run == "survive"}
    assert len(ends) == 1, "of one run"


def can_mount() -> bool:
    """Whether a test may have a /dev/shm of its own."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


def play(tmp_path, names: list[str], *options: str) -> dict[str, dict]:
    """{drill: its row} of one run, all of whose drills must have gone well."""
    output = tmp_path / "drills.json"
    command = [sys.executable, str(ROOT / "benchmarks/drills.py"), *names, "--output", str(output)]
    command += [*shape(tmp_path, **TINY), "--dtype", "float32", "--max-tokens", str(TOKENS)]
    command += ["--patience", f"{patience():.2f}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=deadline(900))
    rows = {row["drill"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == names and done.returncode == 0, done.stdout[-6000:] + done.stderr
    for name, row in rows.items():
        assert row["ok"] and row["exit_code"] == DRILLS[name].code and row["seen"]
        assert not any(row["left_behind"].values())
    return rows


@pytest.mark.e2e
def test_a_full_shm(tmp_path):
    if not can_mount():
        pytest.skip("a full /dev/shm needs the right to mount one")
    play(tmp_path, ["full-shm-start"])


@pytest.mark.e2e
def test_a_run_that_survives_ends_as_an_undisturbed_one(tmp_path, undisturbed):
    """On CPU, where everything can be repeated bitwise: no step is lost or done twice, and none of its numbers."""
    assert set(LONG[:4]) <= set(FLAGS["survive"]) and LONG[-1] in FLAGS["survive"]
    metrics = tmp_path / "metrics.jsonl"
    rows = play(tmp_path, SURVIVED, "--metrics", str(metrics))
    expected = undisturbed[0].report["steps"]
    assert {row["weights"] for row in rows.values()} == {expected[-1]["weights"]}
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert sum("lost" in line for line in lines) == sum(bool(row["recovered_s"]) for row in rows.values())
    steps = {line["step"]: line for line in lines if "step" in line}  # what follows a loss replaces later steps
    assert list(steps) == list(range(1, 14))
    for row, undisturbed_row in zip(steps.values(), expected, strict=True):
        for key in ("step", "reward", "loss", "logprob_gap", "grad_norm", "weights", "tokens", "best"):
            assert row[key] == undisturbed_row[key], (row["step"], key)


@pytest.mark.e2e
def test_replicas_of_shards_lose_a_trainer_and_go_on_in_another_layout(tmp_path):
    """Four trainers in two replicas, and two engines of two ranks; then two trainers, whose shards are gathered."""
    checkpoint = tmp_path / "checkpoint"
    output = tmp_path / "drills.json"
    model = [*shape(tmp_path, **TINY), "--dtype", "float32", "--max-tokens", "8"]
    command = [sys.executable, str(ROOT / "benchmarks/drills.py"), "kill-shard-of-set", "--output", str(output), *model]
    command += ["--checkpoint", str(checkpoint), "--patience", f"{patience():.2f}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(600))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert "FSDP2 in shards of 2" in done.stdout and "2 replicas bitwise identical" in done.stdout
    sizes = ["--num-gpus", "2", "--tensor-parallel-size", "2", "--trainer", "fsdp", "--push", "gather"]
    sizes += ["--bucket-mb", "1"]
    run = Run(tmp_path, "--resume", str(checkpoint), *sizes, *model[4:], "--steps", "1")
    report = run.passed()
    assert "FSDP2 in shards of 2, gathered for each push in 3 rounds" in run.stdout
    assert [row["step"] for row in report["steps"]] == [4]
    assert report["steps"][0]["logprob_gap"] < 0.001
