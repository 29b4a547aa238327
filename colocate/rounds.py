"""--push gather: weights that come in rounds, through one buffer that a trainer fills anew for each. Both sides of it.

The trainer and the worker on its GPU tell each other how far they are by a control tensor beside the buffer, ROUND. The
trainer sends (`send`), and the worker reads (`arriving`): in a push, whose plan is `Rounds` then, and in a comparison.
The engine needs worker_extension_cls="colocate.rounds.Extension", which takes weights without rounds, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from rlhf_utils import ColocateWorkerExtension, CopyPlan, HandleError, Piece, Recording, is_control

# int64, shape (4,), in the trainer's memory, exported beside the weights (see rlhf_utils.is_control): the round that
# the buffer holds, how many the worker has taken, and the processes of trainer and worker.
ROUND = "rlhf.round"
NO_ROUND = (-1, 0, 0, 0)
ROUND_S = 60.0  # how long one side waits for the other


# ---- Trainer --------------------------------------------------------------------------------------------------------


def send(control: torch.Tensor, rounds: Iterable[int]) -> None:
    """Send weights through one buffer, some of them in each round, to the worker on this GPU, which reads (`arriving`).

    control: exported as ROUND, NO_ROUND at first. rounds: each step fills the buffer, and gives its round's number.
    Returns when the worker has taken all. If it has ended, or takes none for ROUND_S, the other rounds are gone through
    all the same, since the trainers of a replica fill their buffers together; then RuntimeError is raised.
    """
    control[:3].copy_(torch.tensor([-1, 0, os.getpid()]))  # the worker may have said already who it is
    ended = _ended(control[3])
    taken = True
    try:
        for number in rounds:
            control[0] = number if taken else -1
            taken = taken and _wait(lambda: int(control[1]) > number, ended)  # noqa: B023
            control[0] = -1  # before the buffer changes
    finally:
        control[:3].copy_(torch.tensor([-1, 0, 0]))  # a worker that still waits takes this trainer for ended
    if not taken:
        raise RuntimeError("the worker on this GPU has not taken the weights")


# ---- Worker ---------------------------------------------------------------------------------------------------------


class Rounds(CopyPlan):
    """A push that replays, in each round, the copies of the weights that are there."""

    def arriving(self) -> Iterator[tuple[int, list[str]]]:
        return arriving(self.weights)

    def weight(self, name: str) -> torch.Tensor:
        return super().weight(name).clone()  # loaders may keep it, and the next round comes to its place


class Extension(ColocateWorkerExtension):
    """The worker extension, for weights in rounds, too."""

    def new_plan(self, recording: Recording, weights: dict[str, list[Piece]]) -> CopyPlan:
        if ROUND not in weights:
            return super().new_plan(recording, weights)
        return Rounds(self.get_model(), self.vllm_config, recording, weights)

    def _record(self, messages: dict) -> Recording:
        recording = super()._record(messages)  # which has found them whole
        _check(messages)
        return recording


def _check(messages: dict) -> None:
    """Raise HandleError unless each message with rounds has its ROUND, for one worker: two would take turns with it."""
    for sender, message in messages.items():
        forms = {w["name"]: (w["dtype"], w["shape"]) for w in message["weights"]}
        in_rounds = ROUND in forms or any(w.get("round") for w in message["weights"])
        if in_rounds and (forms.get(ROUND) != ("int64", [4]) or message["readers"]):
            what = f"missing: {ROUND} ({sender}): export it beside weights in rounds, int64 (4,), for one reader"
            raise HandleError(f"the trainers' messages do not fit, nothing was loaded: {what}")


def arriving(weights: dict[str, list[Piece]]) -> Iterator[tuple[int, list[str]]]:
    """(round, names of the weights that are there): of all at once, unless the trainer sends them in rounds.

    Then it must be doing so (`send`), and they are gone when the loop goes on: what was launched on the current
    stream by then may still read them. Raises RuntimeError if a round does not come, or was over before it was read.
    """
    names = [name for name in weights if not is_control(name)]
    if ROUND not in weights:
        yield 0, names
        return
    rounds: dict[int, list[str]] = {}
    for name in names:
        rounds.setdefault(weights[name][0].round, []).append(name)
    control = weights[ROUND][0].tensor
    control[3] = os.getpid()
    ended = _ended(control[2])
    try:
        for number in sorted(rounds):
            if not _wait(lambda: int(control[0]) == number, ended):  # noqa: B023
                raise RuntimeError(f"the trainer on this GPU has not sent round {number} of its weights")
            yield number, rounds[number]
            if int(control[0]) != number:
                raise RuntimeError(f"the trainer on this GPU has not waited until round {number} was read")
            control[1] = number + 1
    except BaseException:  # the loop was left: the trainer need not wait
        control[1] = len(rounds)
        raise


# ---- Both -----------------------------------------------------------------------------------------------------------


def _wait(ready: Callable[[], bool], ended: Callable[[], bool]) -> bool:
    """Wait until it is ready: False if it is not within ROUND_S, or the other side's process has ended."""
    end = time.monotonic() + ROUND_S
    while not ready():
        if ended() or time.monotonic() > end:
            return ready()
        time.sleep(5e-5)
    return True


def _ended(process: torch.Tensor) -> Callable[[], bool]:
    """A function: whether the process with this number was seen alive, and is not any more. One never seen counts as
    not ended."""

    def alive() -> bool:
        return os.path.exists(f"/proc/{int(process)}/exe")  # a zombie has none

    seen = alive()

    def ended() -> bool:
        nonlocal seen
        now = alive()
        seen = seen or now
        return seen and not now

    return ended
