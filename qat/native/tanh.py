"""Native transformation of DoReFa's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.native.operators import below_autograd


def tanh_weight(weight: Tensor) -> Tensor:
    """Return `qat.quantizers.tanh.tanh_weight`, bit for bit.

    The backward pass reads the weight again; nothing else is kept.

    Args:
        weight: float32, any shape.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        out: Tensor = _TanhWeight.apply(weight)  # type: ignore[no-untyped-call]
        return out
    result: Tensor = below_autograd(torch.ops.qat.tanh_weight_forward.default, weight)[0]
    return result


class _TanhWeight(torch.autograd.Function):
    """As the gradient that is registered with the operator, which takes longer to call."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        y, ratio = below_autograd(torch.ops.qat.tanh_weight_forward.default, weight)
        ctx.save_for_backward(weight, ratio)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        operator = torch.ops.qat.tanh_weight_backward.default
        return below_autograd(operator, grad, *ctx.saved_tensors)  # type: ignore[no-any-return]


def register() -> None:
    """Register fake kernels and the gradient, once, after the library is loaded."""
    torch.library.register_fake("qat::tanh_weight_forward", _fake_forward)
    torch.library.register_fake("qat::tanh_weight_backward", _fake_backward)
    torch.library.register_autograd("qat::tanh_weight_forward", _gradient, setup_context=_keep)


def _fake_forward(weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty(())


def _fake_backward(grad: Tensor, weight: Tensor, ratio: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1])


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> Tensor | None:
    return None if grad is None else torch.ops.qat.tanh_weight_backward(grad, *ctx.saved_tensors)
