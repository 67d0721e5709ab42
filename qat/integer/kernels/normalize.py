"""Softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qat.integer.kernels.qparams import QParams, float32_scalar, round_to_float32
from qat.integer.kernels.requantize import dequantize, quantize, requantize_codes

_FLOAT32_MAX = torch.finfo(torch.float32).max


def _sum_in_order(x: Tensor) -> Tensor:
    """Sum over the first axis in float32 and in order, which no built-in reduction promises."""
    total = torch.zeros(x.shape[1:], dtype=torch.float32, device=x.device)
    for term in x.unbind(0):
        total = total + term
    return total


#: What the integer softmax of ONNX Runtime is right for: uint8, 1/256, zero point 0.
PROBABILITY = QParams(1.0 / 256.0, 0, 0, 255)


def softmax(codes: Tensor, x: QParams, y: QParams, axis: int = -1) -> Tensor:
    """Softmax to any encoding: to `PROBABILITY` by `qlinear_softmax`, and from there to `y`.

    Args:
        codes: Integer, any shape.
        x: Parameters of the input.
        y: Parameters of the result.
        axis: The axis that sums to one.

    Returns:
        int32 codes, shape of `codes`.
    """
    if x.wide or y.wide:
        return quantize(torch.softmax(dequantize(codes, x).double(), axis).to(torch.float32), y)
    return requantize_codes(qlinear_softmax(codes, x, PROBABILITY, axis), PROBABILITY, y)


def qlinear_softmax(codes: Tensor, x: QParams, y: QParams, axis: int = -1) -> Tensor:
    """QLinearSoftmax (opset 13 and later): a table of exponentials, relative to the largest code.

    The runtime scales by `floor(1 / y.scale)`, so the result is sensible only for a scale of one over an
    integer. Over a single element its float32 product overflows for scales below 1/148, and the code is that
    of 0 (in int8 the smallest or largest) instead of that of 1; so it is here.

    Args:
        codes: Integer 8-bit codes, any shape.
        x: Parameters of the input.
        y: Parameters of the result; int8 if `qmin` is negative.
        axis: The axis that sums to one.

    Returns:
        int32 codes, shape of `codes`.
    """
    moved = codes.to(torch.int64).movedim(axis, 0)
    length = moved.shape[0]
    # head room for the sum; division and logarithm are float32, the rest double
    room = max(0.0, round_to_float32(math.log(float(float32_scalar(_FLOAT32_MAX, codes) / length))) - 5.0) / x.scale
    steps = torch.arange(256, dtype=torch.float64, device=codes.device) - 255.0 + room
    table = torch.exp(steps * x.scale).to(torch.float32)
    terms = table[moved - moved.amax(0, keepdim=True) + 255]
    top = torch.floor(1.0 / float32_scalar(y.scale, codes))
    share = (terms * top) / _sum_in_order(terms)
    # where the product overflows, the runtime converts infinity to an integer
    lost = -(2**31) if y.qmin < 0 else 0
    result = torch.where(share.isfinite(), share, 0.0).round().to(torch.int64)
    result = torch.where(share.isfinite(), result, lost) + y.zero_point
    if y.qmin < 0:
        result = torch.where(result < -(2**31), result + 2**32, result)
    return torch.clamp(result, y.qmin, y.qmax).to(torch.int32).movedim(0, axis)
