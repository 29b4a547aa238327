"""--report-to: a run's numbers go where one looks at curves, each by its own library. Needs no network."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

from colocate.config import MISSING, USAGE, Stop, refuse_unless

PROJECT = "rlhf_colocate"


class Tracker:
    """One of them. log: takes ({name: number}, step)."""

    def __init__(self, log: Callable[[dict[str, float], int], None], close: Callable[[], None]):
        self._log = log
        self.close = close

    def log(self, line: dict) -> None:
        """A line of --metrics: a step's, or {"eval": ...}. Names are "reward", "seconds/rollout", "eval/reward"."""
        step = line.get("step", line.get("eval", {}).get("step"))
        if step is not None:
            self._log(numbers(line), step)


def numbers(line: dict, prefix: str = "") -> dict[str, float]:
    """The numbers in a line, those within its dicts, too, by names with slashes."""
    found = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            found[prefix + name] = float(value)
    return found


def tensorboard(config: dict) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(os.environ.get("TENSORBOARD_LOGGING_DIR"))  # transformers' variable; else runs/
    writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def wandb(config: dict) -> Tracker:
    import wandb as library

    run = library.init(project=os.environ.get("WANDB_PROJECT", PROJECT), config=config)
    return Tracker(lambda values, step: run.log(values, step=step), run.finish)


def trackio(config: dict) -> Tracker:
    import trackio as library

    library.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), config=config)
    return Tracker(lambda values, step: library.log(values, step=step), library.finish)


KINDS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}


def check(names: str | None) -> None:
    """Raise Stop(USAGE) for a name of --report-to that is unknown, Stop(MISSING) for a library that is missing."""
    for name in split(names):
        refuse_unless(name in KINDS, f"--report-to {name} is none of {', '.join(KINDS)}. Try: --report-to tensorboard")
        found = importlib.util.find_spec(name)
        # wandb leaves a folder of its name behind, which Python finds as well, but without an origin.
        refuse_unless(
            bool(found and found.origin), f"--report-to {name} needs its library. Try: pip install {name}", MISSING
        )


def split(names: str | None) -> list[str]:
    return [name.strip() for name in names.split(",")] if names else []


def start(names: str | None, config: dict) -> list[Tracker]:
    """Raises Stop(USAGE) for one that does not start, such as wandb without a login."""
    found = []
    for name in split(names):
        try:
            found.append(KINDS[name](config))
        except Exception as error:  # of its library's kinds
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            offline = ", or try: WANDB_MODE=offline" if name == "wandb" else ""
            raise Stop(f"--report-to {name} does not start ({cause}). Leave it out{offline}", USAGE) from None
    return found
