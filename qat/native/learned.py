"""Native fake quantization on learned grids: of any tensor, and of weights with the factor of a batch norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.native.norm_learned import fake_grid_gradients
from qat.native.operators import axis_of, below_autograd, one_device
from qat.native.ranges import BatchNormFactor


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    grad_scale: float = 1.0,
    clips: bool = False,
) -> Tensor:
    """Return `qat.quantizers.learned.fake_quantize_learned`: the value bit for bit, gradients up to their rounding.

    The backward pass reads `x` again. The gradients of the grid are summed in float64, in an order that only the shape
    decides.

    Args:
        x: Any shape.
        scale: Positive float32, one value, or (C,) with an axis.
        zero_point: As many float32 numbers; the nearest code is used.
        qmin: Smallest code, at least -2**23.
        qmax: Largest code, at most 2**23.
        axis: Dimension of the channels; None for per-tensor.
        grad_scale: Factor of the gradients of scale and zero point.
        clips: The gradients are those of a learned clip.
    """
    rest = (qmin, qmax, axis_of(x, axis), grad_scale, clips)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or zero_point.requires_grad):
        out: Tensor = _Learned.apply(x, scale, zero_point, rest)  # type: ignore[no-untyped-call]
        return out
    operator = torch.ops.qat.fake_quantize_learned_forward.default
    result: Tensor = below_autograd(operator, x, scale, zero_point, *rest)
    return result


def fake_quantize_weight_learned(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    factor: BatchNormFactor,
    axis: int | None = None,
    grad_scale: float = 1.0,
) -> Tensor:
    """Return `fake_quantize_learned(weight * f, ...) / f` with the factor f of a batch norm, bit for bit as in PyTorch.

    f is a constant to the gradient. That of the weight passes unchanged where the code was not clamped. The backward
    pass reads the weight again; the gradients of the grid are summed in float64, in an order that only the shape
    decides.

    Args:
        weight: Any shape.
        scale: Positive float32, one value, or (C,) with an axis.
        zero_point: As many float32 numbers; the nearest code is used.
        qmin: Smallest code, at least -2**23.
        qmax: Largest code, at most 2**23.
        factor: Where f comes from.
        axis: Dimension of the channels of the grid; None for per-tensor.
        grad_scale: Factor of the gradients of scale and zero point.
    """
    place = (qmin, qmax, axis_of(weight, axis), factor.channel_axis, factor.groups, grad_scale)
    if torch.is_grad_enabled() and (weight.requires_grad or scale.requires_grad or zero_point.requires_grad):
        out: Tensor = _Weight.apply(weight, scale, zero_point, factor[:4], place)  # type: ignore[no-untyped-call]
        return out
    operator = torch.ops.qat.fake_quantize_weight_learned_forward.default
    result: Tensor = below_autograd(operator, weight, scale, zero_point, *factor[:4], *place)[0]
    return result


class _Learned(torch.autograd.Function):
    """As the gradient that is registered with the operator, which takes longer to call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, rest: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.rest = rest
        operator = torch.ops.qat.fake_quantize_learned_forward.default
        return below_autograd(operator, x, scale, zero_point, *rest)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operator = torch.ops.qat.fake_quantize_learned_backward.default
        dx, ds, dz = below_autograd(operator, grad, *ctx.saved_tensors, *ctx.rest)
        with_x, with_scale, with_zero_point, _ = ctx.needs_input_grad
        return dx if with_x else None, ds if with_scale else None, dz if with_zero_point else None, None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor, norm: tuple[Any, ...], place: tuple[Any, ...]
    ) -> Tensor:
        operator = torch.ops.qat.fake_quantize_weight_learned_forward.default
        y, factor = below_autograd(operator, weight, scale, zero_point, *norm, *place)
        ctx.save_for_backward(weight, scale, zero_point, factor)
        ctx.place = place
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operator = torch.ops.qat.fake_quantize_weight_learned_backward.default
        with_weight, with_scale, with_zero_point, *_ = ctx.needs_input_grad
        dw, ds, dz = below_autograd(operator, grad, *ctx.saved_tensors, *ctx.place, with_zero_point)
        return dw if with_weight else None, ds if with_scale else None, dz if with_zero_point else None, None, None


def register() -> None:
    """Register fake kernels and gradients, once, after the library is loaded."""
    torch.library.register_fake("qat::fake_quantize_learned_forward", _fake_forward)
    torch.library.register_fake("qat::fake_quantize_learned_backward", _fake_backward)
    torch.library.register_autograd("qat::fake_quantize_learned_forward", _gradient, setup_context=_keep)
    torch.library.register_fake("qat::fake_quantize_weight_learned_forward", _fake_weight)
    torch.library.register_fake("qat::fake_quantize_weight_learned_backward", _fake_weight_backward)
    torch.library.register_autograd(
        "qat::fake_quantize_weight_learned_forward", _weight_gradient, setup_context=_keep_weight
    )


def _fake_forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int = -1,
    grad_scale: float = 1.0,
    clips: bool = False,
) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int = -1,
    grad_scale: float = 1.0,
    clips: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    grids = (values.new_empty(values.shape, dtype=torch.float32) for values in (scale, zero_point))
    return torch.empty_like(x), *grids  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *ctx.rest = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.qat.fake_quantize_learned_backward(grad, *ctx.saved_tensors, *ctx.rest), *((None,) * 5)


def _fake_weight(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    gamma: Tensor | None,
    var: Tensor,
    eps: float,
    gamma_floor: float,
    qmin: int,
    qmax: int,
    axis: int,
    channel_axis: int = 0,
    groups: int = 1,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    one_device(weight, scale=scale, zero_point=zero_point, gamma=gamma, var=var)
    return torch.empty_like(weight), torch.empty_like(var, memory_format=torch.contiguous_format)


def _fake_weight_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    factor: Tensor,
    qmin: int,
    qmax: int,
    axis: int,
    channel_axis: int = 0,
    groups: int = 1,
    grad_scale: float = 1.0,
    with_zero_point: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), *fake_grid_gradients(scale, zero_point, with_zero_point)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, scale, zero_point, _, _, _, _, *ctx.place = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, scale, zero_point, output[1])


def _weight_gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    gradients = torch.ops.qat.fake_quantize_weight_learned_backward(grad, *ctx.saved_tensors, *ctx.place)
    return *gradients, *((None,) * 10)
