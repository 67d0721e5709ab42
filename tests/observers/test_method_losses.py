"""Lp, SQNR and the refinement against brute force on the elements, by the real formula."""

from __future__ import annotations

import pytest
import torch

from qat import numerics
from qat.observers import make_observer
from qat.observers.binning import magnitude_edges
from qat.observers.density import Counts
from qat.observers.refine import refine_range
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

SCHEMES = [Scheme("uint4"), Scheme("int4", symmetric=True), Scheme("int8", symmetric=True)]
BY_ROW = Granularity("per_channel", axis=0)


def elements(kind):
    g = torch.Generator().manual_seed(4)
    normal = torch.randn(8000, generator=g)
    return {
        "gaussian": normal,
        "relu": normal.relu(),
        "laplace": -torch.log(torch.rand(8000, generator=g)) * normal.sign(),
        "outlier": torch.cat([normal, torch.tensor([30.0])]),
    }[kind]


KINDS = ["gaussian", "relu", "laplace", "outlier"]


def cost(x, low, high, how, power=2.0, gamma=1.0):
    """The cost of K candidate ranges, (K,)."""
    scale, zero_point = numerics.range_to_scale(low, high, how)
    wide = x.expand(len(scale), -1)
    restored = numerics.dequantize(
        numerics.quantize(wide, scale, zero_point, *how.code_range, BY_ROW), scale, zero_point, BY_ROW
    )
    error = (restored.double() - wide.double()).abs() ** power
    if gamma != 1.0:
        ends = numerics.representable_range(scale, zero_point, *how.code_range)
        beyond = (wide < ends[0][:, None]) | (wide > ends[1][:, None])
        error = torch.where(beyond, gamma * error, error)
    return error.mean(1)


def least(x, how, **options):
    low, high = x.min().clamp(max=0).double(), x.max().clamp(min=0).double()
    shares = torch.logspace(-2, 0, 60, dtype=torch.float64)
    if how.symmetric:
        bound = torch.maximum(-low, high) * shares
        return float(cost(x, -bound, bound, how, **options).min())
    shares = torch.logspace(-2, 0, 25, dtype=torch.float64)
    pairs = torch.cartesian_prod(low * shares, high * shares)
    return float(torch.cat([cost(x, *part.unbind(1), how, **options) for part in pairs.split(200)]).min())


def found(name, x, how, **options):
    observer = make_observer(ObserverSpec(name, options), PER_TENSOR, None, "t")
    observer.observe(x)
    return observer.range(how)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", SCHEMES, ids=lambda s: s.dtype)
@pytest.mark.parametrize("p", [1.0, 2.4, 4.0])
def test_lp_is_as_good_as_brute_force(kind, how, p):
    x = elements(kind)
    low, high = found("lp", x, how, p=p, mantissa_bits=7)
    assert float(cost(x, low[None], high[None], how, power=p)) <= 1.03 * least(x, how, power=p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", SCHEMES, ids=lambda s: s.dtype)
def test_sqnr_is_as_good_as_brute_force(kind, how):
    x = elements(kind)
    low, high = found("sqnr", x, how, mantissa_bits=7)
    assert float(cost(x, low[None], high[None], how, gamma=3.0)) <= 1.03 * least(x, how, gamma=3.0)


def test_what_weighs_more_widens_the_range():
    x = elements("laplace")
    how = Scheme("int4", symmetric=True)
    widths = [float(found("lp", x, how, p=p)[1]) for p in (1.0, 2.0, 4.0)]
    assert widths[0] < widths[1] < widths[2]
    assert float(found("sqnr", x, how, gamma=1.0)[1]) < float(found("sqnr", x, how, gamma=10.0)[1])


def test_lp_two_is_the_histogram_observer():
    x = elements("laplace")
    how = Scheme("int4", symmetric=True)
    lp, mse = found("lp", x, how, p=2.0, mantissa_bits=7), found("mse", x, how)
    assert float(lp[1]) == pytest.approx(float(mse[1]), rel=0.02)


@pytest.mark.parametrize("start", ["minmax", "percentile", "mean"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", SCHEMES, ids=lambda s: s.dtype)
def test_mle_is_never_worse_than_where_it_starts(start, kind, how):
    x = elements(kind)
    low, high = found("mle", x, how, start=start)
    minmax = x.min().double(), x.max().double()
    begin = {"minmax": minmax, "percentile": found("percentile", x, how)}.get(start)
    if begin is None:
        mean = 4 * float(x.abs().double().mean())
        begin = torch.tensor(max(float(x.min()), -mean)).double(), torch.tensor(min(float(x.max()), mean)).double()
    mine = float(cost(x, low[None], high[None], how))
    assert mine <= 1.02 * float(cost(x, begin[0][None], begin[1][None], how))
    # and near the least error there is, unless it began far away on the other side of a worse one
    assert mine <= 1.25 * least(x, how)


def test_refining_any_range():
    x = elements("gaussian")
    observer = make_observer(ObserverSpec("histogram"), PER_TENSOR, None, "t")
    observer.observe(x)
    negative, positive = (side.double() for side in observer.magnitudes())
    counts = Counts(negative, positive, magnitude_edges(7), x.min().double()[None], x.max().double()[None])
    how = Scheme("uint4")
    start = torch.tensor([-0.3]).double(), torch.tensor([9.0]).double()
    low, high = refine_range(counts, *start, how)
    assert float(cost(x, low, high, how)) <= 1.1 * least(x, how)
    assert float(x.min()) <= float(low) < -1.5 < 1.5 < float(high) <= float(x.max())
