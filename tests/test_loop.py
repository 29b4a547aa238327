"""The RLHF loop, with the real Ray and the real vLLM: it learns, it goes on bitwise from a checkpoint, it says no."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_script import Run, shape

from colocate.config import FAIL, PASS

pytestmark = pytest.mark.e2e
ONE = ["--num-gpus", "1", "--tensor-parallel-size", "1"]
SMALL = ["--prompts-per-step", "4", "--group-size", "4", "--max-tokens", "8"]
TINY = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}


def test_the_reward_rises_on_two_engines(tmp_path):
    """A vocabulary of 1,000 ids makes it quick; trainers average gradients, engines share the prompts."""
    paths = {name: tmp_path / name for name in ("metrics.jsonl", "plot.png", "trace.json")}
    files = [x for name, path in paths.items() for x in ("--" + name.split(".")[0], str(path))]
    layout = ["--num-gpus", "2", "--tensor-parallel-size", "1", "--steps", "16", "--max-tokens", "8"]
    run = Run(tmp_path, *layout, *shape(tmp_path, **TINY), *files)
    report = run.passed()
    rows = report["steps"]
    assert [json.loads(line) for line in paths["metrics.jsonl"].read_text().splitlines()] == rows
    assert [r["step"] for r in rows] == list(range(1, 17))
    assert [r["version"] for r in rows] == list(range(3, 19)), "1 was the proof's, 2 took it back"
    rewards = [r["reward"] for r in rows]
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3]), rewards
    for row in rows:
        assert row["logprob_gap"] < 0.02 and row["ratio"] == pytest.approx(1, abs=0.02)
        assert row["tokens"] == 64 * 8
        assert set(row["seconds"]) == {"rollout", "sleep", "reward", "train", "wake", "push", "wake KV"}
    assert len({r["weights"] for r in rows}) == len(rows), "every step changes the weights"
    assert run.stdout.count("[step]") == 17 and "tokens/s" in run.stdout
    assert paths["plot.png"].read_bytes().startswith(b"\x89PNG")
    events = json.loads(paths["trace.json"].read_text())["traceEvents"]
    names = {e["name"] for e in events if e["ph"] == "X"}
    assert {"rollout", "sleep", "wake_up", "learn", "push_weights", "train", "push"} <= names
    rows_shown = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert rows_shown == {"phases", "trainer 0", "trainer 1", "engine 0, rank 0", "engine 1, rank 0"}
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")


def test_resume_goes_on_bitwise_and_the_checkpoint_is_an_ordinary_one(tmp_path):
    model, whole, half = shape(tmp_path, **TINY), tmp_path / "whole", tmp_path / "half"
    common = [*ONE, *SMALL, "--steps"]
    three = Run(tmp_path, *common, "3", *model, "--checkpoint", str(whole)).passed()["steps"]
    two = Run(tmp_path, *common, "2", *model, "--checkpoint", str(half)).passed()["steps"]
    third = Run(tmp_path, *common, "1", "--resume", str(half)).passed()["steps"]
    same = ("step", "reward", "loss", "logprob_gap", "grad_norm", "weights", "best")
    assert [{k: r[k] for k in same} for r in [*two, *third]] == [{k: r[k] for k in same} for r in three]
    load = """if True:
        import sys, torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
        file = load_file(sys.argv[1] + "/model.safetensors")
        assert file and model.dtype == torch.bfloat16
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in file.items())
    """
    command = [sys.executable, "-c", load, str(whole)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob(".*.new-*")) and not list(tmp_path.glob(".*.old-*"))


STALE = """
import sys
import rlhf_colocate as rc

class Stale(rc.Colocation):
    def push(self, version):
        pushed = super().push(version)
        if version == 4:  # after step 2: the trainers go on from weights that the engine never saw
            self.on_trainers("perturb", version)
        return pushed

rc.Colocation = Stale
sys.exit(rc.main(sys.argv[1:]))
"""


def test_stale_weights_show_in_the_logprobs(tmp_path):
    """Bound between what bf16 leaves (0.001 nats) and what 2 % of noise does (0.01)."""
    stale = tmp_path / "stale.py"
    stale.write_text(STALE)
    bound = ["--steps", "3", "--logprob-tolerance", "0.004"]
    run = Run(tmp_path, *ONE, *SMALL, *shape(tmp_path, **TINY), *bound, script=stale)
    assert run.code == FAIL and run.last_line.startswith("FAIL: logprobs: step 3: ")
    assert [row["logprob_gap"] < 0.004 for row in run.report["steps"]] == [True, True]


BROKEN = """
import sys
import rlhf_colocate as rc

class Broken(rc.RayTrainingActor):
    def learn(self, *args):
        if __import__("torch").distributed.get_rank() == 1:
            raise OSError("the dog ate it")
        return super().learn(*args)

rc.Colocation.training_actor = Broken
sys.exit(rc.main(sys.argv[1:]))
"""


def test_one_trainer_that_fails_ends_the_run_while_the_others_wait_for_it(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN)
    layout = ["--num-gpus", "2", "--tensor-parallel-size", "1", *SMALL, "--steps", "1"]
    run = Run(tmp_path, *layout, *shape(tmp_path, **TINY), script=broken, timeout=200)
    assert run.code == FAIL and "the dog ate it" in run.last_line
    assert run.report["stages_s"]["train"] < 30, "it did not wait for --timeout"


def test_simple_push_and_kl(tmp_path):
    options = ["--steps", "2", "--push", "simple", "--kl-coef", "0.1", "--offload-optimizer", "--sleep-level", "0"]
    run = Run(tmp_path, *ONE, *SMALL, *shape(tmp_path, **TINY), *options)
    assert run.code == PASS, run.stdout + run.stderr
    first, second = run.report["steps"]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 0


def test_a_text_reward_rises_with_a_pretrained_model(tmp_path, smollm2):
    options = ["--steps", "8", "--learning-rate", "3e-5", "--max-tokens", "12"]
    rows = Run(tmp_path, *ONE, "--model", str(smollm2), *options).passed()["steps"]
    assert isinstance(rows[0]["best"], str)
    assert sum(r["reward"] for r in rows[-2:]) > sum(r["reward"] for r in rows[:2]), [r["reward"] for r in rows]
