"""Reward functions: what may be one, what it is called with, and the processes that --reward runs in."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import inspect
import math
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import SupportsFloat

from colocate.config import USAGE, Stop, refuse_unless
from colocate.prompts import Prompt
from colocate.report import short


class TaskError(Stop):
    """The user's function has failed. The trainers' state is whole."""


@dataclasses.dataclass(frozen=True)
class Answer:
    prompt: Prompt
    text: str
    token_ids: list[int]

    def __str__(self) -> str:
        return f"the prompt {short(self.prompt.text)} and the completion {short(self.text)}"


def drop(*_args, **_options) -> None:
    """What TRL's reward functions log."""


LOGS = {"log_extra": drop, "log_metric": drop}


class Reward:
    """A function of (prompt, completion), or of (prompt, completion, row); or TRL's, with a parameter `completions`.

    TRL's gets lists, with an entry for each answer: `prompts`, `completions`, `completion_ids`, and every other column
    of --prompts by its name; what it logs with `log_extra` and `log_metric` is dropped. It may be async. A chat's
    prompt is its messages there, and a completion [{"role": "assistant", "content": text}]
    (https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function"). Messages name the function.
    """

    def __init__(self, function: Callable[..., object], name: str):
        """Raises Stop(USAGE) if the function cannot be called in either way."""
        self.function = function
        self.name = name
        self.takes_row = False
        self.takes_all = False
        self.parameters: dict[str, inspect.Parameter] = {}
        try:
            signature = inspect.signature(function)
        except ValueError:  # some built-in functions have none
            return
        self.parameters = dict(signature.parameters)
        kinds = {parameter.kind for parameter in self.parameters.values()}
        self.takes_all = inspect.Parameter.VAR_KEYWORD in kinds
        if self.of_lists:
            return
        row = self.parameters.get("row")
        by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.takes_row = self.takes_all or (row is not None and row.kind in by_keyword)
        try:
            signature.bind("", "", **self._row({}))
        except TypeError:
            message = f"{name}{signature} does not take a prompt and a completion"
            raise Stop(f"{message}. Try: def {function.__name__}(prompt, completion, row)", USAGE) from None

    @property
    def of_lists(self) -> bool:
        """Whether it is written for TRL."""
        return "completions" in self.parameters

    def check_columns(self, row: dict, flag: str = "--prompts") -> None:
        """Raise Stop(USAGE) if it wants a column that the prompts of this flag don't have. row: one of theirs."""
        if not self.of_lists:
            return
        known = {"prompts", "completions", "completion_ids", *LOGS, *row}
        collecting = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        required = [n for n, p in self.parameters.items() if p.default is p.empty and p.kind not in collecting]
        unknown = [name for name in required if name not in known]
        has = ", ".join(row)
        message = f"{self.name} wants trainer_state, which TRL's trainer has and this script has not. Leave it out"
        refuse_unless("trainer_state" not in unknown, message)
        message = f"{self.name} wants {', '.join(unknown)}, and the prompts have only {has}. Give {flag} with it"
        refuse_unless(not unknown, message)

    def __call__(self, answers: list[Answer]) -> list[float | None]:
        """What the answers are worth; None, which TRL's may say: this function has nothing to say of an answer.

        Raises TaskError, with the function and the sample named, if it raises an error, its cause, or if what it
        returns is not one finite number for each answer.
        """
        asked = f"for {answers[0]}"
        if len(answers) > 1:
            asked = f"for {len(answers)} completions, the first one {asked}"
        try:
            values = self.function(**self._columns(answers)) if self.of_lists else [self._one(a) for a in answers]
            if inspect.iscoroutine(values):
                values = asyncio.run(values)
        except Exception as error:
            raise TaskError(f"reward: {self.name} raised {described(error)} {asked}") from error
        try:
            values = list(values)
        except TypeError:
            values = []
        if len(values) != len(answers):
            message = f"returned {len(values)} values {asked}. It must return a list with a number for each"
            raise TaskError(f"reward: {self.name} {message}")
        return [self._number(value, answer) for value, answer in zip(values, answers, strict=True)]

    def _row(self, row: dict) -> dict[str, dict]:
        return {"row": row} if self.takes_row else {}

    def _one(self, answer: Answer) -> object:
        return self.function(answer.prompt.text, answer.text, **self._row(answer.prompt.row))

    def _columns(self, answers: list[Answer]) -> dict[str, list]:
        names = dict.fromkeys(name for answer in answers for name in answer.prompt.row)
        columns = {name: [answer.prompt.row.get(name) for answer in answers] for name in names}
        columns["prompts"] = [a.prompt.messages or a.prompt.text for a in answers]
        columns["completions"] = [
            [{"role": "assistant", "content": a.text}] if a.prompt.messages else a.text for a in answers
        ]
        columns["completion_ids"] = [a.token_ids for a in answers]
        columns |= LOGS
        return columns if self.takes_all else {n: column for n, column in columns.items() if n in self.parameters}

    def _number(self, value: object, answer: Answer) -> float | None:
        if value is None and self.of_lists:
            return None
        number = math.nan
        # A tensor of several numbers and an integer of 400 digits cannot become one.
        with contextlib.suppress(ValueError, TypeError, OverflowError, RuntimeError):
            if isinstance(value, SupportsFloat):  # "1" does not
                number = float(value)
        if not math.isfinite(number):
            found = f"reward: {self.name} returned {short(value)} for {answer}"
            raise TaskError(f"{found}. It must return a finite number")
        return number


@functools.cache  # the file is run once
def load_function(where: str, flag: str) -> tuple[Callable, str]:
    """The function of a flag's FILE.py:FUNCTION, and its name. Its file may import what lies beside it.

    Raises Stop(USAGE) if there is no such file or function, and for an error in the file.
    """
    path, _, name = where.rpartition(":")
    file = Path(path).expanduser().resolve()
    example = f"{path or where}:{name if path else flag.removeprefix('--')}"
    refuse_unless(
        path.endswith(".py") and name.isidentifier(),
        f"{flag} {where} is no FILE.py:FUNCTION. Try: {flag} {example}",
    )
    refuse_unless(file.is_file(), f"{flag} {where}: there is no file {file}. Give one that has the function {name}")
    module = run_file(file, where, flag)
    function = getattr(module, name, None)
    others = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
    message = f"{flag} {where}: {file.name} has no function {name}; it has {', '.join(others) or 'none'}"
    refuse_unless(callable(function), f"{message}. Try: {flag} {path}:{others[0] if others else 'FUNCTION'}")
    return function, f"{file.name}:{name}"


def run_file(file: Path, where: str, flag: str):
    """The module of the user's file, which is run once, whatever number of flags name it."""
    name = "user_" + file.stem
    known = sys.modules.get(name)
    if known and known.__file__ == str(file):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        message = f"{flag} {where} cannot be imported: {described(error, str(file))}"
        raise Stop(f"{message}. Try: python {file}", USAGE) from None
    return module


@functools.cache
def load_reward(where: str) -> Reward:
    """The function of --reward FILE.py:FUNCTION. Raises Stop(USAGE)."""
    return Reward(*load_function(where, "--reward"))


# ---------------------------------------------------------------------------------------------------------------------
# The processes
# ---------------------------------------------------------------------------------------------------------------------


def begin(parent_died: int = signal.SIGKILL) -> None:
    """In a process for rewards: leave Ctrl-C to the driver, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, parent_died, 0, 0, 0)  # PR_SET_PDEATHSIG of prctl(2); Linux only


def work(where: str, answers: list[Answer]) -> list[float | None]:
    return load_reward(where)(answers)


class Workers:
    """Processes beside the driver, in which --reward's functions run: one that hangs can be cut off."""

    def __init__(self, count: int, timeout_s: float):
        """Starts them, before there is a Ray: what the driver starts later counts as Ray's. Raises Stop(USAGE)."""
        self.count = count
        self.timeout_s = timeout_s
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit Ray's locks without its threads
        self.pool = concurrent.futures.ProcessPoolExecutor(count, mp_context=spawn, initializer=begin)
        try:
            concurrent.futures.wait([self.pool.submit(begin) for _ in range(count)])
            self.pool.submit(begin).result()
        except concurrent.futures.BrokenExecutor:  # they import the main script, which must not run there
            fix = 'Try: --reward-workers 0, or call main() below: if __name__ == "__main__"'
            raise Stop(f"The processes for --reward did not start. {fix}", USAGE) from None

    def __call__(self, where: str, answers: list[Answer]) -> list[float | None]:
        """`Reward.__call__` of all answers. Raises TaskError also for a function that hangs or ends its process."""
        reward = load_reward(where)
        size = -(-len(answers) // self.count) if reward.of_lists else 1
        parts = [answers[i : i + size] for i in range(0, len(answers), size)]
        end = time.monotonic() + self.timeout_s
        values = []
        try:
            for future in [self.pool.submit(work, where, part) for part in parts]:
                values += future.result(max(0.0, end - time.monotonic()))
        except BaseException as error:
            self.kill()
            asked = f"for {answers[len(values)]}"
            if isinstance(error, TimeoutError):
                longer = f"To wait longer: --stage-timeout reward={2 * self.timeout_s:g}"
                found = f"did not return within {self.timeout_s:g} s {asked}"
                raise TaskError(f"reward: {reward.name} {found}. {longer}") from None
            if isinstance(error, concurrent.futures.BrokenExecutor):
                raise TaskError(f"reward: {reward.name} ended its process {asked}") from None
            raise
        return values

    def kill(self) -> None:
        """End the processes now. (Python 3.14 has `kill_workers`.)"""
        for process in list((self.pool._processes or {}).values()):
            process.kill()
        self.pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------------------------------------------------


def described(error: BaseException, file: str = "") -> str:
    """An error in the user's file: its type, its message and its line.

    file: the user's; else the one that the first call below ours is in.
    """
    ours = Path(__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent != ours]
    file = file or (frames[0].filename if frames else "")
    lines = [frame.lineno for frame in frames if frame.filename == file]
    place = f" ({Path(file).name}, line {lines[-1]})" if lines else ""  # a SyntaxError's message has it already
    return f"{type(error).__name__}: {short(error)}{place}"
