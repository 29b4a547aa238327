"""A rollout of two turns with a tool: what the model writes between <calc> and </calc> is computed, and it goes on.

    python rlhf_colocate.py --model MODEL --prompts sums.jsonl --stop "</calc>" \
        --rollout examples/calculator.py:rollout --reward examples/calculator.py:reward

Each line of sums.jsonl: {"prompt": "What is 12 * 7? Use <calc>12 * 7</calc>.\n", "answer": "84"}
"""

import ast
import operator

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def compute(text: str) -> str:
    """The value of a sum, difference or product of integers, of at most 30 characters. "error" for all else."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        raise ValueError(node)

    try:
        return str(value(ast.parse(text.strip()[:30], mode="eval").body))
    except (SyntaxError, ValueError, KeyError):
        return "error"


def rollout(generate, prompts, task) -> list[dict]:
    """One sample for each of the prompts: a turn, the tool's answer, and a second turn where the tool was called.

    generate(list of token ids, **arguments of vllm.SamplingParams) -> samples: {"prompt", "tokens", "logprobs": of each
    of the tokens, "truncated"}. What is returned has a "mask" beside these: 1 for tokens that the model has written and
    is to learn from, 0 for the tool's, which have no log-probability of the model's (any number will do).
    """
    samples = generate([prompt.token_ids for prompt in prompts])
    calls = []  # samples that have called the tool
    for sample in samples:
        sample["mask"] = [1] * len(sample["tokens"])
        text = task.text(sample["tokens"])
        if text.endswith("</calc>") and "<calc>" in text:
            said = task.encode(f" {compute(text.rpartition('<calc>')[2].removesuffix('</calc>'))}\n")
            add(sample, said, [0.0] * len(said), learn=0)
            calls.append(sample)
    if calls:
        answers = generate([sample["prompt"] + sample["tokens"] for sample in calls])
        for sample, answer in zip(calls, answers, strict=True):
            add(sample, answer["tokens"], answer["logprobs"], learn=1)
            sample["truncated"] = answer["truncated"]
    return samples


def add(sample: dict, tokens: list[int], logprobs: list[float], learn: int) -> None:
    sample["tokens"] += tokens
    sample["logprobs"] += logprobs
    sample["mask"] += [learn] * len(tokens)


def reward(prompt: str, completion: str, row: dict) -> float:
    """1 for an answer that ends in the right number, 0.1 for having called the tool."""
    words = completion.split()
    return float(bool(words) and words[-1].rstrip(".") == row["answer"]) + 0.1 * ("</calc>" in completion)
