"""The second opinion on a push: what must be where, derived without vLLM's loaders.

`compare` runs on a worker. It takes digests of what arrived, and compares every parameter element with the trainer's
weights, by `expected_layout`: from the layers' classes and sizes alone. It shares nothing with the recording that a
push replays. What it does not know is named, and counted as not compared; that vLLM's loaders wrote each of its
elements exactly once follows from that recording.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from colocate.kept import keep
from colocate.rounds import arriving
from rlhf_utils import HandleError, Piece, device_uuid, digest, is_control, open_pieces, whole

# Integer types of the same width, to compare bits instead of values: NaN equals itself, and -0.0 is not 0.0.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Region:
    """`parameter[dst]` of this rank's vLLM model must equal `weight[src]` of the checkpoint, bit for bit.

    dst None: the weight is in the parameter, but in an order of its kernel's own, so it cannot be compared.
    Where vLLM has quantized the parameter, this is said of what it was before.
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
    unknown: dict[str, int] = field(default_factory=dict)  # parameter -> elements that no region accounts for
    architecture: str = "the model"
    quantized: dict[str, torch.Size] = field(default_factory=dict)  # parameter -> its shape before


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
    The recording of vLLM's loaders speaks for the unknown ones.

    model: the rank's model (`worker.get_model()`). names: of the weights that the trainer sends.
    tp_rank: as if for another rank (for fault injection).
    """
    names = {name for name in names if not is_control(name)}
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    spelled = _names_in_checkpoint(model, names)
    packed = _packed_layers(model)
    places: dict[str, list[Region]] = {}
    sizes: dict[str, int] = {}
    padding: dict[str, int] = {}
    quantized: dict[str, torch.Size] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            memory = parameter.untyped_storage().data_ptr()
            if memory in seen:  # tied embeddings, and views that multi-head latent attention keeps of kv_b_proj
                continue
            seen.add(memory)
            name = f"{prefix}.{leaf}" if prefix else leaf
            in_blocks = False
            if _is_quantized(module):
                in_blocks = hasattr(module, "weight_scale_inv")
                if leaf.startswith("weight_scale"):
                    continue  # it is compared with its weight
                if leaf == "weight":
                    parameter = _as_loaded(module)
                    quantized[name] = parameter.shape
            regions = _regions(name, prefix, leaf, module, parameter, packed, spelled, config, tp_rank)
            if prefix.rpartition(".")[2] in TRANSPOSED.get(kind, ()) and leaf == "weight":
                regions = [replace(r, transposed=True, shape=r.shape[::-1]) for r in regions]
            regions = [replace(r, weight=spelled.get(r.weight, r.weight)) for r in regions]
            if in_blocks and name in quantized and not _has_plain_blocks(module):
                regions = [replace(r, dst=None) for r in regions]
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
    return Layout(
        regions=layout,
        padding=padding,
        processed={n: sizes[n] for n, regions in known.items() if any(r.dst is None for r in regions)},
        unknown={n: sizes[n] - padding.get(n, 0) for n in places if n in unknown},
        architecture=(getattr(config, "architectures", None) or [type(model).__name__])[0],
        quantized=quantized,
    )


def _is_quantized(module: torch.nn.Module) -> bool:
    """Whether vLLM has made FP8 of a linear layer's weight, as it loaded it."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dtype == torch.float8_e4m3fn and hasattr(module, "orig_dtype")


def _has_plain_blocks(module: torch.nn.Module) -> bool:
    """Whether its weight is (out, in), maybe padded, with a float32 scale for each BLOCK x BLOCK elements."""
    shape = (module.output_size_per_partition, module.input_size_per_partition)
    scale = module.weight_scale_inv
    blocks = tuple(-(-n // BLOCK) for n in shape)
    fits = module.weight.dim() == 2 and all(have >= n for have, n in zip(module.weight.shape, shape, strict=True))
    return fits and scale.dtype == torch.float32 and tuple(scale.shape) == blocks


def _as_loaded(module: torch.nn.Module) -> torch.Tensor:
    """A quantized layer's weight as vLLM's loaders had it: without values."""
    shape = (module.output_size_per_partition, module.input_size_per_partition)
    weight = torch.empty(shape, dtype=module.orig_dtype, device="meta")
    weight.weight_loader = getattr(module.weight, "weight_loader", None) or module.weight_loader
    return weight


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
    return packed | (getattr(model, "packed_modules_mapping", None) or {})


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

    shape = tuple(parameter.shape)
    dtype = parameter.dtype
    tp = getattr(module, "tp_size", 1)
    if tp_rank is None:
        tp_rank = get_tensor_model_parallel_rank()
    rank = tp_rank if tp > 1 else 0  # layers may opt out (disable_tp)
    parent, _, last = prefix.rpartition(".")

    def rows(weight: str, dst_start: int, src_start: int, n: int, total: int) -> Region:
        dst = slice(dst_start, dst_start + n)
        src = slice(src_start, src_start + n)
        return Region(name, (dst,), weight, (src,), (total, *shape[1:]), dtype)

    if parameter.numel() == 0:
        raise HandleError(
            f"{name}: vLLM's CPU backend has repacked it: pass preload_engine_process as "
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
        q = module.num_heads * module.head_size
        kv = module.num_kv_heads * module.head_size
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
    parts = packed.get(last, [])
    total = sum(n * of for n, _, of in sizes)
    separate = len(parts) == len(sizes) and name not in spelled
    kind = getattr(config, "model_type", "")
    if not separate and kind in GROUPED and isinstance(module, QKVParallelLinear):
        return _grouped_regions(name, module, rank, kv_rank, rows)
    if not separate and kind not in STACKED:
        return []
    regions = []
    dst = 0
    base = 0
    for i, (n, r, of) in enumerate(sizes):
        if separate:
            regions.append(rows(f"{parent}.{parts[i]}.{leaf}", dst, r * n, n, n * of))
        else:
            regions.append(rows(name, dst, base + r * n, n, total))
        dst += n
        base += n * of
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
    hidden = config.hidden_dim_unpadded
    n = config.intermediate_size_per_partition_unpadded
    cut = slice(rank * n, (rank + 1) * n)
    prefix = prefix.removesuffix(".routed_experts")
    # Triton's kernel takes the weights as they are loaded; all others permute, pack or pad them.
    plain = getattr(getattr(module.quant_method, "unquantized_backend", None), "name", "") == "TRITON"
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


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements of two tensors of the same shape and dtype differ in their bits."""
    a_bits = a.view(BITS[a.dtype.itemsize])
    b_bits = b.view(BITS[b.dtype.itemsize])
    return 0 if torch.equal(a_bits, b_bits) else int((a_bits != b_bits).sum())


LARGEST = 448.0  # of float8_e4m3fn
BLOCK = 128


def _scales_are_shared() -> bool:
    """Whether this vLLM takes the largest element over all tensor-parallel ranks: 0.32 does, 0.26 does not."""
    from vllm.model_executor.layers.quantization.utils import quant_utils

    return hasattr(quant_utils, "amax_for_tp_weight_quant")


class AsLoaded:
    """A layer's weight as it was before vLLM quantized it, put together from the trainer's.

    weight, scale: the engine's, the weight (out, in) and without what its kernel pads. regions: of which it consists.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, regions: int):
        self.weight = weight
        self.scale = scale
        self.missing = regions

    def add(self, region: Region, weight: torch.Tensor) -> None:
        """weight: the whole one of the checkpoint."""
        if not hasattr(self, "before"):
            self.before = torch.zeros_like(self.weight, dtype=region.dtype)
        self.before[region.dst].copy_(region.source(weight))
        self.missing -= 1

    def numel(self) -> int:
        return self.weight.numel() + self.scale.numel()


class Quantized(AsLoaded):
    """And what must come of it, with a scale of a tensor or of each row: a float32, the largest element over 448."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, shape: torch.Size, regions: int, shared: bool):
        """weight (in, out) and scale: the engine's, maybe padded for its kernel. shape: without that, (out, in).

        shared: the largest element is of all tensor-parallel ranks' parts, not of this one's.
        """
        super().__init__(weight.t()[: shape[0], : shape[1]], scale[: shape[0]], regions)
        self.shared = shared
        self.rows = torch.zeros(shape[0], device=weight.device)  # largest elements, over all ranks
        self.whole = self.rows.new_zeros(1)

    def add(self, region: Region, weight: torch.Tensor) -> None:
        super().add(region, weight)
        weight = weight.t() if region.transposed else weight
        self.rows[region.dst[:1]] = weight[region.src[:1]].abs().amax(1).float()
        self.whole = torch.maximum(self.whole, weight.abs().amax().float())

    def wrong(self) -> int:
        """How many elements of the engine's weight and scale are not what they must be. Forgets the weight."""
        before = self.__dict__.pop("before")
        by_row = self.scale.dim() == 2
        if self.shared:
            most = self.rows if by_row else self.whole
        else:
            most = before.abs().amax(1).float() if by_row else before.abs().amax().float().view(1)
        largest = torch.tensor(LARGEST, device=before.device)  # a tensor, since torch multiplies by a number's inverse
        right = most / largest
        if by_row:
            right = right.clamp_min(1 / (LARGEST * 512)).view(-1, 1)
        wrong = differing(right, self.scale)
        step = max(1, 2**24 // before.shape[1])
        for start in range(0, len(before), step):
            part = slice(start, start + step)
            values = before[part].float()
            values = values / right[part] if by_row else values * (1 / right)
            # Not clamp: of all-zero weights, whose scale is 0, vLLM's kernels make 448, since their minimum skips NaN.
            wrong += differing(values.fmin(largest).fmax(-largest).to(self.weight.dtype), self.weight[part])
        return wrong


class QuantizedInBlocks(AsLoaded):
    """The same with a scale for each BLOCK x BLOCK elements, from the block's largest element. Within bounds, not bits:
    torch's compiler makes vLLM's arithmetic, which may round in other ways, and DeepGEMM rounds scales up to powers of
    two, and the weight once more.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, shape: torch.Size, regions: int):
        """weight (out, in) and scale: the engine's. shape: the weight's without what its kernel pads."""
        super().__init__(weight[: shape[0], : shape[1]], scale, regions)

    def wrong(self) -> int:
        """How many elements of the engine's weight and scale are further off than roundings are. Forgets the weight."""
        before = self.__dict__.pop("before")
        rows, columns = before.shape
        wrong = 0
        in_powers = bool((self.scale.frexp().mantissa == 0.5).all())
        for scale, start in zip(self.scale, range(0, rows, BLOCK), strict=True):
            values = before[start : start + BLOCK].float()
            most = torch.nn.functional.pad(values.abs().amax(0), (0, -columns % BLOCK)).view(-1, BLOCK).amax(1)
            right = most.clamp_min(1e-4) / LARGEST
            if in_powers:
                right = right.log2().ceil().exp2()
            wrong += int((~torch.isclose(scale, right, rtol=1e-3, atol=0)).sum())
            wide = scale.repeat_interleave(BLOCK)[:columns]
            off = (self.weight[start : start + BLOCK].float() * wide - values).abs()
            # A rounding is off by a 16th of an element at most, or half of the smallest step, 2**-10. Two may be made.
            wrong += int((~(off <= values.abs() / 7 + wide / 256)).sum())
        return wrong


def compare(worker, messages: dict, digests: dict) -> dict:
    """Compare what arrived with what was sent, and every parameter element with what it must be.

    digests: {weight, or piece of one: digest} by a replica's trainers (see `checks.weight_digests`).
    Returns {"gpu", "tp_rank", "transport": {"checked", "wrong"}, "placement": {"checked", "wrong", "padding",
    "processed", "unknown"}, "beside": see `compare_beside`}; `checked` counts tensors and elements, `wrong` names the
    tensors that differ (with the number of elements, for placement); the last three count elements by parameter (see
    Layout).
    """
    gpu = device_uuid(worker.device)
    with open_pieces(messages, gpu, worker.device) as weights:
        layout = expected_layout(worker.get_model(), weights)
        transport, checked, wrong = compare_weights(worker.get_model(), layout, weights, digests)
        count = sum(not is_control(name) for name in weights)
    return {
        "gpu": gpu,
        "tp_rank": worker.rank,
        "transport": {"checked": count, "wrong": sorted(transport)},
        "placement": {
            "checked": checked,
            "wrong": wrong,
            "padding": layout.padding,
            "processed": layout.processed,
            "unknown": layout.unknown,
        },
        "beside": compare_beside(worker),
    }


def beside(worker) -> dict[str, torch.Tensor]:
    """{name: tensor} of what no push brings, and a sleep can damage: rotary caches, scales, what `keep` has found.

    Left out are buffers that a checkpoint may have, integers, which layers count with, and scales that vLLM computes.
    """
    model = worker.get_model()
    found = {}
    computed = getattr(worker.vllm_config.cache_config, "calculate_kv_scales", False)
    for name, buffer in model.named_buffers():
        prefix, _, leaf = name.rpartition(".")
        scale = leaf.startswith("_") and not computed
        if scale or leaf in model.get_submodule(prefix)._non_persistent_buffers_set:
            found[name] = buffer
    return {name: t for name, t in found.items() if t.is_floating_point() and not t.is_meta}


def first_look(worker) -> list[str]:
    """At an engine's start, before it sleeps: `keep`, whose names it returns. `compare_beside` compares with now."""
    kept = keep(worker)
    worker._first_beside = {name: digest(tensor) for name, tensor in beside(worker).items()}
    return kept


def compare_beside(worker) -> dict:
    """Whether all of `beside` is as at this worker's `first_look`: {"checked": tensors, "wrong": names}."""
    found = {name: digest(tensor) for name, tensor in beside(worker).items()}
    first = worker._first_beside
    return {"checked": len(found), "wrong": [name for name in found if found[name] != first.get(name)]}


def compare_weights(
    model, layout: Layout, weights: dict[str, list[Piece]], digests: dict[str, str]
) -> tuple[list[str], int, dict[str, int]]:
    """(pieces that did not arrive as they were sent, parameter elements compared, {parameter: how many are wrong}).

    One weight after the other, since one that is sharded is put together for this.
    """
    regions: dict[str, list[Region]] = {}
    for region in layout.regions:
        if region.dst is not None:
            regions.setdefault(region.weight, []).append(region)
    parameters = {name: p.data for name, p in model.named_parameters()}
    arrived = {}
    checked = 0
    wrong = Counter()
    counts = Counter(region.parameter for of_weight in regions.values() for region in of_weight)
    layers = {}
    for name in layout.quantized.keys() & counts.keys():
        shape, inverse = layout.quantized[name], parameters.get(f"{name}_scale_inv")
        if inverse is None:
            scale = parameters[f"{name}_scale"]
            layers[name] = Quantized(parameters[name], scale, shape, counts[name], _scales_are_shared())
        else:
            layers[name] = QuantizedInBlocks(parameters[name], inverse, shape, counts[name])
        parameters[name] = layers[name].weight
    with contextlib.closing(arriving(weights)) as rounds:
        for name in (name for _, names in rounds for name in names):
            arrived |= {piece.named(name): digest(piece.tensor) for piece in weights[name]}
            weight = whole(weights[name])
            for region in regions.pop(name, []):
                if layer := layers.get(region.parameter):
                    layer.add(region, weight)
                    if not layer.missing:
                        checked += layer.numel()
                        wrong[region.parameter] += layer.wrong()
                    continue
                have = parameters[region.parameter][region.dst]
                checked += have.numel()
                wrong[region.parameter] += differing(have, region.source(weight))
    for region in (region for missing in regions.values() for region in missing):
        count = parameters[region.parameter][region.dst].numel()
        checked += count
        wrong[region.parameter] += count
    transport = [piece for piece in arrived.keys() | digests.keys() if arrived.get(piece) != digests.get(piece)]
    return transport, checked, dict(+wrong)
