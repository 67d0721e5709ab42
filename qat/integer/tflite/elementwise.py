"""Addition, subtraction, multiplication, PReLU and clamping of int8 codes, with broadcasting.

Sources: TensorFlow Lite `kernels/{add,sub,mul}.cc` (`Prepare`), `kernels/internal/reference/{add,sub,prelu}.h`,
`kernels/internal/reference/integer_ops/{add,mul}.h`; `CalculateActivationRangeQuantized` in `kernels/kernel_util.cc`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.integer.kernels.qparams import QParams, round_to_float32
from qat.integer.tflite.arithmetic import Multiplier, multiply, quantize, requantize

#: Sums are computed with this many bits more than their operands have.
_HEADROOM = 20


def sum_multipliers(a: QParams, b: QParams, y: QParams) -> tuple[float, float, float]:
    """The multipliers of the operands and of the result of a sum."""
    twice = round_to_float32(2.0 * max(a.scale, b.scale))
    return a.scale / twice, b.scale / twice, twice / round_to_float32((1 << _HEADROOM) * y.scale)


def _sum(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams, sign: int) -> Tensor:
    left, right, out = (Multiplier.of(m) for m in sum_multipliers(a, b, y))
    first = multiply((a_codes.to(torch.int64) - a.zero_point) << _HEADROOM, left)
    second = multiply((b_codes.to(torch.int64) - b.zero_point) << _HEADROOM, right)
    return requantize(first + sign * second, out, y)


def add(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    """Add.

    Args:
        a_codes: int8 codes of any integer dtype.
        a: Parameters of `a_codes`.
        b_codes: int8 codes; shapes broadcast.
        b: Parameters of `b_codes`.
        y: Parameters of the result.

    Returns:
        int32 codes of the broadcast shape.
    """
    return _sum(a_codes, a, b_codes, b, y, 1)


def sub(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    """Subtract `b` from `a`; arguments and result as for `add`."""
    return _sum(a_codes, a, b_codes, b, y, -1)


def mul(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    """Multiply; arguments and result as for `add`."""
    product = (a_codes.to(torch.int64) - a.zero_point) * (b_codes.to(torch.int64) - b.zero_point)
    return requantize(product, Multiplier.of(round_to_float32(round_to_float32(a.scale * b.scale) / y.scale)), y)


def prelu(codes: Tensor, x: QParams, slopes: Tensor, slope: QParams, y: QParams) -> Tensor:
    """PReLU with quantized slopes.

    Args:
        codes: int8 codes of any integer dtype.
        x: Parameters of `codes`.
        slopes: int8 codes that broadcast against `codes`.
        slope: Parameters of `slopes`.
        y: Parameters of the result.

    Returns:
        int32 codes, shape of `codes`.
    """
    value = codes.to(torch.int64) - x.zero_point
    steep = Multiplier.of(round_to_float32(x.scale / y.scale))
    flat = Multiplier.of(round_to_float32(round_to_float32(x.scale * slope.scale) / y.scale))
    below = multiply(value * (slopes.to(torch.int64) - slope.zero_point), flat)
    result = torch.where(value >= 0, multiply(value, steep), below) + y.zero_point
    return result.clamp(y.qmin, y.qmax).to(torch.int32)


def bounds(low: float | None, high: float | None, y: QParams) -> tuple[int, int]:
    """Codes of the bounds of a clamp, those of the range where there is none."""
    first = y.qmin if low is None else int(quantize(torch.tensor(float(low)), y))
    last = y.qmax if high is None else int(quantize(torch.tensor(float(high)), y))
    return first, max(first, last)


def clamp(codes: Tensor, low: float | None, high: float | None, y: QParams) -> Tensor:
    """Clamp the codes of a tensor whose encoding the result shares, int32."""
    first, last = bounds(low, high, y)
    return codes.to(torch.int32).clamp(first, last)
