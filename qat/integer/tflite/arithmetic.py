"""The arithmetic of TFLite's reference kernels: quantize, multiply by a fixed-point number, exponential, reciprocal.

Sources: TensorFlow Lite `kernels/internal/common.h`, `kernels/internal/quantization_util.cc` and
`kernels/internal/reference/{quantize,dequantize}.h`; gemmlowp `fixedpoint/fixedpoint.h`. Raw fixed-point numbers are
int64 tensors here that hold values of int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qat import numerics
from qat.integer.kernels.qparams import QParams, float32_scalar

INT32_MIN, INT32_MAX = -(1 << 31), (1 << 31) - 1


def quantize(x: Tensor, q: QParams) -> Tensor:
    """Quantize as TFLite does: `clamp(round(x / scale) + zero_point)`, the division in float32, ties away from zero.

    Args:
        x: Real values, any shape. Infinities saturate; nan becomes `qmin` (undefined in TFLite).
        q: Parameters of the result.

    Returns:
        int32 codes, shape of `x`.
    """
    steps = x.to(torch.float32) / float32_scalar(q.scale, x)
    steps = torch.nan_to_num(steps, nan=float(q.qmin - q.zero_point), posinf=torch.inf, neginf=-torch.inf)
    steps = numerics.round_half(steps.clamp(q.qmin - q.zero_point, q.qmax - q.zero_point), "half_away")
    return steps.to(torch.int32) + q.zero_point


@dataclass(frozen=True)
class Multiplier:
    """A 31-bit multiplier and a shift, or one of them a channel (`numerics.fixed_point_multiplier`).

    Attributes:
        mantissa: int64, shape () or (channels,).
        shift: int64, in the same shape; positive is left.
    """

    mantissa: Tensor
    shift: Tensor

    @classmethod
    def of(cls, values: float | Sequence[float]) -> Multiplier:
        """Return the multiplier of a real number, or of one a channel.

        Raises:
            EncodingError: A number is negative, not finite, or 2**30 or more.
        """
        numbers = [values] if isinstance(values, float) else list(values)
        pairs = [numerics.fixed_point_multiplier(value) for value in numbers]
        mantissa = torch.tensor([m for m, _ in pairs], dtype=torch.int64)
        shift = torch.tensor([s for _, s in pairs], dtype=torch.int64)
        return cls(mantissa.reshape(()), shift.reshape(())) if isinstance(values, float) else cls(mantissa, shift)

    def along(self, axis: int, dims: int) -> Multiplier:
        """Return it in a shape that broadcasts against a tensor of `dims` dimensions, channels along `axis`."""
        if not self.mantissa.dim():
            return self
        shape = [-1 if d == axis % dims else 1 for d in range(dims)]
        return Multiplier(self.mantissa.reshape(shape), self.shift.reshape(shape))


def multiply(x: Tensor, by: Multiplier) -> Tensor:
    """`MultiplyByQuantizedMultiplier` with double rounding; int64 of values within int32."""
    return numerics.requantize_fixed_point(x, by.mantissa, by.shift, 0, INT32_MIN, INT32_MAX).to(torch.int64)


def requantize(acc: Tensor, by: Multiplier, y: QParams) -> Tensor:
    """Accumulator to codes: `clamp(multiply(acc) + zero_point)`, int32."""
    return numerics.requantize_fixed_point(acc, by.mantissa, by.shift, y.zero_point, y.qmin, y.qmax)


def requantize_codes(codes: Tensor, x: QParams, y: QParams) -> Tensor:
    """Codes of one encoding to another (the Quantize operator on int8); a copy if they are equal."""
    if x == y:
        return codes.to(torch.int32)
    return requantize(codes.to(torch.int32) - x.zero_point, Multiplier.of(x.scale / y.scale), y)


# gemmlowp ------------------------------------------------------------------------------------------------------------


def doubling_high_mul(a: Tensor, b: Tensor | int, bits: int = 31) -> Tensor:
    """`SaturatingRoundingDoublingHighMul`: `a * b / 2**bits`, ties up; `bits` is 15 for its 16-bit form."""
    product = a.to(torch.int64) * b
    half = 1 << (bits - 1)
    nudge = torch.where(product >= 0, half, 1 - half)
    result = torch.div(product + nudge, 1 << bits, rounding_mode="trunc")
    return result.clamp(max=(1 << bits) - 1)


def divide_by_power(x: Tensor, exponent: int | Tensor) -> Tensor:
    """`RoundingDivideByPOT`: `x / 2**exponent`, ties away from zero."""
    e = torch.as_tensor(exponent, dtype=torch.int64, device=x.device)
    mask = (torch.ones_like(e) << e) - 1
    threshold = (mask >> 1) + (x < 0).to(torch.int64)
    return (x >> e) + ((x & mask) > threshold).to(torch.int64)


def _shift_left(x: Tensor, amount: int) -> Tensor:
    return (x << amount).clamp(INT32_MIN, INT32_MAX)


#: exp(-1/4), exp(-1/2), exp(-1), ..., exp(-16) as Q0.31, by the exponent of the power of two
_BARREL = (
    (-2, 1672461947), (-1, 1302514674), (0, 790015084), (1, 290630308), (2, 39332535), (3, 720401), (4, 242),
)  # fmt: skip


def exp_on_negative_values(a: Tensor) -> Tensor:
    """`exp(a)` of a Q5.26 number that is not positive, as Q0.31."""
    quarter = 1 << 24
    within = (a & (quarter - 1)) - quarter
    result = _exp_of_a_quarter(within << 5)
    remainder = within - a
    for exponent, factor in _BARREL:
        bit = (remainder >> (26 + exponent)) & 1
        result = torch.where(bit == 1, doubling_high_mul(result, factor), result)
    return torch.where(a == 0, INT32_MAX, result)


def _exp_of_a_quarter(a: Tensor) -> Tensor:
    """`exp(a)` for a Q0.31 number in [-1/4, 0): Taylor's series around -1/8, to the fourth power."""
    constant, third = 1895147668, 715827883
    x = a + (1 << 28)
    x2 = doubling_high_mul(x, x)
    x3, x4 = doubling_high_mul(x2, x), doubling_high_mul(x2, x2)
    higher = divide_by_power(doubling_high_mul(divide_by_power(x4, 2) + x3, third) + x2, 1)
    return constant + doubling_high_mul(x + higher, constant)


def one_over_one_plus_x(a: Tensor) -> Tensor:
    """`1 / (1 + a)` of a Q0.31 number in [0, 1), as Q0.31, by three steps of Newton and Raphson."""
    total = a + INT32_MAX
    half_denominator = torch.div(total + torch.where(total >= 0, 1, -1), 2, rounding_mode="trunc")
    x = 1515870810 + doubling_high_mul(half_denominator, -1010580540)
    for _ in range(3):
        rest = (1 << 29) - doubling_high_mul(half_denominator, x)
        x = x + _shift_left(doubling_high_mul(x, rest), 2)
    return _shift_left(x, 1)
