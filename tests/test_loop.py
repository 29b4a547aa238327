"""The RLHF loop, with the real Ray and the real vLLM: it learns, it goes on bitwise from a checkpoint, it says no."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from running import LONG, TOKENS, Run, deadline

pytestmark = pytest.mark.e2e
QUICK = ["--dtype", "float32"]
ONE = [*QUICK, "--num-gpus", "1", "--tensor-parallel-size", "1"]


def test_the_reward_rises(undisturbed):
    """A vocabulary of 1,000 ids makes it quick; two trainers average gradients. (Two engines in a loop share prompts in
    test_drills.py and test_nodes.py.)
    """
    run, files = undisturbed
    rows = run.report["steps"]
    assert [json.loads(line) for line in files["metrics"].read_text().splitlines()] == rows
    assert [r["step"] for r in rows] == list(range(1, 14))
    assert [r["version"] for r in rows] == list(range(3, 16)), "1 was the proof's, 2 took its noise back"
    rewards = [r["reward"] for r in rows]
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3]), rewards
    for row in rows:
        assert row["logprob_gap"] < 0.02 and row["ratio"] == pytest.approx(1, abs=0.02)
        assert row["tokens"] == 64 * TOKENS
        stages = {"rollout", "sleep", "reward", "train", "wake", "push", "wake KV"}
        assert row["seconds"].keys() - {"verify", "checkpoint"} == stages
    assert len({r["weights"] for r in rows}) == 13, "steps change the weights"
    assert run.stdout.count("[train] ") == 3 and "attention, packed sequences" in run.stdout
    assert run.stdout.count("[step]") == 14 and "tokens/s" in run.stdout
    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    events = json.loads(files["trace"].read_text())["traceEvents"]
    names = {e["name"] for e in events if e["ph"] == "X"}
    assert {"rollout", "generate", "sleep", "wake_up", "learn", "push_weights", "train", "push"} <= names
    rows_shown = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert rows_shown == {"stages", "trainer 0", "trainer 1", "engine 0"}
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")


def test_resume_goes_on_bitwise(tmp_path, undisturbed):
    """Another run with --kl-coef and --offload-optimizer is in test_live.py."""
    run, files = undisturbed
    (thirteenth,) = Run(tmp_path, *LONG, "--steps", "1", "--resume", str(files["half"])).passed()["steps"]
    same = ("step", "reward", "loss", "logprob_gap", "grad_norm", "weights", "best")
    assert {k: thirteenth[k] for k in same} == {k: run.report["steps"][-1][k] for k in same}


def test_the_checkpoint_is_an_ordinary_one(undisturbed):
    whole = undisturbed[1]["checkpoint"]
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


def test_adapters_are_trained_and_pushed(tmp_path):
    folder = tmp_path / "checkpoint"
    run = Run(tmp_path, *ONE, "--lora-rank", "8", "--steps", "2", "--max-tokens", "8", "--checkpoint", str(folder))
    report = run.passed()
    assert "adapters of rank 8 on 24 layers" in run.stdout
    first, second = report["steps"]
    assert first["weights"] != second["weights"] and second["logprob_gap"] < 0.02
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 8 and settings["peft_type"] == "LORA"
    assert (folder / "model.safetensors").stat().st_size and (folder / "trainer_state").is_dir()


def test_a_pretrained_model_speaks_and_its_text_is_rewarded(tmp_path, smollm2):
    """That such a reward rises takes longer: results/loop-rehearsal-smollm2.json."""
    options = ["--steps", "1", "--max-tokens", "12", "--prompts-per-step", "4"]
    report = Run(tmp_path, *ONE, "--model", str(smollm2), *options, seconds=1200).passed()
    proof = report["samples"][0]
    (row,) = report["steps"]
    assert "Paris" in proof["old"]
    assert "Paris" in proof["new"], "2 % of noise must not make it forget"
    assert isinstance(row["best"], str) and 0 <= row["reward"] <= 1
