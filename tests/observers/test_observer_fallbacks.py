"""Data that a method has too little to go on: a stated fallback, with a warning that names the tensor, or an error."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qat
from qat import numerics
from qat.errors import DataError, QuantizationWarning
from qat.observers import OBSERVERS, make_observer, weight_range
from qat.quantizers import FakeQuantize
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

NAMES = sorted(OBSERVERS)
SCHEMES = [Scheme("uint8"), Scheme("int8", symmetric=True), Scheme("int4", symmetric=True), Scheme("uint16")]


def observed(name, x, how):
    observer = make_observer(ObserverSpec(name), PER_TENSOR, None, "features.3")
    observer.observe(x)
    return observer.range(how)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", SCHEMES, ids=lambda s: s.dtype)
@pytest.mark.filterwarnings("ignore::qat.errors.QuantizationWarning")
def test_zero_and_everything_near_comes_back(name, how):
    """Zero is exact, and a tensor of one sign, of one element or of few has a range that is of use."""
    cases = {
        "negative": -torch.rand(500, 4) - 0.5,
        "single": torch.tensor([-0.7]),
        "pair": torch.tensor([[0.2], [3.0]]),
        "offset": torch.rand(500, 4) + 10.0,
    }
    for case, x in cases.items():
        low, high = observed(name, x, how)
        scale, zero_point = numerics.range_to_scale(low, high, how)
        codes = numerics.quantize(torch.cat([x.flatten(), torch.zeros(1)]), scale, zero_point, *how.code_range)
        back = numerics.dequantize(codes, scale, zero_point)
        assert float(back[-1]) == 0.0
        assert torch.isfinite(back).all()
        if how.int_type.bits >= 8:
            assert float((back[:-1] - x.flatten()).abs().mean()) <= 0.2 * float(x.abs().max()), case


@pytest.mark.parametrize("name", NAMES)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.sampled_from(SCHEMES),
)
@settings(max_examples=20, deadline=None)
def test_any_data_have_a_finite_range_whose_grid_holds_zero(name, values, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantizationWarning)
        low, high = observed(name, torch.tensor(values), how)
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert low <= high
    scale, zero_point = numerics.range_to_scale(low, high, how)
    assert how.code_range[0] <= int(zero_point) <= how.code_range[1]
    assert float(numerics.dequantize(zero_point, scale, zero_point)) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_all_zero_gets_the_floor_and_is_named(name):
    quantizer = FakeQuantize(Scheme("uint8", observer=ObserverSpec(name)), "features.3")
    quantizer.observer.observe(torch.zeros(64, 8))
    with pytest.warns(QuantizationWarning, match=r"'features\.3' is all zero"):
        quantizer.finish()
    assert float(quantizer.scale) == numerics.SCALE_FLOOR


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(name, bad):
    quantizer = FakeQuantize(Scheme("uint8", observer=ObserverSpec(name)), "features.3")
    quantizer.observer.observe(torch.tensor([[1.0, bad], [2.0, 0.5]]))
    with pytest.raises(DataError, match=r"'features\.3': 1 of the observed values are nan or inf"):
        quantizer.finish()
    how = Scheme("int8", True, Granularity("per_channel", axis=0), ObserverSpec(name))
    with pytest.raises(DataError, match=r"'fc\.weight': 1 of the observed values"):
        weight_range(torch.tensor([[1.0, bad], [2.0, 0.5]]), how, "fc.weight")


def test_the_public_call_names_the_tensor():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    x = torch.full((64, 3, 8, 8), 0.5)
    scheme = {"activations": {"observer": "mace"}}
    qmodel = qat.prepare(model, x[:2], target=qat.load_target("arm-cpu"), scheme=scheme)
    with pytest.warns(QuantizationWarning, match=r"'input': the 0 percentile of sample minima"):
        qat.calibrate(qmodel, [x])
