"""Methods that yield a scale: `range_to_scale` gives back that very scale, of which the range is only the carrier."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat import numerics
from qat.observers import make_observer, overflow_rate, weight_range
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

INT8 = Scheme("int8", symmetric=True)


def scale_of(x, name, how):
    how = how.with_(observer=ObserverSpec(name))
    return numerics.range_to_scale(*weight_range(x, how, "w"), how)[0]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([-1.0, 2.0], 2 / 127),
        ([-2.0, 1.0], 2 / 128),
        ([-2.0, 2.0], 2 / 127),
        ([-2.0, 1.99], 2 / 128),
        ([-3.0, -1.0], 3 / 128),
        ([0.5, 0.25], 0.5 / 127),
    ],
)
def test_arq(values, scale):
    w = torch.tensor([values])
    assert float(scale_of(w, "arq", INT8)) == pytest.approx(scale, rel=1e-7)
    # without the code -128 there is nothing to divide by 128 for
    narrow = max(abs(v) for v in values) / 127
    assert float(scale_of(w, "arq", INT8.with_(qmin=-127))) == pytest.approx(narrow, rel=1e-7)
    both = torch.tensor([values, [1.0, -4.0]])
    by_channel = INT8.with_(granularity=Granularity("per_channel", axis=0))
    assert scale_of(both, "arq_quantize", by_channel).tolist() == pytest.approx([scale, 4 / 128], rel=1e-7)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "fl"),
    [
        # values of real ACUITY tables
        (-23.27, 19.82, "int16", 10),
        (-1.0, 0.9766, "int16", 15),
        # exact powers of two, and next to them
        (-0.5, 1.0, "int8", 7),
        (-0.5, 1.0000001, "int8", 6),
        (-0.5, 0.9999999, "int8", 7),
        (-4.0, 3.0, "int8", 5),
        (-0.25, 0.2, "int8", 9),
        (0.0, 300.0, "int8", -2),
        (-(2.0**-12), 0.0, "int8", 19),
    ],
)
def test_dynamic_fixed_point(low, high, dtype, fl):
    w = torch.tensor([low, high])
    assert fl == INT_BITS[dtype] - 1 - math.ceil(math.log2(float(w.abs().max())))
    for power_of_two in (False, True):
        how = Scheme(dtype, symmetric=True, power_of_two=power_of_two)
        assert float(scale_of(w, "dynamic_fixed_point", how)) == 2.0**-fl


INT_BITS = {"int8": 8, "int16": 16}


@given(st.floats(2.0**-20, 2.0**20, width=32), st.sampled_from([4, 8, 16]))
@settings(max_examples=200, deadline=None)
def test_dynamic_fixed_point_is_the_formula(largest, bits):
    w = torch.tensor([largest, -largest / 2])
    how = Scheme(f"int{bits}", symmetric=True, power_of_two=True)
    mantissa, exponent = math.frexp(largest)
    ceiling = exponent - 1 if mantissa == 0.5 else exponent
    assert float(scale_of(w, "dynamic_fixed_point", how)) == 2.0 ** -(bits - 1 - ceiling)


def test_power_of_two_alone_saturates_nothing():
    # the scheme's own rule differs from ACUITY's where the largest value is an exact power of two
    w = torch.tensor([1.0, -0.5])
    how = INT8.with_(power_of_two=True)
    assert float(scale_of(w, "minmax", how)) == 2.0**-6
    assert float(scale_of(w, "dynamic_fixed_point", how)) == 2.0**-7


@pytest.mark.parametrize("name", ["arq", "dynamic_fixed_point", "admm", "ifmr"])
@pytest.mark.parametrize("value", [1.0, -3.7, 7.0, -1e-3])
@pytest.mark.parametrize("how", [INT8, Scheme("uint8"), Scheme("int4", symmetric=True)], ids=lambda s: s.dtype)
def test_a_constant_tensor_comes_back(name, value, how):
    observer = make_observer(ObserverSpec(name), PER_TENSOR, None, "t")
    x = torch.full((5, 3), value)
    observer.observe(x)
    scale, zero_point = numerics.range_to_scale(*observer.range(how), how)
    back = numerics.dequantize(numerics.quantize(x, scale, zero_point, *how.code_range), scale, zero_point)
    # fixed point may be one of its steps, two of an affine scheme, short of the largest value
    assert float((back - x).abs().max()) <= float(scale) * (1.01 if how.symmetric else 2.01)


@pytest.mark.parametrize("name", ["arq", "dynamic_fixed_point", "admm", "ifmr"])
def test_all_zero_is_the_floor(name):
    observer = make_observer(ObserverSpec(name), PER_TENSOR, None, "t")
    observer.observe(torch.zeros(5, 3))
    for how in (INT8, Scheme("uint8")):
        low, high = observer.range(how)
        assert (float(low), float(high)) == (0.0, 0.0)
        assert float(numerics.range_to_scale(low, high, how)[0]) == numerics.SCALE_FLOOR


# -- the share of elements at the clamp


def test_overflow_rate_is_the_share_at_the_clamp():
    x = torch.tensor([-300.0, -127.0, -126.0, 0.0, 1.0, 126.4, 126.6, 500.0])
    one = torch.tensor(1.0), torch.tensor(0)
    assert overflow_rate(x, *one, INT8) == 4 / 8
    assert overflow_rate(x, *one, INT8.with_(qmin=-120, qmax=120)) == 6 / 8


def test_overflow_rate_of_affine_codes_leaves_zero_out():
    x = torch.tensor([0.0, 0.0, 0.0, 100.0, 255.0, 300.0])
    assert overflow_rate(x, torch.tensor(1.0), torch.tensor(0), Scheme("uint8")) == 2 / 6
    both = overflow_rate(torch.tensor([-10.0, 0.0, 5.0, 900.0]), torch.tensor(1.0), torch.tensor(4), Scheme("uint8"))
    assert both == 2 / 4


def test_overflow_rate_by_channel():
    x = torch.tensor([[1.0, 200.0], [1.0, 200.0]])
    how = INT8.with_(granularity=Granularity("per_channel", axis=0))
    assert overflow_rate(x, torch.tensor([1.0, 2.0]), torch.zeros(2, dtype=torch.int32), how) == 1 / 4
