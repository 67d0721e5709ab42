"""Gradients and values of learned quantizers against the papers' formulas, as autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import quantizer_cases as cases
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat.quantizers import QUANTIZE, TRACK, FakeQuantize, Quantizer, fake_quantize
from qat.quantizers.method import FLOOR, at_least, power_of_two
from qat.scheme import Scheme

SEEDS = st.integers(0, 2**31)


def gradients(quantizer: Quantizer, x: Tensor, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the input and of each parameter."""
    x = x.clone().requires_grad_()
    y = quantizer(x)
    scale, zero_point = quantizer.grid()
    expected = fake_quantize(
        x.detach(), scale, zero_point, quantizer.qmin, quantizer.qmax, quantizer.scheme.granularity
    )
    assert torch.equal(y.detach(), expected)
    dx, *rest = torch.autograd.grad(y, [x, *quantizer.learned_parameters()], upstream)
    return dx, rest


def check(
    quantizer: Quantizer, x: Tensor, reference: Callable[..., Tensor], parameters: list[Tensor] | None = None
) -> None:
    """Compare with a function of the input and the parameters."""
    upstream = torch.linspace(-1.0, 1.5, x.numel()).reshape(x.shape)
    dx, found = gradients(quantizer, x, upstream)
    given_ones = quantizer.learned_parameters() if parameters is None else parameters
    leaves = [t.detach().double().requires_grad_() for t in (x, *given_ones)]
    expected = torch.autograd.grad(reference(*leaves), leaves, upstream.double())
    torch.testing.assert_close(dx.double(), expected[0], rtol=1e-5, atol=1e-7)
    for mine, theirs in zip(found, expected[1:], strict=True):
        size = float(upstream.abs().sum()) * 1e-5 * max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=size)


@settings(max_examples=25)
@given(cases.grids(), SEEDS)
def test_lsq(grid: tuple[Scheme, float, int], seed: int) -> None:
    scheme, scale, zero_point = grid
    q = cases.activation(scheme, "lsq", scale, zero_point)
    levels = scheme.code_range[1] - (0 if scheme.symmetric else scheme.code_range[0])
    x = cases.values_off_borders(seed, (3, 2, 4), scale, levels + 3)
    factor = cases.lsq_factor(x, levels)
    check(q, x, lambda x, s: cases.lsq(x, s, zero_point, q.qmin, q.qmax, factor))


@settings(max_examples=25)
@given(cases.grids(), SEEDS)
def test_lsq_plus(grid: tuple[Scheme, float, int], seed: int) -> None:
    scheme, scale, zero_point = grid
    assume(not scheme.symmetric)
    q = cases.activation(scheme, "lsq_plus", scale, zero_point)
    levels = scheme.code_range[1] - scheme.code_range[0]
    x = cases.values_off_borders(seed, (3, 8), scale, levels + 3)
    factor = cases.lsq_factor(x, levels)
    check(q, x, lambda x, s, b: cases.lsq_plus(x, s, b, q.qmin, q.qmax, factor))


@settings(max_examples=25)
@given(st.floats(0.01, 2.0), st.sampled_from([3, 15, 255]), SEEDS)
def test_pact(scale: float, levels: int, seed: int) -> None:
    q = cases.activation(Scheme("uint8", qmax=levels), "pact", scale, 0)
    x = cases.values_off_borders(seed, (24,), scale, levels + 3)
    check(q, x, lambda x, a: cases.pact(x, a, levels))


def test_pact_of_a_tensor_with_negative_values_moves_both_ends() -> None:
    q = cases.activation(cases.UINT4, "pact", 0.5, 5)
    assert q.learned_parameters()[0].item() == 5.0  # the upper end is the longer one: 10 steps of 0.5
    x = torch.tensor([7.0, 1.0, -1.0, -4.0])
    dx, (dalpha,) = gradients(q, x, torch.tensor([1.0, 1.0, 1.0, 10.0]))
    assert dx.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert dalpha.item() == pytest.approx(1.0 - 10.0 * 5 / 10)


@settings(max_examples=25)
@given(cases.grids(), st.integers(-6, 3), SEEDS)
def test_tqt(grid: tuple[Scheme, float, int], exponent: int, seed: int) -> None:
    scheme, _, zero_point = grid
    scale = 2.0**exponent
    q = cases.activation(scheme, "tqt", scale, zero_point)
    bits = {("uint4", 15): 4, ("int4", 7): 3, ("uint8", 255): 8, ("int8", 127): 8, ("uint8", 15): 4}[
        scheme.dtype, scheme.code_range[1]
    ]
    x = cases.values_off_borders(seed, (24,), scale, 300)
    check(q, x, lambda x, t: cases.tqt(x, t, zero_point, q.qmin, q.qmax, bits))


@settings(max_examples=25)
@given(cases.grids(), SEEDS)
def test_ulq(grid: tuple[Scheme, float, int], seed: int) -> None:
    scheme, scale, zero_point = grid
    assume(not scheme.symmetric)
    assume(scheme.code_range[0] < zero_point < scheme.code_range[1])
    q = cases.activation(scheme, "ulq", scale, zero_point)
    x = cases.values_off_borders(seed, (24,), scale, 300)
    check(q, x, lambda x, low, high: cases.ulq(x, low, high, q.qmin, q.qmax))


def test_ulq_with_a_fixed_lower_end() -> None:
    q = cases.activation(cases.UINT4, "ulq", 0.5, 4, fixed_min=True)
    assert [name for name, _ in q.named_parameters()] == ["clip_max"]
    x = torch.tensor([9.0, 1.1, -1.0, -4.0])
    check(q, x, lambda x, high: cases.ulq(x, torch.tensor(-2.0, dtype=torch.float64), high, 0, 15))
    with torch.no_grad():
        q.clip_max.mul_(1.5)
    scale, zero_point = q.grid()
    assert float((0 - zero_point) * scale) == pytest.approx(-2.0, abs=float(scale) / 2)


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([1.0, -0.3]))
def test_lsq_of_weights_by_channel_and_with_a_batch_norm(seed: int, gamma: float) -> None:
    bn = nn.BatchNorm1d(3)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([gamma, 2.0, 0.1]))
        bn.running_var.copy_(torch.tensor([1.0, 0.25, 4.0]))
    scale = torch.tensor([0.1, 0.2, 0.05])
    q = cases.weight(cases.CHANNELS, "lsq", torch.ones(3, 8), bn)
    q.load_encoding(cases.encoding(cases.CHANNELS, scale, [0, 0, 0]))
    factor = q.factor()
    assert factor is not None
    w = torch.stack([cases.values_off_borders(seed + c, (8,), float(scale[c]), 10) for c in range(3)]) / factor[:, None]
    f = factor.double()[:, None]

    def reference(w: Tensor, step: Tensor) -> Tensor:
        # the step is that of the weight, and folding makes it that of the folded one
        s = cases.scaled(step, 1 / math.sqrt(8 * 7))[:, None] * f.abs()
        return cases.on_grid(w * f, s, torch.zeros((), dtype=torch.float64), -7, 7) / f

    upstream = torch.linspace(-1.0, 1.5, 24).reshape(3, 8)
    leaf = w.clone().requires_grad_()
    dw, ds = torch.autograd.grad(q(leaf), [leaf, q.step], upstream)
    torch.testing.assert_close(q.step, scale / factor.abs())
    leaves = [w.double().requires_grad_(), q.step.detach().double().requires_grad_()]
    expected = torch.autograd.grad(reference(*leaves), leaves, upstream.double())
    torch.testing.assert_close(dw.double(), expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ds.double(), expected[1], rtol=1e-4, atol=1e-4 * float(upstream.abs().sum()))


@pytest.mark.parametrize("learning", [True, False])
def test_a_learned_grid_by_channel_follows_the_statistics_of_its_batch_norm(learning: bool) -> None:
    torch.manual_seed(0)
    bn, w = nn.BatchNorm1d(3), torch.randn(3, 8)
    q = cases.weight(cases.CHANNELS, "lsq", torch.ones(3, 8), bn)
    q.load_encoding(cases.encoding(cases.CHANNELS, torch.tensor([0.1, 0.2, 0.3]), [0, 0, 0]))
    q.set_phase(TRACK if learning else QUANTIZE)
    before, factor = (q.codes(w), q(w).detach()), q.factor()
    with torch.no_grad():
        bn.running_var.copy_(torch.tensor([0.5, 1.0, 7.0]))
        bn.weight.copy_(torch.tensor([-1.5, 1.0, 0.7]))
    if not learning:
        # standing still, the grid is that of the folded weight until it is told
        assert not torch.equal(q.codes(w)[0], before[0][0])
        q.follow_batch_norm(w, factor)
    after = q.codes(w), q(w).detach()
    sign = torch.tensor([-1, 1, 1])[:, None]
    assert torch.equal(after[0][0], sign * before[0][0])
    torch.testing.assert_close(after[1], before[1], rtol=1e-6, atol=0.0)
    scale = torch.tensor(before[0][1].scale) * (q.factor() / factor).abs()
    torch.testing.assert_close(torch.tensor(after[0][1].scale), scale)
    # what is kept when learning ends is what it was
    q.set_phase(QUANTIZE)
    assert torch.equal(q.codes(w)[0], after[0][0])
    torch.testing.assert_close(q(w).detach(), after[1], rtol=1e-6, atol=0.0)


def test_re_estimated_statistics_leave_learned_codes_alone() -> None:
    torch.manual_seed(0)
    bn, w = nn.BatchNorm1d(3), torch.randn(3, 8)
    q = cases.weight(cases.CHANNELS, "lsq", torch.ones(3, 8), bn)
    q.load_encoding(cases.encoding(cases.CHANNELS, torch.tensor([0.1, 0.2, 0.3]), [0, 0, 0]))
    q.set_phase(TRACK)
    codes, factor = q.codes(w)[0], q.factor()
    with torch.no_grad():
        bn.running_var.copy_(torch.tensor([0.5, 1.0, 7.0]))
    q.follow_batch_norm(w, factor)
    assert torch.equal(q.codes(w)[0], codes)
    torch.testing.assert_close(q.scale, torch.tensor([0.1, 0.2, 0.3]) * (q.factor() / factor).abs())


def test_a_learned_grid_of_a_whole_weight_is_that_of_the_folded_one() -> None:
    bn = nn.BatchNorm1d(3)
    q = cases.weight(cases.INT4, "lsq", torch.ones(3, 8), bn)
    q.load_encoding(cases.encoding(cases.INT4, torch.tensor([0.1]), [0]))
    with torch.no_grad():
        bn.running_var.copy_(torch.tensor([0.5, 1.0, 7.0]))
    assert float(q.grid()[0]) == pytest.approx(0.1)


def test_lsq_of_weights_by_group() -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 10)
    q = cases.weight(cases.GROUPS, "lsq", w)
    assert q.step.shape == (9,)
    leaf = w.clone().requires_grad_()
    dw, ds = torch.autograd.grad(q(leaf).square().sum(), [leaf, q.step])
    scales = q.scale.reshape(3, 3).repeat_interleave(4, 1)[:, :10].double()
    step = scales.clone().requires_grad_()
    ref = w.double().requires_grad_()
    out = cases.on_grid(ref, step, torch.zeros((), dtype=torch.float64), -7, 7)
    expected_dw, by_element = torch.autograd.grad(out.square().sum(), [ref, step])
    by_group = torch.nn.functional.pad(by_element, (0, 2)).reshape(9, 4).sum(1) / math.sqrt(30 / 9 * 7)
    torch.testing.assert_close(dw.double(), expected_dw, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ds.double(), by_group, rtol=1e-4, atol=1e-6)
    assert torch.equal(q(w), q.codes(w)[1].dequantize(q.codes(w)[0]))


def test_dorefa_transforms_the_weight_and_keeps_its_largest_magnitude() -> None:
    w = torch.tensor([[-2.0, 0.5], [1.0, 0.25]])
    q = cases.weight(cases.INT4, "dorefa", w)
    t = torch.tanh(w.double()) * 2.0 / math.tanh(2.0)
    codes, encoding = q.codes(w)
    assert encoding.scale == pytest.approx((2.0 / 7,))
    assert codes.tolist() == torch.round(t / (2.0 / 7)).tolist()
    leaf = w.clone().requires_grad_()
    y = q(leaf)
    assert torch.equal(y.detach(), encoding.dequantize(codes))
    (dw,) = torch.autograd.grad(y.sum(), leaf)
    # straight through the rounding, the ratio of the maxima being a constant
    torch.testing.assert_close(dw.double(), (1 - torch.tanh(w.double()) ** 2) * 2.0 / math.tanh(2.0), rtol=1e-5, atol=0)
    with pytest.warns(UserWarning, match="all zero"):
        dead = cases.weight(cases.INT4, "dorefa", torch.zeros(2, 2))
    assert dead(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]


def test_dorefa_clips_activations_to_a_range_that_stays() -> None:
    q = cases.activation(cases.UINT4, "dorefa", 0.1, 0)
    assert list(q.parameters()) == []
    x = torch.tensor([-1.0, 0.52, 9.0], requires_grad=True)
    y = q(x)
    assert y.tolist() == pytest.approx([0.0, 0.5, 1.5])
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 1.0, 0.0]
    assert q.encoding().scale == pytest.approx((0.1,))


@pytest.mark.parametrize(("init", "name"), [("mean", "lsq"), ("sigma", "lsq_plus")])
def test_initial_steps_of_the_papers(init: str, name: str) -> None:
    torch.manual_seed(1)
    w = torch.randn(4, 50) * torch.tensor([[0.1], [1.0], [2.0], [5.0]]) + 0.05
    q = cases.weight(cases.CHANNELS, name, w, init=init)
    if init == "mean":
        expected = 2 * w.abs().mean(1) / math.sqrt(7)
    else:
        mean, sigma = w.mean(1), w.std(1, correction=0)
        expected = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / 8
    torch.testing.assert_close(q.step.detach(), expected, rtol=1e-5, atol=0)
    assert q.codes(w)[1].method == f"{name}, {init}"


# -- positivity


@pytest.mark.parametrize("name", cases.LEARNED)
def test_scales_stay_positive_whatever_is_done_to_the_parameters(name: str) -> None:
    q = cases.activation(cases.UINT4, name, 0.25, 3)
    for value in (-1e9, -1.0, 0.0, 1e-30):
        with torch.no_grad():
            for parameter in q.parameters():
                parameter.fill_(value)
        scale, zero_point = q.grid()
        assert 0.0 < float(scale) < float("inf")
        assert 0 <= int(zero_point) <= 15
        assert bool(torch.isfinite(q(torch.randn(2, 3))).all())
        assert q.encoding().scale == (float(scale),)


def test_a_step_below_its_floor_comes_back() -> None:
    q = cases.activation(cases.UINT4, "lsq", 0.5, 0)
    with torch.no_grad():
        q.step.fill_(-3.0)
    assert float(q.grid()[0]) == 0.5 * FLOOR
    x = torch.tensor([[1.0, 2.0]])
    # what would push it further down is dropped, what pulls it up is not
    (down,) = torch.autograd.grad(q(x).sum(), q.step)
    (up,) = torch.autograd.grad(-q(x).sum(), q.step)
    assert down.item() == 0.0
    assert up.item() < 0.0


@settings(max_examples=50)
@given(st.floats(-126, 127))
def test_powers_of_two_are_exact(exponent: float) -> None:
    x = torch.tensor(exponent, requires_grad=True)
    y = power_of_two(x)
    assert float(y.detach()) == 2.0 ** math.ceil(float(x.detach()))
    assert torch.autograd.grad(y, x)[0].item() == pytest.approx(float(y.detach()) * math.log(2), rel=1e-6)


def test_at_least() -> None:
    value = torch.tensor([2.0, 0.5, 0.5], requires_grad=True)
    y = at_least(value, 1.0)
    assert y.tolist() == [2.0, 1.0, 1.0]
    assert torch.autograd.grad(y, value, torch.tensor([1.0, 1.0, -1.0]))[0].tolist() == [1.0, 0.0, -1.0]


# -- QDrop


@pytest.mark.parametrize("name", ["static", "lsq", "pact"])
def test_drop_keeps_float_values_with_its_probability(name: str) -> None:
    torch.manual_seed(0)
    q = cases.activation(cases.UINT4, name, 0.1, 5, drop=0.3)
    q.momentum = 1e-9
    x = torch.randn(100, 100, requires_grad=True)
    y = q(x)
    kept = (y == x).float()
    assert float(kept.mean()) == pytest.approx(0.3, abs=0.02)
    scale, zero_point = q.grid()
    quantized = fake_quantize(x.detach(), scale, zero_point, 0, 15)
    assert torch.equal(torch.where(kept.bool(), quantized, y), quantized)
    # a float value has the gradient 1 even where the grid saturates
    far = (x.detach() > 1.5) & kept.bool()
    assert far.any()
    assert torch.autograd.grad(y.sum(), x)[0][far].eq(1).all()
    q.eval()
    assert torch.equal(q(x), quantized)


def test_drop_is_of_a_fixed_range_too() -> None:
    q = FakeQuantize(cases.with_quantizer(cases.UINT4, "lsq", drop=1.0), "softmax", fixed=(0.0, 1.0)).train()
    q.set_phase(cases.TRACK)
    x = torch.rand(5, 5)
    assert list(q.parameters()) == []
    assert torch.equal(q(x), x)
    assert not torch.equal(q.eval()(x), x)
