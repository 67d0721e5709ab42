from __future__ import annotations

import pytest
import torch

from qat.observers import make_observer
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

SCHEME = Scheme("uint8")


def bounds(x, percentile=None, granularity=PER_TENSOR, channels=None, **options):
    if percentile is not None:
        options["percentile"] = percentile
    observer = make_observer(ObserverSpec("percentile", options), granularity, channels, "x")
    observer.observe(x)
    return observer.range(SCHEME)


def samples(kind):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20000, generator=generator)
    return {
        "gaussian": x,
        "relu": x.relu(),
        "shifted": x * 0.01 + 5.0,
        "negative": -x.abs() - 2.0,
        "scales": x * 10.0 ** torch.randint(-8, 8, x.shape, generator=generator),
    }[kind]


@pytest.mark.parametrize("kind", ["gaussian", "relu", "shifted", "negative", "scales"])
@pytest.mark.parametrize("percentile", [60.0, 95.0, 99.0, 99.9, 99.99])
def test_close_to_the_sorted_elements(kind, percentile):
    x = samples(kind)
    low, high = bounds(x, percentile)
    ordered = x.sort().values.double()
    # between the neighbours of that rank, give or take the width of a bin there
    rank = percentile / 100 * len(x)
    for bound, values in ((high, ordered), (-low, -ordered.flip(0))):
        below = values[max(0, int(rank) - 1)]
        above = values[min(len(x) - 1, int(rank) + 1)]
        slack = 2.0**-7
        least, most = below - below.abs() * slack - 1e-38, above + above.abs() * slack + 1e-38
        assert float(least) <= float(bound) <= float(most)


def test_one_hundred_is_exactly_min_and_max():
    x = samples("gaussian")
    assert bounds(x, 100) == (x.min().double(), x.max().double())


def test_default_cuts_one_element_in_ten_thousand():
    x = torch.cat([torch.rand(99_995), torch.full((5,), 1000.0)])
    low, high = bounds(x)
    assert 0.0 <= float(low) < 0.001
    assert 0.99 < float(high) <= 1.0
    # a larger share of outliers is no longer cut
    assert float(bounds(torch.cat([x, torch.full((15,), 1000.0)]))[1]) > 900


def test_many_equal_elements():
    x = torch.cat([torch.zeros(1000), torch.full((9,), 2.0), torch.tensor([-7.0])])
    low, high = bounds(x, 99.0)
    assert float(low) == pytest.approx(0.0, abs=1e-30)
    assert float(high) == pytest.approx(0.0, abs=1e-30)


def test_finer_bins_come_closer():
    x = torch.rand(4000) ** 3
    exact = float(x.double().quantile(0.97))
    coarse, fine = (abs(float(bounds(x, 97.0, mantissa_bits=bits)[1]) - exact) for bits in (0, 10))
    assert fine < coarse
    assert fine < 2.0**-10 * exact


def test_by_channel():
    x = torch.randn(3000, 4) * torch.tensor([1e-3, 1.0, 10.0, 1e5])
    low, high = bounds(x, 99.0, Granularity("per_channel", axis=1), 4)
    for channel in range(4):
        alone = bounds(x[:, channel], 99.0, mantissa_bits=4)
        assert (low[channel], high[channel]) == alone
