"""The histogram observer's ranges against brute force over ranges, on the real elements and by the real formula."""

from __future__ import annotations

import pytest
import torch

from qat import numerics
from qat.observers import make_observer
from qat.observers.weights import weight_range
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

SPEC = ObserverSpec("histogram")
AFFINE8, AFFINE4 = Scheme("uint8", observer=SPEC), Scheme("uint4", observer=SPEC)
SYMMETRIC8, SYMMETRIC4 = Scheme("int8", True, observer=SPEC), Scheme("int4", True, observer=SPEC)
COUNT = 8000


def samples(kind):
    generator = torch.Generator().manual_seed(11)
    normal = torch.randn(COUNT, generator=generator)
    sign = torch.where(torch.randn(COUNT, generator=generator) > 0, 1.0, -1.0)
    laplace = -torch.log(torch.rand(COUNT, generator=generator)) * sign
    return {
        "gaussian": normal,
        "laplace": laplace,
        "relu": normal.relu(),
        "uniform": torch.rand(COUNT, generator=generator) * 2 - 0.5,
        "bimodal": torch.where(sign > 0, normal * 0.3 - 2, normal * 0.2 + 3),
        "outlier": torch.cat([normal, torch.tensor([60.0])]),
        "silu": torch.nn.functional.silu(normal * 3),
    }[kind]


KINDS = ["gaussian", "laplace", "relu", "uniform", "bimodal", "outlier", "silu"]


def error(x, low, high, scheme):
    """Mean squared error by the real formula; `low` and `high` are (K,) candidates."""
    scale, zero_point = numerics.range_to_scale(low, high, scheme)
    wide = x.expand(len(low), -1)
    by_row = Granularity("per_channel", axis=0)
    codes = numerics.quantize(wide, scale, zero_point, *scheme.code_range, by_row)
    restored = numerics.dequantize(codes, scale, zero_point, by_row)
    return (restored.double() - wide.double()).square().mean(1)


def observed(x, scheme):
    observer = make_observer(scheme.observer, PER_TENSOR, None, "x")
    observer.observe(x)
    return observer.range(scheme)


def brute_force(x, scheme):
    """The least error over a dense grid of ranges within the observed one, by a plain formula of its own."""
    low, high = float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
    qmin, qmax = scheme.code_range
    if scheme.symmetric:
        bound = max(-low, high)
        grids = [(step * bound / qmax, 0) for step in torch.linspace(0, 1, 301)[1:].tolist()]
    else:
        steps = [0.0, 0.01, 0.02, 0.04, *torch.linspace(0.08, 1, 17).tolist()]
        lows = [low * step for step in steps] if low < 0 else [0.0]
        highs = [high * step for step in steps] if high > 0 else [0.0]
        scales = [((b - a) / (qmax - qmin), a) for a in lows for b in highs if a < b]
        grids = [(s, min(max(round(qmin - a / s), qmin), qmax)) for s, a in scales]
    best = float("inf")
    out = torch.empty_like(x)
    for scale, zero in grids:
        torch.div(x, scale, out=out).round_().clamp_(qmin - zero, qmax - zero).mul_(scale).sub_(x)
        best = min(best, float(out.dot(out)) / len(x))
    return best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", [AFFINE8, AFFINE4, SYMMETRIC8, SYMMETRIC4], ids=lambda s: s.dtype)
def test_within_two_percent_of_brute_force_and_never_worse_than_minmax(kind, scheme):
    x = samples(kind)
    low, high = observed(x, scheme)
    found = float(error(x, low[None], high[None], scheme))
    minmax = float(error(x, x.min()[None], x.max()[None], scheme))
    assert found <= minmax
    assert found <= 1.02 * brute_force(x, scheme)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int8", True, observer=SPEC, qmin=-120, qmax=120),
        Scheme("int8", True, observer=SPEC, power_of_two=True),
        Scheme("uint8", observer=SPEC, qmax=15),
        Scheme("uint8", True, observer=SPEC),
        Scheme("uint16", observer=SPEC),
        Scheme("int16", True, observer=SPEC),
    ],
    ids=lambda s: s.describe().replace(" ", "-"),
)
@pytest.mark.parametrize("kind", ["gaussian", "relu", "outlier"])
def test_other_schemes_are_never_worse_than_minmax(scheme, kind):
    x = samples(kind)
    low, high = observed(x, scheme)
    found = error(x, low[None], high[None], scheme)
    minmax = error(x, x.min()[None], x.max()[None], scheme)
    assert float(found) <= float(minmax)


def test_power_of_two_scale_is_the_best_of_them():
    x, scheme = samples("laplace"), Scheme("int4", True, observer=SPEC, power_of_two=True)
    low, high = observed(x, scheme)
    bounds = 7 * 2.0 ** torch.arange(-8, 3, dtype=torch.float64)
    bounds = bounds[bounds <= 2 * x.abs().max()]
    assert float(error(x, low[None], high[None], scheme)) == float(error(x, -bounds, bounds, scheme).min())


def test_narrow_range_far_from_zero():
    x = samples("uniform") * 1e-4 + 3.0
    for scheme in (AFFINE8, SYMMETRIC8):
        low, high = observed(x, scheme)
        assert float(high) == pytest.approx(3.0, rel=1e-3)
        assert float(low) == float(x.min())


def test_values_on_the_grid_of_minmax_keep_it():
    x = torch.arange(256.0).repeat(16)
    low, high = observed(x, Scheme("uint8", observer=SPEC))
    assert (float(low), float(high)) == (0.0, 255.0)


def test_scales_of_data_do_not_matter():
    x = samples("laplace")
    low, high = observed(x, AFFINE4)
    for factor in (2.0**-30, 2.0**100):
        scaled = observed(x * factor, AFFINE4)
        assert float(scaled[0]) == pytest.approx(float(low) * factor, rel=1e-9)
        assert float(scaled[1]) == pytest.approx(float(high) * factor, rel=1e-9)


def test_range_does_not_depend_on_threads():
    observer = make_observer(SPEC, PER_TENSOR, None, "x")
    observer.observe(samples("gaussian"))
    first = observer.range(AFFINE8)
    torch.set_num_threads(2)
    assert observer.range(AFFINE8) == first


@pytest.mark.parametrize("scheme", [AFFINE8, AFFINE4, SYMMETRIC8, SYMMETRIC4], ids=lambda s: s.dtype)
def test_by_channel_equals_each_channel_alone(scheme):
    x = torch.stack([samples(k)[:COUNT] for k in KINDS], dim=1)
    x = x * 10.0 ** torch.arange(-3, 4)
    observer = make_observer(SPEC, Granularity("per_channel", axis=1), len(KINDS), "x")
    observer.observe(x)
    low, high = observer.range(scheme)
    for channel in range(len(KINDS)):
        alone = make_observer(ObserverSpec("histogram", {"mantissa_bits": 4}), PER_TENSOR, None, "x")
        alone.observe(x[:, channel])
        one_low, one_high = alone.range(scheme)
        # in company a channel may have more candidates than alone, and finer sums
        near = error(
            x[:, channel], torch.stack([low[channel], one_low]), torch.stack([high[channel], one_high]), scheme
        )
        assert float(near[0]) == pytest.approx(float(near[1]), rel=0.03)
        assert float(near[0]) <= 1.01 * float(error(x[:, channel], *(v[None] for v in x[:, channel].aminmax()), scheme))


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "bimodal", "outlier"])
@pytest.mark.parametrize("dtype", ["uint8", "uint4"])
def test_negative_weight_minimises_the_error_after_a_leaky_relu(kind, dtype):
    slope = 0.1
    x = samples(kind)
    # negative values reach further, as before an activation
    x = torch.where(x < 0, 3 * x, x)
    weighted = Scheme(dtype, observer=ObserverSpec("histogram", {"negative_weight": slope**2}))

    def error_after(low, high):
        scale, zero_point = numerics.range_to_scale(low, high, weighted)
        codes = numerics.quantize(x, scale, zero_point, *weighted.code_range)
        restored = numerics.dequantize(codes, scale, zero_point)
        leaky = torch.nn.functional.leaky_relu
        return float((leaky(restored, slope).double() - leaky(x, slope).double()).square().mean())

    low, high = observed(x, weighted)
    mine = error_after(low, high)
    least, most = float(x.min()), float(x.max())
    candidates = [(a, b) for a in torch.linspace(0, 1, 60).tolist() for b in torch.linspace(0, 1, 61)[1:].tolist()]
    best = min(error_after(torch.tensor(a * least), torch.tensor(b * most)) for a, b in candidates)
    assert mine <= 1.02 * best
    # and it is another range than the one that is best before the leaky ReLU
    assert mine < error_after(*observed(x, Scheme(dtype, observer=SPEC)))


def test_negative_weight_zero_is_a_range_for_a_relu():
    x = samples("gaussian")
    low, high = observed(x, Scheme("uint8", observer=ObserverSpec("histogram", {"negative_weight": 0.0})))
    # no code is spent on what the ReLU takes away
    assert int(numerics.range_to_scale(low, high, AFFINE8)[1]) == 0
    alone = observed(x.relu(), AFFINE8)
    torch.testing.assert_close(high, alone[1], rtol=0.02, atol=0)


def test_negative_weight_holds_for_tensors_at_hand():
    x = torch.where(samples("laplace") < 0, 4 * samples("laplace"), samples("laplace")).reshape(4, -1)
    scheme = Scheme("uint4", granularity=Granularity("per_channel", axis=0))
    plain = weight_range(x, scheme.with_(observer=SPEC), "w")
    weighted = weight_range(x, scheme.with_(observer=ObserverSpec("histogram", {"negative_weight": 0.01})), "w")
    assert bool((weighted[0] > plain[0]).all())
    assert bool((weighted[1] > plain[1]).all())
