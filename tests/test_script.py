"""The script itself, with the real Ray and the real vLLM, by subprocess: its report, its exit code, what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid

import pytest
from running import TINY, Run, deadline, shape

from colocate.config import INTERRUPTED, MISSING

pytestmark = pytest.mark.e2e
PROOF = ["--steps", "0"]
TWO = [*PROOF, "--num-gpus", "2"]
ONE = [*PROOF, "--num-gpus", "1", "--tensor-parallel-size", "1"]
QUICK = ["--dtype", "float32"]  # bfloat16 is slow on many CPUs


def test_default_layout(tmp_path):
    """In bfloat16, whatever --dtype auto would choose here."""
    report = Run(tmp_path, *PROOF, "--dtype", "bfloat16").passed()
    rows = report["placement"]
    assert [r["bundle"] for r in rows] == [0, 1, 2, 3]
    assert [r["engine"] for r in rows] == [0, 0, 1, 1]
    assert sorted(r["tp_rank"] for r in rows) == [0, 0, 1, 1]
    assert len({r["gpu"] for r in rows}) == 4
    assert len({r[k] for r in rows for k in ("trainer_pid", "worker_pid")}) == 8
    placement = report["verify"]["placement"]
    padding = {name.split(" ")[1]: count for name, count in placement["padding"].items()}
    hidden = 256 if "rehearsal" in report["hardware"]["mode"] else 768
    assert padding == {"model.decoder.embed_tokens.weight": 32 * hidden}, "50272 rows, padded to 50304"
    assert not placement["processed"]
    assert {"preflight", "start", "push", "verify", "teardown"} <= report["stages_s"].keys()
    assert report["versions"]["ray"] and report["hardware"]["cpu_cores"] and report["config"]["num_gpus"] == 4


MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}


def test_a_mixture_of_experts(tmp_path):
    """The shared layout (live.py) is a tied Qwen2 with biases; test_layout.py has the other architectures."""
    mixtral = shape(tmp_path, **MIXTRAL, num_key_value_heads=2, num_local_experts=4)
    report = Run(tmp_path, *ONE, "--dtype", "bfloat16", *mixtral).passed()
    assert report["verify"]["placement"]["processed"]


def test_a_signal_to_all_processes_leaves_nothing(tmp_path):
    """As `timeout` and Slurm send it, so that Ray's own processes end, too."""
    options = [*shape(tmp_path, **TINY), *ONE, *QUICK, "--max-tokens", "8", "--steps", "1000"]
    run = Run(
        tmp_path, *options, interrupt_at=r"\[step\]", interrupt=lambda pid: os.killpg(pid, signal.SIGTERM), seconds=300
    )
    assert run.code == INTERRUPTED, run.stdout + run.stderr
    assert run.last_line == "FAIL: interrupted" and run.report["steps"]


def test_ctrl_c_leaves_nothing(tmp_path):
    """While engines start, which takes seconds. Ctrl-C before that is in test_start.py."""
    trace = tmp_path / "trace.json"
    model = shape(tmp_path, **TINY)
    run = Run(tmp_path, *TWO, *QUICK, *model, "--trace", str(trace), interrupt_at=r"\[train\]", seconds=300)
    assert run.code == INTERRUPTED
    assert run.last_line == "FAIL: interrupted"
    assert "Traceback" not in run.stderr
    rows = [e["args"]["name"] for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "thread_name"]
    assert rows == ["stages", "trainer 0", "trainer 1"]


def test_a_ray_cluster_with_too_few_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # what a cluster started by ray.init wants
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
    serve = "import ray, sys; c = ray.init('local', num_gpus=1, include_dashboard=False); "
    serve += "print(c.address_info['address'], flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", serve], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as ray:
        address = ray.stdout.readline().strip()
        run = Run(tmp_path, *TWO, "--ray-address", address)
        ray.communicate("", timeout=deadline(60))
    assert run.code == MISSING
    assert "has 1 free GPUs, and 2 are needed" in run.stderr and not run.stdout.count("[place]")


@pytest.mark.gpu(2)
def test_cuda_ipc_on_two_gpus(tmp_path):
    assert Run(tmp_path, *TWO).passed()["hardware"]["mode"] == "CUDA IPC"
