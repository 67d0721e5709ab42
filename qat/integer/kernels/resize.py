"""Nearest and bilinear interpolation as ONNX Runtime's Resize computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.errors import PlanError
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import dequantize, quantize


def _scales(sizes: Sequence[int], inputs: Sequence[int], scales: Sequence[float] | None) -> list[Tensor]:
    if len(sizes) != len(inputs):
        raise PlanError(
            f"{len(sizes)} output sizes for {len(inputs)} spatial dimensions", "give one a dimension"
        )
    if scales is not None:
        return [torch.tensor(s, dtype=torch.float32) for s in scales]
    return [
        torch.tensor(float(o), dtype=torch.float32) / torch.tensor(float(i), dtype=torch.float32)
        for o, i in zip(sizes, inputs, strict=True)
    ]


def resize_nearest(codes: Tensor, sizes: Sequence[int], scales: Sequence[float] | None = None) -> Tensor:
    """Nearest neighbour on the codes: Resize with `asymmetric` coordinates and `floor`.

    Args:
        codes: Integer, shape (N, C, *spatial).
        sizes: Output size of each spatial dimension. PyTorch's `nearest` multiplies by the inverse scale and
            differs where the position is an integer up to rounding.
        scales: The scales if the node carries scales; else output size over input size.

    Returns:
        int32 codes, shape (N, C, *sizes), same encoding.
    """
    y = codes.to(torch.int32)
    for d, (size, scale) in enumerate(zip(sizes, _scales(sizes, codes.shape[2:], scales), strict=True)):
        source = torch.floor(torch.arange(size, dtype=torch.float32) / scale).to(torch.int64)
        y = y.index_select(2 + d, source.clamp(max=codes.shape[2 + d] - 1).to(codes.device))
    return y


def _taps(
    size: int, scale: Tensor, length: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    position = torch.arange(size, dtype=torch.float32)
    corners = position * (length - 1) / max(size - 1, 1)
    source = corners if align_corners else (position + 0.5) / scale - 0.5
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
    scales: Sequence[float] | None = None,
) -> Tensor:
    """Bilinear interpolation: DequantizeLinear, Resize (`linear`) in float32, QuantizeLinear.

    Args:
        codes: Integer, shape (N, C, H, W).
        x: Parameters of the input.
        y: Parameters of the result.
        sizes: Output height and width.
        align_corners: `align_corners` coordinates; else `half_pixel`.
        scales: The scales if the node carries scales; else output size over input size.

    Returns:
        int32 codes, shape (N, C, *sizes).

    Raises:
        PlanError: Another number of dimensions.
    """
    if codes.dim() != 4:
        raise PlanError(
            f"bilinear interpolation of {codes.dim()} dimensions", "it is defined for (N, C, H, W)"
        )
    real = dequantize(codes, x)
    scale_h, scale_w = _scales(sizes, codes.shape[2:], scales)
    top, bottom, dy1, dy2 = (
        t.to(codes.device) for t in _taps(sizes[0], scale_h, codes.shape[2], align_corners)
    )
    left, right, dx1, dx2 = (
        t.to(codes.device) for t in _taps(sizes[1], scale_w, codes.shape[3], align_corners)
    )
    above, below = real.index_select(2, top), real.index_select(2, bottom)
    y1, y2 = dy1[:, None], dy2[:, None]
    total = (dx2 * y2) * above.index_select(3, left)
    total = total + (dx1 * y2) * above.index_select(3, right)
    total = total + (dx2 * y1) * below.index_select(3, left)
    total = total + (dx1 * y1) * below.index_select(3, right)
    return quantize(total, y)
