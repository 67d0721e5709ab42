"""From observed ranges to scales and zero points, against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numerics_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat import numerics
from qat.errors import EncodingError
from qat.scheme import INT_TYPES, Scheme

INT8 = Scheme(dtype="int8", symmetric=True)
UINT8 = Scheme(dtype="uint8")

bounds = st.one_of(
    st.floats(-1000.0, 1000.0, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([v for v in reference.NASTY if math.isfinite(v)]),
)
ranges = st.tuples(bounds, bounds).map(sorted)


def one(low: float, high: float, scheme: Scheme) -> tuple[Tensor, Tensor]:
    return numerics.range_to_scale(torch.tensor(low), torch.tensor(high), scheme)


def widest(scheme: Scheme) -> float:
    qmin, qmax = scheme.code_range
    return 2 * numerics.RANGE_LIMIT / (qmax - qmin)


def exact_scale(low: float, high: float, scheme: Scheme) -> Fraction:
    """The scale of the contract before it is rounded to float32 or to a power of two."""
    qmin, qmax = scheme.code_range
    limit, floor = Fraction(numerics.RANGE_LIMIT), Fraction(numerics.SCALE_FLOOR)
    lo, hi = max(min(Fraction(low), Fraction(0)), -limit), min(max(Fraction(high), Fraction(0)), limit)
    scale = (hi - lo) / (qmax - qmin)
    if scheme.symmetric:
        sides = [(qmax - scheme.symmetric_zero_point, hi), (scheme.symmetric_zero_point - qmin, -lo)]
        sides = [side for side in sides if side[0] > 0]
        scale = max(extent for _, extent in sides) / min(codes for codes, _ in sides)
    return min(max(scale, floor), Fraction(widest(scheme)))


@given(ranges, reference.schemes(tuple(INT_TYPES)))
@settings(max_examples=500)
def test_scale_and_zero_point_are_the_formula(span: list[float], scheme: Scheme) -> None:
    low, high = span
    qmin, qmax = scheme.code_range
    scale, zero_point = one(low, high, scheme)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    exact = exact_scale(low, high, scheme)
    if scheme.power_of_two:
        assert math.frexp(float(scale))[0] == 0.5
        assert float(scale) / 2 < exact <= float(scale) * (1 + 2.0**-52)
    else:
        assert abs(Fraction(float(scale)) - exact) <= exact * (Fraction(1, 2**24) + Fraction(1, 2**44))
    if scheme.symmetric:
        assert int(zero_point) == scheme.symmetric_zero_point
    else:
        cut = max(min(Fraction(low), Fraction(0)), -Fraction(numerics.RANGE_LIMIT))
        real = qmin - cut / Fraction(float(scale))
        # float64 may fall on either side of a tie
        assert abs(int(zero_point) - min(real, qmax)) <= Fraction(1, 2) + Fraction(1, 10**5)


@given(ranges, reference.schemes(), st.lists(st.floats(0.0, 1.0), max_size=8))
@settings(max_examples=300)
def test_what_lies_inside_comes_back_to_half_a_step(span: list[float], scheme: Scheme, inside: list[float]) -> None:
    low, high = span
    qmin, qmax = scheme.code_range
    scale, zero_point = one(low, high, scheme)
    lo, hi = max(min(low, 0.0), -numerics.RANGE_LIMIT), min(max(high, 0.0), numerics.RANGE_LIMIT)
    if scheme.symmetric:  # a side without codes saturates at zero, and codes on both are finite
        lo = max(lo, -widest(scheme) * (scheme.symmetric_zero_point - qmin))
        hi = min(hi, widest(scheme) * (qmax - scheme.symmetric_zero_point))
    x = torch.tensor([lo, hi, 0.0, *(lo + f * (hi - lo) for f in inside)], dtype=torch.float32)
    x = x.clamp(lo, hi)
    for rounding in ("half_even", "half_away"):
        codes = numerics.quantize(x, scale, zero_point, qmin, qmax, rounding=rounding)
        back = numerics.dequantize(codes, scale, zero_point)
        error = (back.double() - x.double()).abs() / scale.double()
        assert float(error.max()) <= 0.5 + (qmax - qmin) * 2.0**-22


@given(ranges, reference.schemes())
@settings(max_examples=300)
def test_zero_is_exact_and_no_code_is_infinite(span: list[float], scheme: Scheme) -> None:
    qmin, qmax = scheme.code_range
    scale, zero_point = one(*span, scheme)
    zeros = torch.tensor([0.0, -0.0])
    codes = numerics.quantize(zeros, scale, zero_point, qmin, qmax)
    assert codes.tolist() == [int(zero_point)] * 2
    assert numerics.dequantize(codes, scale, zero_point).tolist() == [0.0, 0.0]
    ends = torch.tensor([qmin, qmax])
    real = numerics.dequantize(ends, scale, zero_point)
    assert torch.isfinite(real).all()
    assert torch.equal(numerics.quantize(real, scale, zero_point, qmin, qmax), ends.int())
    assert float(scale) ** 2 >= 2.0**-126  # the product of two is normal
    assert math.isfinite(1.0 / float(scale) ** 2)


@pytest.mark.parametrize(
    ("low", "high", "scheme", "scale", "zero_point"),
    [
        (0.0, 2.55, UINT8, 0.01, 0),
        (-2.55, 0.0, UINT8, 0.01, 255),
        (-1.0, 1.55, UINT8, 0.01, 100),
        (1.0, 2.55, UINT8, 0.01, 0),  # widened to hold zero
        (-2.55, -1.0, UINT8, 0.01, 255),
        (5.1, 5.1, UINT8, 0.02, 0),  # constant
        (-0.5, 254.5, UINT8, 1.0, 0),  # ties to even
        (-1.5, 253.5, UINT8, 1.0, 2),
        (0.0, 2.55, Scheme(dtype="int8"), 0.01, -128),
        (-2.55, 0.0, Scheme(dtype="int8"), 0.01, 127),
        (0.0, 655.35, Scheme(dtype="uint16"), 0.01, 0),
        (-655.35, 0.0, Scheme(dtype="uint16"), 0.01, 65535),
        # -128 is spare: both ends keep their magnitude
        (-1.27, 0.5, INT8, 0.01, 0),
        (-0.5, 1.27, INT8, 0.01, 0),
        (-1.27, 1.27, INT8.with_(qmin=-127), 0.01, 0),
        (-1.2, 0.3, INT8.with_(qmin=-120, qmax=120), 0.01, 0),
        (-1.27, 0.5, Scheme(dtype="uint8", symmetric=True), 0.01, 128),
        (-0.07, 0.07, Scheme(dtype="int4", symmetric=True), 0.01, 0),
        # one side only: what lies on the other saturates at zero and has no say
        (-9.0, 1.27, INT8.with_(qmin=0), 0.01, 0),
        (-1.28, 9.0, INT8.with_(qmax=0), 0.01, 0),
        (0.0, 1.2, UINT8.with_(qmin=100, qmax=220), 0.01, 100),
        (-1.2, 0.0, UINT8.with_(qmin=100, qmax=220), 0.01, 220),
        (0.0, 2.55 / 256, UINT8.with_(power_of_two=True), 2.0**-14, 0),
        (0.0, 255 * 2.0**-7, UINT8.with_(power_of_two=True), 2.0**-7, 0),
    ],
)
def test_known_ranges(low: float, high: float, scheme: Scheme, scale: float, zero_point: int) -> None:
    found_scale, found_zero_point = numerics.range_to_scale(
        torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64), scheme
    )
    assert float(found_scale) == pytest.approx(scale, rel=2.0**-23)
    assert int(found_zero_point) == zero_point


def test_the_zero_point_belongs_to_the_rounded_scale() -> None:
    # with 65535 steps the rounding of the scale moves it by up to 0.004
    scheme = Scheme(dtype="uint16")
    low, high = -torch.rand(3000) * 10, torch.rand(3000) * 10
    scale, zero_point = numerics.range_to_scale(low, high, scheme)
    exact = [-Fraction(bound) / Fraction(s) for bound, s in zip(low.tolist(), scale.tolist(), strict=True)]
    assert zero_point.tolist() == [round(z) for z in exact]
    unrounded = ((high.double() - low.double()) / 65535).tolist()
    assert zero_point.tolist() != [round(-bound / s) for bound, s in zip(low.tolist(), unrounded, strict=True)]


@pytest.mark.parametrize("qmin", [-128, -127])
def test_symmetric_int8_maps_both_ends_to_opposite_codes(qmin: int) -> None:
    x = torch.tensor([-3.7, 3.7, 0.0])
    scale, zero_point = one(-3.7, 1.0, INT8.with_(qmin=qmin))
    assert numerics.quantize(x, scale, zero_point, qmin, 127).tolist() == [-127, 127, 0]


@pytest.mark.parametrize("dtype", reference.CODE_TYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("span", [(0.0, 0.0), (-0.0, 0.0), (0.0, reference.SMALLEST), (-1e-30, 1e-30)])
def test_an_empty_range_gets_the_floor(dtype: str, symmetric: bool, span: tuple[float, float]) -> None:
    scheme = Scheme(dtype=dtype, symmetric=symmetric)
    scale, zero_point = one(*span, scheme)
    assert float(scale) == numerics.SCALE_FLOOR
    assert int(zero_point) == (scheme.symmetric_zero_point if symmetric else scheme.int_type.qmin)


@pytest.mark.parametrize("dtype", reference.CODE_TYPES)
def test_the_widest_range_keeps_both_signs(dtype: str) -> None:
    scheme = Scheme(dtype=dtype)
    scale, zero_point = one(-reference.FLOAT_MAX, reference.FLOAT_MAX, scheme)
    qmin, qmax = scheme.code_range
    codes = numerics.quantize(torch.tensor([-math.inf, 0.0, math.inf]), scale, zero_point, qmin, qmax)
    assert codes.tolist() == [qmin, int(zero_point), qmax]
    assert qmin < int(zero_point) < qmax
    assert abs(int(zero_point) - (qmin + qmax) / 2) <= 1


@pytest.mark.parametrize("exponent", range(-39, 118))
def test_powers_of_two_stay_and_everything_above_goes_up(exponent: int) -> None:
    scheme = INT8.with_(power_of_two=True)
    for codes, expected in ((127.0, 2.0**exponent), (127.0 * (1 + 2.0**-40), 2.0 ** (exponent + 1))):
        high = torch.tensor(codes * 2.0**exponent, dtype=torch.float64)
        assert float(numerics.range_to_scale(-high, high, scheme)[0]) == expected


@given(st.lists(ranges, min_size=1, max_size=6), reference.schemes())
def test_channels_are_independent(spans: list[list[float]], scheme: Scheme) -> None:
    low, high = torch.tensor(spans).unbind(1)
    scale, zero_point = numerics.range_to_scale(low, high, scheme)
    alone = [one(*span, scheme) for span in spans]
    assert scale.tolist() == [float(s) for s, _ in alone]
    assert zero_point.tolist() == [int(z) for _, z in alone]
    unchecked = numerics.range_to_scale_unchecked(low, high, scheme)
    assert torch.equal(unchecked[0], scale)
    assert torch.equal(unchecked[1], zero_point)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_range_that_is_not_finite(bad: float) -> None:
    for low, high in ((bad, 1.0), (0.0, bad)):
        with pytest.raises(EncodingError, match="the observed range is not finite; check the data"):
            one(low, high, UINT8)


def test_an_inverted_range() -> None:
    with pytest.raises(EncodingError, match=r"range is empty \(low > high\); calibrate"):
        one(1.0, 0.5, UINT8)


def test_no_ranges_at_all() -> None:
    scale, zero_point = numerics.range_to_scale(torch.empty(0), torch.empty(0), UINT8)
    assert scale.shape == zero_point.shape == (0,)
