"""KL against an independent, straightforward computation on the elements, as MNN's two passes do it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat import numerics
from qat.errors import QuantizationWarning
from qat.observers import make_observer, weight_range
from qat.observers.divergence import two_sided
from qat.observers.kl import START, kl_threshold
from qat.observers.linear import linear_counts
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

SYMMETRIC = Scheme("int8", symmetric=True)
BINS = 2048


def reference_costs(histogram, target):
    """The divergence for each threshold from `target` on, bin by bin, with fractions as floats, in float64."""
    d = np.asarray(histogram, dtype=np.float64)
    d = d / d.sum()
    costs = []
    for i in range(target, len(d)):
        p = d[:i].copy()
        p[i - 1] += d[i:].sum()
        expanded = np.zeros(i)
        for j in range(target):
            start, end = j * i / target, (j + 1) * i / target
            left, right = math.ceil(start), math.floor(end)
            parts = [(k, 1.0) for k in range(left, right)]
            parts += [(left - 1, left - start)] if left > start else []
            parts += [(right, end - right)] if right < end else []
            mass = sum(d[k] * share for k, share in parts)
            count = sum(share for k, share in parts if d[k] != 0)
            for k, share in parts:
                if d[k] != 0:
                    expanded[k] += mass / count * share
        both = (p != 0) & (expanded != 0)
        costs.append(
            float(np.sum(p[both] * np.log(p[both] / expanded[both]))) + int(np.sum((p != 0) & (expanded == 0)))
        )
    return costs


def reference_threshold(histogram, target):
    best, threshold = 10000.0, target
    for i, cost in enumerate(reference_costs(histogram, target)):
        if cost < best:
            best, threshold = cost, target + i
    return threshold


def mnn_histogram(x, bins=BINS):
    """Second pass of MNN: bins from the largest magnitude, small values skipped."""
    values = x.abs().double().numpy()
    largest = values.max()
    counted = values[values > 1e-6]
    index = np.minimum(np.floor(counted * (bins / largest)).astype(int), bins - 1)
    return np.bincount(index, minlength=bins).astype(np.float64), largest


def elements(kind, count=30000):
    g = torch.Generator().manual_seed(5)
    normal = torch.randn(count, generator=g)
    return {
        "gaussian": normal,
        "laplace": -torch.log(torch.rand(count, generator=g)) * normal.sign(),
        "relu": normal.relu(),
        "outlier": torch.cat([normal, torch.tensor([40.0])]),
        "few": normal[:700],
    }[kind]


KINDS = ["gaussian", "laplace", "relu", "outlier", "few"]


@pytest.mark.parametrize("kind", KINDS)
def test_threshold_on_mnns_histogram(kind):
    histogram, _ = mnn_histogram(elements(kind), 320)
    assert kl_threshold(torch.from_numpy(histogram), 32) == reference_threshold(histogram + START, 32)
    assert kl_threshold(torch.from_numpy(histogram), 32, start=0.0) == reference_threshold(histogram, 32)


def test_full_size_golden_vector():
    # 2048 bins of a triangular density with a far outlier: what the reference gives, computed once
    histogram = np.maximum(0.0, 900.0 - np.arange(BINS))
    histogram[2000] = 3.0
    assert kl_threshold(torch.from_numpy(histogram), 128) == reference_threshold(histogram + START, 128)


@given(
    st.lists(st.integers(0, 50), min_size=12, max_size=48).filter(lambda h: sum(h) > 0),
    st.integers(2, 8),
    st.sampled_from([0.0, START]),
)
@settings(max_examples=60, deadline=None)
def test_any_histogram(counts, target, start):
    from qat.observers.kl import _Prefix

    histogram = torch.tensor(counts, dtype=torch.float64)
    expected = reference_costs(np.array(counts) + start, target)
    found = _Prefix(histogram, start).costs(torch.arange(target, len(counts)), target)
    assert np.allclose(found.numpy(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_have_mnns_scale(kind):
    # the elements are at hand: no bin of floats stands between
    x = elements(kind)
    histogram, largest = mnn_histogram(x)
    threshold = kl_threshold(torch.from_numpy(histogram), 128)
    scale = (threshold + 0.5) * largest / BINS / 127
    how = SYMMETRIC.with_(observer=ObserverSpec("kl"))
    found, _ = numerics.range_to_scale(*weight_range(x, how, "w"), how)
    assert float(found) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_comes_within_two_bins_of_two(kind):
    x = elements(kind)
    observer = make_observer(ObserverSpec("kl"), PER_TENSOR, None, "t")
    for part in x.split(1000):
        observer.observe(part)
    histogram, largest = mnn_histogram(x)
    rebuilt = linear_counts(
        *(side.double() for side in (sum(observer.magnitudes()),)),
        *_edges(observer, largest),
        BINS,
    )[0].numpy()
    # no element is farther than two bins from its own: the cumulative counts differ by what lies in two bins
    mine, theirs = np.cumsum(rebuilt), np.cumsum(histogram) + (x.abs() <= 1e-6).sum().item()
    assert np.all(mine[2:] >= theirs[:-2] - 1e-6)
    assert np.all(mine[:-2] <= theirs[2:] + 1e-6)
    low, high = observer.range(SYMMETRIC)
    costs = reference_costs(histogram + START, 128)
    kept = round(float(max(-low, high)) / largest * BINS - 0.5)
    # the divergence is nearly flat around its least value
    assert costs[kept - 128] <= min(costs) * 1.05 + 1e-4


def _edges(observer, largest):
    from qat.observers.binning import magnitude_edges

    return magnitude_edges(observer.mantissa_bits), torch.zeros(1).double(), torch.tensor([largest]).double()


def test_small_tensors_are_not_searched_where_mnn_does_not():
    x = torch.randn(4, 8, 9, 11)
    bound = 2047.5 / 2048 * float(x.abs().max())
    for name, options, searched in (
        ("kl", {"min_area": 99}, True),
        ("kl", {"min_area": 100}, False),
        ("KL", {}, False),
        ("kl_divergence", {}, True),
    ):
        observer = make_observer(ObserverSpec(name, options), PER_TENSOR, None, "t")
        observer.observe(x)
        low, high = observer.range(SYMMETRIC)
        assert (max(-float(low), float(high)) == pytest.approx(bound)) != searched


def test_affine_tensors_of_one_sign_have_twice_the_target_bins():
    x = elements("relu")
    histogram, largest = mnn_histogram(x)
    how = Scheme("uint8", observer=ObserverSpec("kl"))
    low, high = weight_range(x, how, "w")
    assert float(low) == 0.0
    assert float(high) == pytest.approx((kl_threshold(torch.from_numpy(histogram), 256) + 0.5) * largest / BINS)
    mirrored = weight_range(-x, how, "w")
    assert (float(mirrored[0]), float(mirrored[1])) == (-float(high), 0.0)


def test_two_sided_search_cuts_both_tails_and_mirrors():
    counts = torch.zeros(BINS, dtype=torch.float64)
    counts[300:1400] = torch.linspace(0, 30, 1100).minimum(torch.linspace(30, 0, 1100)) * 20
    counts[0] = counts[-1] = 1.0
    low, high = two_sided(counts, 256, -3.0, 5.0)
    assert -3.0 < low < -1.5
    assert 1.5 < high < 4.0
    assert two_sided(counts.flip(0), 256, -5.0, 3.0) == (-high, -low)


@pytest.mark.parametrize(
    ("x", "scheme", "message"),
    [
        (torch.full((3, 4), 5e-6) * torch.arange(12).reshape(3, 4) / 11, SYMMETRIC, r"'t': its largest .* below 1e-05"),
        (torch.zeros(40, 40), SYMMETRIC, r"'t': its largest magnitude is below"),
        (torch.randn(100), SYMMETRIC, r"'t': it has fewer elements .* than target bins \(128\)"),
        (torch.randn(3000), Scheme("int16", symmetric=True), r"'t': 32768 target bins leave nothing to merge 2048"),
    ],
)
def test_what_has_no_threshold_is_minmax_with_a_warning(x, scheme, message):
    observer = make_observer(ObserverSpec("kl"), PER_TENSOR, None, "t")
    observer.observe(x)
    with pytest.warns(QuantizationWarning, match=message):
        low, high = observer.range(scheme)
    assert (float(low), float(high)) == (float(x.min()), float(x.max()))


def test_only_the_channels_that_need_it_fall_back():
    w = torch.randn(3, 900)
    w[1] = 0.0
    how = SYMMETRIC.with_(observer=ObserverSpec("kl"), granularity=Granularity("per_channel", axis=0))
    with pytest.warns(QuantizationWarning, match=r"'w' in 1 of 3 channels"):
        low, high = weight_range(w, how, "w")
    assert (float(low[1]), float(high[1])) == (0.0, 0.0)
    alone = how.with_(granularity=PER_TENSOR)
    assert (low[2], high[2]) == weight_range(w[2], alone, "w")
