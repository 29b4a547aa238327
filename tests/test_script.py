"""The script itself, with the real Ray and the real vLLM, by subprocess: its report, its exit code, what it leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.drills import processes_with
from colocate.config import FAIL, FAULTS, INTERRUPTED, MISSING, PASS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.e2e
PROOF = ["--steps", "0"]
TWO = [*PROOF, "--num-gpus", "2"]
ONE = [*PROOF, "--num-gpus", "1", "--tensor-parallel-size", "1"]


class Run:
    """One run of the script. Nothing of it may be left when it has ended: no process, no file in /dev/shm."""

    def __init__(
        self,
        tmp_path: Path,
        *arguments: str,
        script: Path = ROOT / "rlhf_colocate.py",
        interrupt_after: float | None = None,
        interrupt: Callable[[int], None] = lambda pid: os.kill(pid, signal.SIGINT),
        timeout: float = 400,
    ):
        mark, before = uuid.uuid4().hex, set(os.listdir("/dev/shm"))
        output = tmp_path / "report.json"
        command = [sys.executable, str(script), "--output-json", str(output), *arguments]
        env = os.environ | {"RLHF_TEST_MARK": mark, "PYTHONPATH": str(ROOT)}
        # A shell's background jobs ignore SIGINT, and so would a script started by them: pytest's child must not.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
        ) as process:
            try:
                if interrupt_after is not None:
                    time.sleep(interrupt_after)
                    interrupt(process.pid)
                    timeout = 60
                self.stdout, self.stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        self.code = process.returncode
        self.last_line = (self.stdout.strip().splitlines() or [""])[-1]
        self.report = json.loads(output.read_text()) if output.exists() else {}
        time.sleep(1)
        assert not processes_with(mark), "processes are left"
        assert set(os.listdir("/dev/shm")) <= before, "files are left in /dev/shm"

    def passed(self) -> dict:
        assert self.code == PASS, self.stdout + self.stderr
        assert self.last_line == "PASS" == self.report["verdict"]
        assert set(self.report["verify"]) == {"replicas", "transport", "placement", "changed", "behaviour"}
        assert all(check["ok"] and check["checked"] > 0 for check in self.report["verify"].values())
        assert self.report["pushes"][0]["bytes"] > 0
        return self.report


def shape(tmp_path: Path, **config) -> list[str]:
    """Arguments for a tiny model of the given configuration with random weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    common = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"vocab_size": 1000, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(common | config))
    return ["--model", str(folder), "--load-format", "dummy"]


def test_default_layout(tmp_path):
    report = Run(tmp_path, *PROOF).passed()
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


def test_two_engines_with_tp_1(tmp_path):
    report = Run(tmp_path, *TWO, "--tensor-parallel-size", "1").passed()
    assert [(r["engine"], r["tp_rank"]) for r in report["placement"]] == [(0, 0), (1, 0)]


QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(QWEN2 | {"num_key_value_heads": 2}, id="qwen2-tied-biases"),
        pytest.param(QWEN3 | {"num_key_value_heads": 1}, id="qwen3-qk-norm-replicated-kv"),
        pytest.param(LLAMA | {"num_key_value_heads": 1}, id="llama-replicated-kv"),
        pytest.param(MIXTRAL | {"num_key_value_heads": 2, "num_local_experts": 4}, id="mixtral"),
    ],
)
def test_architectures_at_tp_2(tmp_path, config):
    report = Run(tmp_path, *TWO, *shape(tmp_path, **config)).passed()
    assert bool(report["verify"]["placement"]["processed"]) == (config["model_type"] == "mixtral")


def test_a_pretrained_model_speaks_before_and_after(tmp_path, smollm2):
    report = Run(tmp_path, *ONE, "--model", str(smollm2)).passed()
    first = report["samples"][0]
    assert "Paris" in first["old"]
    assert "Paris" in first["new"], "2 % of noise must not make it forget"


@pytest.mark.parametrize("fault", FAULTS)
def test_every_injected_fault_fails_the_right_check(tmp_path, fault):
    run = Run(tmp_path, *TWO, "--inject", fault)
    check = FAULTS[fault][1]
    assert run.code == FAIL
    assert run.last_line.startswith("FAIL: ") and run.report["verdict"] == run.last_line
    assert f"{check}: " in run.last_line
    verify = run.report["verify"]
    if check in verify:
        assert not verify[check]["ok"] and verify[check]["wrong"]
    if fault in ("flip-element", "wrong-tp-slice"):
        assert verify["transport"]["ok"], "what arrived was right"
    if fault == "flip-element":
        assert [list(names.values()) for names in verify["placement"]["wrong"].values()] == [[1]], "one element"
    if fault == "drop-tensor":
        assert "missing: model.decoder" in run.last_line and not run.report["pushes"]


def test_a_signal_to_all_processes_leaves_nothing(tmp_path):
    """As `timeout` and Slurm send it, so that Ray's own processes end, too."""
    options = [*shape(tmp_path, **QWEN2, num_key_value_heads=2), "--num-gpus", "2", "--max-tokens", "8"]
    options += ["--steps", "1000"]
    run = Run(tmp_path, *options, interrupt_after=45, interrupt=lambda pid: os.killpg(pid, signal.SIGTERM))
    assert run.code == INTERRUPTED, run.stdout + run.stderr
    assert run.last_line == "FAIL: interrupted" and run.report["steps"]


@pytest.mark.parametrize("seconds", [2, 5, 15])
def test_ctrl_c_leaves_nothing(tmp_path, seconds):
    run = Run(tmp_path, *TWO, interrupt_after=seconds)
    assert run.code == INTERRUPTED
    assert run.last_line == "FAIL: interrupted"
    assert "Traceback" not in run.stderr


def test_an_engine_that_dies_while_starting_says_why(tmp_path):
    run = Run(tmp_path, *ONE, "--max-model-len", "100000")
    assert run.code == FAIL
    assert run.last_line.startswith("FAIL: engine 0 (start): ")
    assert "max_model_len" in run.last_line and "_cached_repr" not in run.stdout + run.stderr


def test_a_training_actor_that_cannot_start_says_why(tmp_path):
    run = Run(tmp_path, *ONE, *shape(tmp_path, architectures=["NewForCausalLM"], model_type="new-and-unknown"))
    assert run.code == FAIL
    assert run.last_line.startswith("FAIL: training actor 0 (report_device_id): ValueError: ")
    assert "new-and-unknown" in run.last_line and "ray::" not in run.last_line


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
        ray.communicate("", timeout=60)
    assert run.code == MISSING
    assert "has 1 free GPUs, not 2" in run.stderr


def test_the_minimal_example(smollm2):
    command = [sys.executable, str(ROOT / "examples/minimal_push.py"), str(smollm2)]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    texts = re.findall(r"^version \d: (.*)$", done.stdout, re.MULTILINE)
    assert "Paris" in texts[0] and len(set(texts)) == 3, texts
    assert re.search(r"^134515008 elements compared, wrong: none$", done.stdout, re.MULTILINE), done.stdout


LISTEN = """
import json, psutil, sys
from pathlib import Path
import rlhf_colocate as rc

model = rc.Model(Path(sys.argv[1]), Path(sys.argv[1]), "dummy", {})
colocation = rc.Colocation(rc.Config(num_gpus=1, tensor_parallel_size=1), True, model)
colocation.start_ray()
pids = {p.pid for p in [psutil.Process(), *psutil.Process().children(recursive=True)]}
connections = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in pids]
print(json.dumps(sorted({c.laddr.ip for c in connections})))
colocation.close()
"""


def test_ray_listens_on_loopback_only(tmp_path):
    command, env = [sys.executable, "-c", LISTEN, str(tmp_path)], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    addresses = json.loads(done.stdout)
    assert addresses and all(a.endswith(("127.0.0.1", "::1")) for a in addresses), addresses


@pytest.mark.gpu(2)
def test_cuda_ipc_on_two_gpus(tmp_path):
    assert Run(tmp_path, *TWO).passed()["hardware"]["mode"] == "CUDA IPC"
