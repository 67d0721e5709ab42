"""AMCT's IFMR and HFMG against plain computations on the elements, or on the histogram."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qat import numerics
from qat.errors import QuantizationWarning, SchemeError
from qat.observers import make_observer
from qat.observers.hfmg import interval_errors, shrinking
from qat.scheme import PER_TENSOR, ObserverSpec, Scheme

AFFINE, SYMMETRIC = Scheme("uint8"), Scheme("int8", symmetric=True)


def elements(kind):
    normal = torch.randn(20000, generator=torch.Generator().manual_seed(9))
    return {
        "gaussian": normal,
        "relu": normal.relu(),
        "shifted": normal * 0.5 + 1,
        "negative": -normal.abs() * 3,
        "outlier": torch.cat([normal, torch.tensor([9.0, -7.0])]),
    }[kind]


KINDS = ["gaussian", "relu", "shifted", "negative", "outlier"]


def seen(name, x, **options):
    observer = make_observer(ObserverSpec(name, options), PER_TENSOR, None, "t")
    for part in x.split(3000):
        observer.observe(part)
    return observer


def reference_ifmr(x, symmetric, start=0.7, end=1.3, step=0.01, share=0.999999):
    """Losses of all candidates, and what they stand for: bounds, or scales."""
    ordered = np.sort(x.double().numpy())
    n = len(ordered)
    high = max(0.0, ordered[::-1][n - int(share * n)] if share < 1 else ordered[-1])
    low = min(0.0, ordered[n - int(share * n)] if share < 1 else ordered[0])
    multiples = start + step * np.arange(int((end - start) / step + 1e-9) + 1)
    found, losses = [], []
    for r in multiples:
        if symmetric:
            bound = r * max(high, -low)
            scale = bound / (127 if high >= -low else 128)
            q = np.clip(np.round(ordered / scale), -128, 127)
            found.append(scale)
        else:
            bound = r * high
            scale = (bound - low) / 255
            q = np.round(np.clip(ordered, low, bound) / scale)
            found.append(bound)
        losses.append(np.mean((q * scale - ordered) ** 2))
    return np.array(found), np.array(losses), low


@pytest.mark.parametrize("kind", KINDS)
def test_ifmr_affine_is_the_best_candidate(kind):
    x = elements(kind)
    bounds, losses, lowest = reference_ifmr(x, symmetric=False)
    low, high = seen("ifmr", x, mantissa_bits=10).range(AFFINE)
    assert float(low) == pytest.approx(lowest, rel=2e-3)
    nearest = np.abs(bounds - float(high)).argmin()
    assert bounds[nearest] == pytest.approx(float(high), rel=2e-3)
    # the bins do not know where exactly elements lie: candidates whose losses are that near may change places
    assert losses[nearest] <= losses.min() * 1.01


@pytest.mark.parametrize("kind", KINDS)
def test_ifmr_symmetric_divides_by_the_codes_of_the_larger_side(kind):
    x = elements(kind)
    scales, losses, _ = reference_ifmr(x, symmetric=True)
    scale, _ = numerics.range_to_scale(*seen("ifmr", x, mantissa_bits=10).range(SYMMETRIC), SYMMETRIC)
    nearest = np.abs(scales - float(scale)).argmin()
    assert scales[nearest] == pytest.approx(float(scale), rel=2e-3)
    assert losses[nearest] <= losses.min() * 1.01


def test_ifmr_of_few_elements_starts_from_the_extremes():
    x = torch.cat([torch.linspace(0, 1, 900), torch.tensor([5.0])])
    one = {"search_range_start": 1.0, "search_range_end": 1.0}
    with pytest.warns(QuantizationWarning, match=r"'t': it has fewer than 1000 elements"):
        assert float(seen("ifmr", x, **one).range(AFFINE)[1]) == 5.0
    more = torch.cat([x, torch.linspace(0, 1, 900)])
    # theirs leaves one element out, however many there are
    assert float(seen("ifmr", more, **one).range(AFFINE)[1]) == pytest.approx(1.0, rel=0.01)


@pytest.mark.filterwarnings("error::qat.errors.QuantizationWarning")
def test_ifmr_percentile_one_is_the_maximum():
    x = torch.cat([elements("gaussian"), torch.tensor([30.0])])
    options = {"search_range_start": 1.0, "search_range_end": 1.0}
    _, high = seen("ifmr", x, max_percentile=1.0, **options).range(AFFINE)
    assert float(high) == 30.0
    _, high = seen("ifmr", x, max_percentile=0.999, **options).range(AFFINE)
    assert 2.5 < float(high) < 4.0


def test_ifmr_two_sided_also_moves_the_lower_end():
    x = torch.cat([elements("gaussian"), torch.tensor([-9.0])])
    wide = {"max_percentile": 1.0, "min_percentile": 1.0, "search_range_start": 0.3}
    one, two = seen("ifmr", x, **wide), seen("ifmr", x, two_sided=True, **wide)
    assert float(one.range(Scheme("uint4"))[0]) == -9.0
    assert -6.0 < float(two.range(Scheme("uint4"))[0]) <= -2.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search_range_start": 1.2, "search_range_end": 0.9}, r"search_range_start 1\.2 .* is above search_range_end"),
        ({"search_step": 0.7}, r"search_step 0\.7 .* is longer than the range from 0\.7 to 1\.3"),
        ({"max_percentile": 0.5}, r"max_percentile .* is 0\.5; give a number in \(0\.5, 1\]"),
        ({"two_sided": 1}, r"two_sided .* is 1; give true or false"),
    ],
)
def test_ifmr_options_out_of_range(options, message):
    with pytest.raises(SchemeError, match=message):
        seen("ifmr", torch.ones(3), **options)


def test_ifmr_search_range_end_is_a_candidate():
    # 0.8 to 1.2 in hundredths is 39.99999 steps in floats; theirs leaves out the end there, which they say is in it
    x = torch.tensor([[0.0, 1.0]]).repeat(50, 1)
    observer = seen("ifmr", x.flatten(), search_range_start=0.8, search_range_end=1.2)
    assert observer._multiples().tolist() == pytest.approx([0.8 + 0.01 * i for i in range(41)])


# -- HFMG


def reference_shrinking(counts):
    """Step by step, without any shortcut."""
    bins, total = len(counts), float(counts.sum())
    step = max(np.ceil(total / 100000), 1)
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])
    first = last = a = b = 0
    path = [(0, bins)]
    while (a + 1) * step <= total + step and (b + 1) * step <= total + step:
        left = int((below <= (a + 1) * step).sum()) - first
        right = int((above <= (b + 1) * step).sum()) - last
        if left > right:
            first, a = first + left, a + 1
        else:
            last, b = last + right, b + 1
        if bins - first - last < max(1, bins // 4):
            break
        if path[-1] != (first, bins - last):
            path.append((first, bins - last))
    return path


@pytest.mark.parametrize("kind", ["triangle", "flat", "spike", "sparse"])
def test_hfmg_path_equals_the_steps(kind):
    generator = np.random.default_rng(1)
    counts = {
        "triangle": np.minimum(np.arange(64), 70 - np.arange(64)).astype(float),
        "flat": np.full(64, 3.0),
        "spike": np.concatenate([[5000.0], generator.integers(0, 30, 63).astype(float)]),
        "sparse": (generator.random(64) < 0.2) * generator.integers(1, 9, 64).astype(float),
    }[kind]
    assert [tuple(p) for p in shrinking(torch.from_numpy(counts)).tolist()] == reference_shrinking(counts)


@pytest.mark.parametrize("levels", [7, 15, 255])
def test_hfmg_errors_equal_a_fine_sum(levels):
    counts = torch.from_numpy(np.random.default_rng(2).integers(0, 50, 256).astype(float))
    intervals = torch.tensor([(0, 256), (10, 250), (100, 180)])
    points = (torch.arange(256 * 200) + 0.5).double() / 200
    weight = counts.repeat_interleave(200) / 200
    expected = []
    for first, end in intervals.tolist():
        step = (end - first) / levels
        nearest = ((points - first) / step).round().clamp(0, levels) * step + first
        expected.append(float((weight * (points - nearest).square()).sum()))
    # a sum of 200 points a bin misses the integral by its own width squared
    slack = float(counts.sum()) / 12 / 200**2
    assert interval_errors(counts, intervals, levels).tolist() == pytest.approx(expected, rel=1e-3, abs=2 * slack)


def test_hfmg_more_levels_than_bins_is_the_error_of_what_is_cut():
    counts = torch.ones(64, dtype=torch.float64)
    errors = interval_errors(counts, torch.tensor([(0, 64), (0, 32)]), 65535)
    assert float(errors[0]) < 64 / 12 * 1.1
    assert float(errors[1]) == pytest.approx(32.0**3 / 3, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["uint8", "uint4"])
def test_hfmg_is_not_worse_than_minmax(kind, dtype):
    x, how = elements(kind), Scheme(dtype)

    def error(low, high):
        scale, zero_point = numerics.range_to_scale(low, high, how)
        codes = numerics.quantize(x, scale, zero_point, *how.code_range)
        return float((numerics.dequantize(codes, scale, zero_point) - x).square().mean())

    low, high = seen("hfmg", x).range(how)
    # its levels go from end to end, those of the scheme through zero: that may cost a little
    assert error(low, high) <= error(x.min(), x.max()) * 1.02
    if dtype == "uint4" and kind == "outlier":
        assert error(low, high) < error(x.min(), x.max()) * 0.5


@pytest.mark.parametrize("bins", [1024, 2048, 4096, 8192])
def test_hfmg_takes_amcts_option(bins):
    observer = seen("hfmg_quantize", elements("outlier"), num_of_bins=bins)
    assert observer.options["bins"] == bins
    low, high = observer.range(Scheme("uint4"))
    assert -4.5 < float(low) < -2.0 < 2.0 < float(high) < 4.5
