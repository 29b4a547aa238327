"""A checkpoint's folder: the model in it, and how it is replaced in one piece.

What was there before stays whole until the new one is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from colocate.config import Stop
from colocate.signals import interrupts_deferred

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_model(model: PreTrainedModel, folder: str, weights: dict) -> None:
    """Write a model with these weights as transformers does, whatever the rank of this trainer."""
    from transformers import GenerationConfig

    # Some published ones are invalid, and refuse to be saved; `replacing` copies the original file.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    # transformers 5.19 lets rank 0 alone write, and the replica that saves may not have it.
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(folder, state_dict=weights)


@contextlib.contextmanager
def replacing(folder: Path, files: Iterable[Path]):
    """Yield a new folder beside `folder`, which takes its place, with copies of `files`, once it has been written.

    Raises Stop if it cannot be written; KeyboardInterrupt and losses of actors come through. The half folder goes.
    """
    new = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        shutil.rmtree(new, ignore_errors=True)  # of a trainer that was lost while it wrote
        new.mkdir()
        yield new
        for file in files:
            shutil.copy(file, new)
        with interrupts_deferred():
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
    except OSError as error:
        raise Stop(describe_failure(folder, new, error)) from None
    except Stop as stop:
        if type(stop) is not Stop:  # an actor was lost
            raise
        raise Stop(describe_failure(folder, new, stop)) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def describe_failure(folder: Path, half: Path, error: Exception) -> str:
    """What to say when writing the checkpoint that was to become `folder`, in `half`, ended with this error."""
    written = sum(file.stat().st_size for file in half.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder.parent).free
    kept = "The checkpoint from before is whole" if folder.exists() else "There was none before"
    why = " ".join(str(error).split())
    fix = "Check --checkpoint"
    if free < 64 * 2**20:
        why = f"the disk of {folder.parent} is full, with {free} bytes free"
        fix = "Make room there, or try --checkpoint on another disk"
    return f"The checkpoint was not written to {folder}: after {written} bytes, {why}. {kept}. {fix}"
