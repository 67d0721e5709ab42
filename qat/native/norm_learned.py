"""Batch norm or an addition, an activation, and fake quantization on a learned grid, in one operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.native.norm import Bounds, Drop, Norm
from qat.native.operators import below_autograd, one_device


class LearnedGrid(NamedTuple):
    """The per-tensor grid of the result, as in `fake_quantize_learned`.

    Attributes:
        scale: Positive float32, one value; it gets a gradient.
        zero_point: float32, one value, of which the nearest code is used; likewise.
        qmin: Smallest code.
        qmax: Largest code.
        grad_scale: Factor of the gradients of scale and zero point.
        clips: The gradients are those of a learned clip.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    grad_scale: float
    clips: bool = False


def norm_quantize_learned(x: Tensor, norm: Norm, bounds: Bounds, grid: LearnedGrid, drop: Drop | None = None) -> Tensor:
    """Return `fake_quantize_learned(norm_quantize(x, norm, bounds, None), *grid)`, the value bit for bit.

    The backward pass reads `x` again. The gradients of the grid are summed in float64, in an order that only the shape
    decides.

    Args:
        x: As in `norm_quantize`.
        norm: The batch norm.
        bounds: Of the activation; infinities for none.
        grid: The grid.
        drop: As in `norm_quantize`; what is not fake-quantized adds nothing to the gradients of the grid.
    """
    inputs = (x, norm.gamma, norm.beta, grid.scale, grid.zero_point)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        out: Tensor = _NormQuantize.apply(*inputs, norm, bounds, grid, drop)  # type: ignore[no-untyped-call]
        return out
    operator = torch.ops.qat.norm_quantize_learned_forward.default
    result: Tensor = below_autograd(operator, x, *norm, *bounds, *grid[:4], False, grid.clips, *(drop or ()))[0]
    return result


def add_quantize_learned(
    x: Tensor, other: Tensor, bounds: Bounds, grid: LearnedGrid, drop: Drop | None = None
) -> Tensor:
    """Return `fake_quantize_learned(add_quantize(x, other, bounds, None), *grid)`, the value bit for bit.

    The backward pass reads `x` and `other` again.

    Args:
        x: As in `add_quantize`.
        other: Likewise.
        bounds: Of the activation; infinities for none.
        grid: The grid.
        drop: As in `norm_quantize_learned`.
    """
    inputs = (x, other, grid.scale, grid.zero_point)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        out: Tensor = _AddQuantize.apply(*inputs, bounds, grid, drop)  # type: ignore[no-untyped-call]
        return out
    operator = torch.ops.qat.add_quantize_learned_forward.default
    result: Tensor = below_autograd(operator, x, other, *bounds, *grid, *(drop or ()))
    return result


class _NormQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        scale: Tensor,
        zero_point: Tensor,
        norm: Norm,
        bounds: Bounds,
        grid: LearnedGrid,
        drop: Drop | None,
    ) -> Tensor:
        codes, (seed, probability) = (grid.qmin, grid.qmax), drop or (None, 0.0)
        y, bits, mean, invstd = below_autograd(
            torch.ops.qat.norm_quantize_learned_forward.default,
            x, gamma, beta, *norm[2:], *bounds, scale, zero_point, *codes, True, grid.clips, seed, probability,
        )  # fmt: skip
        ctx.save_for_backward(x, bits, gamma, beta, mean, invstd, scale, zero_point, seed)
        ctx.rest = norm.batch_statistics, bounds, (*codes, grid.grad_scale), (grid.clips, probability)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bits, gamma, beta, mean, invstd, scale, zero_point, seed = ctx.saved_tensors
        batch_statistics, bounds, codes, (clips, probability) = ctx.rest
        _, with_gamma, with_beta, with_scale, with_zero_point, *_ = ctx.needs_input_grad
        dx, dgamma, dbeta, dscale, dzero_point = below_autograd(
            torch.ops.qat.norm_quantize_learned_backward.default,
            grad, x, bits, gamma, beta, mean, invstd, batch_statistics, *bounds, scale, zero_point, *codes,
            with_zero_point, clips, seed, probability,
        )  # fmt: skip
        return (
            dx,
            dgamma if with_gamma else None,
            dbeta if with_beta else None,
            dscale if with_scale else None,
            dzero_point if with_zero_point else None,
            None,
            None,
            None,
            None,
        )


class _AddQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        other: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bounds: Bounds,
        grid: LearnedGrid,
        drop: Drop | None,
    ) -> Tensor:
        seed, probability = drop or (None, 0.0)
        ctx.save_for_backward(x, other, scale, zero_point, seed)
        ctx.rest = bounds, (grid.qmin, grid.qmax, grid.grad_scale), (grid.clips, probability)
        return below_autograd(  # type: ignore[no-any-return]
            torch.ops.qat.add_quantize_learned_forward.default,
            x, other, *bounds, scale, zero_point, *grid[2:], seed, probability,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, other, scale, zero_point, seed = ctx.saved_tensors
        bounds, rest, (clips, probability) = ctx.rest
        with_x, with_other, with_scale, with_zero_point, *_ = ctx.needs_input_grad
        both, dscale, dzero_point = below_autograd(
            torch.ops.qat.add_quantize_learned_backward.default,
            grad, x, other, *bounds, scale, zero_point, *rest, with_zero_point, clips, seed, probability,
        )  # fmt: skip
        return (
            both if with_x else None,
            both if with_other else None,
            dscale if with_scale else None,
            dzero_point if with_zero_point else None,
            None,
            None,
            None,
        )


def register() -> None:
    """Register fake kernels and the gradient of additions, once, after the library is loaded."""
    torch.library.register_fake("qat::norm_quantize_learned_forward", _fake_norm)
    torch.library.register_fake("qat::norm_quantize_learned_backward", _fake_norm_backward)
    torch.library.register_fake("qat::add_quantize_learned_forward", _fake_add)
    torch.library.register_fake("qat::add_quantize_learned_backward", _fake_add_backward)
    torch.library.register_autograd("qat::add_quantize_learned_forward", _add_gradient, setup_context=_keep_add)


def _fake_norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
    low_bound: float,
    high_bound: float,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    with_mask: bool = True,
    clips: bool = False,
    seed: Tensor | None = None,
    drop: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one_device(x, gamma=gamma, beta=beta, scale=scale, zero_point=zero_point)
    bits = x.new_empty(((x.numel() + 7) // 8 if with_mask else 0,), dtype=torch.uint8)
    statistics = x.new_empty((x.shape[1],), dtype=torch.float32)
    return torch.empty_like(x), bits, statistics, torch.empty_like(statistics)


def _fake_norm_backward(
    grad: Tensor,
    x: Tensor,
    mask_bits: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    batch_statistics: bool,
    low_bound: float,
    high_bound: float,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    grad_scale: float = 1.0,
    with_zero_point: bool = True,
    clips: bool = False,
    seed: Tensor | None = None,
    drop: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = x.new_empty((x.shape[1],), dtype=torch.float32)
    return (
        torch.empty_like(x),
        parameters,
        torch.empty_like(parameters),
        *fake_grid_gradients(scale, zero_point, with_zero_point),
    )


def fake_grid_gradients(scale: Tensor, zero_point: Tensor, with_zero_point: bool) -> tuple[Tensor, Tensor]:
    """Return what the shapes of the gradients of a grid are, for fake kernels."""
    shape = zero_point.shape if with_zero_point else (0,)
    return scale.new_empty(scale.shape, dtype=torch.float32), zero_point.new_empty(shape, dtype=torch.float32)


def _fake_add(
    x: Tensor,
    other: Tensor,
    low_bound: float,
    high_bound: float,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    grad_scale: float = 1.0,
    clips: bool = False,
    seed: Tensor | None = None,
    drop: float = 0.0,
) -> Tensor:
    one_device(x, other=other, scale=scale, zero_point=zero_point)
    return torch.empty_like(x)


def _fake_add_backward(
    grad: Tensor,
    x: Tensor,
    other: Tensor,
    low_bound: float,
    high_bound: float,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    grad_scale: float = 1.0,
    with_zero_point: bool = True,
    clips: bool = False,
    seed: Tensor | None = None,
    drop: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *fake_grid_gradients(scale, zero_point, with_zero_point)


def _keep_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, other, low, high, scale, zero_point, *rest, clips, seed, probability = inputs
    ctx.save_for_backward(x, other, scale, zero_point, seed)
    ctx.bounds, ctx.rest, ctx.last = (low, high), rest, (clips, probability)


def _add_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, other, scale, zero_point, seed = ctx.saved_tensors
    clips, probability = ctx.last
    both, dscale, dzero_point = torch.ops.qat.add_quantize_learned_backward(
        grad, x, other, *ctx.bounds, scale, zero_point, *ctx.rest, True, clips, seed, probability
    )
    return both, both, None, None, dscale, dzero_point, *((None,) * 6)
