"""Prompts and rewards. The only module that knows a tokenizer: token ids go to the engines, and token ids come back."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import SupportsFloat

from colocate.config import LONGEST_PROMPT, USAGE, Config, Stop, refuse_unless
from colocate.model_folder import Model
from colocate.report import shorten


@dataclasses.dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    text: str | None = None  # None for a model without a tokenizer
    row: dict = dataclasses.field(default_factory=dict)  # the line of --prompts; {"prompt": text} for the script's own


class Task:
    """What is asked, and what the answers are worth.

    A model without a tokenizer gets seeded token ids as prompts, and `multiples_of_8` as its reward.
    """

    def __init__(self, config: Config, model: Model, prompts: list[str], reward: Callable[[str, str], float]):
        """prompts, reward: the script's own; --prompts and --reward replace them.

        Raises Stop(USAGE) for a prompt that is empty, or longer than --max-model-len allows.
        """
        self.config = config
        self.model = model
        self.stop_token_ids: list[int] = []  # for engines that have no tokenizer
        if not model.has_tokenizer:
            refuse_text(config)
            return
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
        if self.tokenizer.eos_token_id is not None:
            self.stop_token_ids = [self.tokenizer.eos_token_id]
        rows = {f"PROMPTS[{i}]": {"prompt": text} for i, text in enumerate(prompts)}
        if config.prompts:
            rows = read_prompts(config.prompts)
        refuse_unless(bool(rows), "PROMPTS is empty. Add a prompt, or try: --prompts FILE.jsonl")
        texts = [row["prompt"] for row in rows.values()]
        encoded = self.tokenizer(texts)["input_ids"]  # with special tokens, as vLLM encodes a prompt
        check_lengths(config, dict(zip(rows, map(len, encoded), strict=True)))
        self.dataset = [Prompt(*parts) for parts in zip(encoded, texts, rows.values(), strict=True)]
        self.reward_function = load_reward(config.reward) if config.reward else Reward(reward, "reward")

    def proof_prompts(self) -> list[list[int]]:
        """Token ids of the first four prompts, for the proof of the push."""
        if self.model.has_tokenizer:
            return [prompt.token_ids for prompt in self.dataset[:4]]
        return token_prompts(self.model.config, self.config.seed, 4, LONGEST_PROMPT)

    def prompts(self, step: int) -> list[Prompt]:
        """The --prompts-per-step prompts of a step, in turns: the same for the same step, whatever came before."""
        n = self.config.prompts_per_step
        if self.model.has_tokenizer:
            return [self.dataset[(step * n + i) % len(self.dataset)] for i in range(n)]
        return [Prompt(ids) for ids in token_prompts(self.model.config, f"{self.config.seed} {step}", n, 16)]

    def seed(self, step: int) -> int:
        """Of the sampler in this step. Each completion adds its number, so seeds of steps and runs are far apart."""
        return 1_000_000 * (1000 * self.config.seed + step)

    def reward(self, prompt: Prompt, tokens: list[int]) -> float:
        """What the reward function says of a completion.

        Raises Stop, with the function and the prompt named, if it raises an error or returns no finite number.
        """
        if not self.model.has_tokenizer:
            return multiples_of_8(tokens)
        try:
            return self.reward_function(prompt, self.text(tokens))
        except Stop as stop:
            if self.config.verbose and stop.__cause__:
                traceback.print_exception(stop.__cause__)
            raise

    def text(self, tokens: list[int]) -> str | list[int]:
        """A completion as vLLM would decode it; the ids themselves for a model without a tokenizer.

        That is without special tokens, and without a last character that is not complete. The tokens are decoded after
        a letter, as part of a text: at the beginning of one, some decoders drop a space.
        """
        if not self.model.has_tokenizer:
            return tokens
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        letter = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        start = len(self.tokenizer.decode(letter, **options))
        return self.tokenizer.decode([*letter, *tokens], **options)[start:].rstrip("\N{REPLACEMENT CHARACTER}")


# ---------------------------------------------------------------------------------------------------------------------
# A model without a tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def token_prompts(model_config: dict, seed: int | str, count: int, length: int) -> list[list[int]]:
    """Seeded token ids: `count` prompts of `length` tokens."""
    rng = random.Random(seed)
    vocab_size = model_config.get("text_config", model_config)["vocab_size"]
    return [[rng.randrange(10, vocab_size) for _ in range(length)] for _ in range(count)]


def multiples_of_8(tokens: list[int]) -> float:
    """The share of ids that are multiples of 8: learned in ten steps from random weights."""
    return sum(t % 8 == 0 for t in tokens) / len(tokens)


def refuse_text(config: Config) -> None:
    """Raise Stop(USAGE) for flags that are about text."""
    flags = [flag for flag, value in (("--prompts", config.prompts), ("--reward", config.reward)) if value]
    name = config.resume or config.model or "the default model here"
    message = f"{' and '.join(flags)}: text needs a tokenizer, and {name} has none. Give a --model that has one"
    refuse_unless(not flags, message)


# ---------------------------------------------------------------------------------------------------------------------
# The user's files
# ---------------------------------------------------------------------------------------------------------------------


def check_task(config: Config) -> None:
    """Read --prompts and --reward, before a model is fetched. Raises Stop(USAGE) for what needs no tokenizer to see."""
    if config.prompts:
        read_prompts(config.prompts)
    if config.reward:
        load_reward(config.reward)


@functools.cache  # a pipe can be read once
def read_prompts(path: str) -> dict[str, dict]:
    """{place in the file: row} of a file with one JSON object a line. Blank lines do not count.

    Each row has a "prompt", a string, and whatever else its line has. Raises Stop(USAGE) for a file of another kind.
    """
    hint = 'Each line must be a JSON object like {"prompt": "1 + 1 =", "answer": "2"}'
    try:
        lines = Path(path).expanduser().read_bytes().splitlines()
    except OSError as error:
        raise Stop(f"--prompts {path} cannot be read: {error.strerror}. Give another file. {hint}", USAGE) from None
    rows = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"--prompts {path}, line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no tokenizer takes it
        except (ValueError, RecursionError) as error:
            raise Stop(f"{place} is no JSON in UTF-8 ({getattr(error, 'msg', error)}). {hint}", USAGE) from None
        refuse_unless(isinstance(row, dict), f"{place} is no JSON object. {hint}")
        refuse_unless(isinstance(row.get("prompt"), str), f'{place} has no "prompt" that is a string. {hint}')
        rows[place] = row
    refuse_unless(bool(rows), f"--prompts {path} is empty. {hint}")
    return rows


def check_lengths(config: Config, lengths: dict[str, int]) -> None:
    """Raise Stop(USAGE) for a prompt without tokens, or with more than `config.longest_prompt`.

    lengths: {place of a prompt: tokens}.
    """
    empty = next((place for place, length in lengths.items() if not length), "")
    refuse_unless(not empty, f"{empty} is an empty prompt, without a token. Take it out")
    longest = max(lengths, key=lengths.get)
    length = lengths[longest]
    room = f"the script's own may have {LONGEST_PROMPT}. Put it into a file, and try: --prompts FILE.jsonl"
    if config.prompts:
        room = f"--max-model-len {config.max_model_len} leaves {config.longest_prompt} beside --max-tokens "
        room += f"{config.max_tokens}. Try: --max-model-len {length + config.max_tokens}"
    refuse_unless(length <= config.longest_prompt, f"{longest} is a prompt of {length} tokens; {room}")


class Reward:
    """A function of (prompt, completion), or of (prompt, completion, row). Messages about it name it."""

    def __init__(self, function: Callable[..., float], name: str):
        """name: for messages. Raises Stop(USAGE) if the function cannot be called in this way."""
        self.function = function
        self.name = name
        self.takes_row = False
        try:
            signature = inspect.signature(function)
        except ValueError:  # some built-in functions have none
            return
        kinds = {parameter.name: parameter.kind for parameter in signature.parameters.values()}
        by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.takes_row = kinds.get("row") in by_keyword or inspect.Parameter.VAR_KEYWORD in kinds.values()
        try:
            signature.bind("", "", **self.keywords({}))
        except TypeError:
            message = f"{name}{signature} does not take a prompt and a completion"
            raise Stop(f"{message}. Try: def {function.__name__}(prompt, completion, row)", USAGE) from None

    def keywords(self, row: dict) -> dict[str, dict]:
        return {"row": row} if self.takes_row else {}

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """Raises Stop, with the function and the prompt named, if there is no finite number. An error is its cause."""
        asked = f"for the prompt {short(prompt.text)}"
        try:
            value = self.function(prompt.text, completion, **self.keywords(prompt.row))
        except Exception as error:
            raise Stop(f"reward: {self.name} raised {described(error)} {asked}") from error
        number = math.nan
        # A tensor of several numbers and an integer of 400 digits cannot become one.
        with contextlib.suppress(ValueError, TypeError, OverflowError, RuntimeError):
            if isinstance(value, SupportsFloat):  # "1" does not
                number = float(value)
        if not math.isfinite(number):
            raise Stop(f"reward: {self.name} returned {short(value)} {asked}. It must return a finite number")
        return number


@functools.cache  # the file is run once
def load_reward(where: str) -> Reward:
    """The function of --reward FILE.py:FUNCTION. Its file may import what lies beside it.

    Raises Stop(USAGE) if there is no such file or function, and for an error in the file.
    """
    path, _, name = where.rpartition(":")
    file = Path(path).expanduser().resolve()
    example = f"{path or where}:{name if path else 'reward'}"
    refuse_unless(
        path.endswith(".py") and name.isidentifier(),
        f"--reward {where} is no FILE.py:FUNCTION. Try: --reward {example}",
    )
    refuse_unless(file.is_file(), f"--reward {where}: there is no file {file}. Give one that has the function {name}")
    spec = importlib.util.spec_from_file_location("user_reward", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        message = f"--reward {where} cannot be imported: {described(error, str(file))}"
        raise Stop(f"{message}. Try: python {path}", USAGE) from None
    function = getattr(module, name, None)
    others = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == spec.name]
    message = f"--reward {where}: {file.name} has no function {name}; it has {', '.join(others) or 'none'}"
    refuse_unless(callable(function), f"{message}. Try: --reward {path}:{others[0] if others else 'FUNCTION'}")
    return Reward(function, f"{file.name}:{name}")


def described(error: BaseException, file: str = "") -> str:
    """An error in the user's file: its type, its message and its line.

    file: the user's; else the one that the first call below ours is in.
    """
    frames = traceback.extract_tb(error.__traceback__)
    file = file or frames[min(1, len(frames) - 1)].filename
    lines = [frame.lineno for frame in frames if frame.filename == file]
    place = f" ({Path(file).name}, line {lines[-1]})" if lines else ""  # a SyntaxError's message has it already
    return f"{type(error).__name__}: {short(error)}{place}"


def short(value: object) -> str:
    """In one line of at most 100 characters; strings in quotes."""
    text = str(value) if isinstance(value, BaseException) else repr(value)
    return shorten(" ".join(text.split()))
