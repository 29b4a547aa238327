"""What runs next to the weights: inside the training actors and inside the vLLM workers that share their GPUs.

Trainer side   `checkpoint_tensors` names a model's weights as its checkpoint does, `export_handles` turns them into a
               message of plain data (numbers, strings, bytes).
Worker side    `open_handles` maps that message back into tensors, without copying; `ColocateWorkerExtension` checks it
               against what the engine's model expects, loads it through vLLM's own loaders, and proves that every
               element arrived at its place. Two ways to push: `update_weights_from_ipc_handles` opens, loads and
               closes each time; `connect_weights` records the loaders' copies once and `push_weights` replays them.
Both sides     `digest`, a 64-bit fingerprint of a tensor's bits, and `device_uuid`, the name of the GPU.

Copy this file into your trainer as it is: it imports torch, and vLLM and Ray inside the functions that need them.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import multiprocessing.shared_memory
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The name under which a message carries the trainer's version: int64, shape (), in the trainer's memory. The trainer
# sets it to -1 before it changes weights, and to a number not used before when it has: whoever maps it sees both.
VERSION = "rlhf.version"
# Integer types of the same width, to compare and to hash bits instead of values: NaN equals itself, -0.0 is not 0.0.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.int16),
        *(torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
    )
}


# Methods of `ColocateWorkerExtension` that write weights. From the call of one until it has succeeded on all ranks, an
# engine's weights are neither the old nor the new ones.
WRITES = ("update_weights_from_ipc_handles", "connect_weights", "push_weights")


class HandleError(ValueError):
    """A message of handles that must not be loaded: the text names the tensor, what was found and what was needed."""


# ---------------------------------------------------------------------------------------------------------------------
# Both sides
# ---------------------------------------------------------------------------------------------------------------------


def device_uuid(device: torch.device) -> str:
    """The GPU's name that is the same in every process, whatever CUDA_VISIBLE_DEVICES says.

    In the rehearsal (CPU), Ray's logical GPU takes its place; without Ray, "cpu".
    """
    if device.type == "cuda":
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    import ray

    ids = ray.get_runtime_context().get_accelerator_ids()["GPU"] if ray.is_initialized() else []
    return "logical-gpu-" + ",".join(ids) if ids else "cpu"


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


# ---------------------------------------------------------------------------------------------------------------------
# Trainer side: weights -> handles
# ---------------------------------------------------------------------------------------------------------------------


class _View(torch.Tensor):
    """A tensor whose slices stay views where transformers would make copies of them."""

    def contiguous(self, *_args, **_kwargs):
        return self


def checkpoint_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A transformers model's weights under the names and in the shapes of its checkpoint, as views (no copies).

    Tied weights come once. transformers 5 renames weights and fuses experts when it loads them; `save_pretrained` takes
    that back, and so does this, with the same function of transformers.
    Raises HandleError for a weight whose form in the checkpoint cannot be had as a view.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parameters = {name: p.detach().as_subclass(_View) for name, p in model.named_parameters()}
    storages = {p.untyped_storage().data_ptr() for p in parameters.values()}
    for name, tensor in revert_weight_conversion(model, parameters).items():
        if tensor.untyped_storage().data_ptr() not in storages:
            raise HandleError(
                f"{type(model).__name__} is not handled: transformers keeps {name} in another form than the checkpoint "
                "has it, so it cannot be shared without a copy"
            )
        yield name, tensor.as_subclass(torch.Tensor)


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


def export_handles(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict:
    """Describe tensors so that another process on the same GPU (CPU: same host) can map them.

    Returns plain data that any serializer carries: {"storages": [{...}], "weights": [{"name", "dtype", "shape",
    "stride", "offset", "storage"}], "checksum"}, strides and offsets in elements. Each storage is exported once,
    however many tensors view it, because the receiver may open one export only once (torch counts references per
    export).
    The tensors' memory stays the exporter's: keep it alive and unchanged until the receiver has answered.
    Waits for the device: everything launched before this call is in the tensors when it returns.
    """
    named_tensors = list(named_tensors)  # alive to the end: the address of a freed storage may be given out again
    storages: list[dict] = []
    index: dict[int, int] = {}
    weights = []
    for name, tensor in named_tensors:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in index:
            index[key] = len(storages)
            storages.append(_export_storage(storage))
        weights.append(
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "stride": list(tensor.stride()),
                "offset": tensor.storage_offset(),
                "storage": index[key],
            }
        )
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    message = {"storages": storages, "weights": weights}
    return message | {"checksum": checksum(message)}


def checksum(message: dict) -> str:
    """SHA-256 of all that a message says, as hex digits: against damage, not against forgers.

    A damaged handle may well describe memory: another weight's, or more than there is, which a GPU does not forgive.
    """
    content = {k: v for k, v in message.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=bytes.hex).encode()).hexdigest()


def _export_storage(storage: torch.UntypedStorage) -> dict:
    # The fields are those of torch.multiprocessing.reductions.reduce_tensor, less its classes and callables:
    # https://github.com/pytorch/pytorch/blob/main/torch/multiprocessing/reductions.py
    if storage.nbytes() == 0:
        return {"kind": "empty", "nbytes": 0}
    if storage.device.type == "cuda":
        fields = storage._share_cuda_()
        names = ("device", "handle", "nbytes", "offset", "ref_handle", "ref_offset", "event", "event_sync")
        return {"kind": "cuda", **dict(zip(names, fields, strict=True))}
    if not storage.filename:
        raise HandleError("found a CPU tensor in private memory, needed shared memory: call share_memory first")
    return {"kind": "cpu", "path": storage.filename, "nbytes": storage.nbytes()}


# ---------------------------------------------------------------------------------------------------------------------
# Worker side: handles -> tensors
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_handles(message: dict, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Map an exported message as {name: tensor} on `device`; unmap on leaving. No bytes are copied.

    Raises HandleError for whatever `export_handles` cannot have written, before anything is mapped where the
    description shows it.
    """
    with _malformed():
        _check_checksum(message)
        for w in message["weights"]:
            _check_extent(w, message["storages"])
        storages = [_open_storage(s, device) for s in message["storages"]]
        tensors = {
            w["name"]: torch.empty(0, dtype=DTYPES[w["dtype"]], device=device).set_(
                storages[w["storage"]], w["offset"], w["shape"], w["stride"]
            )
            for w in message["weights"]
        }
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


@contextlib.contextmanager
def _malformed():
    """One kind of error for all that can be wrong with a message: missing keys, other types, dead handles."""
    try:
        yield
    except (HandleError, torch.OutOfMemoryError):
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError, OSError) as error:
        kind = type(error).__name__
        raise HandleError(f"found a malformed message ({kind}: {error}), needed what export_handles returns") from None


def _check_checksum(message: dict) -> None:
    if message["checksum"] != checksum(message):
        raise HandleError("found handles that were changed on the way (the checksum differs), needed them as exported")


def _check_extent(weight: dict, storages: list[dict]) -> None:
    name, shape, stride = weight["name"], weight["shape"], weight["stride"]
    numbers = [*shape, *stride, weight["offset"], weight["storage"]]
    if type(name) is not str or {type(x) for x in numbers} - {int}:
        raise HandleError(f"{name!r}: found {weight}, needed a name, and numbers for shape, stride, offset and storage")
    if weight["dtype"] not in DTYPES:
        raise HandleError(f"{name}: found dtype {weight['dtype']!r}, needed one of {', '.join(DTYPES)}")
    if len(shape) != len(stride) or min([*shape, *stride, weight["offset"]], default=0) < 0:
        raise HandleError(f"{name}: found shape {shape}, stride {stride}, offset {weight['offset']}")
    if not 0 <= weight["storage"] < len(storages):
        raise HandleError(f"{name}: found storage {weight['storage']}, needed one of {len(storages)}")
    last = weight["offset"] + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    end = (last + 1) * DTYPES[weight["dtype"]].itemsize if 0 not in shape else 0
    storage = storages[weight["storage"]]
    nbytes = storage["nbytes"] if storage["kind"] != "empty" else 0
    if end > nbytes:
        raise HandleError(f"{name}: found a tensor that ends at byte {end} of a storage of {nbytes}")


def _open_storage(s: dict, device: torch.device) -> torch.UntypedStorage:
    if s["kind"] == "empty":
        return torch.UntypedStorage(0, device=device)
    if s["kind"] != device.type:
        raise HandleError(f"found a handle to {s['kind']} memory, needed {device.type}")
    if s["kind"] == "cpu":
        if not re.fullmatch(r"/proc/\d+/fd/\d+", s["path"]) or not os.path.exists(s["path"]):
            raise HandleError(f"found no shared memory at {s['path']!r}: has the trainer ended?")
        if (size := os.path.getsize(s["path"])) < s["nbytes"]:
            raise HandleError(f"found {size} bytes of shared memory, needed {s['nbytes']}")
        return torch.UntypedStorage.from_file(s["path"], True, s["nbytes"])
    torch.cuda._lazy_init()
    # The sender's device index means nothing here: this worker may see more GPUs, or in another order.
    fields = (s["handle"], s["nbytes"], s["offset"], s["ref_handle"], s["ref_offset"], s["event"], s["event_sync"])
    return torch.UntypedStorage._new_shared_cuda(device.index, *fields)


# ---------------------------------------------------------------------------------------------------------------------
# Worker side: what must be where
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """`parameter[dst]` of this rank's vLLM model must equal `weight[src]` of the checkpoint, bit for bit.

    dst None: the weight is in the parameter, but in an order of its kernel's own, so it cannot be compared.
    transposed: src is a part of the transposed weight.
    """

    parameter: str
    dst: tuple[slice | int, ...] | None
    weight: str
    src: tuple[slice | int, ...]
    shape: tuple[int, ...]  # of the whole checkpoint weight
    dtype: torch.dtype
    transposed: bool = False

    def source(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of the whole weight that belongs here, as a view."""
        return (weight.t() if self.transposed else weight)[self.src]


@dataclass(frozen=True)
class Layout:
    """Where every checkpoint weight belongs in one rank's parameters (see `expected_layout`)."""

    regions: list[Region]
    padding: dict[str, int]  # parameter -> elements that belong to no weight (vocabulary padding)
    processed: dict[str, int]  # parameter -> elements that cannot be compared: their kernel has an order of its own
    needs_reload: bool  # some layer is processed after loading
    reload: frozenset[str]  # weights whose parameters do not keep them as they are loaded
    unknown: dict[str, int] = field(default_factory=dict)  # parameter -> elements that no region accounts for
    extra: frozenset[str] = frozenset()  # weights without a region, which the unknown parameters may need
    architecture: str = "the model"


# Families whose checkpoints hold q, k and v (or gate and up) as one weight, by the order of its rows:
STACKED = {"phi3", "glm", "glm4", "gpt2", "gpt_bigcode"}  # all q, all k, all v, as vLLM has them
GROUPED = {"falcon", "bloom", "gpt_neox"}  # by KV head: its q heads, its k head, its v head
# Layers that the checkpoint has as (in, out), not as (out, in): transformers' Conv1D.
TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc")}


def expected_layout(model: torch.nn.Module, names: Iterable[str], tp_rank: int | None = None) -> Layout:
    """Derive, without vLLM's loaders, which slice of which checkpoint weight belongs where in a vLLM model.

    It is a second opinion on what the loaders do: from the layers' classes and sizes alone it un-fuses qkv and
    gate_up, cuts the tensor-parallel slices, repeats KV heads where there are fewer of them than ranks, and leaves out
    the padding of the vocabulary. Parameters that share memory (tied embeddings) count once.
    A parameter is `unknown` if its layer is of another kind, or if a weight that it should have is not among `names`
    while others are that no parameter should have: then the checkpoint names or orders its weights in another way.
    `require_written_once` speaks for the unknown ones.

    model: the rank's model (`worker.get_model()`), unquantized. names: of the weights that the trainer sends.
    tp_rank: as if for another rank (for fault injection).
    """
    names = set(names) - {VERSION}
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    spelled = _names_in_checkpoint(model, names)
    packed = _packed_layers(model)
    # Experts are packed after loading, and MLA keeps matrices (W_UV) that it derives from its weights then.
    mla = any(hasattr(m, "W_UV") for m in model.modules())
    needs_reload = mla or any(hasattr(m, "w13_weight") for m in model.modules())
    places: dict[str, list[Region]] = {}
    sizes: dict[str, int] = {}
    padding: dict[str, int] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{leaf}" if prefix else leaf
            regions = _regions(name, prefix, leaf, module, parameter, packed, spelled, config, tp_rank)
            if prefix.rpartition(".")[2] in TRANSPOSED.get(kind, ()) and leaf == "weight":
                regions = [replace(r, transposed=True, shape=r.shape[::-1]) for r in regions]
            regions = [replace(r, weight=spelled.get(r.weight, r.weight)) for r in regions]
            sizes[name] = parameter.numel()
            if all(r.dst is not None for r in regions):
                rest = parameter.numel() - sum(parameter.data[r.dst].numel() for r in regions)
                if rest > 0 and hasattr(module, "org_vocab_size"):
                    padding[name] = rest
                elif rest:
                    regions = []
            places[name] = regions
    extra = names - {r.weight for regions in places.values() for r in regions}
    unknown = {n for n, regions in places.items() if not regions}
    if extra:
        unknown |= {n for n, regions in places.items() if any(r.weight not in names for r in regions)}
    known = {n: regions for n, regions in places.items() if n not in unknown}
    layout = [r for regions in known.values() for r in regions]
    extra = frozenset(names - {r.weight for r in layout}) if unknown else frozenset()
    reload = frozenset(r.weight for r in layout if mla or r.dst is None)
    return Layout(
        regions=layout,
        padding=padding,
        processed={n: sizes[n] for n, regions in known.items() if any(r.dst is None for r in regions)},
        needs_reload=needs_reload,
        reload=reload | extra if needs_reload else reload,
        unknown={n: sizes[n] - padding.get(n, 0) for n in places if n in unknown},
        extra=extra,
        architecture=(getattr(config, "architectures", None) or [type(model).__name__])[0],
    )


def _names_in_checkpoint(model: torch.nn.Module, names: set[str]) -> dict[str, str]:
    """{a weight's name as vLLM's model may have it: its name in the checkpoint}, by vLLM's own tables of renamings."""
    renamed = {name: name for name in names}
    for prefix, module in model.named_modules():
        if mapper := getattr(module, "hf_to_vllm_mapper", None):
            rename = replace(mapper, orig_to_new_stacked={})._map_name  # without the fusing of layers
            start = f"{prefix}." if prefix else ""
            for name, now in renamed.items():
                if now.startswith(start):
                    renamed[name] = start + (rename(now.removeprefix(start)) or name)
    return {now: name for name, now in renamed.items()} | {name: name for name in names}


def _packed_layers(model: torch.nn.Module) -> dict[str, list[str]]:
    """{a fused layer of vLLM: the checkpoint's layers in it}, as in {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}."""
    packed: dict[str, list[str]] = {}
    for module in model.modules():
        stacked = getattr(getattr(module, "hf_to_vllm_mapper", None), "orig_to_new_stacked", {})
        for part, (fused, _) in stacked.items():
            parts = packed.setdefault(fused.rpartition(".")[2], [])
            if (last := part.rpartition(".")[2]) not in parts:
                parts.append(last)
    return packed | getattr(model, "packed_modules_mapping", {})


def _regions(name, prefix, leaf, module, parameter, packed, spelled, config, tp_rank) -> list[Region]:
    """The regions of one parameter; none if its layer's kind, or the order of its weights' rows, is not known."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        LinearBase,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    shape, dtype = tuple(parameter.shape), parameter.dtype
    tp = getattr(module, "tp_size", 1)
    if tp_rank is None:
        tp_rank = get_tensor_model_parallel_rank()
    rank = tp_rank if tp > 1 else 0  # layers may opt out (disable_tp)
    parent, _, last = prefix.rpartition(".")

    def rows(weight: str, dst_start: int, src_start: int, n: int, total: int) -> Region:
        dst, src = (slice(dst_start, dst_start + n),), (slice(src_start, src_start + n),)
        return Region(name, dst, weight, src, (total, *shape[1:]), dtype)

    if parameter.numel() == 0:
        raise HandleError(
            f"{name}: found it repacked by vLLM's CPU backend, needed plain parameters: pass preload_engine_process as "
            "Ray's worker_process_setup_hook, with RLHF_COLOCATE_ROLE=engine"
        )
    if leaf in ("w13_weight", "w2_weight"):
        return _expert_regions(name, prefix, leaf, module, parameter, tp_rank)
    loader = inspect.unwrap(getattr(parameter, "weight_loader", module.forward))
    if isinstance(module, LinearBase) and getattr(loader, "__self__", None) is not module:
        return []  # not the layer's own loader: Mamba's layers, for one, put rows in an order of theirs
    if isinstance(module, VocabParallelEmbedding):
        start = rank * shape[0]
        n = max(0, min(shape[0], module.org_vocab_size - start))
        return [rows(name, 0, start, n, module.org_vocab_size)]
    if isinstance(module, QKVParallelLinear):
        q, kv = module.num_heads * module.head_size, module.num_kv_heads * module.head_size
        v = module.num_kv_heads * getattr(module, "v_head_size", module.head_size)
        kv_rank = rank // module.num_kv_head_replicas
        sizes = [(q, rank, tp), (kv, kv_rank, tp // module.num_kv_head_replicas)]
        sizes += [(v, kv_rank, tp // module.num_kv_head_replicas)]
    elif isinstance(module, MergedColumnParallelLinear):
        sizes = [(n // tp, rank, tp) for n in module.output_sizes]
    elif isinstance(module, ColumnParallelLinear):
        return [rows(name, 0, rank * shape[0], shape[0], shape[0] * tp)]
    elif isinstance(module, RowParallelLinear) and leaf == "weight":
        columns = slice(rank * shape[1], (rank + 1) * shape[1])
        return [
            Region(name, (slice(None), slice(None)), name, (slice(None), columns), (shape[0], shape[1] * tp), dtype)
        ]
    elif type(module).__name__.endswith("Norm") and len(shape) == 2:  # a row for each head
        return [rows(name, 0, tp_rank * shape[0], shape[0], shape[0] * get_tensor_model_parallel_world_size())]
    elif type(module).__name__.endswith("Norm") or isinstance(
        module, (LinearBase, torch.nn.Linear, torch.nn.Embedding)
    ):  # the same on every rank: norms, positions, biases of row-parallel layers, routers
        return [Region(name, (), name, (), shape, dtype)]
    else:
        return []
    # A fused layer: its parts come as weights of their own (Llama), or as one fused weight (Phi-3).
    parts, total = packed.get(last, []), sum(n * of for n, _, of in sizes)
    separate = len(parts) == len(sizes) and name not in spelled
    kind = getattr(config, "model_type", "")
    if not separate and kind in GROUPED and isinstance(module, QKVParallelLinear):
        return _grouped_regions(name, module, rank, kv_rank, rows)
    if not separate and kind not in STACKED:
        return []
    regions, dst, base = [], 0, 0
    for i, (n, r, of) in enumerate(sizes):
        if separate:
            regions.append(rows(f"{parent}.{parts[i]}.{leaf}", dst, r * n, n, n * of))
        else:
            regions.append(rows(name, dst, base + r * n, n, total))
        dst, base = dst + n, base + n * of
    return regions


def _grouped_regions(name, module, rank, kv_rank, rows) -> list[Region]:
    """Where the checkpoint has, for each KV head, its q heads, k and v, and vLLM has all q, all k, all v."""
    size = module.head_size
    group = module.total_num_heads // module.total_num_kv_heads  # q heads of a KV head
    heads = range(rank * module.num_heads, (rank + 1) * module.num_heads)
    kv_heads = range(kv_rank * module.num_kv_heads, (kv_rank + 1) * module.num_kv_heads)
    order = [h // group * (group + 2) + h % group for h in heads]  # places in the checkpoint, counted in heads
    order += [h * (group + 2) + group for h in kv_heads]
    order += [h * (group + 2) + group + 1 for h in kv_heads]
    total = module.total_num_kv_heads * (group + 2) * size
    return [rows(name, i * size, place * size, size, total) for i, place in enumerate(order)]


def _expert_regions(name, prefix, leaf, module, parameter, tp_rank) -> list[Region]:
    """w13 (experts, gate rows then up rows, hidden) and w2 (experts, hidden, intermediate), cut along intermediate."""
    config = module.moe_config
    tp = config.moe_parallel_config.tp_size
    rank = tp_rank if tp > 1 else 0
    hidden, n = config.hidden_dim_unpadded, config.intermediate_size_per_partition_unpadded
    cut = slice(rank * n, (rank + 1) * n)
    prefix = prefix.removesuffix(".routed_experts")
    # Triton's kernel takes the weights as they are loaded; all others permute, pack or pad them.
    plain = module.quant_method.unquantized_backend.name == "TRITON"
    regions = []
    for e in range(module.global_num_experts):
        parts = [(module.ckpt_down_proj_name, (e,), (slice(None), cut), (hidden, n * tp))]
        if leaf == "w13_weight":
            names = (module.ckpt_gate_proj_name, module.ckpt_up_proj_name)
            parts = [(p, (e, slice(i * n, (i + 1) * n)), (cut,), (n * tp, hidden)) for i, p in enumerate(names)]
        for part, dst, src, shape in parts:
            weight = f"{prefix}.{e}.{part}.weight"
            regions.append(Region(name, dst if plain else None, weight, src, shape, parameter.dtype))
    return regions


@_malformed()
def _names(message: dict) -> list[str]:
    """Of the weights in a message."""
    _check_checksum(message)
    return [w["name"] for w in message["weights"]]


@_malformed()
def check_message(message: dict, layout: Layout) -> None:
    """Refuse a message that is not exactly the model's weights: raises HandleError naming the first few offenders."""
    _check_checksum(message)
    needed = {r.weight: (r.shape, r.dtype) for r in layout.regions} | {VERSION: ((), torch.int64)}
    counts = Counter(w["name"] for w in message["weights"])
    problems = [f"duplicate: {n}" for n, c in counts.items() if c > 1]
    hint = {VERSION: " (export it beside the weights: an int64 scalar under the name rlhf_utils.VERSION)"}
    problems += [f"missing: {n}{hint.get(n, '')}" for n in needed if n not in counts]
    problems += [f"missing: {n}" for n in layout.extra if n not in counts]  # which another GPU's message has
    problems += [f"unexpected: {n}" for n in counts if n not in needed and n not in layout.extra]
    for w in message["weights"]:
        shape, dtype = needed.get(w["name"], (tuple(w["shape"]), DTYPES.get(w["dtype"])))
        if tuple(w["shape"]) != shape:
            problems.append(f"wrong shape: {w['name']}: found {tuple(w['shape'])}, needed {shape}")
        if DTYPES.get(w["dtype"]) != dtype:
            problems.append(f"wrong dtype: {w['name']}: found {w['dtype']}, needed {str(dtype).removeprefix('torch.')}")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise HandleError(
            f"the weights do not fit {layout.architecture}, nothing was loaded: {'; '.join(problems[:5])}{more}"
        )
    for w in message["weights"]:
        _check_extent(w, message["storages"])


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements of two tensors of the same shape and dtype differ in their bits."""
    a, b = a.view(BITS[a.dtype.itemsize]), b.view(BITS[b.dtype.itemsize])
    return 0 if torch.equal(a, b) else int((a != b).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Worker side: the fast path. vLLM's loaders run once, watched; from then on a push is the copies that they made.
# ---------------------------------------------------------------------------------------------------------------------


class _RecordCopies(TorchDispatchMode):
    """Note each copy from a weight's slice into a parameter's slice of the same dtype, while it happens as usual.

    dry: the parameters are not written; only noted.
    `written` has every copy into a parameter, also of what a loader has computed, in order: the slice, and whether it
    came from a weight as it is. `overwritten` are the parameters that were written in another way where a copy had
    been: replaying the copy alone would be wrong. All are by the address of the parameter's memory.
    """

    def __init__(self, weights: Iterable[torch.Tensor], parameters: Iterable[torch.Tensor], dry: bool = False):
        super().__init__()
        self.weights = {_address(w) for w in weights}
        self.copies: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.written: dict[int, list[tuple[torch.Tensor, bool]]] = {}
        self.overwritten: set[int] = set()
        self.dry = dry
        self.watch(parameters)

    def watch(self, parameters: Iterable[torch.Tensor]) -> None:
        for p in parameters:
            self.copies.setdefault(_address(p), [])
            self.written.setdefault(_address(p), [])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {s.name: a for a, s in zip(args, func._schema.arguments, strict=False)} | (kwargs or {})
        targets = [given.get(s.name) for s in func._schema.arguments if s.alias_info and s.alias_info.is_write]
        skip = False
        for dst in [t for w in targets for t in (w if isinstance(w, (list, tuple)) else [w]) if t is not None]:
            address = _address(dst)
            if address in self.weights:
                raise HandleError(
                    f"found a loader of vLLM that writes into the trainer's weights ({func}), needed none"
                )
            if address not in self.copies:
                continue
            skip = self.dry
            copied = func is torch.ops.aten.copy_.default
            src = args[1] if copied else dst
            same = src.dtype == dst.dtype and src.shape == dst.shape
            plain = copied and same and _address(src) in self.weights
            if copied:
                self.written[address].append((dst.detach(), plain))
            if plain:
                self.copies[address].append((dst.detach(), src.detach()))
                continue
            start, end = _span(dst)
            if any(start < e and s < end for s, e in (_span(d) for d, _ in self.copies[address])):
                self.overwritten.add(address)
        if skip:
            return targets[0] if func._schema.returns else None
        return func(*args, **(kwargs or {}))


def _address(t: torch.Tensor) -> int:
    """Of a tensor's memory; on the meta device, where there is none, of what stands for it."""
    storage = t.untyped_storage()
    return storage.data_ptr() or storage._cdata


def _span(t: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor's memory and the one after its last."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize


def _box(view: torch.Tensor, base: torch.Tensor) -> list[tuple[int, int]] | None:
    """The (start, stop) in each dimension of contiguous `base` that `view` of its memory is; None if it is no box."""
    offset = view.storage_offset() - base.storage_offset()
    extents = {s: n for n, s in zip(view.shape, view.stride(), strict=True) if n > 1}
    box = []
    for n, stride in zip(base.shape, base.stride(), strict=True):
        start, offset = divmod(offset, stride)
        box.append((start, start + (extents.pop(stride, 1) if n > 1 else 1)))
    return None if extents or any(stop > n for (_, stop), n in zip(box, base.shape, strict=True)) else box


def covered_once(views: list[torch.Tensor], base: torch.Tensor) -> int | None:
    """How many elements of contiguous `base` its views cover, each exactly once; None if that cannot be said.

    Exact, and without a mark per element: the views' edges cut `base` into cells, and a cell is covered as a whole.
    """
    boxes = [_box(v, base) for v in views]
    if None in boxes or not base.is_contiguous() or any(v.dtype != base.dtype for v in views):
        return None
    edges = [sorted({e for b in boxes for e in b[d]}) for d in range(base.dim())]
    cells = torch.zeros([max(len(e) - 1, 0) for e in edges], dtype=torch.int32)
    for b in boxes:
        cells[tuple(slice(e.index(lo), e.index(hi)) for e, (lo, hi) in zip(edges, b, strict=True))] += 1
    return None if (cells > 1).any() else sum(v.numel() for v in views)


def require_written_once(model, model_config, weights: dict[str, torch.Tensor], layout: Layout) -> None:
    """Let vLLM's loaders say what the layout cannot: they run on these weights, watched, and write into no parameter.

    Raises HandleError, which names parameter and count, unless they would write each element of each of the layout's
    unknown parameters, padding excepted, exactly once. It also does if they do not take the weights.
    """
    parameters = dict(model.named_parameters())
    kept = {module: dict(module._parameters) for module in model.modules()}
    loaded = dict(parameters)  # as the loaders find them: of another shape where layers are processed after loading
    recorder = _RecordCopies(weights.values(), [*parameters.values(), *model.buffers()], dry=True)

    def watch(as_loaded: dict[str, torch.Tensor]) -> None:
        loaded.update(as_loaded)
        recorder.watch(as_loaded.values())

    try:
        with recorder:
            _load_weights(model, model_config, weights.items(), layout.needs_reload, watch)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise  # the GPU's fault, not the model's
        detail = str(error) if isinstance(error, HandleError) else f"{type(error).__name__}: {error}"
        raise _not_handled(layout, f"vLLM's loaders do not take the trainer's weights ({detail[:300]})") from None
    finally:
        for module, own in kept.items():  # some loaders put a new parameter in the old one's place
            module._parameters.clear()
            module._parameters.update(own)
    problems = []
    for name, needed in layout.unknown.items():
        own = _address(parameters[name])
        target = _address(loaded[name])
        # vLLM's reload goes over those that it does not replace a second time.
        count = _times_written(recorder.written[target], loaded[name], repeated=layout.needs_reload and own == target)
        if count not in (needed, needed + layout.padding.get(name, 0)):
            problems.append(f"{name}: {count} of {needed}" if count is not None else f"{name}: some twice")
        elif not recorder.written[own]:
            problems.append(f"{name}: 0 of {needed}, since vLLM's reload loses them")
    if problems:
        more = f" (and {len(problems) - 2} more)" if len(problems) > 2 else ""
        what = "vLLM's loaders do not write each element of these parameters exactly once: "
        raise _not_handled(layout, what + "; ".join(problems[:2]) + more)


def _not_handled(layout: Layout, why: str) -> HandleError:
    extra = sorted(layout.extra)
    names = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
    why += f". The trainer sends weights whose place is not known: {names}" if extra else ""
    return HandleError(f"{layout.architecture} is not handled, nothing was loaded: {why}")


def _times_written(writes: list[tuple[torch.Tensor, bool]], parameter: torch.Tensor, repeated: bool) -> int | None:
    """As `covered_once`, of what was written into a parameter. repeated: the same slice may come more than once."""
    views: list[torch.Tensor] = []
    slices: list[tuple] = []
    for view, plain in writes:
        where = (view.storage_offset(), view.shape, view.stride())
        transformed = not plain and where in slices[-1:]  # in place, after it was loaded
        if not transformed and not (repeated and where in slices):
            views.append(view)
            slices.append(where)
    return covered_once(views, parameter)


class CopyPlan:
    """How one set of weights gets into a model: recorded copies to replay, and weights for vLLM's loaders.

    Building the plan loads the weights once. It is valid as long as their mapping and the parameters' addresses are;
    those survive vLLM's sleep.

    weights: {checkpoint name: mapped tensor}; version: the mapped VERSION word.
    """

    def __init__(self, model, model_config, weights: dict[str, torch.Tensor], version: torch.Tensor, layout: Layout):
        self.model, self.model_config, self.layout = model, model_config, layout
        self.weights, self.version = weights, version
        parameters = {n: p.data for n, p in model.named_parameters()}
        with _RecordCopies(weights.values(), parameters.values()) as recorder:
            model.load_weights((n, w) for n, w in weights.items() if n not in layout.reload)
        now = {n: p.data_ptr() for n, p in model.named_parameters()}
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        loaders = set(layout.reload)
        left: dict[str, int] = {}
        for name, parameter in parameters.items():
            address = _address(parameter)
            copies = recorder.copies[address]
            covered = covered_once([dst for dst, _ in copies], parameter)
            same = address not in recorder.overwritten and now[name] == parameter.data_ptr()
            # Covered but for padding; anything else is left to the loaders.
            if same and covered == parameter.numel() - layout.padding.get(name, 0):
                self.copies += copies
            elif name in layout.unknown:
                left[name] = layout.unknown[name]
            else:
                loaders |= {r.weight for r in layout.regions if r.parameter == name}
        if left:
            # From which weights they come is not known. These should do; if they do not, all of them will.
            loaders |= layout.extra
            chosen = {n: w for n, w in weights.items() if n in loaders}
            try:
                require_written_once(model, model_config, chosen, replace(layout, unknown=left))
            except HandleError:
                loaders = set(weights)
        self.loaders = sorted(loaders)
        self.nbytes = sum(dst.nbytes for dst, _ in self.copies)
        self.seen = torch.full((2,), -1, dtype=torch.int64, device=version.device)
        self.graph = self._capture() if version.is_cuda else None
        self._run_loaders()

    def push(self, version: int) -> None:
        """Bring the weights of that version in; done when it returns. Raises HandleError if they are another's.

        The version is read from the trainer's memory before and after the copies: a step that has not finished and one
        that began meanwhile show, and so does the mapping of a trainer that is gone, as its version stands still. That
        holds if no version is ever given out twice, not by the next trainer either.
        """
        if self.graph:
            self.graph.replay()
        else:
            self._copy(self.copies)
        self._run_loaders()
        seen = self.seen.tolist()  # waits for the copies
        if self.loaders:
            seen.append(int(self.version))
        if set(seen) != {version}:
            raise HandleError(
                f"found the trainer's weights at version {' then '.join(map(str, dict.fromkeys(seen)))}, needed "
                f"{version}: the engine must not be used before a whole push (-1 is a step under way)"
            )

    def _run_loaders(self) -> None:
        if self.loaders:
            chosen = [(n, self.weights[n]) for n in self.loaders]
            _load_weights(self.model, self.model_config, chosen, self.layout.needs_reload)

    def _copy(self, copies: list, lanes: list | None = None) -> None:
        """All copies, between two looks at the version; over several CUDA streams if there are lanes."""
        self.seen[0].copy_(self.version)
        for lane in lanes or []:
            lane.wait_stream(torch.cuda.current_stream())
        for i, (dst, src) in enumerate(copies):
            with torch.cuda.stream(lanes[i % len(lanes)]) if lanes else contextlib.nullcontext():
                dst.copy_(src)
        for lane in lanes or []:
            torch.cuda.current_stream().wait_stream(lane)
        self.seen[1].copy_(self.version)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """One CUDA graph of the copies: over 4 streams, since one alone leaves memory idle between copies, the largest
        first, so that the lanes end together; strided slices as 16- or 8-byte elements, which doubles their rate."""
        graph, lanes = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(4)]
        copies = [_widened(dst, src) for dst, src in sorted(self.copies, key=lambda c: -c[0].nbytes)]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            # Other threads of the worker (NCCL's watchdog) may call CUDA meanwhile.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._copy(copies, lanes)
            finally:
                graph.capture_end()
        return graph


def _widened(dst: torch.Tensor, src: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same bytes as the widest elements that both tensors' shapes, strides and offsets allow."""
    for wide in (torch.complex128, torch.int64):
        with contextlib.suppress(RuntimeError):
            return dst.view(wide), src.view(wide)
    return dst, src


# ---------------------------------------------------------------------------------------------------------------------
# Engine side: the call of a worker's method
# ---------------------------------------------------------------------------------------------------------------------


def call_workers(llm, method: str, *args) -> list:
    """Call a method of `ColocateWorkerExtension` on all workers of a `vllm.LLM`; their results in rank order.

    Raises HandleError or RuntimeError with what the ranks' exceptions said, once all of them have replied. Where a
    worker raises, vLLM's collective_rpc raises too, but leaves the replies of the ranks after it in their queues, and
    takes them for those to the next call: so each worker catches its exception and replies with it.
    https://github.com/vllm-project/vllm/blob/main/vllm/v1/executor/multiproc_executor.py
    """
    replies = llm.collective_rpc("reply_to_call", args=(method, *args))
    failed = {rank: r for rank, r in enumerate(replies) if "error" in r}
    if failed:
        ranks: dict[str, list[str]] = {}  # by what they say: mostly all say the same
        for rank, reply in failed.items():
            ranks.setdefault(reply["error"], []).append(str(rank))
        kind = HandleError if all(r["kind"] == "HandleError" for r in failed.values()) else RuntimeError
        raise kind("; ".join(f"rank {' and '.join(who)}: {text}" for text, who in ranks.items()))
    return [r["result"] for r in replies]


# ---------------------------------------------------------------------------------------------------------------------
# Worker side: the extension. vLLM mixes it into the worker's class: `self` is the worker.
# ---------------------------------------------------------------------------------------------------------------------


class ColocateWorkerExtension:
    """Methods for `call_workers`, given to vLLM as worker_extension_cls="rlhf_utils.ColocateWorkerExtension".

    `messages` is always {gpu_uuid: export_handles([*checkpoint_tensors(model), (VERSION, version)])} of all training
    actors: a worker takes its own GPU's; before it loads, it checks the rest, too. Method names must differ from the
    worker's own (vLLM refuses to start otherwise). After one that writes (WRITES) has failed, do not generate before a
    push succeeded.
    """

    _plan: CopyPlan | None = None  # set while connected

    def reply_to_call(self, method: str, *args) -> dict:
        """What `call_workers` calls: {"result"}, or {"error", "kind"} of the exception."""
        try:
            return {"result": getattr(self, method)(*args)}
        except Exception as error:
            kind = type(error).__name__
            text = str(error) if kind in ("HandleError", "RuntimeError") else f"{kind}: {error}"
            return {"error": text, "kind": kind}

    def report_device_id(self) -> dict:
        return {
            "gpu": device_uuid(self.device),
            "tp_rank": self.rank,
            "pid": os.getpid(),
            "torch": torch.__version__,
        }

    def update_weights_from_ipc_handles(self, messages: dict) -> dict:
        """Load the weights behind the handles: the simple way, and the reference for `push_weights`.

        Returns {"version", "weights", "bytes", "open_ms", "load_ms"}; bytes as received.
        Raises HandleError, with the old weights untouched, unless the message is exactly the model's weights.
        """
        message, layout = self._checked(messages)
        start = time.perf_counter()
        with open_handles(message, self.device) as weights:
            opened = time.perf_counter()
            version = weights.pop(VERSION)
            if layout.unknown:
                require_written_once(self.get_model(), self.model_config, weights, layout)
            _load_weights(self.get_model(), self.model_config, weights.items(), layout.needs_reload)
            nbytes = sum(w.nbytes for w in weights.values())
            count = len(weights)
            version = int(version)  # after the loaders: the trainer's weights were still that version
        return {
            "version": version,
            "weights": count,
            "bytes": nbytes,
            "open_ms": 1e3 * (opened - start),
            "load_ms": 1e3 * (time.perf_counter() - opened),
        }

    def connect_weights(self, messages: dict) -> dict:
        """Map this GPU's weights for good and record how vLLM's loaders bring them in, once per trainer and engine.

        That loads them, too. Returns {"version", "weights", "copies", "bytes", "loaders", "open_ms", "record_ms"}: how
        many copies a push replays, their bytes, and the names of the weights that it must take through vLLM's loaders
        (processed after loading). An earlier connection ends with the call.
        Raises HandleError, with the old weights untouched, unless the message is exactly the model's weights; if the
        trainer turns out to be in the middle of a step, some are loaded by then.
        """
        self.disconnect_weights()
        message, layout = self._checked(messages)
        start = time.perf_counter()
        with contextlib.ExitStack() as mapping:
            weights = mapping.enter_context(open_handles(message, self.device))
            opened = time.perf_counter()
            word = weights.pop(VERSION)
            version = int(word)
            if layout.unknown:
                require_written_once(self.get_model(), self.model_config, weights, layout)
            plan = CopyPlan(self.get_model(), self.model_config, weights, word, layout)
            if version < 0 or int(word) != version:
                raise HandleError("found the trainer in the middle of a step, needed it at rest: connect between steps")
            self._plan, self._mapping = plan, mapping.pop_all()
        return {
            "version": version,
            "weights": len(plan.weights),
            "copies": len(plan.copies),
            "bytes": plan.nbytes,
            "loaders": plan.loaders,
            "open_ms": 1e3 * (opened - start),
            "record_ms": 1e3 * (time.perf_counter() - opened),
        }

    def push_weights(self, version: int) -> dict:
        """Replay the recorded copies. Returns {"version", "bytes", "copy_ms"}, bytes as written to parameters.

        Raises HandleError if the trainer's weights are not that version, RuntimeError without `connect_weights`.
        """
        if self._plan is None:
            raise RuntimeError("found no connection to a trainer, needed connect_weights() before push_weights()")
        start = time.perf_counter()
        self._plan.push(version)
        return {"version": version, "bytes": self._plan.nbytes, "copy_ms": 1e3 * (time.perf_counter() - start)}

    def disconnect_weights(self) -> None:
        """Forget the plan and unmap the trainer's weights. Harmless when there is no connection."""
        if self._plan is not None:
            self._plan = None
            self._mapping.close()

    def gpu_used_bytes(self) -> int:
        """Of this worker's GPU, by all processes; 0 on CPU."""
        if self.device.type == "cpu":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def verify_weights(self, messages: dict, digests: dict) -> dict:
        """Compare what arrived with what was sent, and every parameter element with what it must be.

        digests: {weight: digest} by the trainer. Returns {"gpu", "tp_rank", "transport": {"checked", "wrong"},
        "placement": {"checked", "wrong", "padding", "processed", "unknown"}}; `checked` counts tensors and elements,
        `wrong` names the tensors that differ (with the number of elements, for placement); the last three count
        elements by parameter (see Layout).
        """
        layout = expected_layout(self.get_model(), _names(self._own(messages)))
        with open_handles(self._own(messages), self.device) as weights:
            weights.pop(VERSION)
            transport = [n for n in {**weights, **digests} if n not in weights or digest(weights[n]) != digests.get(n)]
            checked, wrong = self._compare(layout, weights)
            count = len(weights)
        return {
            "gpu": device_uuid(self.device),
            "tp_rank": self.rank,
            "transport": {"checked": count, "wrong": sorted(transport)},
            "placement": {
                "checked": checked,
                "wrong": wrong,
                "padding": layout.padding,
                "processed": layout.processed,
                "unknown": layout.unknown,
            },
        }

    def _compare(self, layout: Layout, weights: dict[str, torch.Tensor]) -> tuple[int, dict[str, int]]:
        """Parameter elements against what they must be: how many, and {parameter: how many are wrong}."""
        parameters = dict(self.get_model().named_parameters())
        checked, wrong = 0, Counter()
        for r in (r for r in layout.regions if r.dst is not None):
            have = parameters[r.parameter].data[r.dst]
            checked += have.numel()
            wrong[r.parameter] += differing(have, r.source(weights[r.weight])) if r.weight in weights else have.numel()
        return checked, dict(+wrong)

    def record_weights(self) -> None:
        """Remember a digest of every parameter for `check_weights_changed`."""
        self._recorded = {n: digest(p) for n, p in self.get_model().named_parameters()}

    def check_weights_changed(self) -> bool:
        """Whether every parameter of this worker differs from what `record_weights` saw. Raises if it never ran."""
        if not hasattr(self, "_recorded"):
            raise RuntimeError("found no record of the old weights, needed record_weights() before the push")
        return all(digest(p) != self._recorded[n] for n, p in self.get_model().named_parameters())

    def corrupt_weights(self, messages: dict, fault: str) -> None:
        """Damage this worker's weights as a broken push would, on tensor-parallel rank 0. For the negative controls."""
        if self.rank != 0:
            return
        parameters = dict(self.get_model().named_parameters())
        if fault == "flip-element":
            parameter = next(p for p in parameters.values() if p.dim() == 2)
            parameter.data.view(BITS[parameter.dtype.itemsize])[0, 0] ^= 1  # the last row may be padding
            return
        names = _names(self._own(messages))
        mine, other = (expected_layout(self.get_model(), names, tp_rank=rank).regions for rank in (0, 1))
        region = next(b for a, b in zip(mine, other, strict=True) if a.src != b.src and a.dst == b.dst is not None)
        with open_handles(self._own(messages), self.device) as weights:
            parameters[region.parameter].data[region.dst].copy_(region.source(weights[region.weight]))

    def _checked(self, messages: dict) -> tuple[dict, Layout]:
        """This GPU's message and the model's layout. Raises HandleError unless all messages hold just its weights."""
        message = self._own(messages)
        layout = expected_layout(self.get_model(), _names(message))
        for other in messages.values():  # the same weights on every GPU: all workers load, or none
            check_message(other, layout)
        return message, layout

    def _own(self, messages: dict) -> dict:
        gpu = device_uuid(self.device)
        if gpu not in messages:
            raise HandleError(f"found handles for {', '.join(messages) or 'no GPU'}, needed some for {gpu}")
        return messages[gpu]


def _load_weights(
    model,
    model_config,
    weights: Iterable[tuple[str, torch.Tensor]],
    needs_reload: bool,
    watch: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> None:
    """Load through vLLM's own loaders; through its layerwise reload where a layer is processed after loading.

    watch: called with the parameters that the reload puts in place of the model's for as long as it runs.

    A layer whose parameters were repacked after loading (MoE kernels, the CPU backend) has lost the shapes that its
    loader wants. vLLM's layerwise reload restores them, loads, processes and copies back into the same addresses, one
    layer at a time: https://github.com/vllm-project/vllm/tree/main/vllm/model_executor/model_loader/reload
    """
    if not needs_reload:
        model.load_weights(weights)
        return
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    on_cpu = next(model.parameters()).device.type == "cpu"
    for method in (getattr(module, "quant_method", None) for module in model.modules()):
        if on_cpu and hasattr(method, "moe_kernel"):
            # vLLM 0.32 packs experts for the CPU only while it builds their kernel, so a reload that finds one leaves
            # them unpacked and the engine wrong: let it build another (UnquantizedFusedMoEMethod._setup_kernel).
            method.moe_kernel = None
    initialize_layerwise_reload(model)
    try:
        if watch:
            watch(dict(model.named_parameters()))
        model.load_weights(weights)
    finally:  # it has taken the model's parameters away
        finalize_layerwise_reload(model, model_config)


# ---------------------------------------------------------------------------------------------------------------------
# Every process of an engine, before it does anything
# ---------------------------------------------------------------------------------------------------------------------


def preload_engine_process() -> None:
    """Import vLLM before it is needed, which is most of an engine's start, and make it fit into Ray's processes.

    Runs when Ray's processes import this module (see `Colocation.start_ray`), not in those of the training actors.
    """
    if os.environ.get("RLHF_COLOCATE_ROLE") != "engine":
        return
    if prefix := os.environ.get("RLHF_COLOCATE_SHM"):
        # So begin the names of vLLM's queues in /dev/shm, whose makers may be killed before anybody has seen them.
        multiprocessing.shared_memory._SHM_NAME_PREFIX = prefix
    if os.environ.get("RLHF_COLOCATE_AVX2"):
        # vLLM picks its AVX2 kernels then. Its AVX-512 attention (0.32) returns NaN where a score is some 50 times its
        # softcap: tanh by exponentials that overflow, as in https://github.com/vllm-project/vllm/pull/56579.
        torch.cpu._is_avx512_supported = torch.cpu._is_amx_tile_supported = lambda: False
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


def _plain_cpu_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


preload_engine_process()
