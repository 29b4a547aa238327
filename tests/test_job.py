"""The script as a job: `ray job submit -- python rlhf_colocate.py ...`, with the real Ray and the real vLLM."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from running import NOT_NICE, ROOT, TINY, deadline, eventually, hear_signals, require_nothing_left, shape

from benchmarks.traces import Traces
from colocate.cluster import free_port

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not importlib.util.find_spec("aiohttp_cors"),
        reason="Ray has no job server here. Try: pip install 'ray[default]'",
    ),
]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def is_open(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def submit(tmp_path_factory):
    """submit(flag, ..., folder=None): the script as a job. Returns (exit code of `ray job submit`, its output).

    folder: one to send along; None: the job begins where the head was started, which has the script. The cluster is
    this head, with one GPU.
    """
    traces = Traces()
    port = free_port()
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    env = clean | traces.env | NOT_NICE | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(traces.folder)}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env["PATH"]])  # for the job's `python`
    command = [*RAY, "start", "--head", "--block", "--num-gpus=1", "--num-cpus=1", f"--port={free_port()}"]
    command += ["--include-dashboard=true", f"--dashboard-port={port}", "--dashboard-agent-listen-port=0"]
    command += [f"--ray-client-server-port={free_port()}", f"--object-store-memory={128 * 2**20}"]

    def run(*flags: str, folder: Path | None = None) -> tuple[int, str]:
        job = ["job", "submit", "--address", f"http://127.0.0.1:{port}", *(["--working-dir", "."] if folder else [])]
        job += ["--", "python", "rlhf_colocate.py", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run([*RAY, *job], **pipes, env=env, cwd=folder or "/", timeout=deadline(200))
        return done.returncode, done.stdout

    log = tmp_path_factory.mktemp("head") / "output.txt"
    with log.open("w") as out:
        head = subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=ROOT, preexec_fn=hear_signals)
    try:
        assert eventually(lambda: is_open(port) or head.poll() is not None, 60) and head.poll() is None, log.read_text()
        yield run
    finally:
        head.terminate()
        eventually(lambda: not traces.processes())
        for path in (traces.folder / "ray", *traces.folder.glob("pymp-*")):  # Ray's own leave these
            shutil.rmtree(path, ignore_errors=True)
        require_nothing_left(traces)
        head.wait()


def test_a_job_runs_on_its_cluster_and_its_log_has_the_scripts_lines(submit, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(ROOT / "colocate", folder / "colocate")
    for name in ("rlhf_colocate.py", "rlhf_utils.py"):
        shutil.copy(ROOT / name, folder)
    layout = ["--num-gpus", "1", "--tensor-parallel-size", "1", "--dtype", "float32", "--steps", "1"]
    code, output = submit(*layout, *shape(tmp_path, **TINY), folder=folder)
    assert code == 0 and re.search(r"Job '\w+' succeeded", output), output
    assert re.search(r"^PASS$", output, re.MULTILINE) and re.search(r"\[step\] +1/1 ", output), output
    assert "unexpected" not in output, "the end of an actor is no error"
    # A private Ray has no nodes to show.
    row = r"^ +bundle .* GPU +node\n +0 +\d+ +0 +0 +\d+ +\S+ +\S+ \(\d+\.\d+\.\d+\.\d+\)$"
    assert re.search(row, output, re.MULTILINE), output


def test_a_job_with_a_wrong_flag_fails_with_one_line(submit):
    code, output = submit("--stpes", "1")
    assert code == 1 and re.search(r"Job '\w+' failed", output), output
    assert "exit code 2," in output
    log = output.rpartition("Running entrypoint")[2].strip().splitlines()[1:]
    assert len(log) == 1 and log[0].startswith("rlhf_colocate.py: error: ") and "--stpes" in log[0], output
