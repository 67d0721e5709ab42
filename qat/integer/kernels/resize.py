"""Nearest and bilinear interpolation as ONNX Runtime's Resize computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.errors import PlanError
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import dequantize, quantize

#: Scale of each dimension where the operator was given scales, None for output size over input size.
Scales = Sequence[float | None] | None


def _checked(sizes: Sequence[int], inputs: Sequence[int], scales: Scales) -> list[tuple[int, int, float | None]]:
    given = [None] * len(sizes) if scales is None else list(scales)
    if not len(sizes) == len(inputs) == len(given):
        raise PlanError(
            f"{len(sizes)} output sizes and {len(given)} scales for {len(inputs)} spatial dimensions",
            "give one a dimension",
        )
    return list(zip(sizes, inputs, given, strict=True))


def _ratio(numerator: int, denominator: int) -> Tensor:
    return torch.tensor(numerator, dtype=torch.float32) / torch.tensor(denominator, dtype=torch.float32)


def resize_nearest(codes: Tensor, sizes: Sequence[int], scales: Scales = None) -> Tensor:
    """Nearest neighbour on the codes, with the source positions of PyTorch's `nearest`.

    ONNX's Resize with `asymmetric` coordinates and `floor` divides by the scale where PyTorch multiplies by
    its inverse: the two differ for some sizes, which are to be exported as Gather.

    Args:
        codes: Integer, shape (N, C, *spatial).
        sizes: Output size of each spatial dimension.
        scales: Scale of each dimension, or None; see `Scales`.

    Returns:
        int32 codes, shape (N, C, *sizes), same encoding.

    Raises:
        PlanError: Another number of sizes or scales.
    """
    y = codes.to(torch.int32)
    for d, (size, length, scale) in enumerate(_checked(sizes, codes.shape[2:], scales)):
        source = nearest_source(size, length, scale, single=codes.dim() == 3)
        y = y.index_select(2 + d, source.to(codes.device))
    return y


def nearest_source(size: int, length: int, scale: float | None, single: bool) -> Tensor:
    """Source index of every output index of `resize_nearest` along one dimension, int64.

    Args:
        size: Output size.
        length: Input size.
        scale: Given scale, or None.
        single: There is only this spatial dimension.
    """
    step = _ratio(length, size) if scale is None else torch.tensor(1.0 / scale, dtype=torch.float32)
    # PyTorch then takes the exact step, whatever the scale, though not for a single dimension
    if not single and size in (length, 2 * length):
        step = torch.tensor(length / size)
    source = torch.floor(torch.arange(size, dtype=torch.float32) * step).to(torch.int64)
    return source.clamp(max=length - 1)


def linear_taps(
    size: int, scale: float | None, length: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Neighbours of every output index of `resize_bilinear` along one dimension, and the distances to them.

    Returns:
        Low and high neighbour (int64), distance to the low one and to the high one (float32, 0.5 where both are one).
    """
    position = torch.arange(size, dtype=torch.float32)
    corners = position * (length - 1) / max(size - 1, 1)
    factor = _ratio(size, length) if scale is None else torch.tensor(scale, dtype=torch.float32)
    source = corners if align_corners else (position + 0.5) / factor - 0.5
    source = source.clamp(0.0, float(length - 1))
    low = source.to(torch.int64).clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    to_low, to_high = (source - low).abs(), (source - high).abs()
    half = torch.full_like(source, 0.5)
    return low, high, torch.where(low == high, half, to_low), torch.where(low == high, half, to_high)


def resize_bilinear(
    codes: Tensor,
    x: QParams,
    y: QParams,
    sizes: Sequence[int],
    align_corners: bool = False,
    scales: Scales = None,
) -> Tensor:
    """Bilinear interpolation: DequantizeLinear, Resize (`linear`) in float32, QuantizeLinear.

    Args:
        codes: Integer, shape (N, C, H, W).
        x: Parameters of the input.
        y: Parameters of the result.
        sizes: Output height and width.
        align_corners: `align_corners` coordinates; else `half_pixel`.
        scales: Scale of each dimension, or None; see `Scales`.

    Returns:
        int32 codes, shape (N, C, *sizes).

    Raises:
        PlanError: Another number of dimensions.
    """
    (left_top, right_top, left_bottom, right_bottom) = bilinear_terms(codes, x, sizes, align_corners, scales)
    total = left_top[0] * left_top[1]
    for weight, value in (right_top, left_bottom, right_bottom):
        total = total + weight * value
    return quantize(total, y)


def bilinear_terms(
    codes: Tensor, x: QParams, sizes: Sequence[int], align_corners: bool, scales: Scales
) -> list[tuple[Tensor, Tensor]]:
    """Weight and value of the four neighbours of every result, float32: left and right above, left and right below.

    Raises:
        PlanError: Another number of dimensions.
    """
    if codes.dim() != 4:
        raise PlanError(f"bilinear interpolation of {codes.dim()} dimensions", "it is defined for (N, C, H, W)")
    real = dequantize(codes, x)
    (height, in_height, scale_h), (width, in_width, scale_w) = _checked(sizes, codes.shape[2:], scales)
    rows = linear_taps(height, scale_h, in_height, align_corners)
    columns = linear_taps(width, scale_w, in_width, align_corners)
    top, bottom, dy1, dy2 = (t.to(codes.device) for t in rows)
    left, right, dx1, dx2 = (t.to(codes.device) for t in columns)
    above, below = real.index_select(2, top), real.index_select(2, bottom)
    y1, y2 = dy1[:, None], dy2[:, None]
    return [
        (dx2 * y2, above.index_select(3, left)),
        (dx1 * y2, above.index_select(3, right)),
        (dx2 * y1, below.index_select(3, left)),
        (dx1 * y1, below.index_select(3, right)),
    ]
