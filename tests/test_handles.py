"""Handles carry tensors between processes without copying them, and refuse what does not fit. No vLLM, no GPU."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import deadline

import rlhf_utils
from rlhf_utils import HandleError, check_messages, checksum, digest, export_handles, open_handles

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")

# Opens a message in another process; prints the tensors' digests, then waits for a line and prints them again.
CHILD = """
import ast, sys, torch, rlhf_utils
message = ast.literal_eval(sys.stdin.readline())
with rlhf_utils.open_handles(message, torch.device("cpu")) as tensors:
    for _ in range(2):
        print({n: (rlhf_utils.digest(t), list(t.shape), str(t.dtype)) for n, t in tensors.items()}, flush=True)
        sys.stdin.readline()
"""


class Shared(torch.nn.Module):
    """A module with parameters of several dtypes and shapes, in shared memory."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = torch.nn.Parameter(torch.randn(7, 5))
        self.bf16 = torch.nn.Parameter(torch.randn(33).to(torch.bfloat16))
        self.fp16 = torch.nn.Parameter(torch.randn(3, 4, 2).to(torch.float16))
        self.scalar = torch.nn.Parameter(torch.tensor(3.25))
        self.empty = torch.nn.Parameter(torch.empty(0, 4))
        self.ids = torch.nn.Parameter(torch.arange(9), requires_grad=False)
        self.mask = torch.nn.Parameter(torch.tensor([True, False, True]), requires_grad=False)
        self.tied = self.matrix
        rlhf_utils.share_memory(self.parameters())


@pytest.fixture(scope="module")
def module() -> Shared:
    return Shared()


def named(module: Shared) -> dict[str, torch.Tensor]:
    tensors = {n: p.detach() for n, p in module.named_parameters()}
    tensors["transposed"] = tensors["matrix"].t()
    tensors["columns"] = tensors["matrix"][:, 1:3]
    return tensors


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain(v) for k, v in value.items())
    return all(map(plain, value)) if isinstance(value, list) else type(value) in (int, str, bytes, bool, type(None))


def test_share_memory_keeps_values_and_ties(module):
    torch.manual_seed(0)
    assert torch.equal(module.matrix, torch.randn(7, 5))
    assert module.tied is module.matrix
    assert module.mask.dtype == torch.bool


def test_round_trip_to_another_process_is_zero_copy(module):
    tensors = named(module)
    message = export_handles(tensors.items())
    assert plain(message), "handles must be plain data"
    assert len(message["storages"]) == 1, "one export for one storage, whatever views it"
    command = [sys.executable, "-c", CHILD]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as child:
        child.stdin.write(repr(message) + "\n")
        child.stdin.flush()
        first = eval(child.stdout.readline())
        expected = {n: (digest(t), list(t.shape), str(t.dtype)) for n, t in tensors.items()}
        assert first == expected
        module.matrix.data.add_(1.0)  # after the export: the other process sees the same memory
        child.stdin.write("\n")
        child.stdin.flush()
        second = eval(child.stdout.readline())
        child.communicate("\n", timeout=deadline(60))
    changed = {n for n in first if first[n] != second[n]}
    assert changed == {"matrix", "transposed", "columns"}
    assert second["matrix"][0] == digest(module.matrix)


def test_a_tensor_without_storage():
    with open_handles(export_handles([("none", torch.empty(0, 4))]), CPU) as tensors:
        assert tensors["none"].shape == (0, 4)


def test_private_memory_is_refused():
    with pytest.raises(HandleError, match="Try: share_memory"):
        export_handles([("w", torch.ones(3))])


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("shape", [7, 500], "out of bounds"),
        ("shape", [7], "stride"),
        ("stride", [-5, 1], "stride"),
        ("offset", -1, "offset"),
        ("offset", 10**9, "out of bounds"),
        ("dtype", "complex64", "complex64"),
        ("storage", 3, "index out of range"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(module, field, value, says):
    message = export_handles([("layer.weight", module.matrix)])
    message["weights"][0][field] = value
    message["checksum"] = checksum(message)
    with pytest.raises(HandleError, match=rf"layer\.weight.*{says}"), open_handles(message, CPU):
        pass


@pytest.mark.parametrize(
    ("field", "value"), [("path", "/etc/passwd"), ("path", "/proc/1/fd/99999"), ("nbytes", 10**9), ("kind", "cuda")]
)
def test_a_storage_that_is_not_there_is_refused(module, field, value):
    message = export_handles([("w", module.matrix)])
    message["storages"][0][field] = value
    message["checksum"] = checksum(message)
    with pytest.raises(HandleError), open_handles(message, CPU):
        pass


def test_handles_of_a_trainer_that_has_ended_are_refused():
    export = "import torch, rlhf_utils as u; m = torch.nn.Linear(4, 4); u.share_memory(m.parameters()); "
    export += "print(u.export_handles(m.named_parameters()))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    message = ast.literal_eval(
        subprocess.check_output([sys.executable, "-c", export], text=True, env=env, timeout=deadline(60))
    )
    with pytest.raises(HandleError, match="has the trainer ended"), open_handles(message, CPU):
        pass


def splitmix_sum(words: list[int]) -> str:
    """What `digest` promises, one word after the other in Python's own integers."""
    mask, total = (1 << 64) - 1, 0
    for position, word in enumerate(words, 1):
        x = (position * 0x9E3779B97F4A7C15 + word) & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        total += x ^ x >> 31
    return f"{total & mask:016x}"


def test_digest_is_the_published_mix():
    n = (1 << 20) + 3  # more words than one chunk
    words = torch.arange(n) * -7_777_777_777_777_777_777 + 1
    assert digest(words) == splitmix_sum(words.tolist())
    tail = torch.arange(21, dtype=torch.uint8)  # two words of 8 bytes, then 5 bytes as words of their own
    bytes_21 = bytes(range(21))
    expected = [int.from_bytes(bytes_21[i : i + 8], "little") for i in (0, 8)] + list(bytes_21[16:])
    assert digest(tail) == splitmix_sum(expected)


def test_digest_sees_every_bit_and_every_position():
    torch.manual_seed(0)
    t = torch.randn(1000, 3000, dtype=torch.float32).to(torch.bfloat16)
    flipped = t.clone()
    flipped.view(torch.int16)[999, 2999] ^= 1
    swapped = t.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert len({digest(t), digest(flipped), digest(swapped)}) == 3
    assert digest(t) == digest(t.clone())
    assert digest(t.t()) == digest(t.t().contiguous()) != digest(t)
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    odd = torch.arange(21, dtype=torch.uint8)
    assert digest(odd[1:]) == digest(odd[1:].clone()) != digest(odd[:-1])
    assert digest(torch.empty(0)) == digest(torch.empty(0, 3))


def test_digest_spans_chunks_and_is_stable():
    t = torch.arange((1 << 20) + 5)
    swapped = t.clone()
    swapped[[3, 1 << 20]] = swapped[[1 << 20, 3]]
    assert digest(t) != digest(swapped)
    # A digest is compared between processes, so it must not depend on the run.
    assert digest(torch.arange(4)) == "4c2f579624d6d714"


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}


QWEN2_TIED = {"model_type": "qwen2", "tie_word_embeddings": True}


@pytest.mark.parametrize("extra", [MIXTRAL, QWEN3_MOE, QWEN2_TIED], ids=lambda e: e["model_type"])
def test_checkpoint_tensors_are_views_with_the_names_of_the_checkpoint(tmp_path, extra):
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape | extra))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    tensors = dict(rlhf_utils.checkpoint_tensors(model))
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(t, saved[n]) for n, t in tensors.items())
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {t.untyped_storage().data_ptr() for t in tensors.values()} == storages, "views, not copies"


def check(*weights: dict, others: tuple[dict, ...] | None = None) -> rlhf_utils.Shapes:
    storages = [{"kind": "cpu", "nbytes": 48}, {"kind": "cpu", "nbytes": 8}]
    messages = {"GPU-1": {"readers": [], "storages": storages, "weights": list(weights)}}
    if others is not None:
        messages["GPU-2"] = {"readers": [], "storages": storages, "weights": list(others)}
    return check_messages({gpu: m | {"checksum": checksum(m)} for gpu, m in messages.items()}, "GPU-1")


def weight(name: str, shape=(4, 3), dtype: str = "float32") -> dict:
    whole = {"full": list(shape), "start": [0] * len(shape), "round": 0}
    return {"name": name, "shape": list(shape), "stride": [3, 1], "dtype": dtype, "offset": 0, "storage": 0} | whole


VERSION = weight(rlhf_utils.VERSION, (), "int64") | {"stride": [], "storage": 1}


def test_a_complete_message_is_accepted():
    both = {"a": ((4, 3), torch.float32), "b": ((4, 3), torch.float32)}
    assert check(weight("b"), weight("a"), VERSION) == both
    assert check(weight("b"), weight("a"), VERSION, others=(VERSION, weight("a"), weight("b"))) == both


def test_a_message_without_a_version_is_refused():
    with pytest.raises(HandleError, match=f"missing: {rlhf_utils.VERSION}"):
        check(weight("b"), weight("a"))


def test_a_message_for_another_gpu_is_refused():
    with pytest.raises(HandleError, match="handles for GPU-2, but none for GPU-1"):
        check_messages({"GPU-2": {}}, "GPU-1")


def test_a_changed_message_is_refused():
    message = {"readers": [], "storages": [], "weights": []}
    with pytest.raises(HandleError, match="checksum differs"):
        check_messages({"GPU-1": message | {"checksum": checksum(message) + "0"}}, "GPU-1")


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ([weight("a")], r"missing: b \(GPU-2\)"),
        ([weight("a"), weight("b"), weight("c")], r"missing: c \(GPU-1\)"),
        ([weight("a"), weight("b"), weight("a")], r"duplicate: a \(GPU-2\)"),
        ([weight("a"), weight("b", (3, 4))], r"wrong shape: b: \(3, 4\) \(GPU-2\), and \(4, 3\)"),
        ([weight("a"), weight("b", dtype="bfloat16")], r"wrong dtype: b: bfloat16 \(GPU-2\), and float32"),
    ],
)
def test_gpus_with_other_weights_are_refused_by_name(theirs, says):
    """Each rank compares all messages with its own: all ranks load, or none."""
    with pytest.raises(HandleError, match=says):
        check(weight("a"), weight("b"), VERSION, others=(*theirs, VERSION))


def test_strict_makes_an_error_of_what_was_not_compared():
    from colocate import checks

    placement = {"checked": 0, "wrong": {}, "padding": {}, "processed": {"w13": 5}, "unknown": {"A": 7}}
    worker = {"gpu": "GPU-1", "tp_rank": 0, "placement": placement}
    assert checks.combine([worker], "placement")["ok"], "the loaders' record speaks for A"
    strict = checks.combine([worker], "placement", strict=True)
    assert not strict["ok"]
    assert set(strict["wrong"]["GPU-1 rank 0"]) == {"A", "w13"}
    nothing = worker | {"placement": placement | {"unknown": {}}}
    assert not checks.combine([nothing], "placement")["ok"]
