"""The numerics contract once more, in exact rational arithmetic and Python's integers, and what tests feed to it."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import strategies as st

from qat.scheme import INT_TYPES, Scheme

FLOAT_MAX = float(torch.finfo(torch.float32).max)
SMALLEST = 2.0**-149
#: the integer types of activations and weights; int32 is for biases
CODE_TYPES = tuple(name for name in INT_TYPES if name != "int32")
NASTY = (0.0, -0.0, SMALLEST, -SMALLEST, 2.0**-126, -(2.0**-126), 1.0, -1.0, 0.5, -0.5, 0.49999997, -0.49999997,
         2.0**24, -(2.0**24), 2.0**31, -(2.0**31), FLOAT_MAX, -FLOAT_MAX, math.inf, -math.inf)  # fmt: skip


def float32(value: Fraction) -> float:
    """The float32 nearest to `value`, ties to even, with subnormals; infinite from half a step above the largest."""
    magnitude = abs(value)
    if magnitude == 0:
        return 0.0
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(magnitude / quantum) * quantum
    result = math.inf if rounded >= 2**128 else float(rounded)
    return result if value > 0 else -result


def round_half(value: Fraction, rounding: str) -> int:
    if rounding == "half_even":
        return round(value)
    away = math.floor(abs(value) + Fraction(1, 2))
    return away if value >= 0 else -away


def clamp(value: float, low: int, high: int) -> int:
    return int(max(low, min(high, value)))


def quantize(x: float, scale: float, zero_point: int, qmin: int, qmax: int, rounding: str = "half_even") -> int:
    """`clamp(round(float32(x / scale)) + zero_point)`; x and scale are float32 values."""
    if math.isnan(x):
        return zero_point
    steps = x if math.isinf(x) else float32(Fraction(x) / Fraction(scale))
    if math.isinf(steps):
        return qmax if steps > 0 else qmin
    return clamp(round_half(Fraction(steps), rounding) + zero_point, qmin, qmax)


def dequantize(code: int, scale: float, zero_point: int) -> float:
    steps = float32(Fraction(code - zero_point))
    return float32(Fraction(steps) * Fraction(scale))


def requantize_float(acc: int, multiplier: float, zero_point: int, qmin: int, qmax: int) -> int:
    scaled = float32(Fraction(float32(Fraction(acc))) * Fraction(multiplier))
    if math.isinf(scaled):
        return qmax if scaled > 0 else qmin
    return clamp(round(Fraction(scaled)) + zero_point, qmin, qmax)


def saturating_rounding_doubling_high_mul(a: int, b: int) -> int:
    """gemmlowp, for int32: `(a * b + nudge) / 2**31`, C's division."""
    if a == b == -(2**31):
        return 2**31 - 1
    product = a * b
    total = product + (2**30 if product >= 0 else 1 - 2**30)
    return total // 2**31 if total >= 0 else -(-total // 2**31)


def rounding_divide_by_pot(x: int, exponent: int) -> int:
    """gemmlowp: a right shift that rounds to nearest, ties away from zero."""
    mask = (1 << exponent) - 1
    remainder = x & mask
    threshold = (mask >> 1) + (1 if x < 0 else 0)
    return (x >> exponent) + (1 if remainder > threshold else 0)


def multiply_by_quantized_multiplier(x: int, multiplier: int, shift: int) -> int:
    """TFLite with double rounding; a left shift that leaves int32 saturates."""
    shifted = clamp(x << max(shift, 0), -(2**31), 2**31 - 1)
    return rounding_divide_by_pot(saturating_rounding_doubling_high_mul(shifted, multiplier), max(-shift, 0))


def multiply_by_quantized_multiplier_smaller_than_one_exp(x: int, multiplier: int, exponent: int) -> int:
    assert exponent <= 0
    return rounding_divide_by_pot(saturating_rounding_doubling_high_mul(x, multiplier), -exponent)


def multiply_single_rounding(x: int, multiplier: int, shift: int) -> int:
    """TFLite built with TFLITE_SINGLE_ROUNDING."""
    total = 31 - shift
    return (x * multiplier + (1 << (total - 1))) >> total


#: positive scales: all magnitudes, subnormals included
scales = st.one_of(
    st.floats(2.0**-20, 2.0**10, width=32),
    st.floats(SMALLEST, FLOAT_MAX, width=32),
    st.integers(-149, 127).map(lambda e: 2.0**e),
)


@st.composite
def code_ranges(draw: st.DrawFn, dtype: str) -> tuple[int, int]:
    """qmin < qmax within the type: whole or narrower."""
    kind = INT_TYPES[dtype]
    if draw(st.booleans()):
        return kind.qmin, kind.qmax
    low = draw(st.integers(kind.qmin, kind.qmax - 1))
    return low, draw(st.integers(low + 1, kind.qmax))


@st.composite
def schemes(draw: st.DrawFn, dtypes: tuple[str, ...] = CODE_TYPES) -> Scheme:
    dtype = draw(st.sampled_from(dtypes))
    low, high = draw(code_ranges(dtype))
    middle = Scheme(dtype=dtype).symmetric_zero_point
    symmetric = low <= middle <= high and draw(st.booleans())
    return Scheme(dtype=dtype, symmetric=symmetric, qmin=low, qmax=high, power_of_two=draw(st.booleans()))


@st.composite
def values_around(draw: st.DrawFn, scale: float, zero_point: int, qmin: int, qmax: int, size: int = 12) -> list[float]:
    """float32 values: nasty ones, ties `(k + 0.5) * scale` and their neighbours, and any."""
    steps = st.integers(qmin - zero_point - 2, qmax - zero_point + 2)
    ties = steps.map(lambda k: float32(Fraction(2 * k + 1, 2) * Fraction(scale)))
    beside = ties.map(lambda t: float(torch.nextafter(torch.tensor(t), torch.tensor(math.copysign(math.inf, -t)))))
    anything = st.floats(width=32, allow_nan=True)
    return draw(st.lists(st.one_of(st.sampled_from(NASTY), ties, beside, anything), max_size=size))
