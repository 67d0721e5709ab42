"""Softmax in fixed point, as TFLite's reference kernel computes it.

Source: TensorFlow Lite `kernels/internal/reference/softmax.h`, and `SoftmaxPrepare` in `kernels/activations.cc`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.integer.kernels.qparams import QParams
from qat.integer.tflite.arithmetic import (
    INT32_MAX,
    Multiplier,
    divide_by_power,
    doubling_high_mul,
    exp_on_negative_values,
    one_over_one_plus_x,
)

#: The only encoding of the result that the operator has.
PROBABILITY = QParams(1.0 / 256.0, -128, -128, 127)
#: A smaller input scale than this makes the kernel abort.
SMALLEST_SCALE = 2.0**-26
#: Bits before the point of what the kernel takes the exponential of.
_DIFFERENCE_BITS = 5


def softmax(codes: Tensor, x: QParams, axis: int = -1) -> Tensor:
    """Softmax to the encoding `PROBABILITY`.

    Args:
        codes: Integer codes of int8, any shape.
        x: Parameters of the input; its scale is above `SMALLEST_SCALE`.
        axis: The axis that sums to one.

    Returns:
        int32 codes, shape of `codes`.
    """
    factor = Multiplier.of(min(x.scale * (1 << (31 - _DIFFERENCE_BITS)), INT32_MAX - 0.0))
    lowest = -int(((1 << _DIFFERENCE_BITS) - 1) * 2 ** (31 - _DIFFERENCE_BITS) / 2.0 ** int(factor.shift))
    differences = torch.arange(-255, 1, dtype=torch.int64)
    kept = differences >= lowest
    scaled = doubling_high_mul(torch.where(kept, differences, 0) << int(factor.shift), int(factor.mantissa))
    table = torch.where(kept, exp_on_negative_values(scaled), 0).to(codes.device)
    kept = kept.to(codes.device)

    wide = codes.to(torch.int64)
    index = wide - wide.amax(axis, keepdim=True) + 255
    terms = table[index]
    total = divide_by_power(terms, 12).sum(axis, keepdim=True)
    headroom = 32 - _bit_length(total)
    scale = one_over_one_plus_x((total << headroom) - (1 << 31))
    exponent = 12 - headroom + 31 - 8
    share = divide_by_power(doubling_high_mul(scale, terms), exponent) - 128
    return torch.where(kept[index], share.clamp(-128, 127), -128).to(torch.int32)


def _bit_length(x: Tensor) -> Tensor:
    """Bits of a positive number below 2**53, int64."""
    return torch.frexp(x.double()).exponent.to(torch.int64)
