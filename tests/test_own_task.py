"""A task of one's own, whole: data, rewards, a tool, evaluation, with the real Ray and vLLM; and its examples."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import pytest
from running import ROOT, Run

sys.path.insert(0, str(ROOT / "examples"))

import arithmetic
import calculator

WORDS = ["<end>", "<calc>", "</calc>", " ", "\n", "+", "=", *"0123456789"]
TRL = """
def short(completions, answer, **kwargs):
    return [1 / (1 + len(completion)) for completion in completions]
"""


@pytest.mark.parametrize(
    "text, value",
    [("12 * 7", "84"), (" 3-10", "-7"), ("2+3*4", "14"), ("", "error"), ("1/0", "error"), ("exit()", "error")],
)
def test_the_calculator_computes_sums_and_products(text, value):
    assert calculator.compute(text) == value


def test_the_calculator_takes_two_turns():
    """With an engine that says what it is told to say."""

    class Letters:
        text = staticmethod(lambda ids: "".join(map(chr, ids)))
        encode = staticmethod(lambda text: [ord(letter) for letter in text])

    turns = [["<calc>2+3</calc>", "no tool"], ["5"]]
    asked = []

    def generate(prompts: list[list[int]]) -> list[dict]:
        asked.append([Letters.text(prompt) for prompt in prompts])
        said = [Letters.encode(text) for text in turns[len(asked) - 1]]
        samples = zip(prompts, said, strict=True)
        return [{"prompt": p, "tokens": t, "logprobs": [-1.0] * len(t), "truncated": False} for p, t in samples]

    class Prompt:
        token_ids = Letters.encode("Q")

    first, second = calculator.rollout(generate, [Prompt, Prompt], Letters)
    assert asked == [["Q", "Q"], ["Q<calc>2+3</calc> 5\n"]]
    assert Letters.text(first["tokens"]) == "<calc>2+3</calc> 5\n5" and Letters.text(second["tokens"]) == "no tool"
    assert first["mask"] == [1] * 16 + [0] * 3 + [1] and second["mask"] == [1] * 7
    assert len(first["logprobs"]) == len(first["tokens"])
    assert calculator.reward("Q", Letters.text(first["tokens"]), {"answer": "5"}) == 1.1


def test_no_sum_is_in_both_halves_and_the_rewards_know_the_format(tmp_path):
    learned, held_out = arithmetic.sums(0)
    assert len(held_out) == 200 and not {*learned} & {*held_out} and len(learned) + 200 == 30 * 30 - 2
    assert arithmetic.sums(0)[1] == held_out != arithmetic.sums(1)[1]
    arithmetic.write_data(tmp_path, 0)
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    said = [message["content"] for message in rows[0]["prompt"]]
    assert said[:2] == ["What is 2 + 3?", "<answer>5</answer>"] and said[-1] == "What is {} + {}?".format(*held_out[0])
    assert rows[0]["text"] == "{}+{}=".format(*held_out[0]) and rows[0]["answer"] == str(sum(held_out[0]))
    said = ["<answer>7</answer>", " <answer>8</answer>\n", "7", "<answer>7</answer>!"]
    assert arithmetic.formatted(said) == [1, 1, 0, 0]
    assert arithmetic.right(said, ["7"] * 4) == [1, 0, 0, 0]
    chat = [[{"role": "assistant", "content": text}] for text in said]
    assert arithmetic.right(chat, ["7"] * 4) == [1, 0, 0, 0]


@pytest.mark.e2e
def test_a_task_of_ones_own_with_a_tool(tmp_path):
    """The model has been taught to call the calculator, and to say what it said."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    first = [(f"{a}+{b}=", f"<calc>{a}+{b}</calc>") for a, b in pairs]
    second = [(f"{a}+{b}=<calc>{a}+{b}</calc> {a + b}\n", str(a + b)) for a, b in pairs]
    model = tmp_path / "model"
    arithmetic.teach(model, WORDS, first + second, seed=0, steps=70)
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows[::2])))
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows[1::2])))
    (tmp_path / "trl.py").write_text(TRL)
    tool = ROOT / "examples/calculator.py"
    paths = {"prompts": "train.jsonl", "eval-prompts": "heldout.jsonl", "save-best": "best", "metrics": "m.jsonl"}
    arguments = [x for flag, name in paths.items() for x in (f"--{flag}", str(tmp_path / name))]
    arguments += ["--prompt-column", "question", "--stop", "</calc>", "--rollout", f"{tool}:rollout"]
    arguments += [
        "--reward",
        f"{tool}:reward",
        "--reward",
        f"{tmp_path / 'trl.py'}:short",
        "--reward-weights",
        "1,0.01",
    ]
    arguments += ["--temperature", "0.8", "--correction", "sequence_mask", "--num-iterations", "2"]
    arguments += ["--loss-type", "dr_grpo", "--scale-rewards", "none", "--epsilon-high", "0.28"]
    arguments += ["--mask-truncated-completions", "--lr-scheduler", "linear", "--learning-rate", "1e-4"]
    arguments += ["--max-num-seqs", "32", "--engine-args", '{"max_num_batched_tokens": 4096}']
    arguments += ["--steps", "3", "--eval-every", "2", "--max-tokens", "12", "--dtype", "float32"]
    if importlib.util.find_spec("tensorboard"):
        arguments += ["--report-to", "tensorboard"]
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "curves")
    layout = ["--num-gpus", "1", "--tensor-parallel-size", "1"]
    report = Run(tmp_path, "--model", str(model), *layout, *arguments).passed()
    assert [e["step"] for e in report["evals"]] == [0, 2, 3] and report["evals"][0]["n"] == 50
    answer = report["evals"][0]["samples"][0]
    assert "</calc> " in answer["answer"] and answer["answer"].count("\n") == 1, "it goes on after the tool"
    assert report["evals"][-1]["rewards"]["calculator.py:reward"] > 0.5
    for row in report["steps"]:
        assert row["logprob_gap"] < 0.01, "the trainers divide by the temperature, too"
        assert row["rewards"].keys() == {"calculator.py:reward", "trl.py:short"}
        assert row["effective"] > 0.9 and row["worst_token"] < 0.5 and row["masked"] == 0
        assert 0 <= row["equal_groups"] <= 8
    assert [row["learning_rate"] for row in report["steps"]] == pytest.approx([1e-4, 2e-4 / 3, 1e-4 / 3])
    assert {"config.json", "trainer_state", "tokenizer.json"} <= {path.name for path in (tmp_path / "best").iterdir()}
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [("eval" in line) for line in lines] == [True, False, False, True, False, True]
