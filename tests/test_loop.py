"""The RLHF loop, with the real Ray and the real vLLM: it learns, it goes on bitwise from a checkpoint, it says no."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from running import LONG, TINY, Run, deadline, shape

pytestmark = pytest.mark.e2e
QUICK = ["--dtype", "float32"]
ONE = [*QUICK, "--num-gpus", "1", "--tensor-parallel-size", "1"]


def test_the_reward_rises_on_two_engines(tmp_path):
    """A vocabulary of 1,000 ids makes it quick; trainers average gradients, engines share the prompts."""
    paths = {name: tmp_path / name for name in ("metrics.jsonl", "plot.png", "trace.json")}
    files = [x for name, path in paths.items() for x in ("--" + name.split(".")[0], str(path))]
    layout = [*QUICK, "--num-gpus", "2", "--tensor-parallel-size", "1", "--steps", "16", "--max-tokens", "8"]
    run = Run(tmp_path, *layout, "--check-replicas-every", "5", *shape(tmp_path, **TINY), *files)
    report = run.passed()
    assert [(r["engine"], r["tp_rank"]) for r in report["placement"]] == [(0, 0), (1, 0)]
    rows = report["steps"]
    assert [json.loads(line) for line in paths["metrics.jsonl"].read_text().splitlines()] == rows
    assert [r["step"] for r in rows] == list(range(1, 17))
    assert [r["version"] for r in rows] == list(range(3, 19)), "1 was the proof's, 2 took its noise back"
    rewards = [r["reward"] for r in rows]
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3]), rewards
    for row in rows:
        assert row["logprob_gap"] < 0.02 and row["ratio"] == pytest.approx(1, abs=0.02)
        assert row["tokens"] == 64 * 8
        stages = {"rollout", "sleep", "reward", "train", "wake", "push", "wake KV"}
        assert row["seconds"].keys() - {"verify"} == stages
    compared = {r["step"]: r["weights"] for r in rows if "weights" in r}
    assert list(compared) == [1, 5, 10, 15, 16], "the first, the last, and every fifth"
    assert len({*compared.values()}) == 5, "steps change the weights"
    assert run.stdout.count("[train] ") == 3 and "attention, packed sequences" in run.stdout
    assert run.stdout.count("[step]") == 17 and "tokens/s" in run.stdout
    assert paths["plot.png"].read_bytes().startswith(b"\x89PNG")
    events = json.loads(paths["trace.json"].read_text())["traceEvents"]
    names = {e["name"] for e in events if e["ph"] == "X"}
    assert {"rollout", "generate", "sleep", "wake_up", "learn", "push_weights", "train", "push"} <= names
    rows_shown = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert rows_shown == {"stages", "trainer 0", "trainer 1", "engine 0", "engine 1"}
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")


def test_resume_goes_on_bitwise(tmp_path, undisturbed):
    """Another run with --kl-coef and --offload-optimizer is in test_live.py."""
    steps, half, _ = undisturbed
    (thirteenth,) = Run(tmp_path, *LONG, "--steps", "1", "--resume", str(half)).passed()["steps"]
    same = ("step", "reward", "loss", "logprob_gap", "grad_norm", "weights", "best")
    assert {k: thirteenth[k] for k in same} == {k: steps[-1][k] for k in same}


def test_the_checkpoint_is_an_ordinary_one(undisturbed):
    whole = undisturbed[2]
    load = """if True:
        import sys, torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
        file = load_file(sys.argv[1] + "/model.safetensors")
        assert file and model.dtype == torch.float32
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in file.items())
    """
    command = [sys.executable, "-c", load, str(whole)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(120))
    assert done.returncode == 0, done.stderr
    assert not list(whole.parent.glob(".*.new-*")) and not list(whole.parent.glob(".*.old-*"))


def test_a_pretrained_model_speaks_and_its_text_reward_rises(tmp_path, smollm2):
    options = ["--steps", "8", "--learning-rate", "3e-5", "--max-tokens", "12", "--prompts-per-step", "4"]
    report = Run(tmp_path, *ONE, "--model", str(smollm2), *options, seconds=1200).passed()
    proof = report["samples"][0]
    rows = report["steps"]
    assert "Paris" in proof["old"]
    assert "Paris" in proof["new"], "2 % of noise must not make it forget"
    assert isinstance(rows[0]["best"], str)
    assert sum(r["reward"] for r in rows[-2:]) > sum(r["reward"] for r in rows[:2]), [r["reward"] for r in rows]
