"""The transformation of DoReFa's weights: its bits, how near it is to the tangent, its gradient, and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from native_cases import same_bits, tensors
from torch import Tensor

from qat import native
from qat.quantizers import tanh

RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def made(weight: Tensor, monkeypatch: pytest.MonkeyPatch, fused: bool) -> tuple[Tensor, Tensor]:
    """Value and gradient, native or in PyTorch."""
    with monkeypatch.context() as patch:
        if not fused:
            patch.setattr(native, "runs_on", lambda _: False)
        leaf = weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = tanh.tanh_weight(leaf)
        upstream = torch.linspace(-1, 1.5, y.numel()).reshape(y.shape)
        return y.detach(), torch.autograd.grad(y, leaf, upstream)[0]


@RELAXED
@given(x=tensors())
def test_native_equals_pytorch(isa: str, x: Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:
        ours, theirs = (made(x.float(), patch, fused) for fused in (True, False))
    assert x.numel() == 0 or ours[0].stride() == theirs[0].stride()
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def test_it_is_the_tangent_but_for_the_rounding_of_float32() -> None:
    x = torch.cat([torch.linspace(-12, 12, 400_001), torch.logspace(-30, 1, 100_001), torch.tensor([math.inf])])
    found, wanted = tanh.tanh(x).double(), torch.tanh(x.double())
    assert float(((found - wanted) / wanted.abs().clamp(min=1e-40)).abs().max()) < 7 * 2.0**-23
    assert float(found.abs().max()) == 1.0
    assert torch.equal(tanh.tanh(-x), -tanh.tanh(x))


def test_the_gradient_is_that_of_the_tangent_times_a_constant(operators: None) -> None:
    w = torch.randn(7, 5, 3) * 0.7
    leaf = w.clone().requires_grad_()
    y = tanh.tanh_weight(leaf)
    ratio = float(w.abs().max()) / math.tanh(float(w.abs().max()))
    torch.testing.assert_close(y.detach().double(), torch.tanh(w.double()) * ratio, rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    torch.testing.assert_close(slope.double(), (1 - torch.tanh(w.double()) ** 2) * ratio, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_what_is_not_finite_and_zeros(operators: None, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.full((3, 3), value)
    w[0, 0] = 0.0
    ours, theirs = (made(w, monkeypatch, fused) for fused in (True, False))
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def test_opcheck_and_compiled(operators: None) -> None:
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    ops = torch.ops.qat
    assert set(torch.library.opcheck(ops.tanh_weight_forward.default, (w,)).values()) == {"SUCCESS"}
    plain = w.detach()
    backward = (torch.ones_like(plain), plain, torch.tensor(1.2))
    assert set(torch.library.opcheck(ops.tanh_weight_backward.default, backward).values()) == {"SUCCESS"}
    compiled = torch.compile(tanh.tanh_weight, fullgraph=True, backend="aot_eager")
    results = []
    for function in (tanh.tanh_weight, compiled):
        y = function(w)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), w)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bad_input_is_a_message(operators: None) -> None:
    ops, w = torch.ops.qat, torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="weight is not float32"):
        ops.tanh_weight_forward(w.double())
    for grad, ratio in ((torch.ones(3, 2), torch.tensor(1.0)), (w, torch.ones(2))):
        with pytest.raises(RuntimeError, match="does not fit a weight of shape"):
            ops.tanh_weight_backward(grad, w, ratio)
