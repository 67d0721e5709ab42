"""Weights on learned grids with the factor of a batch norm: one operator equals the path of PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import same_bits
from torch import Tensor, nn

from qat import native
from qat.native import BatchNormFactor
from qat.quantizers import TRACK, WeightFakeQuantize, weight
from qat.scheme import PER_TENSOR, Granularity, QuantizerSpec, Scheme


@st.composite
def cases(draw: st.DrawFn) -> tuple[WeightFakeQuantize, Tensor]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channel_axis = 1 if groups > 1 else draw(st.sampled_from([0, 0, 1]))
    spatial = draw(st.sampled_from([(1,), (1, 1), (3, 3)]))
    shape = (draw(st.integers(1, 24)) * groups, draw(st.integers(1, 40)), *spatial)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(shape, generator=generator)
    order = draw(st.permutations(range(w.dim())))
    if draw(st.booleans()):  # the same values in another order of memory
        w = w.permute(order).contiguous().permute([order.index(d) for d in range(w.dim())])
    symmetric = draw(st.sampled_from([True, True, False]))
    name = draw(st.sampled_from(["lsq", "lsq_plus", "tqt", "ulq"]))
    granularity = draw(
        st.sampled_from([PER_TENSOR, Granularity("per_channel", channel_axis), Granularity("per_channel", 0)])
    )
    scheme = Scheme("int4", symmetric=symmetric, granularity=granularity, quantizer=QuantizerSpec(name))
    bn = nn.BatchNorm2d(w.shape[channel_axis] * groups, affine=draw(st.booleans()), eps=1e-3)
    assert bn.running_var is not None
    bn.running_var.copy_(torch.rand(bn.num_features, generator=generator) * 4)
    if bn.affine:
        with torch.no_grad():
            bn.weight.copy_(torch.randn(bn.num_features, generator=generator))
            bn.weight[::3] = draw(st.sampled_from([0.0, -0.0, 1.0]))
    quantizer = WeightFakeQuantize(scheme, "w", w.shape, bn, channel_axis=channel_axis, groups=groups)
    quantizer.refresh(w)
    quantizer.set_phase(TRACK)
    with torch.no_grad():  # some codes are clamped
        for parameter in quantizer.parameters():
            parameter.mul_(0.7) if name != "tqt" else parameter.sub_(1)
    if draw(st.booleans()):
        w.flatten()[:: draw(st.integers(1, 7))] = draw(st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan]))
    return quantizer, w.to(draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])))


def both(quantizer: WeightFakeQuantize, w: Tensor) -> list[list[Tensor]]:
    """Value, and gradients of the weight and the parameters, native and in PyTorch."""
    upstream = torch.linspace(-1.0, 1.5, w.numel()).reshape(w.shape).to(w.dtype)
    results = []
    for path in (weight.is_for_native, lambda *_, **__: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weight, "is_for_native", path)
            patch.setattr("qat.quantizers.learned.is_for_native", path)
            leaf = w.detach().requires_grad_()
            y = quantizer(leaf)
            results.append([y.detach(), *torch.autograd.grad(y, [leaf, *quantizer.parameters()], upstream)])
    return results


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_the_value_is_that_of_pytorch_to_the_bit_and_gradients_to_rounding(
    isa: str, case: tuple[WeightFakeQuantize, Tensor]
) -> None:
    (y, dw, *grids), (want, want_dw, *want_grids) = both(*case)
    assert same_bits(y, want)
    assert y.stride() == want.stride()
    # PyTorch divides by the factor and multiplies with it again
    torch.testing.assert_close(dw, want_dw, rtol=1e-6 if dw.dtype == torch.float32 else 1e-2, atol=1e-30)
    for have, wanted in zip(grids, want_grids, strict=True):
        tolerance = 1e-4 * float(wanted.nan_to_num().abs().max()) + 1e-12
        torch.testing.assert_close(have, wanted, rtol=1e-4, atol=tolerance, equal_nan=True)


def test_the_gradient_is_of_the_statistics_that_the_value_had(operators: None) -> None:
    w = torch.randn(6, 5, requires_grad=True)
    scale = torch.full((6,), 0.1, requires_grad=True)
    found = []
    for moved in (False, True):
        var = torch.rand(6, generator=torch.Generator().manual_seed(0)) + 0.5
        gamma = torch.ones(6)
        factor = BatchNormFactor(gamma, var, 1e-5, 2.0**-20, 0, 1)
        y = native.fake_quantize_weight_learned(w, scale, torch.zeros(6), -8, 7, factor, 0)
        if moved:  # as a batch norm and an optimizer do before the backward pass
            var.mul_(9.0)
            gamma.mul_(3.0)
        found.append(torch.autograd.grad(y.square().sum(), [w, scale]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("axis", [0, None])
def test_sums_have_the_same_bits_for_every_number_of_threads(operators: None, axis: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(300, 64, 3, 3, generator=generator, requires_grad=True)
    factor = BatchNormFactor(None, torch.rand(300, generator=generator) + 0.1, 1e-5, 2.0**-20, 0, 1)
    scale = torch.full((300,) if axis == 0 else (), 0.2, requires_grad=True)
    zero_point = torch.zeros_like(scale).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = native.fake_quantize_weight_learned(w, scale, zero_point, -8, 7, factor, axis, 0.1)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [w, scale, zero_point])])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_opcheck(operators: None) -> None:
    w = torch.randn(6, 4, 3, 3, requires_grad=True)
    scale, zero_point = torch.full((6,), 0.1, requires_grad=True), torch.full((6,), 0.3, requires_grad=True)
    forward = torch.ops.qat.fake_quantize_weight_learned_forward.default
    backward = torch.ops.qat.fake_quantize_weight_learned_backward.default
    norm = (None, torch.rand(6) + 0.5, 1e-5, 2.0**-20)
    for given_w, place, grid in (
        (w, (-8, 7, 0), (scale, zero_point)),
        (w.detach().to(memory_format=torch.channels_last), (-8, 7, 0, 0, 1, 0.5), (scale, zero_point)),
        (w, (-8, 7, -1), (torch.tensor(0.1), torch.tensor(0.0))),
        (torch.randn(0, 6, 1), (-8, 7, 1, 1), (scale, zero_point)),
    ):
        assert set(torch.library.opcheck(forward, (given_w, *grid, *norm, *place)).values()) == {"SUCCESS"}
        y, factor = forward(given_w, *grid, *norm, *place)
        plain = [t.detach() for t in (torch.ones_like(y), given_w, *grid, factor)]
        assert set(torch.library.opcheck(backward, (*plain, *place)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(operators: None, dynamic: bool) -> None:
    factor = BatchNormFactor(torch.ones(3), torch.rand(3) + 0.5, 1e-5, 2.0**-20, 0, 1)

    def step(w: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return native.fake_quantize_weight_learned(w * 2, scale, zero_point, -8, 7, factor, 0, 0.5)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for width in (4, 7):
        results = []
        for function in (step, compiled):
            leaves = [
                t.requires_grad_()
                for t in (torch.linspace(-1, 1, width * 3).reshape(3, width), torch.ones(3), torch.zeros(3))
            ]
            y = function(*leaves)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


W, ONE, ZERO, VAR = torch.ones(2, 3), torch.ones(1), torch.zeros(1), torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((W.long(), ONE, ZERO, None, VAR, 0.0, 0.0, 0, 15, -1), "weight is neither float32"),
        ((W, torch.ones(2), ZERO, None, VAR, 0.0, 0.0, 0, 15, -1), "2 values in scale for 1 channels"),
        ((W, ONE, torch.ones(2), None, VAR, 0.0, 0.0, 0, 15, -1), "2 values in zero_point for 1 channels"),
        ((W, ONE, ZERO, None, torch.ones(3), 0.0, 0.0, 0, 15, -1), "var is not float32 with 2 values"),
        ((W, ONE, ZERO, ONE, VAR, 0.0, 0.0, 0, 15, -1), "gamma is not float32 with 2 values"),
        ((W, ONE, ZERO, None, VAR, 0.0, 0.0, 15, 0, -1), "is empty or too wide"),
        ((W, ONE, ZERO, None, VAR, 0.0, 0.0, 0, 15, 5), "axis 5 of a tensor of shape"),
        ((W, ONE, ZERO, None, VAR, 0.0, 0.0, 0, 15, -1, 2), "channel_axis 2 of a weight"),
        ((W, ONE, ZERO, None, VAR, 0.0, 0.0, 0, 15, -1, 0, 2), "2 groups do not fit"),
    ],
)
def test_bad_input_is_a_message(operators: None, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.fake_quantize_weight_learned_forward(*arguments)


def test_bad_gradients(operators: None) -> None:
    backward = torch.ops.qat.fake_quantize_weight_learned_backward
    for grad in (torch.ones(3, 2), W.bfloat16()):
        with pytest.raises(RuntimeError, match="give a gradient of the shape and type of the weight"):
            backward(grad, W, ONE, ZERO, VAR, 0, 15, -1)
    with pytest.raises(RuntimeError, match="factor is not float32 with 2 values"):
        backward(W, W, ONE, ZERO, ONE, 0, 15, -1)
