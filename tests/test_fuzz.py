"""Messages of handles with random damage: each is refused with a HandleError, or describes memory that is there."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf_utils
from rlhf_utils import HandleError, export_handles, open_handles

numbers = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, -1]), st.booleans()
)
junk = st.recursive(
    st.one_of(st.none(), numbers, st.floats(), st.text(max_size=6), st.binary(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)
likely = st.sampled_from(
    ["cpu", "cuda", "empty", "float32", "float64", "complex64", "w", "/proc/self/fd/0", "/proc/1/fd/1", "/dev/zero"]
)


@pytest.fixture(scope="module")
def good() -> dict:
    weights = {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "e": torch.empty(0, 2)}
    rlhf_utils.share_memory(weights.values())
    return export_handles([*weights.items(), ("t", weights["w"].t())])


def places(value, path=()):
    """Every place in a nested message: the ways to its dict values and list items."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_ten_thousand_damaged_messages(good, data):
    message = copy.deepcopy(good)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(list(places(message)) or [()]))
        if not where:
            break
        *way, key = where
        parent = message
        for step in way:
            parent = parent[step]
        kind = data.draw(st.sampled_from(["delete", "number", "likely", "junk", "duplicate"]))
        if kind == "delete":
            del parent[key]
        elif kind == "duplicate" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = data.draw({"number": numbers, "likely": likely}.get(kind, junk))
    try:
        with open_handles(message, torch.device("cpu")) as tensors:
            for tensor in tensors.values():
                tensor.clone()  # all of it can be read
    except HandleError as error:
        assert str(error)
