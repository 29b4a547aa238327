"""Fault drills with the real Ray and the real vLLM: the message, recovery where it is promised, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_script import Run, shape

from benchmarks.drills import DRILLS, FLAGS, TWO, runs

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.e2e
TINY = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
RUNS = runs(name for name, drill in DRILLS.items() if not drill.gpu)


def can_mount() -> bool:
    """Whether a test may have a /dev/shm of its own."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@pytest.mark.parametrize("run", RUNS)
def test_drills(tmp_path, run):
    if run.startswith("full-shm") and not can_mount():
        pytest.skip("a full /dev/shm needs the right to mount one")
    names, output = RUNS[run], tmp_path / "drills.json"
    command = [sys.executable, str(ROOT / "benchmarks/drills.py"), *names, "--output", str(output)]
    options = [*shape(tmp_path, **TINY), "--max-tokens", "64"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600)
    rows = {row["drill"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == names and done.returncode == 0, done.stdout[-6000:] + done.stderr
    for name, row in rows.items():
        assert row["ok"] and row["exit_code"] == DRILLS[name].code and row["seen"]
        assert not any(row["left_behind"].values())
        # A process is found dead within a second or two, a stopped one at the deadline.
        assert row["seconds_to_message"] <= 10 + DRILLS[name].deadline_s
    if run == "survive":  # on CPU, where everything can be repeated bitwise
        steps = FLAGS[run][FLAGS[run].index("--steps") :][:2]
        undisturbed = Run(tmp_path, *TWO, *steps, *options).passed()["steps"]
        assert {row["weights"] for row in rows.values()} == {undisturbed[-1]["weights"]}, "no step lost or done twice"
