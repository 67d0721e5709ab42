"""Float kernels of ONNX Runtime for 64-bit ARM, between DequantizeLinear and QuantizeLinear.

They are plain C++ whose compiler fuses products into sums; which ones was found by running it (1.31).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.integer.kernels.elementwise import fma
from qat.integer.kernels.layer_norm import affine, root, rows_of
from qat.integer.kernels.qparams import QParams, float32_scalar
from qat.integer.kernels.requantize import quantize
from qat.integer.kernels.resize import Scales, bilinear_terms


def layer_norm(
    codes: Tensor,
    x: QParams,
    weight: Tensor | None,
    bias: Tensor | None,
    y: QParams,
    normalized_dims: int = 1,
    epsilon: float = 1e-5,
) -> Tensor:
    """Layer normalization, value by value after Welford (1962); arguments as for `kernels.layer_norm.layer_norm`."""
    rows = rows_of(codes, x, normalized_dims)
    mean, squares = _welford(rows.t().contiguous())
    count = float32_scalar(rows.shape[1], rows)
    deviation = root(squares / count + float32_scalar(epsilon, rows))
    real = affine((rows - mean[:, None]) / deviation[:, None], weight, bias)
    return quantize(real.reshape(codes.shape), y)


def _welford(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and sum of squared deviations, of each column."""
    counts = torch.arange(1, len(values) + 1, dtype=torch.float32, device=values.device)
    mean = torch.zeros_like(values[0])
    before, after = [], []
    for value, count in zip(values.unbind(0), counts.unbind(0), strict=True):
        before.append(value - mean)
        mean = mean + before[-1] / count
        after.append(value - mean)
    left, right = torch.stack(before), torch.stack(after)
    totals = [torch.zeros_like(mean)]
    for product in (left.double() * right.double()).unbind(0):
        totals.append((totals[-1] + product).to(torch.float32))
    # rounded to float64 and then to float32, which nearly always is the fused sum; all of them are looked at together
    sums = torch.stack(totals)
    if not torch.equal(fma(left, right, sums[:-1]), sums[1:]):
        total = totals[0]
        for a, b in zip(left.unbind(0), right.unbind(0), strict=True):
            total = fma(a, b, total)
        return mean, total
    return mean, totals[-1]


def resize_bilinear(
    codes: Tensor,
    x: QParams,
    y: QParams,
    sizes: Sequence[int],
    align_corners: bool = False,
    scales: Scales = None,
) -> Tensor:
    """Bilinear interpolation; arguments and result as for `kernels.resize.resize_bilinear`."""
    left_top, right_top, left_bottom, right_bottom = bilinear_terms(codes, x, sizes, align_corners, scales)
    total = right_top[0] * right_top[1]
    for weight, value in (left_top, left_bottom, right_bottom):
        total = fma(value, weight, total)
    return quantize(total, y)


def hard_sigmoid(x: Tensor) -> Tensor:
    """`min(max(x / 6 + 1 / 2, 0), 1)`, the sixth as a float32 factor, product and sum rounded once."""
    return fma(x, float32_scalar(1 / 6, x), float32_scalar(0.5, x)).clamp(0.0, 1.0)


def hard_swish(x: Tensor) -> Tensor:
    """`x * hard_sigmoid(x)`."""
    return x * hard_sigmoid(x)
