"""MACE's percentiles over samples: the golden vectors of its own script, and numpy's percentile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.errors import DataError, QuantizationWarning
from qat.observers import make_observer
from qat.observers.samples import enhanced
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

SCHEME = Scheme("uint8")


def mace(name="t", granularity=PER_TENSOR, channels=None, **options):
    return make_observer(ObserverSpec("mace", options), granularity, channels, name)


def golden():
    """20 samples with minimum -4 (sample 7: -60) and maximum 4 (sample 3: 90)."""
    x = torch.zeros(20, 6)
    x[:, 0], x[:, 1] = -4.0, 4.0
    x[7, 0], x[3, 1] = -60.0, 90.0
    return x


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({}, -60.0, 90.0),
        ({"percentile": 5}, -6.8, 8.3),
        ({"enhance": True}, -60.0, 4.0),
        ({"percentile": 5, "enhance": True}, -6.8, 8.3),
    ],
)
def test_golden_vector(options, low, high):
    observer = mace(**options)
    for batch in golden().split(3):
        observer.observe(batch)
    found = observer.range(SCHEME)
    assert [float(bound) for bound in found] == pytest.approx([low, high], rel=1e-6)


@given(st.integers(1, 40), st.floats(0.0, 50.0), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_equals_numpy_over_samples(count, percentile, seed):
    x = torch.randn(count, 3, 5, generator=torch.Generator().manual_seed(seed)) + 0.2
    lows, highs = x.flatten(1).amin(1).double().numpy(), x.flatten(1).amax(1).double().numpy()
    observer = mace(percentile=percentile)
    observer.observe(x)
    low, high = observer.range(SCHEME)
    assert float(low) == pytest.approx(np.percentile(lows, percentile), rel=1e-12, abs=1e-15)
    assert float(high) == pytest.approx(np.percentile(highs, 100 - percentile), rel=1e-12, abs=1e-15)


def reference_enhanced(minima, maxima, low, high, ratio):
    """The rule as MACE's script goes through it."""
    a, b, n = sorted(minima), sorted(maxima, reverse=True), len(minima)
    ia = ib = 0
    for i in range(n):
        if a[i] + 0.1 > high:
            break
        if i > ia and ((a[i] - low) / (high - low)) / ((i - ia) / (n - ia)) > ratio:
            ia, low = i, a[i]
        if low + 0.1 > b[i]:
            break
        if i > ib and ((high - b[i]) / (high - low)) / ((i - ib) / (n - ib)) > ratio:
            ib, high = i, b[i]
    return low, high


@given(
    st.lists(st.tuples(st.floats(-100, 0), st.floats(0.5, 100)), min_size=2, max_size=30),
    st.sampled_from([1.5, 3.0, 10.0]),
)
@settings(max_examples=100, deadline=None)
def test_enhance_equals_the_script(pairs, ratio):
    minima, maxima = (sorted(side) for side in zip(*pairs, strict=True))
    maxima.reverse()
    expected = reference_enhanced(minima, maxima, minima[0], maxima[0], ratio)
    assert enhanced(minima, maxima, len(minima), minima[0], maxima[0], ratio) == expected


def test_by_channel_each_has_its_own_samples():
    x = torch.stack([golden(), golden() * 2], dim=1)
    observer = mace(granularity=Granularity("per_channel", axis=1), channels=2, percentile=5)
    observer.observe(x)
    low, high = observer.range(SCHEME)
    assert low.tolist() == pytest.approx([-6.8, -13.6], rel=1e-6)
    assert high.tolist() == pytest.approx([8.3, 16.6], rel=1e-6)


def test_beyond_the_capacity_only_what_needs_more_is_an_error():
    x = torch.randn(40, 5)
    x[3] = 50.0
    full, small = mace(percentile=2), mace("features.3", percentile=2, capacity=4)
    for observer in (full, small):
        observer.observe(x)
    # ranks 0 and 1 of 40 are among the 4 that are kept
    assert full.range(SCHEME) == small.range(SCHEME)
    many = mace("features.3", percentile=25, capacity=4)
    many.observe(x)
    with pytest.raises(
        DataError, match=r"'features\.3': mace needs the extremes of 11 of 40 .* capacity to 11 or more"
    ):
        many.range(SCHEME)
    enhance = mace("features.3", enhance=True, capacity=4)
    enhance.observe(x)
    with pytest.raises(DataError, match=r"'features\.3'.*40 of 40"):
        enhance.range(SCHEME)


def test_a_collapsed_range_is_minmax_with_a_warning():
    for x, options in ((torch.full((4, 3), 2.5), {}), (torch.tensor([[0.0, 1.0], [5.0, 6.0]]), {"percentile": 50})):
        observer = mace("features.3", **options)
        observer.observe(x)
        if options:
            low, high = observer.range(SCHEME)
            assert (float(low), float(high)) == (2.5, 3.5)
            continue
        with pytest.warns(QuantizationWarning, match=r"'features\.3': the 0 percentile .* its range is min-max"):
            low, high = observer.range(SCHEME)
        assert (float(low), float(high)) == (2.5, 2.5)
