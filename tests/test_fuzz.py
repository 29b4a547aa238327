"""Messages of handles with random damage. No vLLM, no GPU."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import rlhf_utils
from rlhf_utils import VERSION, HandleError, export_handles, open_handles

CPU = torch.device("cpu")
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
thousands = settings(max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))


class Trainer:
    def __init__(self):
        self.weights = {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
        self.weights |= {"s": torch.tensor(2.0), VERSION: torch.tensor(7)}
        rlhf_utils.share_memory(self.weights.values())

    def message(self) -> dict:
        return export_handles(self.weights.items())


class Model(torch.nn.Module):
    """It loads by name."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, torch.nn.Parameter(torch.full_like(weight, 3)))

    def load_weights(self, weights) -> None:
        for name, weight in weights:
            self.get_parameter(name).data.copy_(weight)


class Worker(rlhf_utils.ColocateWorkerExtension):
    """What vLLM's worker brings to the extension."""

    device = CPU
    rank = 0
    model_config = None
    vllm_config = None
    parallel_config = types.SimpleNamespace(
        tensor_parallel_size=1, pipeline_parallel_size=1, enable_expert_parallel=False, enable_eplb=False
    )

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.model = Model({n: t for n, t in weights.items() if n != VERSION})
        self.parameters = dict(self.model.named_parameters())

    def get_model(self) -> Model:
        return self.model


def places(value, path=()):
    """Every place in a nested message: the ways to its dict values and list items."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damage(data, message: dict) -> None:
    """One to three times: drop, cut, double or replace a value somewhere in it, or give a key another name."""
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(list(places(message)) or [()]))
        if not where:
            break
        *way, key = where
        parent = message
        for step in way:
            parent = parent[step]
        kind = data.draw(st.sampled_from(["delete", "cut", "rename", "number", "likely", "junk", "double"]))
        if kind == "delete":
            del parent[key]
        elif kind == "cut" and isinstance(parent[key], (str, bytes, list)):
            parent[key] = parent[key][: data.draw(st.integers(0, len(parent[key])))]
        elif kind == "rename" and isinstance(parent, dict):
            parent[data.draw(st.text(max_size=3))] = parent.pop(key)
        elif kind == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = data.draw({"number": numbers, "likely": likely}.get(kind, junk))


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer()


def test_thousands_of_damaged_messages_are_refused(trainer):
    """All of them, whichever GPU's message it is, before a parameter is touched."""
    worker = Worker(trainer.weights)
    before = {n: p.clone() for n, p in worker.parameters.items()}
    good = {"cpu": trainer.message(), "GPU-other": trainer.message()}
    refused = []

    @thousands
    @given(data=st.data())
    def refuse(data):
        messages = copy.deepcopy(good)
        if not (gpu := data.draw(st.sampled_from([*good, None]))):
            messages[data.draw(st.text(max_size=6))] = messages.pop("cpu")  # another GPU's UUID
        else:
            damage(data, messages[gpu])
        assume(messages != good)  # another order of keys says the same
        for method in (worker.update_weights_from_ipc_handles, worker.connect_weights):
            with pytest.raises(HandleError, match=r"but none for cpu|their checksum differs|a malformed message"):
                method(messages)
        assert all(torch.equal(p, before[n]) for n, p in worker.parameters.items())
        refused.append(gpu)

    refuse()
    assert len(refused) >= 2_000
    assert worker.update_weights_from_ipc_handles(good)["version"] == 7, "the message itself is a good one"
    assert all(torch.equal(p, trainer.weights[n]) for n, p in worker.parameters.items())


@thousands
@given(data=st.data())
def test_thousands_of_forged_messages_cannot_reach_beyond_shared_memory(trainer, data):
    """With a checksum that fits: each is refused, or describes memory that is there."""
    message = trainer.message()
    damage(data, message)
    try:
        message["checksum"] = rlhf_utils.checksum(message)
    except TypeError:  # bytes as keys, for instance: no message that could be sent
        return
    try:
        with open_handles(message, CPU) as tensors:
            for tensor in tensors.values():
                tensor.clone()  # all of it can be read
    except HandleError as error:
        assert str(error)
