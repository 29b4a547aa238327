"""Damage a worker's weights as a broken push would, for the negative controls."""

from __future__ import annotations

from colocate.verify import expected_layout
from rlhf_utils import BITS, device_uuid, open_handles


def corrupt(worker, messages: dict, fault: str) -> None:
    """On tensor-parallel rank 0: "flip-element" flips a bit, "wrong-tp-slice" takes the other rank's slice."""
    if worker.rank != 0:
        return
    parameters = dict(worker.get_model().named_parameters())
    if fault == "flip-element":
        parameter = next(p for p in parameters.values() if p.dim() == 2)
        parameter.data.view(BITS[parameter.dtype.itemsize])[0, 0] ^= 1  # the last row may be padding
        return
    names = [w["name"] for w in messages[device_uuid(worker.device)]["weights"]]
    mine, other = (expected_layout(worker.get_model(), names, tp_rank=rank).regions for rank in (0, 1))
    region = next(b for a, b in zip(mine, other, strict=True) if a.src != b.src and a.dst == b.dst is not None)
    with open_handles(messages[device_uuid(worker.device)], worker.device) as weights:
        parameters[region.parameter].data[region.dst].copy_(region.source(weights[region.weight]))
