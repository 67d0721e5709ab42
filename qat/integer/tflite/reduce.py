"""Average pooling and the mean over axes.

Sources: TensorFlow Lite `kernels/internal/reference/integer_ops/pooling.h` and
`kernels/internal/reference/reduce.h` (`QuantizedMeanOrSum`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qat.integer.kernels.qparams import QParams
from qat.integer.tflite.arithmetic import Multiplier, requantize


def average(total: Tensor, count: Tensor) -> Tensor:
    """`total / count` to nearest, ties away from zero; int64 of the broadcast shape."""
    half = torch.div(count, 2, rounding_mode="trunc")
    return torch.div(torch.where(total > 0, total + half, total - half), count, rounding_mode="trunc")


def avg_pool(
    codes: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[tuple[int, int]], fill: int | None
) -> Tensor:
    """Average pooling of the codes themselves: the encoding is kept, and the rounding is that of the raw int8 codes.

    Args:
        codes: int8 codes, shape (N, C, *spatial), 1 or 2 spatial dimensions.
        kernel: One a dimension.
        stride: One a dimension.
        padding: Begin and end of each dimension.
        fill: Code that padding counts as; None where it does not count, and the divisor is the number of real elements.

    Returns:
        int32 codes, shape (N, C, *windows).
    """
    dims = len(kernel)
    flat = [side for pair in reversed(padding) for side in pair]
    pool = (functional.avg_pool1d, functional.avg_pool2d)[dims - 1]

    def sums(x: Tensor) -> Tensor:
        # whole numbers far below 2**53, whose mean times their number is within a small fraction of the sum
        window = math.prod(kernel)
        return torch.round(pool(x, tuple(kernel), tuple(stride)) * window).to(torch.int64)

    real = functional.pad(codes.double(), flat, value=0.0 if fill is None else float(fill))
    ones = functional.pad(torch.ones_like(codes, dtype=torch.float64), flat, value=0.0 if fill is None else 1.0)
    return average(sums(real), sums(ones)).to(torch.int32)


def mean_multiplier(x: QParams, y: QParams, count: int) -> Multiplier:
    """The multiplier of a mean: that of the scales, with the division by `count` worked in."""
    whole = Multiplier.of(x.scale / y.scale)
    mantissa, exponent = int(whole.mantissa), int(whole.shift)
    shift = min(count.bit_length() - 1, 32, 31 + exponent)
    return Multiplier(torch.tensor((mantissa << shift) // count), torch.tensor(exponent - shift))


def mean(codes: Tensor, x: QParams, y: QParams, axes: Sequence[int], keepdims: bool = False) -> Tensor:
    """Mean over axes.

    Args:
        codes: int8 codes, any shape.
        x: Parameters of the input.
        y: Parameters of the result.
        axes: The axes to average over.
        keepdims: Keep them with size 1.

    Returns:
        int32 codes.
    """
    reduced = [a % codes.dim() for a in axes]
    total = (codes.to(torch.int64) - x.zero_point).sum(reduced, keepdim=keepdims)
    return requantize(total, mean_multiplier(x, y, math.prod(codes.shape[a] for a in reduced)), y)
