"""The optimizer's state beside a Hugging Face checkpoint: tensors by torch.distributed.checkpoint, numbers as JSON.

Tensors are saved as the trainers of a replica hold them, and read as those hold them that go on: in other shards, or in
none. https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FOLDER = "trainer_state"  # in the checkpoint's
NUMBERS = "numbers.json"
PARTS = ("master", "exp_avg", "exp_avg_sq", "reference", "base")  # a tensor's name is "master.model.norm.weight"


def write(folder: Path, tensors: dict[str, torch.Tensor], numbers: dict, group) -> None:
    """Write the state into the checkpoint's folder. group: of the trainers that hold it, which must all call this."""
    import torch
    import torch.distributed.checkpoint as dcp

    where = folder / FOLDER
    dcp.save(tensors, checkpoint_id=where, process_group=group, no_dist=group is None)
    if group is None or torch.distributed.get_rank(group) == 0:
        (where / NUMBERS).write_text(json.dumps(numbers))


def read_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill the tensors, in place and wherever they are, with what `write` wrote."""
    import torch.distributed.checkpoint as dcp

    dcp.load(tensors, checkpoint_id=folder / FOLDER, no_dist=True)  # each trainer reads its own


def read_numbers(folder: Path) -> dict:
    return json.loads((folder / FOLDER / NUMBERS).read_text())


def elements(folder: Path) -> dict[str, int]:
    """{part: elements in the state}. Raises ValueError if a file is missing or cut off, others if it is no state."""
    import torch.distributed.checkpoint as dcp

    where = folder / FOLDER
    metadata = dcp.FileSystemReader(where).read_metadata()
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    if short := [name for name, end in ends.items() if (where / name).stat().st_size < end]:
        raise ValueError(f"{short[0]} is cut off")
    found = dict.fromkeys(PARTS, 0)
    for name, tensor in metadata.state_dict_metadata.items():
        found[name.partition(".")[0]] += math.prod(tensor.size)
    return found
