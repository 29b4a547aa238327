"""The kernels of colocate/fp8.py against plain torch, on a GPU or, without one, in Triton's interpreter.

Sizes are odd, strides too, and weights come in pieces; a second push finds the same largest element in some layers.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import torch

from colocate import fp8

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def round_as_a_gpu_does() -> None:
    """Triton's interpreter does not round to the nearest FP8."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    plain = interpreter._convert_float

    def convert(values, source, target, mode):
        if target != tl.float8e4nv:
            return plain(values, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = convert


def make_layer(shape, rows, scale, dtype, by_row, skipped, more) -> tuple[fp8.Layer, torch.Tensor]:
    """A layer and what it is to be quantized from. rows: of its pieces. skipped: elements before each source's row."""
    out, width = shape
    source = (scale * torch.randn(out, width + skipped, device=DEVICE)).to(dtype)[:, skipped:]
    if by_row:
        source[out // 2] = 0
    weight = torch.zeros(shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    scales = torch.zeros((out, 1) if by_row else 1, device=DEVICE)
    slices = list(zip(weight.split(rows), source.split(rows), strict=True))
    if not by_row and width > 40 and skipped:  # pieces of rows
        slices = [part for dst, src in slices for part in ((dst[:, :32], src[:, :32]), (dst[:, 32:], src[:, 32:]))]
    others = [(more * torch.randn(9, 70, device=DEVICE)).to(dtype)[:, skipped:]] if more and not by_row else []
    return fp8.Layer(weight, scales, slices, by_row, others), source


def main() -> int:
    if not GPU:
        round_as_a_gpu_does()
    torch.manual_seed(0)
    shapes = [((48, 64), [16, 16, 16]), ((33, 65), [1, 32]), ((7, 1), [7]), ((1, 7), [1]), ((100, 900), [40, 60])]
    shapes += [((3, 17_000), [3]), ((64, 896), [60, 4])]
    wrong = []
    for by_row, dtype in itertools.product((False, True), (torch.bfloat16, torch.float16)):
        numbers = itertools.product((0.001, 0.02, 300), (0, 3, 16), (0, 0.01, 900))
        cases = [(*shape, *next(numbers)) for shape in shapes for _ in range(3)]
        made = [make_layer(s, rows, scale, dtype, by_row, skipped, more) for s, rows, scale, skipped, more in cases]
        if GPU:  # NumPy's minimum does not skip NaN, as a GPU's does
            made.append(make_layer((16, 32), [16], 0, dtype, by_row, 0, 0))
        quantizer = fp8.Quantizer([layer for layer, _ in made], blocks=3)
        for push in range(3):
            if push == 1:  # the largest element stays in some layers
                for _, source in made[::2]:
                    source[source.abs() < source.abs().max()] *= 0.7
                for _, source in made[1::2]:
                    source *= 1.3
            if push == 2:  # a sleep has dropped what the engine had
                for layer, _ in made:
                    layer.weight.view(torch.uint8).fill_(7)
                    layer.scale.fill_(7)
            quantizer()
            for layer, source in made:
                weight, scale = fp8.quantize(source, by_row, layer.looked_at)
                differ = int((weight.view(torch.uint8) != layer.weight.view(torch.uint8)).sum())
                if differ or not torch.equal(scale.view(-1), layer.scale.view(-1)):
                    wrong.append(f"push {push}, {dtype}, by row {by_row}, {tuple(source.shape)}: {differ} elements")
    print("\n".join(wrong) or "all alike")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
