"""Weights that are set by codes: exactly these codes, on a grid that stays, and still trainable."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat.errors import EncodingError
from qat.quantizers import QUANTIZE, LearnedRounding, WeightFakeQuantize
from qat.scheme import Granularity, ObserverSpec, Scheme

GRANULARITIES = [Granularity(), Granularity("per_channel", 0), Granularity("per_group", 1, 4)]


def quantizer_of(
    granularity: Granularity, dtype: str = "int4", *, norm: nn.Module | None = None, symmetric: bool = True
) -> WeightFakeQuantize:
    scheme = Scheme(dtype=dtype, symmetric=symmetric, granularity=granularity, observer=ObserverSpec("minmax"))
    return WeightFakeQuantize(scheme, "w", (6, 10), norm)


def norm_of(seed: int, spread: float) -> nn.BatchNorm1d:
    """A batch norm whose factors span many orders of magnitude, some negative, one zero."""
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm1d(6)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6, generator=generator) * 10 ** (spread * torch.randn(6, generator=generator)))
        norm.weight[0] = 0.0
        assert norm.running_var is not None
        norm.running_var.copy_(10 ** (spread * torch.randn(6, generator=generator)))
    return norm


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.sampled_from(GRANULARITIES),
    st.sampled_from(["int4", "uint4", "int8", "uint8", "int16"]),
    st.floats(0, 2),
    st.booleans(),
)
def test_the_codes_are_exactly_those_that_were_set(
    seed: int, granularity: Granularity, dtype: str, spread: float, folded: bool
) -> None:
    q = quantizer_of(granularity, dtype, norm=norm_of(seed, spread) if folded else None, symmetric="u" not in dtype)
    q.set_phase(QUANTIZE)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 10, generator=generator)
    before = q.codes(weight)[1]
    codes = torch.randint(q.qmin, q.qmax + 1, (6, 10), generator=generator, dtype=torch.int32)
    q.set_codes(weight, codes, "test")
    found, encoding = q.codes(weight)
    assert torch.equal(found, codes)
    assert (encoding.scale, encoding.zero_point) == (before.scale, before.zero_point)
    assert (encoding.provenance, encoding.method) == ("ptq", "test")
    # what the layer computes with is on the grid too
    torch.testing.assert_close(q(weight), weight, rtol=1e-6, atol=0)


def test_the_grid_no_longer_follows_the_weight_and_survives_saving() -> None:
    q, weight = quantizer_of(Granularity("per_channel", 0)), torch.randn(6, 10)
    assert q.follows
    codes = torch.ones(6, 10, dtype=torch.int32)
    q.set_codes(weight, codes, "test")
    assert not q.follows
    other = quantizer_of(Granularity("per_channel", 0))
    other.load_state_dict(q.state_dict())
    assert torch.equal(other.codes(weight)[0], codes)
    assert other.codes(weight)[1] == q.codes(weight)[1]


def test_codes_on_another_scale() -> None:
    q, weight = quantizer_of(Granularity("per_channel", 0)), torch.randn(6, 10)
    scale, codes = torch.linspace(0.1, 0.6, 6), torch.randint(-8, 8, (6, 10), dtype=torch.int32)
    q.set_codes(weight, codes, "test", scale=scale)
    found, encoding = q.codes(weight)
    assert torch.equal(found, codes)
    assert torch.equal(torch.tensor(encoding.scale), scale)
    assert encoding.min is None
    torch.testing.assert_close(weight, codes * scale[:, None])


@pytest.mark.parametrize(
    "scale", [torch.ones(5), torch.tensor([1.0, 1, 0, 1, 1, 1]), torch.tensor([1.0, 1, torch.inf, 1, 1, 1])]
)
def test_a_scale_that_does_not_fit(scale: Tensor) -> None:
    q, weight = quantizer_of(Granularity("per_channel", 0)), torch.randn(6, 10)
    before = weight.clone()
    with pytest.raises(
        EncodingError, match=r"the scale of 'w' is not of shape \(6,\), or not positive and finite; give one that is"
    ):
        q.set_codes(weight, torch.ones(6, 10, dtype=torch.int32), "test", scale=scale)
    assert torch.equal(weight, before)
    assert q.follows


def test_refreshing_keeps_the_grid_until_the_weight_moves() -> None:
    q, weight = quantizer_of(Granularity("per_channel", 0)), torch.randn(6, 10)
    q.set_codes(weight, torch.ones(6, 10, dtype=torch.int32), "test")
    scale = q.scale.clone()
    q.refresh(weight)
    assert torch.equal(q.scale, scale)
    q.refresh(weight * 1.01)
    assert not torch.equal(q.scale, scale)
    assert q.follows


def test_training_goes_on_from_the_codes() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(10, 6)
    q = quantizer_of(Granularity("per_channel", 0))
    nn.utils.parametrize.register_parametrization(layer, "weight", q)
    original = layer.parametrizations.weight.original  # type: ignore[union-attr,union-attr]
    q.refresh(original)
    q.set_phase(QUANTIZE)
    codes = q.codes(original)[0]
    q.set_codes(original, codes, "test")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        layer(torch.randn(8, 10)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(q.codes(original)[0], codes)


@pytest.mark.parametrize(
    "codes", [torch.full((6, 10), 8), torch.full((6, 10), -9), torch.zeros(6, 9, dtype=torch.int32)]
)
def test_codes_that_do_not_fit(codes: Tensor) -> None:
    q, weight = quantizer_of(Granularity()), torch.randn(6, 10)
    before = weight.clone()
    with pytest.raises(EncodingError, match=r"for 'w' of shape \(6, 10\); give one in \[-8, 7\] for each weight"):
        q.set_codes(weight, codes, "test")
    assert torch.equal(weight, before)
    assert q.follows


def test_a_dtype_that_cannot_hold_the_codes() -> None:
    q, weight = quantizer_of(Granularity(), "int16"), torch.randn(6, 10).to(torch.bfloat16)
    with pytest.raises(
        EncodingError, match=r"'w' in torch\.bfloat16 cannot hold its codes; convert the model to float32"
    ):
        q.set_codes(weight, torch.full((6, 10), 12345), "test")


# -- the learned rounding


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("folded", [False, True])
def test_a_learned_rounding_starts_at_the_float_weight(granularity: Granularity, folded: bool) -> None:
    torch.manual_seed(0)
    q, weight = quantizer_of(granularity, norm=norm_of(1, 0.5) if folded else None), torch.randn(6, 10)
    rounding = LearnedRounding(*q.steps(weight), (q.qmin, q.qmax))
    assert bool(((rounding.weight() - weight).abs() <= 1e-5 * rounding.step.abs() + 1e-5).all())
    q.set_phase(QUANTIZE)
    q.learn_rounding(rounding)
    assert torch.equal(q(weight), rounding.weight())
    assert not [key for key in q.state_dict() if "rounding" in key]
    q.learn_rounding(None)
    torch.testing.assert_close(q(weight), weight, rtol=0, atol=float(q.steps(weight)[1].abs().max()))


def test_a_learned_rounding_has_the_nearest_codes_at_first_and_neighbours_always() -> None:
    torch.manual_seed(0)
    q, weight = quantizer_of(Granularity()), torch.randn(6, 10)
    rounding = LearnedRounding(*q.steps(weight), (q.qmin, q.qmax))
    assert torch.equal(rounding.codes(), q.codes(weight)[0])
    with torch.no_grad():
        rounding.logits.normal_(std=10)
    codes, steps = rounding.codes(), q.steps(weight)[0]
    assert bool(((codes == steps.floor()) | (codes == steps.floor() + 1)).all())


def test_indecision_counts_the_undecided() -> None:
    q, weight = quantizer_of(Granularity()), torch.randn(6, 10)
    rounding = LearnedRounding(*q.steps(weight), (q.qmin, q.qmax))
    with torch.no_grad():
        rounding.logits.copy_(torch.tensor([20.0, -20.0, 0.0]).repeat(20).reshape(6, 10))
    assert float(rounding.indecision(2.0).detach()) == pytest.approx(20, abs=1e-4)
    copied = copy.deepcopy(rounding)
    assert torch.equal(copied.codes(), rounding.codes())
