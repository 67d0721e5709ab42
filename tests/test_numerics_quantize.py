"""quantize and dequantize against exact rational arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numerics_reference as reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat import numerics
from qat.errors import EncodingError
from qat.scheme import INT_TYPES, Granularity

ROUNDINGS: tuple[numerics.Rounding, ...] = ("half_even", "half_away")


def scalar(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


@given(st.fractions() | st.floats(width=32, allow_nan=False, allow_infinity=False).map(Fraction))
def test_the_reference_rounds_to_float32_as_numpy(value: Fraction) -> None:
    with np.errstate(over="ignore"):
        nearest = float(np.float32(float(value)))
    if Fraction(float(value)) == value:  # else numpy would round twice
        assert reference.float32(value) == nearest


@pytest.mark.parametrize("dtype", INT_TYPES)
@given(st.data())
@settings(max_examples=40)
def test_quantize_is_the_formula(dtype: str, data: st.DataObject) -> None:
    qmin, qmax = data.draw(reference.code_ranges(dtype))
    scale, zero_point = data.draw(reference.scales), data.draw(st.integers(qmin, qmax))
    values = data.draw(reference.values_around(scale, zero_point, qmin, qmax))
    x = torch.tensor(values, dtype=torch.float32)
    for rounding in ROUNDINGS:
        codes = numerics.quantize(x, scalar(scale), scalar(zero_point, torch.int32), qmin, qmax, rounding=rounding)
        assert codes.dtype == torch.int32
        assert codes.tolist() == [reference.quantize(v, scale, zero_point, qmin, qmax, rounding) for v in values]


@pytest.mark.parametrize("dtype", INT_TYPES)
@given(st.data())
def test_dequantize_is_the_formula(dtype: str, data: st.DataObject) -> None:
    kind = INT_TYPES[dtype]
    scale, zero_point = data.draw(reference.scales), data.draw(st.integers(kind.qmin, kind.qmax))
    codes = data.draw(st.lists(st.integers(kind.qmin, kind.qmax), max_size=12))
    x = numerics.dequantize(torch.tensor(codes, dtype=torch.int64), scalar(scale), scalar(zero_point, torch.int32))
    assert x.dtype == torch.float32
    assert x.tolist() == [reference.dequantize(q, scale, zero_point) for q in codes]


@pytest.mark.parametrize("dtype", reference.CODE_TYPES)
@given(st.data())
@settings(max_examples=10)
def test_every_code_survives_a_round_trip(dtype: str, data: st.DataObject) -> None:
    kind = INT_TYPES[dtype]
    # above, the dequantized codes would be infinite
    largest = float(np.float32(reference.FLOAT_MAX / (kind.qmax - kind.qmin + 1)))
    scale = data.draw(st.one_of(reference.scales.map(lambda s: min(s, largest)), st.just(largest)))
    zero_point = scalar(data.draw(st.integers(kind.qmin, kind.qmax)), torch.int32)
    codes = torch.arange(kind.qmin, kind.qmax + 1, dtype=torch.int32)
    real = numerics.dequantize(codes, scalar(scale), zero_point)
    assert torch.isfinite(real).all()
    for rounding in ROUNDINGS:
        again = numerics.quantize(real, scalar(scale), zero_point, kind.qmin, kind.qmax, rounding=rounding)
        assert torch.equal(again, codes)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_ties(rounding: numerics.Rounding) -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    codes = numerics.quantize(x, scalar(1.0), scalar(0, torch.int32), -128, 127, rounding=rounding)
    assert codes.tolist() == {"half_even": [-2, -2, 0, 0, 2, 2], "half_away": [-3, -2, -1, 1, 2, 3]}[rounding]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_half_away_does_not_round_the_largest_below_a_tie_up(value: float) -> None:
    x = torch.tensor([value, 0.49999997, -0.49999997, 8388607.5, -8388607.5], dtype=torch.float32)
    expected = [reference.round_half(Fraction(v), "half_away") for v in x.tolist()]
    assert numerics.round_half(x, "half_away").tolist() == expected


def test_rounding_keeps_infinities_and_nan() -> None:
    for rounding in ROUNDINGS:
        rounded = numerics.round_half(torch.tensor([math.inf, -math.inf, math.nan]), rounding)
        assert rounded[:2].tolist() == [math.inf, -math.inf]
        assert rounded[2].isnan()


def test_the_division_is_one_float32_division() -> None:
    # the product with the inverse falls on the other side of some ties
    generator = torch.Generator().manual_seed(1)
    s = torch.rand(20_000, generator=generator) + 0.1
    tie = (torch.randint(0, 60, s.shape, generator=generator) + 0.5) * s
    exact = numerics.quantize(tie, s, torch.zeros(s.shape, dtype=torch.int32), 0, 255, Granularity("per_channel"))
    assert torch.equal(exact, torch.round(tie / s).to(torch.int32))
    assert not torch.equal(exact, torch.round(tie * (1 / s)).to(torch.int32))


@pytest.mark.parametrize("dtype", reference.CODE_TYPES)
def test_infinities_saturate_and_nan_is_zero(dtype: str) -> None:
    kind = INT_TYPES[dtype]
    x = torch.tensor([math.inf, -math.inf, reference.FLOAT_MAX, -reference.FLOAT_MAX, math.nan])
    zero_point = kind.qmin + 1
    codes = numerics.quantize(x, scalar(1e-30), scalar(zero_point, torch.int32), kind.qmin, kind.qmax)
    assert codes.tolist() == [kind.qmax, kind.qmin, kind.qmax, kind.qmin, zero_point]


def test_int32_saturates_at_its_own_bounds() -> None:
    # float32(2**31 - 1) is 2**31, whose conversion to int32 would wrap around
    x = torch.tensor([3e9, -3e9, math.inf, -math.inf, 2147483520.0])
    codes = numerics.quantize(x, scalar(1.0), scalar(0, torch.int32), -(2**31), 2**31 - 1)
    assert codes.tolist() == [2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 2147483520]


@pytest.mark.parametrize("storage", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_dequantize_takes_any_integer_type(storage: torch.dtype) -> None:
    codes = torch.tensor([0, 5, 100], dtype=storage)
    assert numerics.dequantize(codes, scalar(0.5), scalar(120, torch.int32)).tolist() == [-60.0, -57.5, -10.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_rounded_to_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 41).to(dtype)
    scale, zero_point = scalar(0.01), scalar(7, torch.int32)
    expected = numerics.quantize(x.to(torch.float32), scale, zero_point, 0, 255)
    assert torch.equal(numerics.quantize(x, scale, zero_point, 0, 255), expected)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    codes = numerics.quantize(x, scalar(1.0), scalar(0, torch.int32), 0, 255)
    assert codes.shape == x.shape
    assert codes.dtype == torch.int32
    assert numerics.dequantize(codes, scalar(1.0), scalar(0, torch.int32)).shape == x.shape
    for axis in range(len(shape)):
        ones = torch.ones(shape[axis])
        per_channel = Granularity("per_channel", axis)
        assert numerics.quantize(x, ones, ones.to(torch.int32), 0, 255, per_channel).shape == x.shape


def place(granularity: Granularity, index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Which scale the element at `index` has."""
    if granularity.kind == "per_tensor":
        return 0
    axis = granularity.axis % len(shape)
    if granularity.kind == "per_channel":
        return index[axis]
    size = granularity.size or 1
    groups = [-(-n // size) if d == axis else n for d, n in enumerate(shape)]
    inside = [i // size if d == axis else i for d, i in enumerate(index)]
    return int(np.ravel_multi_index(inside, groups))


@given(st.data())
@settings(max_examples=100)
def test_every_element_is_quantized_with_its_own_scale(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    kind = data.draw(st.sampled_from(["per_tensor", "per_channel", "per_group"]))
    granularity = Granularity(kind, axis, data.draw(st.integers(1, 6)) if kind == "per_group" else None)
    indices = list(itertools.product(*(range(n) for n in shape)))
    count = 1 + max(place(granularity, i, shape) for i in indices)
    scale = torch.arange(1, count + 1) * 0.25
    zero_point = torch.arange(count, dtype=torch.int32) % 7 - 3
    x = torch.randn(shape) * 20
    codes = numerics.quantize(x, scale, zero_point, -100, 100, granularity)
    real = numerics.dequantize(codes, scale, zero_point, granularity)
    for i in indices:
        s, z = float(scale[place(granularity, i, shape)]), int(zero_point[place(granularity, i, shape)])
        assert int(codes[i]) == reference.quantize(float(x[i]), s, z, -100, 100)
        assert float(real[i]) == reference.dequantize(int(codes[i]), s, z)


@pytest.mark.parametrize(
    ("count", "shape", "granularity", "message"),
    [
        (2, (2, 3), Granularity(), "2 scales for a per-tensor encoding"),
        (2, (2, 3), Granularity("per_channel", 1), r"2 scales for 3 channels \(axis 1 of shape \(2, 3\)\)"),
        (1, (2, 3), Granularity("per_channel", 2), r"axis 2 of a tensor of shape \(2, 3\)"),
        (1, (), Granularity("per_channel", 0), "axis 0 of a tensor"),
        (1, (2, 3), Granularity("per_channel", -3), "axis -3 of a tensor"),
        (3, (2, 3), Granularity("per_group", 1, 2), "3 scales for groups of 2 along axis 1.*; give 4"),
    ],
)
def test_scales_that_do_not_fit(count: int, shape: tuple[int, ...], granularity: Granularity, message: str) -> None:
    with pytest.raises(EncodingError, match=message):
        numerics.quantize(torch.ones(shape), torch.ones(count), torch.zeros(count), 0, 255, granularity)
    with pytest.raises(EncodingError, match=message):
        numerics.dequantize(torch.ones(shape).int(), torch.ones(count), torch.zeros(count), granularity)


@given(st.data())
def test_the_representable_range_is_that_of_the_outermost_codes(data: st.DataObject) -> None:
    qmin, qmax = data.draw(reference.code_ranges(data.draw(st.sampled_from(reference.CODE_TYPES))))
    scale, zero_point = scalar(data.draw(st.floats(2.0**-100, 2.0**100, width=32))), scalar(qmin, torch.int32)
    low, high = numerics.representable_range(scale, zero_point, qmin, qmax)
    ends = numerics.dequantize(torch.tensor([qmin, qmax]), scale, zero_point)
    assert [float(low), float(high)] == ends.tolist()
