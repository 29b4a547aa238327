"""Pushes out of sharded weights: each worker reads the pieces that it needs. No vLLM, no GPU."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import deadline

import rlhf_utils as u
from colocate import rounds
from colocate.kept import keep
from colocate.rounds import NO_ROUND, ROUND
from rlhf_utils import VERSION, HandleError, NotHandled, Piece, Slice

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"q": (6, 8), "k": (2, 8), "v": (2, 8), "o": (8, 6), "norm": (7,), "scale": ()}
SPARE = {"pipeline_parallel_size": 1, "enable_expert_parallel": False, "enable_eplb": False}


class Model(torch.nn.Module):
    """q, k and v become one parameter, o is transposed."""

    def __init__(self):
        super().__init__()
        for name, shape in {"qkv": (10, 8), "o": (6, 8), "norm": (7,), "scale": ()}.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))

    def load_weights(self, weights) -> None:
        for name, weight in weights:
            rows = {"q": slice(0, 6), "k": slice(6, 8), "v": slice(8, 10)}.get(name)
            if rows:
                self.qkv.data[rows].copy_(weight)
            else:
                getattr(self, name).data.copy_(weight.t() if name == "o" else weight)


class Worker(u.ColocateWorkerExtension):
    device = torch.device("cpu")  # without Ray, its UUID is "cpu"
    rank = 0
    model_config = SimpleNamespace(dtype=torch.float32)
    vllm_config = None
    parallel_config = SimpleNamespace(tensor_parallel_size=1, **SPARE)

    def __init__(self):
        self.model = Model()

    def get_model(self) -> Model:
        return self.model

    def holds(self, full: dict[str, torch.Tensor]) -> bool:
        expected = Model()
        expected.load_weights(full.items())
        return all(torch.equal(a, b) for a, b in zip(self.model.parameters(), expected.parameters(), strict=True))


class Shards:
    """So many trainers, each with its piece of each weight, and the full weights to compare with."""

    def __init__(self, count: int, dims: dict[str, int] | None = None):
        torch.manual_seed(0)
        self.full = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        self.versions = [torch.tensor(5) for _ in range(count)]
        self.pieces: list[dict[str, Piece]] = [{} for _ in range(count)]
        for name, weight in self.full.items():
            dim = (dims or {}).get(name, 0)
            parts = weight.tensor_split(count, dim) if weight.dim() else [weight]  # uneven: the first ones get more
            start = 0
            for trainer, part in zip(self.pieces, parts, strict=False):
                at = [0] * weight.dim()
                if weight.dim():
                    at[dim] = start
                    start += part.shape[dim]
                trainer[name] = Piece(part.clone(), tuple(weight.shape), tuple(at))
        u.share_memory([p.tensor for trainer in self.pieces for p in trainer.values()] + self.versions)
        self.names = ["cpu", *(f"GPU-{i}" for i in range(1, count))]

    def messages(self) -> dict:
        named = zip(self.names, self.pieces, self.versions, strict=True)
        return {gpu: u.export_handles([*p.items(), (VERSION, version)], self.names) for gpu, p, version in named}

    def change(self) -> None:
        for name, weight in self.full.items():
            weight.normal_()
            for trainer in self.pieces:
                if piece := trainer.get(name):
                    box = [slice(a, a + n) for a, n in zip(piece.start, piece.tensor.shape, strict=True)]
                    piece.tensor.copy_(weight[tuple(box)])
        for version in self.versions:
            version.add_(1)


@pytest.mark.parametrize("dims", [{}, {"q": 1, "o": 1}, {"k": 1, "v": 1, "q": 1}], ids=["rows", "q and o", "qkv"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_push_out_of_shards_does_what_one_out_of_a_replica_does(count, dims):
    shards = Shards(count, dims)
    worker = Worker()
    connected = worker.connect_weights(shards.messages())
    assert (connected["remote_bytes"] > 0) == (count > 1)
    for version in (6, 7):
        shards.change()
        pushed = worker.push_weights(version)
        assert pushed["bytes"] == 4 * sum(w.numel() for w in shards.full.values())
        assert worker.holds(shards.full)
    shards.change()
    assert worker.update_weights_from_ipc_handles(shards.messages())["version"] == 8
    assert worker.holds(shards.full)
    worker.disconnect_weights()


@pytest.mark.parametrize("simple", [False, True], ids=["recorded", "simple"])
def test_what_no_weight_is_and_a_sleep_drops_is_kept_as_a_buffer(simple):
    shards = Shards(1)
    worker = Worker()
    worker.model.slopes = torch.tensor([0.5, 0.25])  # a plain attribute, as ALiBi's slopes are
    worker.model.same_slopes = worker.model.slopes
    worker.model.slopes_cpu = torch.ones(2)
    worker.model.none_yet = torch.empty(0)
    worker.model.kv_cache = torch.ones(4)
    slopes = worker.model.slopes
    assert keep(worker) == ["slopes"]
    assert keep(worker) == [], "it has it already"
    for _ in range(2):  # as vLLM's worker, at a sleep of level 2 and when the weights wake up
        saved = {name: buffer.cpu().clone() for name, buffer in worker.model.named_buffers()}
        slopes.zero_()
        for name, buffer in worker.model.named_buffers():
            buffer.data.copy_(saved[name])
        worker.connect_weights(shards.messages())  # after a loss, too
    shards.change()
    if simple:
        worker.update_weights_from_ipc_handles(shards.messages())
    else:
        worker.push_weights(6)
    assert worker.model.slopes is slopes and slopes.tolist() == [0.5, 0.25] and worker.holds(shards.full)
    assert "_kept_slopes" not in worker.model.state_dict(), "no checkpoint has it"
    worker.disconnect_weights()


def test_what_an_object_of_vllm_in_a_layer_holds_is_kept_too():
    worker = Worker()
    worker.model.layer = torch.nn.Module()
    worker.model.layer.impl = type("Impl", (), {"__module__": "vllm.v1.attention"})()
    worker.model.layer.impl.slopes = torch.tensor([0.5])
    assert keep(worker) == ["layer.impl.slopes"]
    assert dict(worker.model.named_buffers())["layer._kept_impl__slopes"] is worker.model.layer.impl.slopes


class Sender:
    """A trainer that sends its weights through a buffer with room for `q` alone: q; k and v; o; norm and scale."""

    ROUNDS = (("q",), ("k", "v"), ("o",), ("norm", "scale"))

    def __init__(self):
        self.full = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        self.buffer = torch.zeros(48)
        self.control = {VERSION: torch.tensor(5), ROUND: torch.tensor(NO_ROUND)}
        u.share_memory([self.buffer, *self.control.values()])
        self.weights = {}
        for number, names in enumerate(self.ROUNDS):
            parts = self.buffer.split(
                [self.full[n].numel() for n in names] + [-sum(self.full[n].numel() for n in names) % 48]
            )
            for name, part in zip(names, parts, strict=False):
                self.weights[name] = Piece.of(part.view(self.full[name].shape), number)

    def messages(self) -> dict:
        return {"cpu": u.export_handles([*self.weights.items(), *self.control.items()])}

    def rounds(self):
        for number, names in enumerate(self.ROUNDS):
            self.buffer.fill_(-1.0)
            for name in names:
                self.weights[name].tensor.copy_(self.full[name])
            yield number

    def change(self) -> None:
        for weight in self.full.values():
            weight.normal_()
        self.control[VERSION].add_(1)

    def sending(self) -> threading.Thread:
        thread = threading.Thread(target=rounds.send, args=(self.control[ROUND], self.rounds()))
        thread.start()
        return thread


class WorkerInRounds(rounds.Extension, Worker):
    """As the script has it."""


def halve_scale(model: Model, weights) -> None:
    """vLLM's loaders, of which one computes: its weight has to go through them."""
    weights = list(weights)
    Model.load_weights(model, [w for w in weights if w[0] != "scale"])
    for _, weight in (w for w in weights if w[0] == "scale"):
        model.scale.data.copy_(weight / 2)


@pytest.mark.parametrize("computes", [False, True])
def test_a_push_through_a_buffer_brings_the_weights_in_rounds(computes):
    sender = Sender()
    worker = WorkerInRounds()
    if computes:
        worker.model.load_weights = lambda weights: halve_scale(worker.model, weights)
    connected = worker.connect_weights(sender.messages())
    assert (connected["weights"], connected["loaders"]) == (6, ["scale"] if computes else [])

    def holds_all() -> bool:
        expected = Model()
        expected.load_weights(sender.full.items())
        if computes:
            expected.scale.data /= 2
        return all(map(torch.equal, worker.model.parameters(), expected.parameters()))

    for version in (6, 7):
        sender.change()
        thread = sender.sending()
        worker.push_weights(version)
        thread.join(deadline(30))
        assert holds_all()
        assert sender.control[ROUND].tolist()[:2] == [-1, 0], "ready for the next push"
    sender.change()
    thread = sender.sending()
    assert worker.update_weights_from_ipc_handles(sender.messages())["version"] == 8
    thread.join(deadline(30))
    assert holds_all()
    thread = sender.sending()
    with pytest.raises(HandleError, match="at version 8, the push is of 9"):
        worker.push_weights(9)
    thread.join(deadline(30))
    worker.disconnect_weights()


def test_a_version_that_changes_between_rounds_is_refused():
    sender = Sender()
    worker = WorkerInRounds()
    worker.connect_weights(sender.messages())

    def changing():
        for number in sender.rounds():
            sender.control[VERSION].fill_(6 if number == 1 else 5)
            yield number

    thread = threading.Thread(target=rounds.send, args=(sender.control[ROUND], changing()))
    thread.start()
    with pytest.raises(HandleError, match="at version 5 then 6, the push is of 5"):
        worker.push_weights(5)
    thread.join(deadline(30))


def test_both_sides_of_a_round_wait_no_longer_than_they_should(monkeypatch):
    monkeypatch.setattr(rounds, "ROUND_S", 0.2)
    sender = Sender()
    worker = WorkerInRounds()
    worker.connect_weights(sender.messages())
    with pytest.raises(RuntimeError, match="the trainer on this GPU has not sent round 0 of its weights"):
        worker.push_weights(5)
    filled = []
    with pytest.raises(RuntimeError, match="the worker on this GPU has not taken the weights"):
        rounds.send(sender.control[ROUND], (filled.append(number) or number for number in sender.rounds()))
    assert filled == [0, 1, 2, 3], "others may be waiting for it to take part"
    monkeypatch.undo()
    sender.change()
    thread = sender.sending()
    worker.push_weights(6)
    thread.join(deadline(30))
    assert worker.holds(sender.full), "what has failed before leaves no trace"


@pytest.mark.parametrize("held_up_in", range(4))
def test_a_worker_that_reads_longer_than_the_trainer_waits_finds_out(monkeypatch, held_up_in):
    sender = Sender()
    worker = WorkerInRounds()
    worker.connect_weights(sender.messages())
    copies = worker._plan.rounds[held_up_in]
    replay = copies.replay

    def late() -> None:
        thread.join(deadline(30))
        replay()

    copies.replay = late
    monkeypatch.setattr(rounds, "ROUND_S", 0.2)
    failed = []

    def send() -> None:
        try:
            rounds.send(sender.control[ROUND], sender.rounds())
        except RuntimeError as error:
            failed.append(str(error))

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(RuntimeError, match="the trainer on this GPU has not"):
        worker.push_weights(5)
    assert failed == ["the worker on this GPU has not taken the weights"]


@pytest.mark.parametrize("reaped", [True, False])
def test_nobody_waits_for_a_process_that_has_ended(reaped):
    sender = Sender()
    control = sender.control[ROUND]
    worker = WorkerInRounds()
    worker.connect_weights(sender.messages())

    def ends(place: int) -> subprocess.Popen:
        other = subprocess.Popen(["sleep", "600"])
        control[place] = other.pid
        threading.Timer(0.5, lambda: other.kill() or (reaped and other.wait())).start()
        return other

    start = time.monotonic()
    with ends(3), pytest.raises(RuntimeError, match="the worker on this GPU has not taken the weights"):
        rounds.send(control, sender.rounds())
    with ends(2), pytest.raises(RuntimeError, match="the trainer on this GPU has not sent round 0"):
        worker.push_weights(5)
    assert time.monotonic() - start < rounds.ROUND_S


def test_a_trainer_that_fails_in_a_round_holds_no_worker_up():
    sender = Sender()
    worker = WorkerInRounds()
    worker.connect_weights(sender.messages())

    def two_rounds():
        filling = sender.rounds()
        yield next(filling)
        yield next(filling)
        raise ConnectionError("another trainer is gone")

    start = time.monotonic()
    replies = []
    thread = threading.Thread(target=lambda: replies.append(worker.reply_to_call("push_weights", 5)))
    thread.start()
    with pytest.raises(ConnectionError):
        rounds.send(sender.control[ROUND], two_rounds())
    thread.join(deadline(30))
    assert time.monotonic() - start < rounds.ROUND_S
    assert "the trainer on this GPU has not sent round 2" in replies[0]["error"]


def test_a_worker_that_fails_in_a_round_holds_no_trainer_up():
    sender = Sender()
    worker = WorkerInRounds()
    worker.connect_weights(sender.messages())
    worker._plan.rounds[1].local.append((torch.zeros(2), torch.zeros(3)))
    thread = sender.sending()
    assert "RuntimeError" in worker.reply_to_call("push_weights", 5)["kind"]
    thread.join(deadline(30))
    assert not thread.is_alive() and sender.control[ROUND].tolist()[:2] == [-1, 0]


def test_weights_in_rounds_without_their_control_tensor_are_refused():
    sender = Sender()
    message = u.export_handles([*sender.weights.items(), (VERSION, sender.control[VERSION])])
    several = u.export_handles([*sender.weights.items(), *sender.control.items()], ["cpu", "GPU-1"])
    for messages in ({"cpu": message}, {"cpu": several}):
        with pytest.raises(HandleError, match=r"missing: rlhf.round \(cpu\): export it beside weights in rounds"):
            WorkerInRounds().connect_weights(messages)


def test_an_engine_without_rounds_refuses_weights_that_come_in_them():
    sender = Sender()
    without_control = u.export_handles([*sender.weights.items(), (VERSION, sender.control[VERSION])])
    for messages in (sender.messages(), {"cpu": without_control}):
        with pytest.raises(HandleError, match="belongs to weights that come in rounds"):
            Worker().connect_weights(messages)


def test_what_is_not_connected_any_more_is_not_mapped():
    """Without the collector of cycles: a trainer's memory stays taken as long as it is mapped."""
    shards = Shards(1)
    worker = Worker()

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("rlhf-weights")

    worker.update_weights_from_ipc_handles(shards.messages())  # imports what holds its frames
    gc.collect()
    gc.disable()
    try:
        before = mapped()
        for _ in range(3):
            worker.update_weights_from_ipc_handles(shards.messages())
            worker.connect_weights(shards.messages())
            worker.push_weights(5)
            assert mapped() > before
            worker.disconnect_weights()
            assert mapped() == before
    finally:
        gc.enable()


def test_pieces_that_several_gpus_hold_are_read_once_and_from_the_own_gpu():
    shards = Shards(2)
    shards.pieces[1] |= {name: shards.pieces[0][name] for name in ("norm", "q")}  # replicas of the first's
    shards.pieces[1]["norm"] = shards.pieces[0]["norm"] = whole = Piece(shards.full["norm"].clone(), (7,), (0,))
    u.share_memory([whole.tensor])
    worker = Worker()
    messages = shards.messages()
    for message in messages.values():
        message["weights"] = [w for w in message["weights"] if w["name"] != "q" or w["start"] == [0, 0]]
    with pytest.raises(HandleError, match=r"missing: q, but 24 of 48 elements \(cpu\)"):
        worker.connect_weights({gpu: m | {"checksum": u.checksum(m)} for gpu, m in messages.items()})
    shards = Shards(2)
    shards.pieces[1]["scale"] = shards.pieces[0]["scale"]
    shards.pieces[0]["norm"] = shards.pieces[1]["norm"] = whole
    worker.connect_weights(shards.messages())
    assert [p.remote for p in worker._plan.weights["norm"]] == [False]
    assert [p.remote for p in worker._plan.weights["q"]] == [False, True]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pieces[1].pop("q"), r"missing: q, but 24 of 48 elements \(cpu\)"),
        (lambda s: [p.pop("norm") for p in s.pieces], "missing: norm"),
        (lambda s: move(s, "q", (2, 0)), r"overlapping, or outside of it: pieces of q \(cpu\)"),
        (lambda s: move(s, "q", (4, 0)), r"overlapping, or outside of it: pieces of q \(cpu\)"),
        (lambda s: move(s, "q", (3, 0), full=(7, 8)), r"wrong shape: q: \(7, 8\) \(GPU-1\), and \(6, 8\) \(cpu\)"),
    ],
)
def test_pieces_that_do_not_make_up_the_weights_are_refused_by_name(change, says):
    shards = Shards(2)
    change(shards)
    worker = Worker()
    for method in (worker.connect_weights, worker.update_weights_from_ipc_handles):
        with pytest.raises(HandleError, match=says):
            method(shards.messages())
    assert not any(p.any() for p in worker.model.parameters()), "nothing was loaded"


def move(shards: Shards, name: str, start: tuple, full: tuple | None = None) -> None:
    piece = shards.pieces[1][name]
    shards.pieces[1][name] = Piece(piece.tensor, full or piece.full, start)


def test_one_trainer_at_another_version_is_enough():
    shards = Shards(2)
    worker = Worker()
    worker.connect_weights(shards.messages())
    shards.versions[1].fill_(4)
    with pytest.raises(HandleError, match="a trainer has weights at version 5 then 4, the push is of 5"):
        worker.push_weights(5)
    with pytest.raises(HandleError, match="a trainer has weights at version 5 then 4, the push is of 5"):
        worker.update_weights_from_ipc_handles(shards.messages())
    for version in shards.versions:
        version.fill_(-1)  # a step is under way: there is no such version to push
    with pytest.raises(HandleError, match="a trainer has weights at version -1"):
        worker.push_weights(-1)


def test_a_message_for_other_gpus_only_is_not_read():
    shards = Shards(2)
    messages = shards.messages()
    messages["GPU-1"] = u.export_handles([*shards.pieces[1].items(), (VERSION, shards.versions[1])], ["GPU-1"])
    with pytest.raises(HandleError, match=r"missing: q, but 24 of 48 elements \(cpu\)"):
        Worker().connect_weights(messages)


def test_the_parts_of_a_slice_in_a_box():
    """Against indexing, for views of a 3-dimensional tensor: cut, transposed, with a dimension taken out."""
    full = torch.arange(5 * 6 * 7).view(5, 6, 7)
    views = [
        full,
        full[1:4, 2:6, 1:5],
        full.transpose(0, 2),
        full[2],
        full[:, 3].t(),
        full[1:2, :, 2:3],
        full[3, 1, 2:],
    ]
    boxes = [((0, 0, 0), (5, 6, 7)), ((0, 0, 0), (3, 6, 7)), ((2, 1, 0), (2, 5, 7)), ((0, 3, 4), (5, 1, 3))]
    for view in views:
        found = Slice(tuple(view.shape), view.stride(), view.storage_offset())
        seen: set[int] = set()
        for start, size in boxes:
            box = full[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))].contiguous()
            part = found.cut(full.shape, start, size)
            expected = {*view.flatten().tolist()} & {*box.flatten().tolist()}
            if part is None:
                assert not expected
                continue
            where, inner = part
            piece = inner.of(box)
            assert torch.equal(piece, found.narrow(where).of(full))
            assert {*piece.flatten().tolist()} == expected
            seen |= expected
        assert seen == {*view.flatten().tolist()}, "the first box is the whole"


def test_a_slice_that_is_no_box_cannot_be_sharded():
    diagonal = Slice((3,), (9,), 0)
    assert diagonal.cut((8, 8), (0, 0), (8, 8)), "out of a replica it can be copied"
    with pytest.raises(NotHandled, match="of a sharded weight"):
        diagonal.cut((8, 8), (0, 0), (4, 8))


def test_tiles_are_the_copies():
    """The kernel's table, read by memmove: no tile is larger than it may be, and together they are the copies."""
    torch.manual_seed(0)
    source = torch.randn(300, 2000).to(torch.bfloat16)
    pairs = [(torch.zeros(300, 2000), source), (torch.zeros(300, 800), source[:, 400:1200])]
    pairs += [
        (torch.zeros(100_000), torch.randn(100_000).to(torch.bfloat16)),
        (torch.zeros(120, 40), source[20:140, :40]),
    ]
    pairs = [(dst.to(torch.bfloat16), src) for dst, src in pairs]
    odd = (torch.zeros(3, dtype=torch.bfloat16), source[0, :3])  # no whole words
    turned = (torch.zeros(2000, 300, dtype=torch.bfloat16), source.t())
    table, others = u._tiles([*pairs, odd, turned])
    assert [dst.shape for dst, _ in others] == [(3,), (2000, 300)]
    for src, dst, rows, words, src_stride, dst_stride in table.tolist():
        assert 0 < rows * words <= u.TILE
        for row in range(rows):
            ctypes.memmove(dst + 8 * row * dst_stride, src + 8 * row * src_stride, 8 * words)
    assert all(torch.equal(dst, src) for dst, src in pairs)
    assert u._tiles([odd]) == (None, [odd])


# Two ranks of a model that FSDP2 has sharded write what they would export.
RANK = """
import sys, torch, rlhf_utils
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
folder, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
moved = {n: p.to_local().to(torch.bfloat16) for n, p in model.named_parameters()}
for where, memory in (("model", None), ("memory", moved)):
    found = {n: (p.tensor, p.full, p.start) for n, p in rlhf_utils.checkpoint_tensors(model, memory)}
    torch.save(found, f"{folder}/{where}-{rank}.pt")
torch.distributed.destroy_process_group()
"""
QWEN2 = {"model_type": "qwen2", "vocab_size": 65, "tie_word_embeddings": True}
QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 16}


@pytest.mark.parametrize("extra", [QWEN2, QWEN3_MOE], ids=lambda e: e["model_type"])
def test_fsdp_trainers_give_the_pieces_of_the_checkpoint(tmp_path, extra):
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape | extra))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], env=env) for rank in range(2)]
    assert [rank.wait(timeout=deadline(120)) for rank in ranks] == [0, 0]
    for where, dtype in (("model", torch.float32), ("memory", torch.bfloat16)):
        found = [torch.load(tmp_path / f"{where}-{rank}.pt") for rank in range(2)]
        assert found[0].keys() | found[1].keys() == saved.keys()
        for name, weight in saved.items():
            pieces = [Piece(*rank[name]) for rank in found if name in rank]
            assert torch.equal(u.whole(pieces), weight.to(dtype)), name
            assert sum(p.tensor.numel() for p in pieces) == weight.numel()
