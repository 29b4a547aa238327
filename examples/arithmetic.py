"""A task that can be checked and that generalises: additions, in a format that is asked for, split by a seed.

    python examples/arithmetic.py data sums               # sums/train.jsonl and sums/heldout.jsonl, with no sum in both
    python examples/arithmetic.py model sums/tiny         # a tiny model that adds badly: half a minute on a CPU
    python rlhf_colocate.py --model sums/tiny --prompts sums/train.jsonl --eval-prompts sums/heldout.jsonl \
        --prompt-column text --reward examples/arithmetic.py:right --reward examples/arithmetic.py:formatted \
        --reward-weights 1,0.1

A chat model takes the column `prompt`, which is the default, with --max-tokens 16: SmolLM2-135M-Instruct gets one of
six right before it learns, and the format always. The rewards have TRL's form.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

FORMAT = re.compile(r"\s*<answer>(\d+)</answer>\s*")
LARGEST = 29  # of the numbers that are added
HELD_OUT = 200  # sums
SHOWN = [(2, 3), (14, 7)]  # to a chat model, with their answers


def sums(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(pairs to learn from, pairs that are held out), the same for the same seed."""
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1) if (a, b) not in SHOWN]
    random.Random(seed).shuffle(pairs)
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def row(a: int, b: int) -> dict:
    """text: for a model of this task alone; prompt: for a chat model; answer: for the rewards."""
    messages = []
    for x, y in [*SHOWN, (a, b)]:
        messages += [{"role": "user", "content": f"What is {x} + {y}?"}]
        messages += [{"role": "assistant", "content": f"<answer>{x + y}</answer>"}]
    messages.pop()
    return {"text": f"{a}+{b}=", "prompt": messages, "answer": str(a + b)}


def text_of(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def formatted(completions: list, **columns: list) -> list[float]:
    """1 for nothing but a number in <answer>...</answer>."""
    return [float(bool(FORMAT.fullmatch(text_of(completion)))) for completion in completions]


def right(completions: list, answer: list[str], **columns: list) -> list[float]:
    """1 for the right number, in the format."""
    found = [FORMAT.fullmatch(text_of(completion)) for completion in completions]
    return [float(bool(f) and f[1] == one) for f, one in zip(found, answer, strict=True)]


def write_data(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in zip(("train", "heldout"), sums(seed), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(a, b)) + "\n" for a, b in pairs))


def teach(folder: Path, words: list[str], lines: list[tuple[str, str]], seed: int, steps: int) -> None:
    """Write a Granite of 0.3 million parameters that has seen (prompt, answer) in so many steps of 64 lines each.

    words: all that its tokenizer knows, a token each; the first one ends an answer.
    """
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    torch.set_num_threads(1)  # more only get in each other's way, with tensors as small as these
    it = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    it.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, words))), "isolated")
    it.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=it, eos_token=words[0])
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(words), "max_position_embeddings": 512}
    # transformers loads a Granite with the tokenizer that is there; to a Qwen or a Llama it brings rules of its own.
    options = {"attention_multiplier": 32**-0.5, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0}
    model = GraniteForCausalLM(GraniteConfig(**sizes, **options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    encoded = [[tokenizer(text)["input_ids"] for text in (prompt, answer + words[0])] for prompt, answer in lines]
    longest = max(len(prompt) + len(answer) for prompt, answer in encoded)
    for _ in range(steps):
        ids_BL = torch.zeros(64, longest, dtype=torch.int64)
        labels_BL = torch.full_like(ids_BL, -100)  # no loss there
        for b, i in enumerate(torch.randint(len(lines), (64,)).tolist()):
            prompt, answer = encoded[i]
            ids_BL[b, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels_BL[b, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        model(input_ids=ids_BL, labels=labels_BL).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "model"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the split, and of the model")
    parser.add_argument("--taught-steps", type=int, default=220, help="of the model")
    given = parser.parse_args()
    if given.what == "data":
        write_data(given.folder, given.seed)
    else:
        words = ["<end>", "<answer>", "</answer>", "+", "=", *"0123456789"]
        lines = [(f"{a}+{b}=", f"<answer>{a + b}</answer>") for a, b in sums(given.seed)[0]]
        teach(given.folder, words, lines, given.seed, given.taught_steps)
