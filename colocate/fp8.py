"""FP8 rollouts: the push quantizes on its way, as vLLM does when it loads 16-bit weights (`--rollout-quantization`).

vLLM keeps a quantized linear layer as float8_e4m3fn with float32 scales, one for the tensor or one for each row. With
the plain extension its weights go through vLLM's layerwise reload: bitwise right, and slow. This one quantizes them
straight from the trainer's memory into the engine's, beside the recorded copies, in their CUDA graph. The bits are
those of vLLM's kernels, csrc/quantization/w8a8/fp8/common.cu in https://github.com/vllm-project/vllm: the proof of the
push compares each. What this file does not know (scales of blocks, for one) still goes through the reload. Experts are
refused: see `QuantizingExtension`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from colocate.rounds import ROUND, Extension
from rlhf_utils import Copy, CopyPlan, NotHandled, Piece, Recording, _keeps_derived_matrices, cut_tiles

LARGEST = 448.0  # of float8_e4m3fn
SMALLEST_SCALE = 1 / (LARGEST * 512)  # vLLM's, of a row
BY_ROW = {"Fp8PerTensorOnlineLinearMethod": False, "Fp8PtpcOnlineLinearMethod": True}  # by vLLM's name of the method
TILE = 16_384  # elements
GROUP = 16 << 20  # bytes of 16-bit weights that one quantizer takes; an H100's L2 cache holds three, the lanes are four
Slices = list[tuple[torch.Tensor, torch.Tensor]]  # (part of an engine's weight, what of the trainer's belongs there)


class QuantizingExtension(Extension):
    """For vllm.LLM(quantization="fp8_per_tensor" and so on, worker_extension_cls=...).

    Not for experts. vLLM builds their kernel anew in each reload, with scales and other tensors of its own, while CUDA
    graphs go on with the first kernel's: CUTLASS's strides, for one, a sleep of level 2 drops and no push brings.
    """

    def new_plan(self, recording: Recording, weights: dict[str, list[Piece]]) -> CopyPlan:
        if any("w13_weight" in module._parameters for module in self.get_model().modules()):
            raise NotHandled("experts in FP8 are not handled: vLLM may compute with tensors that a push does not reach")
        if ROUND in weights:  # a scale needs all of a layer's weights at once
            return super().new_plan(recording, weights)
        model = self.get_model()
        layers, recording = find_layers(model, recording, weights)
        return CopyPlan(model, self.vllm_config, recording, weights, quantizers(layers))


@dataclasses.dataclass
class Layer:
    """weight (out, in) and scale (1,) or, by_row, (out, 1): the engine's. slices: what the weight is quantized from.

    looked_at: what the largest element is looked for in, besides: the other tensor-parallel ranks' part.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    slices: Slices
    by_row: bool
    looked_at: list[torch.Tensor] = dataclasses.field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes


def find_layers(
    model: torch.nn.Module, recording: Recording, weights: dict[str, list[Piece]]
) -> tuple[list[Layer], Recording]:
    """The layers that are quantized here, and the recording of what is left."""
    # Matrices derived from a layer are made by vLLM's reload alone.
    if any(map(_keeps_derived_matrices, model.modules())):
        return [], recording
    # Those that need no loader are here only if the others do not load without them: then fewer may not load at all.
    if {c.weight for c in recording.copies} & set(recording.loaders):
        return [], recording
    layers = []
    copies = [*recording.copies]
    left = dict(recording.unprocessed)
    for prefix, module in model.named_modules():
        layer = _layer_of(module, left.get(f"{prefix}.weight", []), weights)
        biases = left.get(f"{prefix}.bias", [])
        if layer is None or bool(biases) != (module._parameters.get("bias") is not None):
            continue
        layers.append(layer)
        copies += biases
        left.pop(f"{prefix}.weight")
        left.pop(f"{prefix}.bias", None)
    taken = {c.weight for name, slices in recording.unprocessed.items() if name not in left for c in slices}
    taken -= {c.weight for slices in left.values() for c in slices}
    loaders = [name for name in recording.loaders if name not in taken]
    return layers, dataclasses.replace(recording, copies=copies, loaders=loaders, unprocessed=left)


def _layer_of(module: torch.nn.Module, copies: list[Copy], weights: dict[str, list[Piece]]) -> Layer | None:
    """None if this file does not know how vLLM quantizes it, or where it keeps what comes of that."""
    by_row = BY_ROW.get(type(getattr(module, "quant_method", None)).__name__)
    if by_row is None or not copies or module._parameters.keys() - {"weight", "weight_scale", "bias"}:
        return None
    weight = module.weight.data.t()
    scale = module.weight_scale.data
    shape = (module.output_size_per_partition, module.input_size_per_partition)
    fits = weight.dtype == torch.float8_e4m3fn and weight.is_contiguous() and tuple(weight.shape) == shape  # not padded
    scales = scale.dtype == torch.float32 and scale.is_contiguous() and scale.numel() == (shape[0] if by_row else 1)
    if not fits or not scales:
        return None
    slices = []
    for c in copies:
        for piece, dst, src in c.bound(weight, weights[c.weight]):
            # Another GPU's memory would be read twice. Rows must be whole, and elements side by side.
            if piece.remote or dst.dim() != 2 or dst.stride(1) != 1 or src.stride(1) != 1:
                return None
            if by_row and dst.shape[1] != shape[1]:
                return None
            slices.append((dst, src))
    shared = getattr(module, "tp_size", 1) > 1 and _scales_are_shared()
    if by_row:
        whole_rows = module.input_size == shape[1]
        return Layer(weight, scale, slices, True) if whole_rows or not shared else None
    others = [piece for name in {c.weight for c in copies} for piece in weights[name]] if shared else []
    if any(piece.remote or piece.tensor.dim() != 2 or piece.tensor.stride(1) != 1 for piece in others):
        return None
    return Layer(weight, scale, slices, False, [piece.tensor for piece in others])


@functools.cache
def _scales_are_shared() -> bool:
    """Whether this vLLM takes the largest element over all tensor-parallel ranks: 0.32 does, 0.26 does not."""
    import vllm.model_executor.layers.quantization.online.fp8 as online

    return hasattr(online, "_is_tp_sharded")


def quantize(
    weight: torch.Tensor, by_row: bool, looked_at: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels below must equal, in plain torch: (float8_e4m3fn, float32 scale of shape (1,) or (rows, 1)).

    A scale is the largest element over 448. A tensor is multiplied by its inverse, a row divided by it: other bits.
    fmin and fmax, since all-zero weights give NaN there, which vLLM's kernels and ours turn into 448 (of scale 0).
    """
    values = weight.float()
    largest = torch.tensor(LARGEST, device=weight.device)
    if by_row:
        scale = (values.abs().amax(1, keepdim=True) / largest).clamp_min(SMALLEST_SCALE)
        values = values / scale
    else:
        scale = torch.stack([part.abs().amax().float() for part in (weight, *looked_at)]).amax().reshape(1) / largest
        values = values * (1 / scale)
    return values.fmin(largest).fmax(-largest).to(torch.float8_e4m3fn), scale


def quantizers(layers: list[Layer]) -> list[Callable[[], None]]:
    """Functions with `nbytes` that quantize these layers, each some of them."""
    if not layers or not layers[0].weight.is_cuda:
        return [PlainQuantizer(layer) for layer in layers]
    groups: list[list[Layer]] = []
    for layer in layers:
        if not groups or groups[-1][0].by_row != layer.by_row or 2 * sum(x.nbytes for x in groups[-1]) > GROUP:
            groups.append([])
        groups[-1].append(layer)
    blocks = 8 * torch.cuda.get_device_properties(layers[0].weight.device).multi_processor_count
    return [Quantizer(group, blocks) for group in groups]


class PlainQuantizer:
    """Of one layer, in plain torch. For tests: vLLM's CPU build cannot compute in FP8, so there is no rehearsal."""

    def __init__(self, layer: Layer):
        self.layer = layer
        self.nbytes = layer.nbytes

    def __call__(self) -> None:
        layer = self.layer
        whole = torch.empty(layer.weight.shape, dtype=layer.slices[0][1].dtype)
        for dst, src in layer.slices:
            whole.as_strided(dst.shape, dst.stride(), dst.storage_offset() - layer.weight.storage_offset()).copy_(src)
        weight, scale = quantize(whole, layer.by_row, layer.looked_at)
        layer.weight.copy_(weight)
        layer.scale.view(-1).copy_(scale.view(-1))


class Quantizer:
    """Some layers, with scales of one kind, by Triton's kernels.

    The largest element of a tensor is known only when all of it was read. It may be the last push's: so one pass reads
    the weights, quantizes by that and finds the largest, and a second one does again what has guessed wrong.
    state: int32, (2, layers): bits of the largest elements, the last push's and this one's.
    """

    def __init__(self, layers: list[Layer], blocks: int):
        self.nbytes = sum(layer.nbytes for layer in layers)
        self.by_row = layers[0].by_row
        self.blocks = blocks
        device = layers[0].weight.device
        self.state = torch.zeros((2, len(layers)), dtype=torch.int32, device=device)
        self.half = layers[0].slices[0][1].dtype
        self.tables = [(table.to(device), *form) for form, table in tables(layers).items()]
        for table, columns, aligned in self.tables:
            self._launch(table, 0, columns, aligned)  # compiles it, outside of a capture

    def __call__(self) -> None:
        if not self.by_row:
            self.state[0].copy_(self.state[1])
            self.state[1].zero_()
        for again in (False, True)[: 1 if self.by_row else 2]:
            for table, columns, aligned in self.tables:
                self._launch(table, len(table), columns, aligned, again)

    def _launch(self, table: torch.Tensor, tiles: int, columns: int, aligned: bool, again: bool | None = None) -> None:
        """again: which of the passes; None: both."""
        by_rows, first_pass, second_pass, types = kernels()
        half = types[self.half]
        shape = {"ROWS": max(1, 8192 // columns), "COLS": columns, "HALF": half, "ALIGNED": aligned}
        if self.by_row:
            by_rows[(self.blocks,)](table, tiles, **shape, num_warps=8 if columns <= 8192 else 16)
            return
        for run, which in ((first_pass, False), (second_pass, True)):
            if again is None or again == which:
                run[(self.blocks,)](table, tiles, self.state, self.state.shape[1], **shape, num_warps=8)


def tables(layers: list[Layer]) -> dict[tuple[int, bool], torch.Tensor]:
    """{(columns of a block, whether all is aligned to 16 bytes): table}: what a kernel's launch works off.

    A table is int64, (tiles, 8): addresses of source and target, rows, elements in a row, strides of source and target
    between rows, in elements; the layer's number, and the address of its scale (by row: of the tile's first row). The
    target of what is only looked at is 0.
    """
    found: dict[tuple[int, bool], list[np.ndarray]] = {}
    for number, layer in enumerate(layers):
        looked_at = [(torch.empty_like(part, device="meta"), part) for part in layer.looked_at]
        for dst, src in [*layer.slices, *looked_at]:
            if not layer.by_row and dst.is_contiguous() and src.is_contiguous():
                dst, src = dst.view(1, -1), src.view(1, -1)
            rows, width = dst.shape
            steps = (src.stride(0), dst.stride(0)) if rows > 1 else (0, 0)
            # Targets are counted from the weight's beginning at first.
            start = 0 if dst.is_meta else dst.storage_offset() - layer.weight.storage_offset()
            whole = np.array([[src.data_ptr(), start, rows, width, *steps, number, layer.scale.data_ptr()]])
            size = max(TILE, width) if layer.by_row else TILE  # by row: of whole rows
            tiles = cut_tiles(whole, size, (2, 1)).numpy()
            if layer.by_row:
                tiles[:, 7] += 4 * (tiles[:, 1] // layer.weight.shape[1])
            tiles[:, 1] = 0 if dst.is_meta else tiles[:, 1] + layer.weight.data_ptr()
            columns = 1 << (width - 1).bit_length()
            aligned = not (tiles[:, :2] % 16).any() and not any(n % 16 for n in (width, *steps))
            found.setdefault((columns if layer.by_row else min(columns, 8192), aligned), []).append(tiles)
    return {form: torch.from_numpy(np.concatenate(parts)) for form, parts in found.items()}


@functools.cache
def kernels() -> tuple:
    """(by rows, first pass, second pass, {dtype: Triton's}). ALIGNED lets the compiler read 16 bytes at once."""
    global tl, load_tile, load_block, to_fp8  # where the compiler looks; a machine without a GPU may not have Triton
    import triton
    import triton.language as tl

    @triton.jit
    def load_tile(entry, HALF: tl.constexpr, ALIGNED: tl.constexpr):
        """(source, target, rows, width, strides of both)"""
        src = tl.load(entry).to(tl.pointer_type(HALF))
        dst = tl.load(entry + 1).to(tl.pointer_type(tl.float8e4nv))
        rows = tl.load(entry + 2).to(tl.int32)
        width = tl.load(entry + 3).to(tl.int32)
        src_stride = tl.load(entry + 4)
        dst_stride = tl.load(entry + 5)
        if ALIGNED:
            src = tl.multiple_of(src, 16)
            dst = tl.multiple_of(dst, 16)
            width = tl.multiple_of(width, 16)
            src_stride = tl.multiple_of(src_stride, 16)
            dst_stride = tl.multiple_of(dst_stride, 16)
        return src, dst, rows, width, src_stride, dst_stride

    @triton.jit
    def load_block(src, src_stride, row, column, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
        """(rows and columns of a block of a tile, which of them there are, their values)"""
        i = row + tl.arange(0, ROWS)[:, None]
        j = column + tl.arange(0, COLS)[None, :]
        inside = (i < rows) & (j < width)
        return i, j, inside, tl.load(src + i * src_stride + j, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def to_fp8(values):
        return tl.maximum(tl.minimum(values, 448.0), -448.0).to(tl.float8e4nv)

    @triton.jit(do_not_specialize=["tiles", "layers"])
    def first_pass(
        table, tiles, state, layers, ROWS: tl.constexpr, COLS: tl.constexpr, HALF: tl.constexpr, ALIGNED: tl.constexpr
    ):
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            entry = table + 8 * tile
            src, dst, rows, width, src_stride, dst_stride = load_tile(entry, HALF, ALIGNED)
            written = tl.load(entry + 1) != 0
            layer = tl.load(entry + 6)
            inverse = tl.div_rn(1.0, tl.div_rn(tl.load(state + layer).to(tl.float32, bitcast=True), 448.0))
            most = tl.zeros([ROWS, COLS], tl.float32)
            for row in range(0, rows, ROWS):
                for column in range(0, width, COLS):
                    i, j, inside, values = load_block(src, src_stride, row, column, rows, width, ROWS, COLS)
                    most = tl.maximum(most, tl.abs(values))
                    tl.store(dst + i * dst_stride + j, to_fp8(values * inverse), mask=inside & written)
            bits = tl.max(tl.max(most, 1), 0).to(tl.int32, bitcast=True)  # of what is not negative, in the same order
            tl.atomic_max(state + layers + layer, bits)

    @triton.jit(do_not_specialize=["tiles", "layers"])
    def second_pass(
        table, tiles, state, layers, ROWS: tl.constexpr, COLS: tl.constexpr, HALF: tl.constexpr, ALIGNED: tl.constexpr
    ):
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            entry = table + 8 * tile
            layer = tl.load(entry + 6)
            guessed = tl.load(state + layer)
            found = tl.load(state + layers + layer)
            scale = tl.div_rn(found.to(tl.float32, bitcast=True), 448.0)
            tl.store(tl.load(entry + 7).to(tl.pointer_type(tl.float32)), scale)
            if (guessed != found) & (tl.load(entry + 1) != 0):
                src, dst, rows, width, src_stride, dst_stride = load_tile(entry, HALF, ALIGNED)
                inverse = tl.div_rn(1.0, scale)
                for row in range(0, rows, ROWS):
                    for column in range(0, width, COLS):
                        i, j, inside, values = load_block(src, src_stride, row, column, rows, width, ROWS, COLS)
                        tl.store(dst + i * dst_stride + j, to_fp8(values * inverse), mask=inside)

    @triton.jit(do_not_specialize=["tiles"])
    def by_rows(table, tiles, ROWS: tl.constexpr, COLS: tl.constexpr, HALF: tl.constexpr, ALIGNED: tl.constexpr):
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            entry = table + 8 * tile
            src, dst, rows, width, src_stride, dst_stride = load_tile(entry, HALF, ALIGNED)
            scales = tl.load(entry + 7).to(tl.pointer_type(tl.float32))
            for row in range(0, rows, ROWS):
                i, j, inside, values = load_block(src, src_stride, row, 0, rows, width, ROWS, COLS)
                scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), 1), 448.0), 1 / (448.0 * 512))[:, None]
                tl.store(scales + i, scale, mask=i < rows)
                tl.store(dst + i * dst_stride + j, to_fp8(tl.div_rn(values, scale)), mask=inside)

    return by_rows, first_pass, second_pass, {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
