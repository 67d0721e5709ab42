from __future__ import annotations

import pytest
import torch

from qat import numerics
from qat.errors import DataError, SchemeError
from qat.observers import OBSERVERS, channel_count, make_observer, weight_range
from qat.scheme import Granularity, ObserverSpec, Scheme

pytestmark = pytest.mark.filterwarnings("ignore::qat.errors.QuantizationWarning")


def scheme(name="minmax", dtype="int8", **granularity):
    kind = Granularity(**granularity) if granularity else Granularity()
    return Scheme(dtype, symmetric=True, granularity=kind, observer=ObserverSpec(name))


def squared_error(w, low, high, how):
    scale, zero_point = numerics.range_to_scale(low, high, how)
    codes = numerics.quantize(w, scale, zero_point, *how.code_range, how.granularity)
    restored = numerics.dequantize(codes, scale, zero_point, how.granularity)
    return (restored.double() - w.double()).square()


def test_minmax_is_exact():
    w = torch.randn(6, 4, 3, 3)
    low, high = weight_range(w, scheme(), "conv.weight")
    assert (low, high) == (w.min().double(), w.max().double())
    low, high = weight_range(w, scheme(kind="per_channel", axis=1), "conv.weight")
    assert torch.equal(low.float(), w.amin((0, 2, 3)))
    assert torch.equal(high.float(), w.amax((0, 2, 3)))


@pytest.mark.parametrize("name", sorted(OBSERVERS))
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_groups_have_the_order_of_expand_to(name, axis, size):
    w = torch.randn(6, 9, 7)
    how = scheme(name, kind="per_group", axis=axis, size=size)
    low, high = weight_range(w, how, "w")
    assert low.shape == high.shape == (channel_count(w.shape, how.granularity),)
    if name == "histogram":
        # a clipped group still has its elements nearest to zero inside
        outside = numerics.expand_to(torch.maximum(-low, high), w, how.granularity) < w.abs()
        assert float(outside.double().mean()) < 0.35
    elif name in ("minmax", "percentile", "moving_average", "mace", "hfmg"):
        # percentiles cut less than a whole element of so few
        for sign, bound in ((1, high), (-1, -low)):
            assert bool((sign * w <= numerics.expand_to(bound, w, how.granularity) + 0.01).all())
    else:
        # another order of the groups would miss some of these magnitudes by far more
        minmax = weight_range(w, scheme("minmax", kind="per_group", axis=axis, size=size), "w")
        largest = torch.maximum(-minmax[0], minmax[1])
        extent = torch.maximum(-low, high)
        assert bool((extent >= 0.4 * largest).all())
        assert bool((extent <= 2.0 * largest).all())
    if name == "minmax":
        observer = make_observer(how.observer, how.granularity, len(low), "w")
        observer.observe(w)
        assert all(torch.equal(a, b) for a, b in zip(observer.range(how), (low, high), strict=True))


@pytest.mark.parametrize("name", ["percentile", "moving_average"])
def test_equals_the_observer(name):
    w = torch.randn(1500, 8)
    how = scheme(name, kind="per_channel", axis=0)
    observer = make_observer(how.observer, how.granularity, 1500, "w")
    observer.observe(w)
    found = weight_range(w, how, "w")
    assert all(torch.equal(a, b) for a, b in zip(observer.range(how), found, strict=True))


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("shape", [(24, 1, 3, 3), (16, 32, 3, 3), (8, 4000)])
def test_histogram_is_never_worse_than_minmax_in_any_channel(dtype, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    how = scheme("histogram", dtype, kind="per_channel", axis=0)
    found = squared_error(w, *weight_range(w, how, "w"), how).flatten(1).mean(1)
    minmax = squared_error(w, *weight_range(w, scheme(kind="per_channel", axis=0), "w"), how).flatten(1).mean(1)
    assert bool((found <= minmax).all())
    if dtype == "int4":
        assert float(found.sum()) < 0.95 * float(minmax.sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("granularity", [{}, {"kind": "per_channel", "axis": 0}])
def test_nonfinite_weights_are_named(bad, granularity):
    w = torch.randn(4, 4)
    w[2, 1] = bad
    with pytest.raises(DataError, match=r"features\.0\.weight.* 1 of the observed"):
        weight_range(w, scheme(**granularity), "features.0.weight")


def test_what_has_no_range_is_named():
    with pytest.raises(DataError, match=r"fc\.weight.*\(0, 4\) is empty"):
        weight_range(torch.zeros(0, 4), scheme(), "fc.weight")
    with pytest.raises(DataError, match=r"fc\.weight.*no axis 2"):
        weight_range(torch.zeros(3, 4), scheme(kind="per_channel", axis=2), "fc.weight")
    with pytest.raises(SchemeError, match="histogram"):
        weight_range(torch.zeros(3, 4), scheme("histogran"), "fc.weight")


def test_parameters_and_half_precision():
    w = torch.nn.Parameter(torch.randn(4, 5).to(torch.bfloat16))
    low, high = weight_range(w, scheme(), "w")
    assert not low.requires_grad
    assert (float(low), float(high)) == (float(w.detach().min()), float(w.detach().max()))
