"""What the end-to-end tests share: deadlines that scale with the machine, runs of the script, and what runs leave."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.traces import Traces
from colocate.config import PASS

ROOT = Path(__file__).resolve().parent.parent
TINY = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
# For a Ray that is not the script's own, whose processes would wait for any other program (docs/traps.md).
NOT_NICE = {"RAY_worker_niceness": "0"}
TOKENS = 24  # of a completion, in the drills' runs
# Thirteen steps with two trainers and one engine: the drills' longest run, and what it must come to.
LONG = ["--num-gpus", "2", "--tensor-parallel-size", "2", "--dtype", "float32", "--max-tokens", str(TOKENS)]
LONG += ["--check-replicas-every", "1", "--steps", "13"]

WORK = "import torch; a = torch.ones(768, 768); [a @ a for _ in range(40)]"
IDLE_S = 4.0  # what WORK takes on an idle machine with slow cores


@functools.cache
def patience() -> float:
    """By how much all deadlines are stretched: 1 on an idle machine, more on a busy one. Measured once for a suite."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", WORK], check=True)
    return max(1.0, (time.perf_counter() - start) / IDLE_S)


def deadline(seconds: float) -> float:
    """Seconds on an idle machine, as seconds on this one."""
    return seconds * patience()


def eventually(condition: Callable[[], object], seconds: float = 30) -> bool:
    """Wait until the condition holds. False: it did not before the deadline."""
    end = time.monotonic() + deadline(seconds)
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def require_nothing_left(traces: Traces) -> None:
    left = traces.left(deadline(30))
    assert not any(left.values()), left


def hear_signals() -> None:
    """For a child of pytest: a shell's background job ignores SIGINT, one of nohup SIGHUP, and a script would, too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Run:
    """One run of the script, as a user starts it. Nothing of it may be left when it has ended.

    interrupt_at: a regular expression. When a line matches it, `interrupt` is called with the process's id.
    """

    def __init__(
        self,
        tmp_path: Path,
        *arguments: str,
        script: Path = ROOT / "rlhf_colocate.py",
        interrupt_at: str = "",
        interrupt: Callable[[int], None] = lambda pid: os.kill(pid, signal.SIGINT),
        seconds: float = 600,
    ):
        output = tmp_path / "report.json"
        errors = tmp_path / "stderr.txt"
        command = [sys.executable, str(script), "--output-json", str(output), *arguments]
        traces = Traces()
        env = os.environ | {"PYTHONPATH": str(ROOT)} | traces.env
        alarm = threading.Timer(deadline(seconds), traces.end)
        lines = []
        options = {"stdout": subprocess.PIPE, "text": True, "env": env, "start_new_session": True}
        options["preexec_fn"] = hear_signals
        with errors.open("w") as stderr, subprocess.Popen(command, stderr=stderr, **options) as process:
            alarm.start()
            for line in process.stdout:
                lines.append(line)
                if interrupt_at and re.search(interrupt_at, line):
                    interrupt_at = ""
                    interrupt(process.pid)
        alarm.cancel()
        self.code = process.returncode
        self.stdout = "".join(lines)
        self.stderr = errors.read_text()
        self.last_line = (self.stdout.strip().splitlines() or [""])[-1]
        self.report = json.loads(output.read_text()) if output.exists() else {}
        require_nothing_left(traces)

    def passed(self) -> dict:
        assert self.code == PASS, self.stdout + self.stderr
        assert self.last_line == "PASS" == self.report["verdict"]
        require_proof(self.report)
        return self.report


def require_proof(report: dict) -> None:
    """Every check of the push has compared something, and has passed."""
    assert set(report["verify"]) == {"replicas", "transport", "placement", "beside", "changed", "behaviour"}
    assert all(check["ok"] and check["checked"] > 0 for check in report["verify"].values())
    assert report["pushes"][0]["bytes"] > 0


def shape(tmp_path: Path, **config) -> list[str]:
    """Arguments for a tiny model of the given configuration with random weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    common = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"vocab_size": 1000, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(common | config))
    return ["--model", str(folder), "--load-format", "dummy"]
