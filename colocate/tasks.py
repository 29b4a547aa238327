"""The task: what is asked, and what answers are worth. Rows of files come from prompts.py, functions from rewards.py.

The only module that knows a tokenizer: token ids go to the engines, and token ids come back.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import random
import traceback
from collections.abc import Callable
from pathlib import Path

from colocate.config import LONGEST_PROMPT, USAGE, Config, Stop, refuse_unless, stage_timeouts
from colocate.model_folder import Model
from colocate.prompts import Prompt, read_prompts
from colocate.report import short
from colocate.rewards import Answer, Reward, TaskError, Workers, described, load_function, load_reward


class Task:
    """What is asked, and what the answers are worth.

    A model without a tokenizer gets seeded token ids as prompts, and `multiples_of_8` as its reward.
    """

    def __init__(self, config: Config, model: Model, prompts: list[str], reward: Callable[..., object]):
        """prompts, reward: the script's own; --prompts and --reward replace them.

        Raises Stop(USAGE) for prompts that are empty, too long or too few, and for a chat without a chat template.
        """
        self.config = config
        self.model = model
        self.notes: list[str] = []  # what a user should be told
        self.stop_token_ids: list[int] = []  # for engines that have no tokenizer
        self.held_out: list[Prompt] = []  # of --eval-prompts
        self.rollout_function: tuple[Callable, str] | None = None  # and its name
        if not model.has_tokenizer:
            refuse_text(config)
            return
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
        self.stop_token_ids = end_tokens(self.tokenizer.eos_token_id, model.folder)
        rows = {f"PROMPTS[{i}]": {"prompt": text} for i, text in enumerate(prompts)}
        if config.prompts:
            rows = read_prompts(config.prompts, config.prompt_column, config.split)
        refuse_unless(bool(rows), "PROMPTS is empty. Add a prompt, or try: --prompts FILE.jsonl")
        self.dataset = self._encode(rows, config.prompt_column if config.prompts else "prompt", bool(config.prompts))
        if config.prompts:
            require_a_step(config, len(self.dataset))
        if config.eval_prompts:
            rows = read_prompts(config.eval_prompts, config.prompt_column, config.eval_split, "--eval-prompts")
            self.held_out = self._encode(rows, config.prompt_column, of_file=True)
            message = f"--eval-prompts {config.eval_prompts} has no prompt of at most {config.longest_prompt} tokens"
            refuse_unless(bool(self.held_out), f"{message}. Try: --overlong error, which names them")
        self.rollout_function = load_rollout(config.rollout) if config.rollout else None
        self.reward_functions = [Reward(reward, "reward")]
        if config.reward:
            self.reward_functions = [load_reward(where) for where in config.reward]
        for function in self.reward_functions:
            function.check_columns(self.dataset[0].row)
        self.workers: Workers | None = None
        if config.reward and config.reward_workers:
            timeout_s = stage_timeouts(config).get("reward", config.timeout)
            self.workers = Workers(config.reward_workers, timeout_s)

    # --- prompts

    def _encode(self, rows: dict[str, dict], column: str, of_file: bool) -> list[Prompt]:
        """The prompts of these rows, without those that --overlong drop takes out of a file.

        Text is encoded with special tokens, as vLLM does it; a chat by the tokenizer's template, which has them.
        """
        chats = {place: self._chat(row[column]) for place, row in rows.items()}
        texts = {place: row[column] for place, row in rows.items()}
        for place, messages in chats.items():
            if messages:
                texts[place] = self._apply_template(messages, place)
        plain = [place for place in rows if not chats[place]]
        encoded = dict(zip(plain, self.tokenizer([texts[p] for p in plain])["input_ids"], strict=True)) if plain else {}
        for place in rows.keys() - encoded.keys():
            encoded[place] = self.tokenizer(texts[place], add_special_tokens=False)["input_ids"]
        lengths = {place: len(encoded[place]) for place in rows}
        left_out = check_lengths(self.config, lengths, of_file)
        kept = [place for place in rows if place not in left_out]
        if left_out:
            count = f"{len(left_out)} of {len(rows)} prompts have more than {self.config.longest_prompt} tokens"
            self.notes.append(f"{count}, and are left out (--overlong drop)")
        return [Prompt(encoded[place], texts[place], rows[place], chats[place]) for place in kept]

    def _chat(self, prompt: str | list[dict]) -> list[dict] | None:
        """The messages of a prompt that is a chat: of one that is none, if --system makes it one."""
        system = self.config.system
        if isinstance(prompt, str) and system is None:
            return None
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if system is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": system}, *prompt]
        # A column of `datasets` has the same keys in all rows, some of them without a value.
        return [{key: value for key, value in message.items() if value is not None} for message in prompt]

    def _apply_template(self, messages: list[dict], place: str) -> str:
        """The chat as text, up to where the model goes on. Raises Stop(USAGE) if the template does not take it."""
        name = self.config.resume or self.config.model
        message = f"{place} is a chat, and the tokenizer of {name} has no chat template"
        fix = "Give a --model that is made for chats, or prompts that are text, without --system"
        refuse_unless(bool(self.tokenizer.chat_template), f"{message}. {fix}")
        goes_on = messages[-1]["role"] == "assistant"  # it has begun to answer
        where = {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **where)
        except Exception as error:  # of jinja, and what the template itself raises
            message = f"{place} does not fit the chat template of {name} ({short(error)})"
            raise Stop(f"{message}. Check the roles of its messages", USAGE) from None

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

    def sampling(self) -> dict:
        """Of a rollout: arguments of vllm.SamplingParams."""
        config = self.config
        options = {"n": config.group_size, "temperature": config.temperature, "max_tokens": config.max_tokens}
        options |= {"top_p": config.top_p, "top_k": config.top_k}
        options |= {"stop_token_ids": self.stop_token_ids}
        if config.stop:  # strings, which the engine can only find in text
            options |= {"stop": list(config.stop), "detokenize": True}
        return options

    def rollout(
        self, generate: Callable[..., list[dict]], prompts: list[Prompt], seed: int | None = None, **changes
    ) -> list[dict]:
        """Samples of these prompts, --group-size of each in order. changes: of `sampling`.

        generate: token ids of prompts, `seed` and arguments of vllm.SamplingParams in, samples out. With --rollout, its
        function is asked, with each prompt as often as there are samples of it: see docs/task.md. Raises Stop, with the
        function named, if it raises an error, or if what it returns cannot be learned from.
        """
        sampling = self.sampling() | changes
        if not self.rollout_function:
            return generate([prompt.token_ids for prompt in prompts], seed=seed, **sampling)
        function, name = self.rollout_function
        n = sampling.pop("n")
        asked = [prompt for prompt in prompts for _ in range(n)]
        turns = itertools.count()

        def turn(token_ids: list[list[int]], **more) -> list[dict]:
            """One turn: a sample of each of these prompts, with noise of its own."""
            own = None if seed is None else seed + next(turns)
            return generate(token_ids, seed=own, **sampling | more)

        try:
            samples = function(turn, asked, self)
        except Stop:
            raise
        except Exception as error:
            raise TaskError(f"rollout: {name} raised {described(error)}") from error
        for i in range(len(asked)):
            wrong = what_is_wrong(samples, len(asked), i)
            found = f"rollout: {name} returned {wrong} for the prompt {short(asked[i].text)}"
            if wrong:
                raise TaskError(f"{found}. See docs/task.md")
        return samples

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that goes on in a conversation: without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # --- rewards

    def score(self, prompts: list[Prompt], samples: list[dict]) -> None:
        """Give each sample its "reward"; and "rewards", {function: what it said}, if there are several.

        samples: equally many for each of the prompts. Raises TaskError, with the function and the prompt named, if
        one raises an error, hangs, or returns no finite number.
        """
        if not self.model.has_tokenizer:
            for sample in samples:
                sample["reward"] = multiples_of_8(sample["tokens"])
            return
        n = len(samples) // len(prompts)
        answers = [Answer(prompts[i // n], self.text(s["tokens"]), s["tokens"]) for i, s in enumerate(samples)]
        try:
            columns = [self._values(i, answers) for i in range(len(self.reward_functions))]
        except TaskError as error:
            if self.config.verbose and error.__cause__:
                traceback.print_exception(error.__cause__)
            raise
        names = [function.name for function in self.reward_functions]
        weights = self.config.weights_of_rewards
        for sample, answer, *values in zip(samples, answers, *columns, strict=True):
            said = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
            if not said:
                found = f"reward: {' and '.join(names)} returned None for {answer}"
                raise TaskError(f"{found}. One must return a number")
            sample["reward"] = sum(said)
            if len(names) > 1:
                sample["rewards"] = dict(zip(names, values, strict=True))

    def _values(self, i: int, answers: list[Answer]) -> list[float | None]:
        """What the i-th reward function says."""
        function = self.reward_functions[i]
        if self.workers:
            return self.workers(self.config.reward[i], answers)
        if function.of_lists:
            return function(answers)
        return [function([answer])[0] for answer in answers]

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


def what_is_wrong(samples: object, count: int, i: int) -> str:
    """With the i-th of so many samples that a rollout function returned; "": nothing."""
    if not isinstance(samples, list) or len(samples) != count:
        return f"no list of {count} samples, one of each prompt, but {short(samples)}"
    sample = samples[i]
    keys = {"prompt", "tokens", "logprobs", "truncated"}
    if not isinstance(sample, dict) or keys - sample.keys():
        return f"a sample without {', '.join(sorted(keys - set(sample)))}"
    sizes = {len(sample[key]) for key in ("tokens", "logprobs", "mask") if key in sample}
    if len(sizes) > 1:
        return f"a sample with {len(sample['tokens'])} tokens, and logprobs or a mask of another length"
    if not sample["tokens"]:
        return "a sample without a token"
    return ""


def end_tokens(eos_token_id: int | None, folder: Path) -> list[int]:
    """Ids that end a completion: the tokenizer's, and those of generation_config.json (of chat models often others)."""
    found = [] if eos_token_id is None else [eos_token_id]
    try:
        more = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        more = None
    more = more if isinstance(more, list) else [more]
    return list(dict.fromkeys([*found, *(token for token in more if isinstance(token, int))]))


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
    names = ("prompts", "reward", "system", "stop", "eval_prompts", "rollout")
    flags = ["--" + name.replace("_", "-") for name in names if getattr(config, name)]
    name = config.resume or config.model or "the default model here"
    message = f"{' and '.join(flags)}: text needs a tokenizer, and {name} has none. Give a --model that has one"
    refuse_unless(not flags, message)


# ---------------------------------------------------------------------------------------------------------------------
# What can be wrong with it
# ---------------------------------------------------------------------------------------------------------------------


def check_task(config: Config) -> None:
    """Read --prompts and --reward, before a model is fetched. Raises Stop for what needs no tokenizer to see."""
    for where in config.reward:
        load_reward(where)
    if config.rollout:
        load_rollout(config.rollout)
    if config.eval_prompts:
        rows = read_prompts(config.eval_prompts, config.prompt_column, config.eval_split, "--eval-prompts")
        for where in config.reward:
            load_reward(where).check_columns(next(iter(rows.values())), "--eval-prompts")
    if config.prompts:
        rows = read_prompts(config.prompts, config.prompt_column, config.split)
        require_a_step(config, len(rows))
        for where in config.reward:
            load_reward(where).check_columns(next(iter(rows.values())))


def load_rollout(where: str) -> tuple[Callable, str]:
    """The function of --rollout, and its name. Raises Stop(USAGE), also for one that takes other arguments."""
    function, name = load_function(where, "--rollout")
    with contextlib.suppress(ValueError):  # some built-in functions have no signature
        signature = inspect.signature(function)
        try:
            signature.bind(None, [], None)
        except TypeError:
            example = f"def {function.__name__}(generate, prompts, task)"
            raise Stop(f"--rollout: {name}{signature} does not take three arguments. Try: {example}", USAGE) from None
    return function, name


def require_a_step(config: Config, count: int) -> None:
    """Raise Stop(USAGE) if the file's prompts are fewer than a step takes: it would have some of them twice."""
    message = f"--prompts {config.prompts} has {count} prompts, fewer than --prompts-per-step {config.prompts_per_step}"
    fix = f"Try: --prompts-per-step {count}" if count else "Try: --overlong error, which names them"
    refuse_unless(count >= config.prompts_per_step or not config.steps, f"{message}. {fix}")


def check_lengths(config: Config, lengths: dict[str, int], of_file: bool) -> dict[str, int]:
    """The prompts that --overlong drop leaves out. Raises Stop(USAGE) for one that is too long without it, or empty.

    lengths: {place of a prompt: tokens}. of_file: they may have `config.longest_prompt`, the script's own fewer.
    """
    empty = next((place for place, length in lengths.items() if not length), "")
    refuse_unless(not empty, f"{empty} is an empty prompt, without a token. Take it out")
    longest = config.longest_prompt if of_file else LONGEST_PROMPT
    overlong = {place: length for place, length in lengths.items() if length > longest}
    if not overlong or (of_file and config.overlong == "drop"):
        return overlong
    place, length = next(iter(overlong.items()))
    found = f"{place} is a prompt of {length} tokens"
    if len(overlong) > 1:
        found += f", the first of {len(overlong)} that are too long"
    room = f"the script's own may have {LONGEST_PROMPT}. Put it into a file, and try: --prompts FILE.jsonl"
    if of_file:
        longest = max(overlong.values())
        room = f"--max-model-len {config.max_model_len} leaves {config.longest_prompt} beside --max-tokens "
        room += f"{config.max_tokens}. Try: --overlong drop, or --max-model-len {longest + config.max_tokens}"
        if config.max_prompt_length and config.max_prompt_length == config.longest_prompt:
            room = f"--max-prompt-length is {config.max_prompt_length}. Try: --overlong drop, or --max-prompt-length "
            room += str(longest)
    raise Stop(f"{found}; {room}", USAGE)
