"""Push a trainer's weights into the vLLM workers on the same GPUs, by CUDA IPC handles.

    message = export_handles([*checkpoint_tensors(model), (VERSION, version)])   # trainer: plain data
    call_workers(llm, "connect_weights", {device_uuid(device): message, ...})    # engine: once
    call_workers(llm, "push_weights", version)                                   # engine: after each optimizer step

Connected, a worker has its trainer's memory mapped and knows which slices vLLM's own loaders would copy where
(`record_loaders`); a push replays these copies as one CUDA graph. `update_weights_from_ipc_handles` is the way without
a connection: open the handles, load through vLLM's loaders, close. The engine is started with
worker_extension_cls="rlhf_utils.ColocateWorkerExtension".

The first two fifths are what to read: the trainer's side, the call, the extension, the push. The rest is what these
stand on: opening and checking messages, the recording of vLLM's loaders, digests, the rehearsal without a GPU.
Copy this file into your trainer as it is: it imports torch and NumPy, and vLLM, transformers, Ray and Triton inside the
functions that need them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib
import json
import math
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# The name under which a message carries the trainer's version: int64, shape (), in the trainer's memory. The trainer
# sets it to -1 before it changes weights, and to a number not used before when it has. Workers read it as they push.
# It is a control tensor (`is_control`).
VERSION = "rlhf.version"
DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}
# Methods of `ColocateWorkerExtension` that write weights. From the call of one until it has succeeded on all ranks, an
# engine's weights are neither the old nor the new ones.
WRITES = ("update_weights_from_ipc_handles", "push_weights")


class HandleError(ValueError):
    """A message of handles that must not be loaded: the text names the tensor, what it is and what it should be."""


class NotHandled(HandleError):
    """A model that cannot be pushed, whatever the message says."""


# ---- Trainer: weights -> handles ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A part of a weight: the box of the full weight, of shape `full`, that begins at `start`, as large as `tensor`."""

    tensor: torch.Tensor
    full: tuple[int, ...]
    start: tuple[int, ...]
    remote: bool = False  # it lies in another GPU's memory
    round: int = 0  # the one in which it is there, if the trainer sends its weights in rounds, one after the other

    @staticmethod
    def of(weight: torch.Tensor | Piece, round: int = 0) -> Piece:
        """All of it; a Piece as it is."""
        if isinstance(weight, Piece):
            return weight
        return Piece(weight, tuple(weight.shape), (0,) * weight.dim(), round=round)

    def named(self, weight: str) -> str:
        """The weight's name, and where in it this piece begins if it is not all of it: "lm_head.weight[500, 0]"."""
        return weight if tuple(self.tensor.shape) == tuple(self.full) else f"{weight}{list(self.start)}"


def checkpoint_tensors(
    model: torch.nn.Module, memory: dict[str, torch.Tensor] | None = None, rounds: dict[str, int] | None = None
) -> Iterator[tuple[str, torch.Tensor | Piece]]:
    """A transformers model's weights under the names and in the shapes of its checkpoint, as views (no copies).

    Of a parameter that is sharded (a DTensor, as FSDP2 makes them) it gives the Piece that this rank holds, if any.
    memory: {parameter: where its values are, or this rank's part of them}, for those that lie elsewhere than in the
    model, for instance since it has masters of another dtype. rounds: {parameter: the one in which they are there},
    where a trainer sends its weights in rounds.
    Tied weights come once. transformers 5 renames weights and fuses experts when it loads them; `save_pretrained` takes
    that back, and so does this, with the same function of transformers.
    Raises NotHandled for a weight whose form in the checkpoint cannot be had as a view.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parameters = dict(model.named_parameters())
    full = {n: torch.empty(p.shape, dtype=p.dtype, device="meta").as_subclass(_View) for n, p in parameters.items()}
    owners = {_storage(t): name for name, t in full.items()}
    for name, view in revert_weight_conversion(model, full).items():
        owner = owners.get(_storage(view))
        if owner is None:
            raise NotHandled(
                f"{type(model).__name__} is not handled: transformers keeps {name} in another form than the checkpoint "
                "has it, so it cannot be shared without a copy"
            )
        parameter = parameters[owner]
        held = (memory or {}).get(owner, parameter).detach()
        if not hasattr(held, "placements") and held.shape == parameter.shape:  # all of it is here
            weight = _slice(view).of(held)
            yield name, Piece.of(weight, rounds[owner]) if rounds else weight
            continue
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        size, start = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if part := _slice(view).cut(parameter.shape, start, size):
            where, local = part
            held = held.to_local() if hasattr(held, "to_local") else held
            yield name, Piece(local.of(held), tuple(view.shape), tuple(start for start, _ in where))


class _View(torch.Tensor):
    """A tensor whose slices stay views where transformers would make copies of them."""

    def contiguous(self, *_args, **_kwargs):
        return self


def export_handles(named_tensors: Iterable[tuple[str, torch.Tensor | Piece]], readers: Sequence[str] = ()) -> dict:
    """Describe tensors so that processes of this host can map them: the worker on the same GPU, or those of `readers`.

    readers: UUIDs of the GPUs whose workers may map them. Without any, it is the worker on the trainer's own GPU.
    Returns plain data that any serializer carries: {"readers", "storages": [{...}], "weights": [{"name", "dtype",
    "shape", "stride", "offset", "storage", "full", "start", "round"}], "checksum"}, strides and offsets in elements.
    Each storage is exported once for each reader, however many tensors view it, because a receiver may open one export
    only once (torch counts references per export).
    The tensors' memory stays the exporter's: keep it alive and unchanged until the receiver has answered.
    Waits for the device: everything launched before this call is in the tensors when it returns.
    """
    named_tensors = list(named_tensors)  # alive to the end: the address of a freed storage may be given out again
    storages: list[dict] = []
    index: dict[int, int] = {}
    weights = []
    for name, tensor in named_tensors:
        piece = Piece.of(tensor)
        tensor = piece.tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in index:
            index[key] = len(storages)
            storages.append(_export_storage(storage, max(len(readers), 1)))
        weights.append(
            {
                "name": name,
                "dtype": _name(tensor.dtype),
                "shape": list(tensor.shape),
                "stride": list(tensor.stride()),
                "offset": tensor.storage_offset(),
                "storage": index[key],
                "full": list(piece.full),
                "start": list(piece.start),
                "round": piece.round,
            }
        )
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    message = {"readers": list(readers), "storages": storages, "weights": weights}
    return message | {"checksum": checksum(message)}


def checksum(message: dict) -> str:
    """SHA-256 of all that a message says, as hex digits: against damage, not against forgers.

    A damaged handle may well describe memory: another weight's, or more than there is, which a GPU does not forgive.
    """
    content = {k: v for k, v in message.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=bytes.hex).encode()).hexdigest()


def _export_storage(storage: torch.UntypedStorage, times: int) -> dict:
    # The fields are those of torch.multiprocessing.reductions.reduce_tensor, less its classes and callables:
    # https://github.com/pytorch/pytorch/blob/main/torch/multiprocessing/reductions.py
    if storage.nbytes() == 0:
        return {"kind": "empty", "nbytes": 0}
    if storage.device.type == "cuda":
        names = ("device", "handle", "nbytes", "offset", "ref_handle", "ref_offset", "event", "event_sync")
        exports = [dict(zip(names, storage._share_cuda_(), strict=True)) for _ in range(times)]
        return {"kind": "cuda", "nbytes": storage.nbytes(), "exports": exports}
    if not storage.filename:
        raise HandleError(
            "a CPU tensor in private memory cannot be exported. Try: share_memory([...]) before export_handles"
        )
    return {"kind": "cpu", "path": storage.filename, "nbytes": storage.nbytes()}


# ---- Engine: the call of a method on its workers --------------------------------------------------------------------


def call_workers(llm, method: str, *args) -> list:
    """Call a method of `ColocateWorkerExtension` on all workers of a `vllm.LLM`; their results in rank order.

    method: its name, or "module:function" for a function(worker, *args), which each worker imports.
    Raises HandleError, NotHandled or RuntimeError with what the ranks' exceptions said, once all have replied. Where a
    worker raises, vLLM's collective_rpc raises too, but leaves the replies of the ranks after it in their queues, and
    takes them for those to the next call: so each worker catches its exception and replies with it.
    https://github.com/vllm-project/vllm/blob/main/vllm/v1/executor/multiproc_executor.py
    """
    replies = llm.collective_rpc("reply_to_call", args=(method, *args))
    ranks: dict[str, list[str]] = {}  # by what they say: mostly all say the same
    for rank, reply in enumerate(replies):
        if "error" in reply:
            ranks.setdefault(reply["error"], []).append(str(rank))
    if ranks:
        text = "; ".join(f"rank {' and '.join(which)}: {error}" for error, which in ranks.items())
        kinds = {reply.get("kind") for reply in replies} - {None}
        if kinds == {"NotHandled"}:
            raise NotHandled(text)
        raise (HandleError if kinds <= {"HandleError", "NotHandled"} else RuntimeError)(text)
    return [r["result"] for r in replies]


# ---- Worker: the extension. vLLM mixes it into the worker's class, so `self` is the worker --------------------------


class ColocateWorkerExtension:
    """Methods for `call_workers`, given to vLLM as worker_extension_cls="rlhf_utils.ColocateWorkerExtension".

    `messages` is always {gpu_uuid: what its trainer exported} of all trainers. A worker checks all of them, and maps
    those that it may read: its own GPU's, unless they name other readers. Method names must differ from the
    worker's own (vLLM refuses to start otherwise). After one that writes (WRITES) has failed, do not generate before a
    push succeeded. A sleep of level 2 drops what no push brings, ALiBi's slopes for one, unless colocate/kept.py was
    asked to keep it, once in each new engine.
    """

    _plan: CopyPlan | None = None  # set while connected
    _recording: tuple[Shapes, Recording] | None = None  # the last recording, and for which weights

    def reply_to_call(self, method: str, *args) -> dict:
        """What `call_workers` calls: {"result"}, or {"error", "kind"} of the exception."""
        try:
            module, _, name = method.rpartition(":")
            if module:
                return {"result": getattr(importlib.import_module(module), name)(self, *args)}
            return {"result": getattr(self, name)(*args)}
        except Exception as error:
            kind = type(error).__name__
            text = str(error) if kind in ("HandleError", "NotHandled", "RuntimeError") else f"{kind}: {error}"
            return {"error": text, "kind": kind}

    def report_device_id(self) -> dict:
        """Where this worker is."""
        found = {"gpu": device_uuid(self.device), "tp_rank": self.rank}
        return found | {"pid": os.getpid(), "torch": torch.__version__}

    def update_weights_from_ipc_handles(self, messages: dict) -> dict:
        """Load the weights behind the handles: the simple way, and the reference for `push_weights`.

        Returns {"version", "weights", "bytes", "open_ms", "load_ms"}; bytes as received.
        Raises HandleError, with the old weights untouched, unless the message is exactly the model's weights; and, with
        the engine's weights neither old nor new, if the trainer changed them meanwhile.
        """
        recording = self._record(messages)
        start = time.perf_counter()
        with open_pieces(messages, device_uuid(self.device), self.device) as weights:
            opened = time.perf_counter()
            names = [name for name in weights if not is_control(name)]
            nbytes = sum(piece.tensor.nbytes for name in names for piece in weights[name])
            by_loaders = dataclasses.replace(recording, copies=[], loaders=names, unprocessed={})
            plan = self.new_plan(by_loaders, weights)
            version = int(plan.versions[0])
            plan.push(version)
        return {
            "version": version,
            "weights": len(names),
            "bytes": nbytes,
            "open_ms": 1e3 * (opened - start),
            "load_ms": 1e3 * (time.perf_counter() - opened),
        }

    def connect_weights(self, messages: dict) -> dict:
        """Map this GPU's weights for good, and record what vLLM's loaders do with them, once per trainer and engine.

        It writes no parameter: the first push does. The engine must be awake. An earlier connection ends with the call.
        Returns {"version", "weights", "copies", "bytes", "remote_bytes", "loaders", "open_ms", "record_ms"}: the
        trainer's version, how many copies a push replays, their bytes, those of them that lie on other GPUs, and the
        names of the weights that it must take through vLLM's loaders.
        Raises HandleError unless the message is exactly the model's weights.
        """
        self.disconnect_weights()
        start = time.perf_counter()
        recording = self._record(messages)
        recorded = time.perf_counter()
        with contextlib.ExitStack() as mapping:
            weights = mapping.enter_context(open_pieces(messages, device_uuid(self.device), self.device))
            opened = time.perf_counter()
            plan = self.new_plan(recording, weights)
            self._plan = plan
            self._mapping = mapping.pop_all()
        bound = time.perf_counter()
        return {
            "version": int(plan.versions[0]),
            "weights": sum(not is_control(name) for name in weights),
            "copies": sum(len(part.local) + len(part.remote) for part in plan.rounds.values()),
            "bytes": plan.nbytes,
            "remote_bytes": plan.remote_bytes,
            "loaders": plan.recording.loaders,
            "open_ms": 1e3 * (opened - recorded),
            "record_ms": 1e3 * (recorded - start + bound - opened),
        }

    def push_weights(self, version: int) -> dict:
        """Replay the recorded copies. Returns {"version", "bytes", "copy_ms"}, bytes as written to parameters.

        Raises HandleError if the trainer's weights are not that version, RuntimeError without `connect_weights`.
        """
        if self._plan is None:
            raise RuntimeError("there is no connection to a trainer. Try: connect_weights before push_weights")
        start = time.perf_counter()
        self._plan.push(version)
        return {"version": version, "bytes": self._plan.nbytes, "copy_ms": 1e3 * (time.perf_counter() - start)}

    def disconnect_weights(self) -> None:
        """Forget the plan and unmap the trainer's weights. Harmless when there is no connection."""
        if self._plan is not None:
            self._plan = None
            self._mapping.close()

    def new_plan(self, recording: Recording, weights: dict[str, list[Piece]]) -> CopyPlan:
        """The plan of a push. For weights that come in rounds, subclass both (see `CopyPlan.arriving`)."""
        rounds = [n for n, held in weights.items() if n != VERSION and (is_control(n) or any(p.round for p in held))]
        if rounds:
            found = f"{rounds[0]} belongs to weights that come in rounds, and this worker extension takes all at once"
            raise HandleError(f'{found}. Try: worker_extension_cls="colocate.rounds.Extension"')
        return CopyPlan(self.get_model(), self.vllm_config, recording, weights)

    def gpu_used_bytes(self) -> int:
        """Of this worker's GPU, by all processes; 0 on CPU."""
        if self.device.type == "cpu":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def record_weights(self) -> None:
        """Remember a digest of every parameter for `check_weights_changed`."""
        self._recorded = {n: digest(p) for n, p in self.get_model().named_parameters()}

    def check_weights_changed(self) -> bool:
        """Whether every parameter of this worker differs from what `record_weights` saw. Raises if it never ran.

        But for the scale of a whole weight: the largest element, of which vLLM makes it, may well stay as it is.
        """
        if not hasattr(self, "_recorded"):
            raise RuntimeError("there is no record of the old weights. Try: record_weights before the push")
        parameters = self.get_model().named_parameters()
        must = {n: p for n, p in parameters if p.numel() > 1 or not n.endswith(("scale", "scale_inv"))}
        return all(digest(p) != self._recorded[n] for n, p in must.items())

    def _record(self, messages: dict) -> Recording:
        """What vLLM's loaders do with these weights. Raises HandleError unless all messages hold just the model's."""
        parallel = self.parallel_config
        if parallel.pipeline_parallel_size > 1 or parallel.enable_expert_parallel or parallel.enable_eplb:
            raise NotHandled("pipeline and expert parallelism are not handled: workers have other weights then")
        weights = check_messages(messages, device_uuid(self.device))
        if self._recording is None or self._recording[0] != weights:
            recording = record_loaders(self.get_model(), self.model_config, weights, parallel.tensor_parallel_size)
            self._recording = (weights, recording)
        return self._recording[1]


# ---- Worker: the push. It is the recorded copies, from the trainer's memory, as one CUDA graph ----------------------


class CopyPlan:
    """A recording, bound to one trainer's memory and to the engine's parameters. Nothing is copied before `push`.

    It is valid as long as the weights' mapping and the parameters' addresses are; those survive vLLM's sleep.

    weights: of `open_pieces`, VERSION among them. launches: done beside the copies, see `CopyGraph`.
    """

    def __init__(
        self, model, vllm_config, recording: Recording, weights: dict[str, list[Piece]], launches: Sequence = ()
    ):
        self.model = model
        self.vllm_config = vllm_config
        self.recording = recording
        self.weights = weights
        self.versions = [piece.tensor for piece in weights[VERSION]]
        targets = {n: p.data for n, p in (*model.named_parameters(), *model.named_buffers())}
        # One round, unless the trainer sends its weights in several. (No lambda: a cycle would keep the memory mapped.)
        self.rounds: dict[int, CopyGraph] = defaultdict(functools.partial(CopyGraph, self.versions))
        for c in recording.copies:
            for piece, dst, src in c.bound(targets[c.parameter], weights[c.weight]):
                copies = self.rounds[piece.round]
                (copies.remote if piece.remote else copies.local).append((dst, src))
        if launches:
            self.rounds[0].launches += launches
        self.remote_bytes = sum(copies.remote_bytes for copies in self.rounds.values())
        self.nbytes = sum(copies.nbytes for copies in self.rounds.values())
        if self.versions[0].is_cuda:
            for copies in self.rounds.values():
                copies.capture()

    def push(self, version: int) -> None:
        """Bring the weights of that version in; done when it returns. Raises HandleError if they are another's.

        The version is read from the trainer's memory before and after the copies: a step that has not finished and one
        that began meanwhile show, and so does the mapping of a trainer that is gone, as its version stands still. That
        holds if no version is ever given out twice, not by the next trainer either. What the trainer has gathered from
        others is as its own version says only if theirs is the same: each of their workers finds out.
        """
        seen: list[int] = []
        with contextlib.closing(self._copy(seen)) as for_loaders:
            if self.recording.loaders:
                _load_weights(self.model, self.vllm_config, for_loaders, self.recording.reload)
                seen += [int(version) for version in self.versions]  # the loaders read after the copies' second look
            # Without loaders this loop runs all rounds; with them, those that are left. What still comes, none took.
            for name, _ in for_loaders:
                raise RuntimeError(f"vLLM's loaders did not take {name}")
        if version < 0 or set(seen) != {version}:
            raise HandleError(
                f"a trainer has weights at version {' then '.join(map(str, dict.fromkeys(seen)))}, the push is of "
                f"{version} (-1: a step is under way): the engine must not be used before a whole push"
            )

    def _copy(self, seen: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
        """The push, done as it is iterated. In each round it replays the copies, yields what must go through vLLM's
        loaders, and notes the versions.
        """
        loaders = set(self.recording.loaders)
        with contextlib.closing(self.arriving()) as rounds:
            for number, names in rounds:
                copies = self.rounds[number]
                copies.replay()
                for name in (name for name in names if name in loaders):
                    yield name, self.weight(name)
                seen += copies.seen.flatten().tolist()  # waits for the copies

    def arriving(self) -> Iterator[tuple[int, list[str]]]:
        """(round, names of the weights that are there): all at once. Those of a subclass may come in rounds."""
        yield 0, [name for name in self.weights if not is_control(name)]

    def weight(self, name: str) -> torch.Tensor:
        """One that is there, as vLLM's loaders get it. They may keep it until the push is over."""
        return whole(self.weights[name])


class CopyGraph:
    """Copies that are done together, with a look at the trainers' versions before and after: on a GPU one CUDA graph.

    local, remote: (target, source), remote ones from another GPU's memory. launches: functions that launch something
    else, and have `nbytes`, that they write. seen: the versions, int64, (2, trainers).
    """

    def __init__(self, versions: list[torch.Tensor]):
        self.versions = versions
        self.local: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.remote: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.launches: list[Callable[[], None]] = []
        self.seen = torch.full((2, len(versions)), -1, dtype=torch.int64, device=versions[0].device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.table: torch.Tensor | None = None  # what the graph reads

    @property
    def remote_bytes(self) -> int:
        return sum(dst.nbytes for dst, _ in self.remote)

    @property
    def nbytes(self) -> int:
        return self.remote_bytes + sum(dst.nbytes for dst, _ in self.local) + sum(run.nbytes for run in self.launches)

    def replay(self) -> None:
        if self.graph:
            self.graph.replay()
            return
        self._look(0)
        for dst, src in (*self.local, *self.remote):
            dst.copy_(src)
        for run in self.launches:
            run()
        self._look(1)

    def _look(self, when: int) -> None:
        for i, version in enumerate(self.versions):
            self.seen[when, i].copy_(version)

    def capture(self) -> None:
        """Make the graph: over 4 streams, since one alone leaves memory idle between copies, the largest first, so
        that the lanes end together; strided slices as 16- or 8-byte elements, which doubles their rate.

        Copies from other GPUs go beside these in one kernel of few blocks, which NVLink keeps waiting, and which leaves
        most of the chip to the local ones; kernels of the usual size would take turns with them.
        """
        graph = torch.cuda.CUDAGraph()
        lanes = [torch.cuda.Stream() for _ in range(4)]
        beside = torch.cuda.Stream(priority=-1)
        table, others = _tiles(self.remote)
        blocks = 64 if 5 * self.remote_bytes < self.nbytes else 96  # see `_copy_tiles`
        copies = [_widened(dst, src) for dst, src in sorted([*self.local, *others], key=lambda c: -c[0].nbytes)]
        if table is not None:
            self.table = table.to(self.seen.device)
            _copy_tiles(self.table, 0, blocks)  # compiles it, outside of the capture
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            # Other threads of the worker (NCCL's watchdog) may call CUDA meanwhile.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._look(0)
                for lane in (*lanes, beside):
                    lane.wait_stream(torch.cuda.current_stream())
                if table is not None:
                    with torch.cuda.stream(beside):
                        _copy_tiles(self.table, len(table), blocks)
                for i, (dst, src) in enumerate(copies):
                    with torch.cuda.stream(lanes[i % len(lanes)]):
                        dst.copy_(src)
                for i, run in enumerate(self.launches):
                    with torch.cuda.stream(lanes[i % len(lanes)]):
                        run()
                for lane in (*lanes, beside):
                    torch.cuda.current_stream().wait_stream(lane)
                self._look(1)
            finally:
                graph.capture_end()
        self.graph = graph


def _widened(dst: torch.Tensor, src: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same bytes as the widest elements that both tensors' shapes, strides and offsets allow."""
    for wide in (torch.complex128, torch.int64):
        with contextlib.suppress(RuntimeError):
            return dst.view(wide), src.view(wide)
    return dst, src


def _load_weights(model, vllm_config, weights: Iterable[tuple[str, torch.Tensor]], needs_reload: bool) -> None:
    """Load through vLLM's own loaders; through its layerwise reload where a layer is processed after loading.

    A layer whose parameters were repacked after loading (MoE kernels, the CPU backend) has lost the shapes that its
    loader wants. vLLM's layerwise reload restores them, loads, processes and copies back into the same addresses, one
    layer at a time: https://github.com/vllm-project/vllm/tree/main/vllm/model_executor/model_loader/reload
    """
    if not needs_reload:
        model.load_weights(weights)
        return
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    modules = list(model.modules())
    on_cpu = next(model.parameters()).device.type == "cpu"
    for method in (getattr(module, "quant_method", None) for module in modules):
        if on_cpu and hasattr(method, "moe_kernel"):
            # vLLM 0.32 packs experts for the CPU only while it builds their kernel, so a reload that finds one leaves
            # them unpacked and the engine wrong: let it build another (UnquantizedFusedMoEMethod._setup_kernel).
            method.moe_kernel = None

    def addresses() -> list[int]:
        return [t.data_ptr() for t in (*model.parameters(), *model.buffers())]

    put_back = _tensors_of(modules)
    before = addresses()
    with set_current_vllm_config(vllm_config):  # kernels are built anew, and look into it
        try:
            initialize_layerwise_reload(model)
            model.load_weights(weights)
            finalize_layerwise_reload(model, vllm_config.model_config)
        except BaseException:
            # A layer that was not finished has lost its tensors, which CUDA graphs and recorded copies write to: the
            # next push would fill memory that nobody reads.
            put_back()
            for module in modules:
                get_layerwise_info(module).reset()
            raise
    if addresses() != before:
        raise RuntimeError("vLLM's layerwise reload moved a parameter: recorded copies would go to where it was")


# ---- Worker: handles -> tensors -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _malformed():
    """One kind of error for all that can be wrong with a message: missing keys, other types, dead handles."""
    try:
        yield
    except (HandleError, torch.OutOfMemoryError):
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError, OSError) as error:
        kind = type(error).__name__
        raise HandleError(f"a malformed message, not one of export_handles ({kind}: {error})") from None


@contextlib.contextmanager
def open_pieces(messages: dict, gpu: str, device: torch.device) -> Iterator[dict[str, list[Piece]]]:
    """Map what this GPU's worker may read: {weight: the pieces that make it up}, its own GPU's where it has the choice.

    Control tensors are among the weights. VERSION's pieces are the versions of all trainers that are read.
    """
    with contextlib.ExitStack() as mapping:
        found: dict[str, dict] = {}  # pieces of each weight, by what only one of them may be
        for owner in sorted(messages, key=lambda owner: owner != gpu):
            message = messages[owner]
            if not _may_read(gpu, owner, message):
                continue
            tensors = mapping.enter_context(open_handles(message, device, gpu))
            for w in message["weights"]:
                tensor = tensors[w["name"]]
                piece = Piece(tensor, tuple(w["full"]), tuple(w["start"]), owner != gpu, w.get("round", 0))
                key = owner if w["name"] == VERSION else (piece.start, tensor.shape)
                found.setdefault(w["name"], {}).setdefault(key, piece)
        pieces = {name: list(by_key.values()) for name, by_key in found.items()}
        found.clear()
        try:
            yield pieces
        finally:
            pieces.clear()


def _may_read(gpu: str, owner: str, message: dict) -> bool:
    return gpu in message["readers"] if message["readers"] else gpu == owner


def whole(pieces: list[Piece]) -> torch.Tensor:
    """The weight: mapped memory if there is one piece, else a tensor of its own."""
    if pieces[0].tensor.shape == pieces[0].full:
        return pieces[0].tensor
    weight = pieces[0].tensor.new_empty(pieces[0].full)
    for piece in pieces:
        box = [slice(start, start + n) for start, n in zip(piece.start, piece.tensor.shape, strict=True)]
        weight[tuple(box)].copy_(piece.tensor)
    return weight


@contextlib.contextmanager
def open_handles(message: dict, device: torch.device, reader: str = "") -> Iterator[dict[str, torch.Tensor]]:
    """Map an exported message as {name: tensor} on `device`; unmap on leaving. No bytes are copied.

    A Piece comes as the part that it is. reader: the UUID of this worker's GPU, if the message is for several.
    Raises HandleError for what `export_handles` cannot have written.
    """
    with _malformed():
        _check_checksum(message)
        number = message["readers"].index(reader) if message["readers"] else 0
        storages = [_open_storage(s, device, number) for s in message["storages"]]
        tensors = {w["name"]: _open_tensor(w, storages, device) for w in message["weights"]}
    try:
        yield tensors
        if device.type == "cuda":
            # All reads must be over before the mapping goes and before the trainer hears that it may write again.
            torch.cuda.synchronize(device)
    finally:
        tensors.clear()
        storages.clear()
        if device.type == "cuda":
            torch.cuda.ipc_collect()


def _open_storage(s: dict, device: torch.device, number: int) -> torch.UntypedStorage:
    if s["kind"] == "empty":
        return torch.UntypedStorage(0, device=device)
    if s["kind"] != device.type:
        raise HandleError(f"a handle to {s['kind']} memory cannot be opened on {device.type}")
    if s["kind"] == "cpu":
        if not re.fullmatch(r"/proc/\d+/fd/\d+", s["path"]) or not os.path.exists(s["path"]):
            raise HandleError(f"there is no shared memory at {s['path']!r}: has the trainer ended?")
        if (size := os.path.getsize(s["path"])) < s["nbytes"]:
            raise HandleError(f"{s['path']!r} has {size} bytes of shared memory, not {s['nbytes']}")
        return torch.UntypedStorage.from_file(s["path"], True, s["nbytes"])
    torch.cuda._lazy_init()
    # The sender's device index means nothing here: this worker may see more GPUs, or in another order. With its own
    # index it maps memory of another GPU, too, and reads it over NVLink or PCIe.
    e = s["exports"][number]
    fields = (e["handle"], s["nbytes"], e["offset"], e["ref_handle"], e["ref_offset"], e["event"], e["event_sync"])
    return torch.UntypedStorage._new_shared_cuda(device.index, *fields)


def _open_tensor(weight: dict, storages: list[torch.UntypedStorage], device: torch.device) -> torch.Tensor:
    try:
        whole = torch.empty(0, dtype=DTYPES[weight["dtype"]], device=device).set_(storages[weight["storage"]])
        return whole.as_strided(weight["shape"], weight["stride"], weight["offset"])  # not beyond the storage's end
    except (LookupError, RuntimeError, TypeError) as error:
        raise HandleError(f"{weight['name']}: {type(error).__name__}: {error}") from None


# ---- Worker: whether messages fit -----------------------------------------------------------------------------------

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # {weight: (its full shape, its dtype)}


@_malformed()
def check_messages(messages: dict, gpu: str) -> Shapes:
    """The weights in these messages, without control tensors. Raises HandleError, which names the first few offenders.

    A message must be as it was exported, and every worker must find each element of each weight exactly once, replicas
    aside. Each worker checks that for all of them: so all load, or none does.
    """
    readers = list(dict.fromkeys(gpu for owner, m in messages.items() for gpu in m.get("readers") or [owner]))
    if gpu not in readers:
        raise HandleError(f"there are handles for {', '.join(readers) or 'no GPU'}, but none for {gpu}")
    wrong = []
    shapes: Shapes = {}
    first: dict[str, str] = {}  # sender of each weight's first piece
    boxes: dict[str, dict] = {sender: {} for sender in messages}  # {weight: (start, shape)} of its piece
    for sender in sorted(messages, key=lambda sender: sender != gpu):
        message = messages[sender]
        _check_checksum(message)
        counts = Counter()
        for w in message["weights"]:
            name = w["name"]
            spec = (tuple(w["full"]), DTYPES[w["dtype"]])
            shape, dtype = shapes.setdefault(name, spec)
            own = first.setdefault(name, sender)
            if spec[0] != shape:
                wrong.append(f"wrong shape: {name}: {spec[0]} ({sender}), and {shape} ({own})")
            if spec[1] != dtype:
                wrong.append(f"wrong dtype: {name}: {_name(spec[1])} ({sender}), and {_name(dtype)} ({own})")
            counts[name] += 1
            boxes[sender][name] = (tuple(w["start"]), tuple(w["shape"]))
        wrong += [f"duplicate: {n} ({sender})" for n, count in counts.items() if count > 1]
        if counts[VERSION] != 1 or shapes[VERSION] != ((), torch.int64):
            wrong.append(f"missing: {VERSION} ({sender}): export it beside the weights, an int64 scalar")
    for reader in [] if wrong else readers:
        readable = [boxes[sender] for sender, message in messages.items() if _may_read(reader, sender, message)]
        for name, (shape, _) in shapes.items():
            pieces = {held[name] for held in readable if name in held}
            if pieces == {((0,) * len(shape), shape)}:  # a replica's: a fast way, since a connection waits
                continue
            parts = tuple(Slice.at(start, size, shape) for start, size in sorted(pieces) if math.prod(size))
            if (count := covered_once(parts, shape)) is None:
                wrong.append(f"overlapping, or outside of it: pieces of {name} ({reader})")
            elif count != math.prod(shape):
                some = f", but {count} of {math.prod(shape)} elements" if count else ""
                wrong.append(f"missing: {name}{some} ({reader})")
    if wrong:
        raise HandleError(f"the trainers' messages do not fit, nothing was loaded: {_some(wrong, 5)}")
    return {name: spec for name, spec in shapes.items() if not is_control(name)}


def _check_checksum(message: dict) -> None:
    if message["checksum"] != checksum(message):
        raise HandleError("the handles were changed on their way: their checksum differs")


# ---- Worker: copies from other GPUs ---------------------------------------------------------------------------------

TILE = 16_384  # words of 8 bytes


def _tiles(copies: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor | None, list]:
    """Cut copies into tiles for `_copy_tiles`. Returns the table, and the copies that cannot be cut into 8-byte words.

    The table is int64, (tiles, 6): the addresses of source and target, rows, words in a row, and the strides between
    rows of source and target, in words.
    """
    cut = []
    others = []
    for dst, src in copies:
        try:
            dst, src = dst.view(torch.int64), src.view(torch.int64)
        except RuntimeError:
            others.append((dst, src))
            continue
        if dst.is_contiguous() and src.is_contiguous():
            dst, src = dst.view(1, -1), src.view(1, -1)
        dst, src = (t.unsqueeze(0) if t.dim() == 1 else t for t in (dst, src))
        if dst.dim() != 2 or dst.stride(1) != 1 or src.stride(1) != 1:
            others.append((dst, src))
            continue
        cut.append((src.data_ptr(), dst.data_ptr(), *dst.shape, src.stride(0), dst.stride(0)))
    if not cut:
        return None, others
    return cut_tiles(np.array(cut), TILE, (8, 8)), others


def cut_tiles(by_copy: np.ndarray, tile: int, sizes: tuple[int, int]) -> torch.Tensor:
    """Rows of (source, target, rows, width, strides of both, ...), cut into tiles of so many elements.

    sizes: bytes of an element of source and target. NumPy, since torch would wake threads for all cores of the host,
    which takes half a second in a container.
    """
    wide = by_copy[:, 3].clip(max=tile)
    high = (tile // wide).clip(min=1)
    across = -(-by_copy[:, 3] // wide)  # tiles beside one another
    count = across * -(-by_copy[:, 2] // high)
    copy = np.arange(len(by_copy)).repeat(count)  # to which a tile belongs
    place = np.arange(len(copy)) - (count.cumsum() - count)[copy]  # among its tiles
    row = place // across[copy] * high[copy]
    column = place % across[copy] * wide[copy]
    table = by_copy[copy]
    for side in (0, 1):
        table[:, side] += sizes[side] * (row * table[:, 4 + side] + column)
    table[:, 2] = (table[:, 2] - row).clip(max=high[copy])
    table[:, 3] = (table[:, 3] - column).clip(max=wide[copy])
    return torch.from_numpy(table)


def _copy_tiles(table: torch.Tensor, tiles: int, blocks: int) -> None:
    """Copy so many tiles of the table, on the current stream.

    The sizes are those that were fastest on two H100s that read each other's memory: 64 blocks beside local copies that
    take longer, and 96 where NVLink decides, as it has an eighth of the memory's rate.
    """
    _tile_kernel()[(blocks,)](table, tiles, BLOCK=8192, num_warps=16)


@functools.cache
def _tile_kernel():
    global tl  # where the compiler looks for it; a machine without a GPU may not have it
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["tiles"])
    def copy_tiles(table, tiles, BLOCK: tl.constexpr):
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            row = table + 6 * tile
            src = tl.load(row).to(tl.pointer_type(tl.int64))
            dst = tl.load(row + 1).to(tl.pointer_type(tl.int64))
            words = tl.load(row + 3).to(tl.int32)  # 64-bit divisions would take longer than the copy
            src_stride = tl.load(row + 4)
            dst_stride = tl.load(row + 5)
            end = tl.load(row + 2).to(tl.int32) * words
            for start in range(0, end, BLOCK):
                i = start + tl.arange(0, BLOCK)
                values = tl.load(src + i // words * src_stride + i % words, mask=i < end)
                tl.store(dst + i // words * dst_stride + i % words, values, mask=i < end)

    return copy_tiles


# ---- Worker: what vLLM's loaders do with the weights, recorded without writing a parameter --------------------------


@dataclass(frozen=True)
class Copy:
    """`target` of a parameter, or of a buffer, becomes `source` of a weight, bit for bit."""

    parameter: str
    target: Slice
    weight: str
    source: Slice

    def bound(self, parameter: torch.Tensor, pieces: list[Piece]) -> Iterator[tuple[Piece, torch.Tensor, torch.Tensor]]:
        """(piece, target, source) for each of the weight's pieces that has some of it: views of parameter and piece."""
        for piece in pieces:
            if part := self.source.cut(piece.full, piece.start, piece.tensor.shape):
                where, source = part
                yield piece, self.target.narrow(where).of(parameter), source.of(piece.tensor)


@dataclass(frozen=True)
class Recording:
    """What brings one set of weights into a rank's model (see `record_loaders`)."""

    copies: list[Copy]
    loaders: list[str]  # weights that must go through vLLM's loaders instead: their parameters are computed from them
    padding: dict[str, int]  # parameter -> elements that belong to no weight (they round the vocabulary up)
    reload: bool  # vLLM's loaders work inside its layerwise reload only
    unprocessed: dict[str, list[Copy]]  # what they copy into parameters that are computed afterwards from just that


def record_loaders(model, model_config, weights: Shapes, tp_size: int) -> Recording:
    """Find out what vLLM's own loaders do with weights of these names, shapes and dtypes. They write nothing.

    They run on tensors of the meta device, so a loader that needs a weight's values is not handled.
    model: the rank's (`worker.get_model()`). tp_size: ranks that share the weights.
    Raises HandleError, which names the first few offenders, unless the weights are exactly the model's: each element of
    each parameter is written once, vocabulary padding excepted, and each weight goes somewhere. Raises NotHandled if
    the model cannot be pushed by this file.
    """
    architecture = (getattr(getattr(model, "config", None), "architectures", None) or [type(model).__name__])[0]
    try:
        targets, reload = _run_dry(model, weights)
        wrong = _misfits(targets, weights, model_config, tp_size)
        computed = {name: t for name, t in targets.items() if t.computed}
        loaders = {w for t in computed.values() for write in t.loads for w in write.weights}
        if not wrong and loaders and len(loaders) < len(weights):
            # They must do without the others.
            alone, _ = _run_dry(model, {n: s for n, s in weights.items() if n in loaders})
            if any(alone[name].loads != t.loads for name, t in computed.items() if name in alone):
                loaders = set(weights)
    except NotHandled as error:
        raise NotHandled(f"{architecture} is not handled, nothing was loaded: {error}") from None
    if wrong:
        raise HandleError(f"the weights do not fit {architecture}, nothing was loaded: {_some(wrong, 5)}")
    copies = []
    unprocessed = {}
    for name, t in targets.items():
        slices = [Copy(name, w.target, next(iter(w.weights)), w.source) for w in t.loads if w.source]
        if not t.computed:
            copies += slices
        elif slices and len(slices) == len(t.writes):
            unprocessed[name] = slices
    padding = {name: t.padding for name, t in targets.items() if t.padding}
    return Recording(copies, sorted(loaders), padding, reload, unprocessed)


def _run_dry(model: torch.nn.Module, weights: Shapes) -> tuple[dict[str, _Target], bool]:
    """({name: parameter or buffer, with what the loaders write into it}, whether they need vLLM's layerwise reload)."""
    modules = dict(model.named_modules())
    put_back = _tensors_of(modules.values())
    meta = {n: torch.empty(shape, dtype=dtype, device="meta") for n, (shape, dtype) in weights.items()}
    recorder = _Recorder(meta)
    now = ""

    def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal now
        for name, weight in meta.items():
            now = name
            yield name, weight

    try:
        targets, reload = _find_targets(modules, recorder)
        recorder.targets = {_storage(t.as_loaded) for t in targets.values()}
        with recorder, torch.no_grad():
            model.load_weights(one_by_one())
        for name, target in targets.items():
            prefix, _, leaf = name.rpartition(".")
            after = getattr(modules[prefix], leaf, None)
            storage = _storage(target.as_loaded if after is None else after)
            target.made_anew = storage != _storage(target.as_loaded)
            target.writes = recorder.writes.get(storage, [])
    except (NotHandled, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "CUDA error" in str(error):
            raise  # the GPU's fault, not the model's
        what = f"{now} {weights[now][0]}" if now else "any weight"
        raise NotHandled(f"vLLM's loaders do not take {what}: {type(error).__name__}: {error}"[:400]) from None
    finally:
        put_back()
    return targets, reload


def _find_targets(modules: dict[str, torch.nn.Module], recorder: _Recorder) -> tuple[dict[str, _Target], bool]:
    """The model's parameters and buffers. If layers are processed after loading, all parameters are exchanged for what
    vLLM's loaders want to find."""
    for prefix, module in modules.items():
        sinks = getattr(getattr(module, "impl", None), "_sinks_source", None)
        if sinks is not None and sinks.dtype != torch.float32:
            raise NotHandled(f"FlashInfer keeps a float32 copy of the attention sinks of {prefix}, which a push misses")
    experts = {m for m in modules.values() if "w13_weight" in m._parameters}
    quantized = {m for m in modules.values() if getattr(getattr(m, "quant_method", None), "uses_meta_device", False)}
    derived = any(_keeps_derived_matrices(m) for m in modules.values())
    reload = bool(experts or quantized) or derived
    targets: dict[str, _Target] = {}
    by_storage: dict[int, _Target] = {}
    for prefix, module in modules.items():
        twins = _as_loaded(module, recorder) if reload else {}
        for leaf, tensor in module._parameters.items():
            if tensor is None:
                continue
            if not tensor.numel():
                raise NotHandled(
                    f"vLLM's CPU backend has repacked {prefix}.{leaf}. Try: RLHF_COLOCATE_ROLE=engine, and "
                    "preload_engine_process(), in each of the engine's processes"
                )
            if known := by_storage.get(_storage(tensor)):  # tied: it counts once
                if leaf in twins:
                    twins[leaf] = known.as_loaded
                continue
            target = _Target(tensor, twins.get(leaf, tensor))
            target.processed = derived or module in quantized
            target.processed |= module in experts and not _takes_weights_as_loaded(module)
            # Made of others after loading: a scale, or a matrix of multi-head latent attention.
            makes = module in quantized or hasattr(module, "W_UV")
            target.optional = makes and leaf not in twins and not hasattr(tensor, "weight_loader")
            if hasattr(module, "shard_indices"):  # VocabParallelEmbedding
                rows = tensor.shape[0] - module.shard_indices.num_org_elements
                target.padding = rows * (tensor.numel() // tensor.shape[0])
            targets[f"{prefix}.{leaf}" if prefix else leaf] = target
            by_storage[_storage(tensor)] = target
        module._parameters.update({leaf: twin for leaf, twin in twins.items() if leaf in module._parameters})
    for prefix, module in modules.items():
        for leaf, tensor in module._buffers.items():
            if tensor is not None and _storage(tensor) not in by_storage:  # else it is another view of a parameter
                targets[f"{prefix}.{leaf}" if prefix else leaf] = _Target(tensor, tensor, optional=True)
    return targets, reload


def _as_loaded(module: torch.nn.Module, recorder: _Recorder) -> dict[str, torch.Tensor]:
    """A layer's parameters as vLLM's loaders want them, on the meta device; they may look different now.

    vLLM's layerwise reload puts the same in their place. It repeats later what was written by a parameter's own loader,
    and loses what was written in another way: so these loaders are marked.
    https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/model_loader/reload/layerwise.py
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    twins = {}
    for name, tensor in get_layerwise_info(module).restore_metadata[0].items():
        twins[name] = twin = restore_layer_refs(to_meta_tensor(tensor), module)
        loader = getattr(twin, "weight_loader", default_weight_loader)
        while getattr(loader, "__name__", "") == "online_process_loader":  # of an earlier reload
            loader = loader.__wrapped__
        twin.weight_loader = recorder.own_loader()(loader)
    return twins


def _keeps_derived_matrices(module: torch.nn.Module) -> bool:
    """Whether multi-head latent attention has copies of what it derives from kv_b_proj, where views of it would do."""
    if not hasattr(module, "W_UV"):
        return hasattr(getattr(module, "impl", None), "_w_uk_packed")  # for AMX
    return _storage(module.W_UV) != _storage(module.kv_b_proj.weight)


def _takes_weights_as_loaded(experts: torch.nn.Module) -> bool:
    """Whether the kernel of these experts keeps their weights in the order of loading. Only Triton's does."""
    return getattr(getattr(experts.quant_method, "unquantized_backend", None), "name", "") == "TRITON"


def _tensors_of(modules: Iterable[torch.nn.Module]) -> Callable[[], None]:
    """A function that gives the modules the parameters and buffers back that they have now."""
    before = [(m, dict(m._parameters), dict(m._buffers), set(m._non_persistent_buffers_set)) for m in modules]

    def put_back() -> None:
        for module, parameters, buffers, non_persistent in before:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set = set(non_persistent)

    return put_back


def _misfits(targets: dict[str, _Target], weights: Shapes, model_config, tp_size: int) -> list[str]:
    """What is wrong with the weights. Raises NotHandled if something is wrong with the model."""
    wrong: list[str] = []
    refused: list[str] = []
    read: Counter[str] = Counter()  # elements by weight
    for name, t in targets.items():
        needed = t.as_loaded.numel() - t.padding
        if t.optional and not t.loads:
            continue
        written = tuple(w.target for w in t.loads)
        count = covered_once(written, t.as_loaded.shape) if t.as_loaded.is_contiguous() else None
        if count is None:
            refused.append(f"vLLM's loaders do not write each element of {name} exactly once")
        elif count not in (needed, needed + t.padding):
            wrong.append(f"missing: {name}" + (f": {count} of {needed} elements are written" if count else ""))
        elif t.computed and t.as_loaded is not t.tensor and not all(w.repeated for w in t.loads):
            refused.append(f"vLLM's layerwise reload loses {name}, whose loader is not its own")
        for w in t.loads:
            for weight in w.weights:
                dtype = weights[weight][1]
                # vLLM keeps a few parameters in float32 in a model of 16 bits, and casts what it loads.
                needs = t.as_loaded.dtype
                cast = needs == torch.float32 and dtype == getattr(model_config, "dtype", None)
                if dtype != needs and not cast:
                    wrong.append(f"wrong dtype: {weight}: {_name(dtype)}, and {name} is {_name(needs)}")
                read[weight] += w.target.numel() + t.padding if w.source else math.prod(weights[weight][0])
    used = {weight for t in targets.values() for w in t.writes for weight in w.weights}
    wrong += [f"unexpected: {weight}" for weight in weights if weight not in used]
    for weight, count in read.items():  # all ranks read as much of it
        if count * tp_size < math.prod(weights[weight][0]):
            shape = tuple(weights[weight][0])
            wrong.append(f"wrong shape: {weight}: {shape}, of which vLLM's loaders take {count} elements")
    if refused:
        raise NotHandled(_some(refused, 2))
    return list(dict.fromkeys(wrong))


@dataclass
class _Target:
    """A parameter or buffer, the loaders' writes into it, and what they must come to."""

    tensor: torch.Tensor  # as the engine has it
    as_loaded: torch.Tensor  # as vLLM's loaders find it: elsewhere, where a layer is processed after loading
    optional: bool = False  # it need not be loaded
    padding: int = 0  # elements that belong to no token
    processed: bool = False  # its kernel keeps it in an order of its own
    made_anew: bool = False  # by the loaders: it is not the engine's any more
    writes: list[_Write] = field(default_factory=list)

    @property
    def loads(self) -> list[_Write]:
        """The writes that bring weights in."""
        return [w for w in self.writes if w.weights and w.target.numel()]

    @property
    def computed(self) -> bool:
        """Copies of slices do not bring it in."""
        if self.processed or self.made_anew or any(w.source is None for w in self.loads):
            return True
        if _form(self.as_loaded) != _form(self.tensor):  # processed by a layer that we don't know
            return True
        for i, w in enumerate(self.writes):  # transformed in place after it was loaded
            if not w.weights and any(
                w.target.offset < earlier.target.end() and earlier.target.offset < w.target.end()
                for earlier in self.writes[:i]
                if earlier.weights
            ):
                return True
        return False


@dataclass(frozen=True)
class _Write:
    """One write into a parameter by a loader."""

    target: Slice
    weights: frozenset[str]  # from which its values come; none: they don't come from weights
    source: Slice | None  # of the one weight that was copied as it is
    repeated: bool  # a layerwise reload repeats it


class _Recorder(TorchDispatchMode):
    """Note what loaders write into parameters, which they do not touch. The weights have shapes and dtypes only (meta).

    writes: {storage: what was written into it, in order}, also of tensors that the loaders made.
    """

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.names = {_storage(w): name for name, w in weights.items()}
        self.origins = {storage: frozenset([name]) for storage, name in self.names.items()}  # of what is in a storage
        self.targets: set[int] = set()
        self.writes: dict[int, list[_Write]] = {}
        self.inside = 0  # of how many parameters' own loaders
        self.alive: list[torch.Tensor] = []  # the number of a freed storage may be given out again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written, is_view = _effects(func)
        if written:
            return self._write(func, written, args, kwargs)
        if is_view:
            return func(*args, **kwargs)
        return self._compute(func, args, kwargs)

    def _compute(self, func, args, kwargs):
        """An operation with a result of its own. It runs on the meta device if one of its operands is there."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.is_meta for t in tensors):
            if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
                return args[0].detach()  # to another device: it stays the same weight
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
            if kwargs.get("device"):
                kwargs["device"] = torch.device("meta")
        result = func(*args, **kwargs)
        if origins := self._origins(tensors):
            for t in tree_leaves(result):
                if isinstance(t, torch.Tensor):
                    self.origins.setdefault(_storage(t), origins)
                    self.alive.append(t)
        return result

    def _write(self, func, written, args, kwargs):
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        targets = [t for name in written for t in tree_leaves(given.pop(name, None)) if t is not None]
        sources = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
        origins = self._origins(sources)
        run = True
        for dst in targets:
            storage = _storage(dst)
            if storage in self.names:
                raise NotHandled(f"a loader of vLLM writes into the trainer's {self.names[storage]} ({func})")
            self.alive.append(dst)
            self.writes.setdefault(storage, []).append(self._describe(func, dst, sources, origins))
            if storage in self.targets:
                run = False
            else:
                run = run and (dst.is_meta or not any(s.is_meta for s in sources))
                self.origins[storage] = self.origins.get(storage, frozenset()) | origins
        if run:
            return func(*args, **kwargs)
        return targets[0] if func._schema.returns else None

    def _describe(self, func, dst, sources, origins) -> _Write:
        source = None
        if func is torch.ops.aten.copy_.default:
            src = sources[0].expand(dst.shape)  # raises what the copy would
            if src.dtype == dst.dtype and _storage(src) in self.names:
                source = _slice(src)
        else:
            origins = frozenset()  # in place, or by index: no slice of a weight
        return _Write(_slice(dst), origins, source, self.inside > 0)

    def _origins(self, tensors: list[torch.Tensor]) -> frozenset[str]:
        return frozenset().union(*(self.origins.get(_storage(t), ()) for t in tensors))

    @contextlib.contextmanager
    def own_loader(self):
        """Around a parameter's own loader."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


@functools.cache
def _effects(func) -> tuple[list[str], bool]:
    """(the arguments that an operation writes, whether its result is a view of another)."""
    aliases = {a.name: a.alias_info for a in func._schema.arguments if a.alias_info}
    return [name for name, alias in aliases.items() if alias.is_write], bool(aliases)


# ---- Both sides: parts of tensors, counted in elements --------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """Some elements of a tensor, as a view of the contiguous tensor of its shape: size, stride, offset, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def at(start: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> Slice:
        """The box of this size that begins at `start`, of a tensor of this shape."""
        strides = _strides(shape)
        return Slice(tuple(size), tuple(strides), sum(map(math.prod, zip(start, strides, strict=True))))

    def box(self, shape: Sequence[int]) -> list[tuple[int, int]] | None:
        """The (start, stop) in each dimension of the whole tensor; None if it is no box. It may be a transposed one."""
        steps = {s: n for n, s in zip(self.size, self.stride, strict=True) if n > 1}
        if math.prod(steps.values()) != self.numel():
            return None  # two dimensions with one stride
        rest = self.offset
        box = []
        for n, step in zip(shape, _strides(shape), strict=True):
            start, rest = divmod(rest, step)
            box.append((start, start + (steps.pop(step, 1) if n > 1 else 1)))
        return None if steps or any(stop > n for (_, stop), n in zip(box, shape, strict=True)) else box

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """These elements of a tensor that may have other strides. Raises NotHandled if they then are no view of it."""
        if whole.is_contiguous():
            return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)
        box = self.box(whole.shape)
        if box is None:
            raise NotHandled(f"vLLM's loaders read {self} of a tensor with strides {whole.stride()}, which is no view")
        corner = whole[tuple(slice(start, stop) for start, stop in box)]
        strides = {s: w for s, w, n in zip(_strides(whole.shape), whole.stride(), whole.shape, strict=True) if n > 1}
        return whole.as_strided(self.size, [strides.get(s, 1) for s in self.stride], corner.storage_offset())

    def cut(
        self, shape: Sequence[int], start: Sequence[int], size: Sequence[int]
    ) -> tuple[list[tuple[int, int]], Slice] | None:
        """Intersect this slice of a tensor of that shape with a box of the tensor. None if they have nothing in common.

        Returns the (start, stop) in each of this slice's dimensions, and the same elements as a Slice of the box.
        Raises NotHandled if this slice is no box.
        """
        if tuple(size) == tuple(shape):
            return [(0, n) for n in self.size], self
        place = {step: d for d, (step, n) in enumerate(zip(_strides(shape), shape, strict=True)) if n > 1}
        dims = [place.get(step) if n > 1 else None for n, step in zip(self.size, self.stride, strict=True)]
        if (box := self.box(shape)) is None:
            raise NotHandled(f"{self} of a sharded weight {tuple(shape)} is not handled")
        within = [(max(a, at), min(b, at + n)) for (a, b), at, n in zip(box, start, size, strict=True)]
        if any(a >= b for a, b in within):
            return None
        steps = _strides(size)
        offset = sum((a - at) * step for (a, _), at, step in zip(within, start, steps, strict=True))
        where = [(0, 1) if d is None else (within[d][0] - box[d][0], within[d][1] - box[d][0]) for d in dims]
        stride = tuple(1 if d is None else steps[d] for d in dims)
        return where, Slice(tuple(b - a for a, b in where), stride, offset)

    def narrow(self, where: Sequence[tuple[int, int]]) -> Slice:
        """The elements from start to stop in each dimension."""
        offset = self.offset + sum(a * step for (a, _), step in zip(where, self.stride, strict=True))
        return Slice(tuple(b - a for a, b in where), self.stride, offset)

    def numel(self) -> int:
        return math.prod(self.size)

    def end(self) -> int:
        """The offset after the last element."""
        return self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True)) + 1


@functools.lru_cache  # layers are alike, and a connection waits
def covered_once(slices: tuple[Slice, ...], shape: tuple[int, ...]) -> int | None:
    """How many elements of a tensor its slices cover, each exactly once; None if that cannot be said.

    Exact, and without a mark per element: the slices' edges cut the tensor into cells, which are covered as a whole.
    """
    boxes = [s.box(shape) for s in slices]
    if None in boxes:
        return None
    if len(boxes) == 1:  # most parameters
        return slices[0].numel()
    edges = [sorted({e for b in boxes for e in b[d]}) for d in range(len(shape))]
    places = [{edge: i for i, edge in enumerate(e)} for e in edges]
    cells = torch.zeros([max(len(e) - 1, 0) for e in edges], dtype=torch.int32)
    for b in boxes:
        cells[tuple(slice(p[lo], p[hi]) for p, (lo, hi) in zip(places, b, strict=True))] += 1
    return None if (cells > 1).any() else sum(s.numel() for s in slices)


def _strides(shape: Sequence[int]) -> list[int]:
    """Of a contiguous tensor."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _slice(view: torch.Tensor) -> Slice:
    return Slice(tuple(view.shape), view.stride(), view.storage_offset())


def _storage(t: torch.Tensor) -> int:
    """The number of a tensor's storage, on the meta device too."""
    return t.untyped_storage()._cdata


def _form(t: torch.Tensor) -> tuple:
    return t.dtype, t.shape, t.stride()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(texts: list[str], count: int) -> str:
    """The first few, and how many more there are."""
    more = f" (and {len(texts) - count} more)" if len(texts) > count else ""
    return "; ".join(texts[:count]) + more


# ---- Both sides -----------------------------------------------------------------------------------------------------


def is_control(name: str) -> bool:
    """Whether this tensor of a message is no weight, but what the trainer tells its workers by, as VERSION is."""
    return name.startswith("rlhf.")


def device_uuid(device: torch.device) -> str:
    """The GPU's name that is the same in every process, whatever CUDA_VISIBLE_DEVICES says.

    In the rehearsal (CPU), Ray's logical GPU takes its place; without Ray, "cpu".
    """
    if device.type == "cuda":
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    import ray

    ids = ray.get_runtime_context().get_accelerator_ids()["GPU"] if ray.is_initialized() else []
    if not ids:
        return "cpu"
    address = ray.util.get_node_ip_address()  # each node of a cluster has a GPU 0
    return "logical-gpu-" + ",".join(ids) + ("" if address.startswith("127.") else f"@{address}")


def digest(tensor: torch.Tensor) -> str:
    """64-bit fingerprint of a tensor's bits as 16 hex digits, computed on its device.

    Each 8-byte word is mixed with its position by the finalizer of splitmix64 (Steele, Lea, Flood 2014) and the
    results are added up modulo 2**64: independent of the order of the additions, so it can run in parallel, but a
    flipped bit or two swapped words change it. Takes 32 MiB of scratch memory for a tensor of any size, and a copy of
    it if it is not contiguous, or not aligned to 8 bytes.
    """
    raw = tensor.detach().reshape(-1)
    raw = raw.view(torch.uint8) if raw.numel() else raw.new_empty(0, dtype=torch.uint8)
    if raw.storage_offset() % 8:  # an 8-byte view needs alignment
        raw = raw.clone()
    whole = raw.numel() // 8 * 8
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    position = 0
    for words in (*raw[:whole].view(torch.int64).split(1 << 20), raw[whole:].to(torch.int64)):
        x = torch.arange(position + 1, position + 1 + words.numel(), device=raw.device)
        x.mul_(-7046029254386353131).add_(words)  # 0x9E3779B97F4A7C15 as a signed number, likewise below
        x.bitwise_xor_((x >> 30).bitwise_and_((1 << 34) - 1)).mul_(-4658895280553007687)
        x.bitwise_xor_((x >> 27).bitwise_and_((1 << 37) - 1)).mul_(-7723592293110705685)
        x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))
        total += x.sum()
        position += words.numel()
    return f"{int(total) & (1 << 64) - 1:016x}"


# ---- CPU rehearsal, and what every process of an engine does first --------------------------------------------------


def share_memory(tensors: Iterable[torch.Tensor]) -> None:
    """Move CPU tensors into one block of shared memory, so that handles can name it (rehearsal only).

    The block is a memfd: it has no name in /dev/shm and is gone with its last user, however that one ends. On a GPU
    nothing needs to be moved: CUDA's allocations can be shared as they are.
    """
    tensors = list(tensors)
    starts = [0]
    for t in tensors:
        starts.append(starts[-1] + -(-t.nbytes // 64) * 64)
    fd = os.memfd_create("rlhf-weights")  # stays open: the other processes reach the memory through it
    path = f"/proc/{os.getpid()}/fd/{fd}"
    block = torch.from_file(path, shared=True, size=starts[-1], dtype=torch.uint8)
    for t, start in zip(tensors, starts, strict=False):
        target = block[start : start + t.nbytes].view(t.dtype).view(t.shape)
        t.data = target.copy_(t.data)


def preload_engine_process() -> None:
    """Import vLLM before it is needed, which is most of an engine's start, and make it fit into Ray's processes.

    For all processes of an engine, as Ray's `worker_process_setup_hook`. RLHF_COLOCATE_ROLE must be "engine" in their
    environment, and something else in the trainers', where it does nothing.
    """
    if os.environ.get("RLHF_COLOCATE_ROLE") != "engine":
        return
    gc.disable()  # of 15 s on a slow core, 5 would go into its search in objects that all stay
    import vllm.v1.executor.ray_executor_v2
    from vllm.platforms import current_platform

    # The process has these variables already. Set once more for its actors, they would give these a runtime_env of
    # their own, and Ray would start new processes for them.
    type(current_platform).ray_noset_device_env_vars = []
    if current_platform.is_cuda():
        import vllm.v1.worker.gpu_worker  # noqa: F401
    else:
        import vllm.model_executor.layers.utils as layer_utils

        # vLLM's CPU platform claims no Ray resource; the rehearsal places it on Ray's logical GPUs.
        type(current_platform).ray_device_key = "GPU"
        # Its linear layers repack their weights for oneDNN and drop the originals; keep them plain, as on a GPU.
        layer_utils.dispatch_cpu_unquantized_gemm = _plain_cpu_linear
    gc.freeze()
    gc.enable()


def _plain_cpu_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear
