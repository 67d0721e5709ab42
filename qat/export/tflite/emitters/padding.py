"""Padding of windows: TFLite's SAME and VALID where they mean the same, else an operator of its own."""

from __future__ import annotations

import numpy as np

from qat.encoding import Encoding
from qat.export.tflite.context import Context

Pairs = tuple[tuple[int, int], ...]


def same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Begin and end padding that SAME gives one dimension; the odd element is at the end."""
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def padded(
    ctx: Context,
    source: int,
    padding: Pairs,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    encoding: Encoding,
    fill: int,
    where: str,
) -> tuple[int, int]:
    """Return the operand of a windowed operator, padded if need be, and the code of its padding.

    Args:
        ctx: The graph.
        source: Number of a tensor (N, H, W, C).
        padding: Begin and end of height and width.
        kernel: Height and width.
        stride: Height and width.
        dilation: Height and width.
        encoding: Encoding of `source`.
        fill: Code to pad with.
        where: Base of names.
    """
    codes = ctx.builder.schema.Padding
    if not any(side for pair in padding for side in pair):
        return source, int(codes.VALID)
    batch, height, width, channels = ctx.builder.shape(source)
    sizes = (height, width)
    if all(
        tuple(pair) == same(*window) for pair, *window in zip(padding, sizes, kernel, stride, dilation, strict=True)
    ):
        return source, int(codes.SAME)
    grown = [n + low + high for n, (low, high) in zip(sizes, padding, strict=True)]
    result = ctx.scratch(f"{where}/padded", (batch, *grown, channels), encoding)
    pad(ctx, source, result, ((0, 0), *padding, (0, 0)), encoding, fill, where)
    return result, int(codes.VALID)


def pad(ctx: Context, source: int, result: int, pairs: Pairs, encoding: Encoding, fill: int, where: str) -> None:
    """Add a Pad, or a PadV2 where the filling is not zero."""
    widths = ctx.builder.integers(pairs, f"{where}/pads")
    if fill == encoding.zero_point[0]:
        ctx.builder.operator("PAD", [source, widths], [result], "Pad")
        return
    value = ctx.builder.codes(np.array([fill]), encoding, f"{where}/fill")
    ctx.builder.operator("PADV2", [source, widths, value], [result], "PadV2")
