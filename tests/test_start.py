"""A start that hangs, is interrupted, or loses a process: one verdict, and nothing stays. Real Ray, real vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from running import deadline, hear_signals, patience, require_nothing_left

from benchmarks.traces import Traces
from colocate.config import FAIL, INTERRUPTED

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "rlhf_colocate.py"
SHAPE = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 512, "hidden_size": 64}
SHAPE |= {"word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ONE = ("--num-gpus", "1", "--tensor-parallel-size", "1", "--steps", "0", "--dtype", "float32", "--load-format", "dummy")
LONG_S = 300  # for a run of half a minute, on a machine that is busy with other things
RAYS_OWN_S = 29  # it gives up by itself after 30


class Start:
    """A run of the script, or of dying.py, which is watched while it starts; `end` looks at what it has left."""

    def __init__(self, *command: str):
        self.traces = Traces()
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "config.json").write_text(json.dumps(SHAPE))
        # Without any CUDA device the rehearsal has its logical GPUs all the same.
        env = os.environ | self.traces.env | {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, *command, *ONE, "--model", str(self.folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, **pipes, env=env, start_new_session=True, preexec_fn=hear_signals)
        self.output = ""

    def wait_for_line(self, text: str) -> None:
        while text not in self.output:
            line = self.process.stdout.readline()
            assert line, f"it ended without {text!r}: {self.output}"
            self.output += line

    def wait_for_process(self, name: str) -> psutil.Process:
        """The child of this name, as soon as it is there."""
        end = time.monotonic() + deadline(LONG_S)
        while time.monotonic() < end and self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.name() == name:
                        return child
        raise AssertionError(f"there was no {name}: {self.process.communicate()[0]}")

    def end(self) -> int:
        """Wait for the end; returns the exit code. Nothing of the run may be left."""
        self.output += self.process.communicate(timeout=deadline(LONG_S))[0]
        require_nothing_left(self.traces)
        return self.process.returncode

    @property
    def start_seconds(self) -> float:
        """How long the stage took, by the table that ends the output."""
        return float(re.search(r"^ +start +([\d.]+)", self.output, re.MULTILINE)[1])

    @property
    def verdict(self) -> str:
        return self.output.strip().splitlines()[-1]


@pytest.fixture
def start():
    """Start(...); whatever happens, its processes and its folder are gone afterwards."""
    starts = []

    def begin(*command: str) -> Start:
        starts.append(Start(*command))
        return starts[-1]

    yield begin
    for one in starts:
        one.traces.end()
        one.process.wait()
        shutil.rmtree(one.folder)


TREE = """
import subprocess, sys, time
import psutil
from colocate.watch import adopt_orphans, children, end_children

def sh(text):
    process = subprocess.Popen(["sh", "-c", f"({text}) >/dev/null\\necho; sleep 600"], stdout=subprocess.PIPE)
    process.stdout.readline()
    while not psutil.Process(process.pid).children():  # its own sleep, which comes after the line
        time.sleep(0.01)
    return process

adopt_orphans()
mine = sh("sleep 600 &")
besides = frozenset(children())
sh("sleep 600 & sleep 600 &")  # the brackets' shell ends: these two are orphans
found = children(besides)
end_children(60, besides)
print(len(found), children(besides), mine.poll(), len(children()))
for process in children():
    process.kill()
"""


def test_all_children_end_orphans_too_but_those_that_are_not_ours():
    command = [sys.executable, "-c", TREE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(LONG_S), cwd=HERE.parent)
    assert done.stdout.strip() == "4 [] None 3", done.stdout + done.stderr


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_ray_that_hangs_ends_at_the_stages_deadline(start, name):
    seconds = round(deadline(10))
    run = start(str(SCRIPT), "--stage-timeout", f"start={seconds}")
    process = run.wait_for_process(name)
    process.suspend()
    assert run.end() == FAIL, run.output
    assert run.verdict.startswith(f"FAIL: Ray did not start within {seconds} s"), run.output
    assert f"{name} (pid {process.pid}) is stopped" in run.verdict
    assert f"--stage-timeout start={2 * seconds}" in run.verdict and "Traceback" not in run.output


@pytest.mark.e2e
@pytest.mark.parametrize(
    "number, until",
    [
        (signal.SIGTERM, None),  # at once: Ray is being imported
        (signal.SIGINT, "gcs_server"),
        (signal.SIGHUP, "raylet"),
    ],
)
def test_a_signal_while_ray_starts_is_heard(start, number, until):
    run = start(str(SCRIPT))
    run.wait_for_line("[preflight]")
    if until:
        run.wait_for_process(until)
    run.process.send_signal(number)
    assert run.end() == INTERRUPTED, run.output
    assert run.verdict == "FAIL: interrupted" and "Traceback" not in run.output


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_signal_is_heard_while_ray_hangs(start, name):
    run = start(str(SCRIPT))
    run.wait_for_process(name).suspend()
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == INTERRUPTED, run.output
    assert run.verdict == "FAIL: interrupted"
    if patience() == 1:  # a busy machine may need so long for other things
        assert run.start_seconds < RAYS_OWN_S


@pytest.mark.e2e
@pytest.mark.parametrize(
    "who, when, how, says",
    [
        ("trainer", "import", "raise", "trainer 0 .*on purpose: trainer import"),
        ("worker", "import", "kill", "lost engine 0"),
        ("worker", "load_model", "raise", "engine 0 .*on purpose: worker load_model"),
        ("engine", "started", "kill", "lost engine 0"),
    ],
)
def test_a_part_that_fails_in_its_start_leaves_nothing(start, who, when, how, says):
    run = start(str(HERE / "dying.py"), who, when, how)
    assert run.end() == FAIL, run.output
    assert re.search(f"^FAIL: .*{says}", run.verdict), run.output
    assert "Traceback" not in run.output
