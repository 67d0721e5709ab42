"""Requantization: float32 against exact rational arithmetic, fixed-point against gemmlowp's and TFLite's integers."""

from __future__ import annotations

import math
from fractions import Fraction

import numerics_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat import numerics
from qat.errors import EncodingError
from qat.scheme import INT_TYPES

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
accumulators = st.one_of(
    st.integers(-1000, 1000),
    st.integers(-(2**25), 2**25),
    st.integers(INT32_MIN, INT32_MAX),
    st.sampled_from([0, 1, -1, 2**24, 2**24 + 1, -(2**24) - 1, INT32_MAX, INT32_MIN, INT32_MIN + 1]),
)
multipliers = st.one_of(
    st.floats(2.0**-20, 1.0, width=32),
    st.floats(1.0, 2.0**12, width=32),
    st.floats(reference.SMALLEST, reference.FLOAT_MAX, width=32),
    st.integers(-40, 20).map(lambda e: 2.0**e),
)
#: mantissas as QuantizeMultiplier makes them
mantissas = st.one_of(st.integers(2**30, 2**31 - 1), st.sampled_from([0, 2**30, 2**30 + 1, 2**31 - 1]))


@st.composite
def results(draw: st.DrawFn) -> tuple[int, int, int]:
    """Zero point, qmin and qmax of a result."""
    low, high = draw(reference.code_ranges(draw(st.sampled_from(reference.CODE_TYPES))))
    return draw(st.integers(low, high)), low, high


@given(st.lists(st.tuples(accumulators, multipliers), max_size=12), results())
@settings(max_examples=300)
def test_float_is_the_formula(pairs: list[tuple[int, float]], result: tuple[int, int, int]) -> None:
    acc = torch.tensor([a for a, _ in pairs], dtype=torch.int32)
    multiplier = torch.tensor([m for _, m in pairs], dtype=torch.float32)
    expected = [reference.requantize_float(a, m, *result) for a, m in pairs]
    for dtype in (torch.int32, torch.int64):
        codes = numerics.requantize_float(acc.to(dtype), multiplier, *result)
        assert codes.dtype == torch.int32
        assert codes.tolist() == expected


def test_float_to_int32_saturates() -> None:
    acc = torch.tensor([INT32_MAX, INT32_MIN], dtype=torch.int32)
    codes = numerics.requantize_float(acc, torch.tensor(4.0), 0, INT32_MIN, INT32_MAX)
    assert codes.tolist() == [INT32_MAX, INT32_MIN]


def test_float_ties_go_to_even_and_large_accumulators_are_rounded_first() -> None:
    acc = torch.tensor([1, 3, 5, -1, -3, 2**24 + 1])
    codes = numerics.requantize_float(acc, torch.tensor(0.5), 0, -(2**15), 2**15 - 1)
    assert codes.tolist() == [0, 2, 2, 0, -2, 2**15 - 1]
    # 2**24 + 1 is no float32: it is 2**24 before it is multiplied, which makes 2.5 and not a little more
    assert int(numerics.requantize_float(acc[-1], torch.tensor(2.5 * 2.0**-24), 0, 0, 255)) == 2


@pytest.mark.parametrize("double_rounding", [True, False])
@given(st.lists(st.tuples(accumulators, mantissas, st.integers(-31, 30)), max_size=12), results())
@settings(max_examples=300)
def test_fixed_point_is_the_integer_reference(
    double_rounding: bool, triples: list[tuple[int, int, int]], result: tuple[int, int, int]
) -> None:
    zero_point, qmin, qmax = result
    acc, multiplier, shift = (torch.tensor([t[i] for t in triples], dtype=torch.int32) for i in range(3))
    multiply = reference.multiply_by_quantized_multiplier if double_rounding else reference.multiply_single_rounding
    codes = numerics.requantize_fixed_point(acc, multiplier, shift, *result, double_rounding=double_rounding)
    assert codes.dtype == torch.int32
    assert codes.tolist() == [reference.clamp(multiply(*t) + zero_point, qmin, qmax) for t in triples]


@given(accumulators, st.integers(2**30, 2**31 - 1), st.integers(-31, 0))
def test_multipliers_below_one_are_gemmlowps(acc: int, mantissa: int, exponent: int) -> None:
    code = numerics.requantize_fixed_point(
        torch.tensor([acc]), torch.tensor([mantissa]), torch.tensor([exponent]), 0, INT32_MIN, INT32_MAX
    )
    assert int(code) == reference.multiply_by_quantized_multiplier_smaller_than_one_exp(acc, mantissa, exponent)


@given(accumulators, st.integers(0, 31))
def test_the_references_right_shift_rounds_half_away_from_zero(x: int, exponent: int) -> None:
    expected = reference.round_half(Fraction(x, 2**exponent), "half_away")
    assert reference.rounding_divide_by_pot(x, exponent) == expected


@given(accumulators, mantissas)
def test_the_references_high_multiplication_rounds_ties_up(a: int, b: int) -> None:
    expected = math.floor(Fraction(a * b, 2**31) + Fraction(1, 2))
    assert reference.saturating_rounding_doubling_high_mul(a, b) == expected


@given(
    st.integers(-(2**20), 2**20),
    st.floats(2.0**-31, 2.0**10, exclude_max=True),
    st.booleans(),
)
def test_fixed_point_is_near_the_real_product(acc: int, multiplier: float, double_rounding: bool) -> None:
    mantissa, shift = numerics.fixed_point_multiplier(multiplier)
    code = numerics.requantize_fixed_point(
        torch.tensor(acc), torch.tensor(mantissa), torch.tensor(shift), 0, INT32_MIN, INT32_MAX,
        double_rounding=double_rounding,
    )  # fmt: skip
    real = Fraction(acc) * Fraction(multiplier)
    assert abs(int(code) - real) <= 1 + abs(real) / 2**30


def test_per_channel_multipliers_broadcast() -> None:
    acc = torch.randint(-(10**6), 10**6, (2, 3, 4, 4))
    split = [numerics.fixed_point_multiplier(m) for m in (0.001, 0.7, 1.5)]
    mantissa, shift = (torch.tensor([s[i] for s in split]).reshape(3, 1, 1) for i in range(2))
    together = numerics.requantize_fixed_point(acc, mantissa, shift, 3, -128, 127)
    for channel in range(3):
        alone = numerics.requantize_fixed_point(acc[:, channel], mantissa[channel], shift[channel], 3, -128, 127)
        assert torch.equal(together[:, channel], alone)
    real = torch.tensor([0.001, 0.7, 1.5]).reshape(3, 1, 1)
    for channel in range(3):
        alone = numerics.requantize_float(acc[:, channel], real[channel], 3, -128, 127)
        assert torch.equal(numerics.requantize_float(acc, real, 3, -128, 127)[:, channel], alone)


def test_a_left_shift_saturates() -> None:
    mantissa, shift = torch.tensor(2**30), torch.tensor(11)  # times 1024
    acc = torch.tensor([2**28, -(2**28), 5])
    codes = numerics.requantize_fixed_point(acc, mantissa, shift, 0, INT32_MIN, INT32_MAX)
    assert codes.tolist() == [2**30, -(2**30), 5120]


@given(st.one_of(st.floats(2.0**-40, 2.0**29), st.floats(0.0, 1e-3), st.integers(-40, 29).map(lambda e: 2.0**e)))
def test_the_multiplier_is_the_nearest_of_31_bits(multiplier: float) -> None:
    mantissa, shift = numerics.fixed_point_multiplier(multiplier)
    if multiplier < 2.0**-33:
        assert (mantissa, shift) == (0, 0)
    if (mantissa, shift) == (0, 0):
        assert multiplier < 2.0**-32
        return
    assert 2**30 <= mantissa < 2**31
    assert -31 <= shift <= 30
    exponent = math.frexp(multiplier)[1]
    exact = reference.round_half(Fraction(multiplier) * Fraction(2) ** (31 - exponent), "half_away")
    assert mantissa * Fraction(2) ** (shift - exponent) == exact


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [
        (0.0235294 * 0.0136683 / 0.05, (1768052620, -7)),
        (0.0, (0, 0)),
        (0.5, (2**30, 0)),
        (1.0, (2**30, 1)),
        (1.5, (3 * 2**29, 1)),
        (1.0 - 2.0**-53, (2**30, 1)),  # rounds up to a power of two
        (0.5 + 2.0**-32, (2**30 + 1, 0)),  # tie: away from zero
        (2.0**-32, (2**30, -31)),
        (2.0**-32 - 2.0**-80, (2**30, -31)),
        (2.0**-33, (0, 0)),
        (5e-324, (0, 0)),
        (2.0**29, (2**30, 30)),
        (2.0**30 - 1.0, (2**31 - 2, 30)),
    ],
)
def test_known_multipliers(multiplier: float, expected: tuple[int, int]) -> None:
    assert numerics.fixed_point_multiplier(multiplier) == expected


@pytest.mark.parametrize("multiplier", [-1.0, -5e-324, math.nan, math.inf])
def test_multipliers_that_cannot_be(multiplier: float) -> None:
    with pytest.raises(EncodingError, match="is negative or not finite; check the scales"):
        numerics.fixed_point_multiplier(multiplier)


@pytest.mark.parametrize("multiplier", [2.0**30, 2.0**30 * (1 - 2.0**-53), 1e30])
def test_multipliers_that_are_too_large(multiplier: float) -> None:
    with pytest.raises(EncodingError, match=r"is 2\*\*30 or more; check the scales of this layer"):
        numerics.fixed_point_multiplier(multiplier)


@pytest.mark.parametrize("dtype", reference.CODE_TYPES)
def test_empty_accumulators(dtype: str) -> None:
    kind, empty = INT_TYPES[dtype], torch.empty((0, 4), dtype=torch.int32)
    assert numerics.requantize_float(empty, torch.ones(4), 0, kind.qmin, kind.qmax).shape == (0, 4)
    ones = torch.ones(4, dtype=torch.int32)
    assert numerics.requantize_fixed_point(empty, ones, ones, 0, kind.qmin, kind.qmax).shape == (0, 4)
