"""Batch norm or an addition, an activation, and the fake quantization of the result, in one operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.native.operators import below_autograd
from qat.native.ranges import GridRule

#: Smallest and largest value that an activation lets through.
Bounds = tuple[float, float]


class Norm(NamedTuple):
    """A batch norm, as `torch.nn.functional.batch_norm` takes it.

    Attributes:
        gamma: float32, (C,); None for ones.
        beta: Likewise; None for zeros.
        running_mean: float32, (C,); changed in place with `batch_statistics`; None where there is none.
        running_var: Likewise.
        batch_statistics: Normalize with those of the batch.
        momentum: Weight of this batch in the running statistics.
        eps: What is added to the variance.
    """

    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batch_statistics: bool
    momentum: float
    eps: float


class Grid(NamedTuple):
    """The per-tensor grid of the result, as in `fake_quantize_track`.

    Attributes:
        state: Smallest and largest value, scale, zero point, samples; they change where `track` is set.
        rule: How a range becomes a grid, and the codes.
        track: Move the range towards that of this batch first.
        momentum: Weight of this batch in the range.
    """

    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    rule: GridRule
    track: bool
    momentum: float


class Drop(NamedTuple):
    """QDrop: elements that keep what they are before fake quantization, by their place in memory.

    Attributes:
        seed: int64, one value, on the CPU: those whose number (`drop_numbers`) it makes small.
        probability: That of an element.
    """

    seed: Tensor
    probability: float


def drop_numbers(like: Tensor, seed: Tensor) -> Tensor:
    """Return a whole number in [0, 2**24) for each place in memory, as `qat.quantizers.dropping.place_numbers`.

    Args:
        like: float32, whose shape and order of memory the result has.
        seed: int64, one value, on the CPU.
    """
    return below_autograd(torch.ops.qat.drop_numbers.default, like, seed)  # type: ignore[no-any-return]


def norm_quantize(x: Tensor, norm: Norm, bounds: Bounds, grid: Grid | None, drop: Drop | None = None) -> Tensor:
    """Return `fake_quantize(clamp(batch_norm(x), *bounds))`.

    The gradient is zero where the activation or the grid saturates, at the bounds too, as that of ReLU and ReLU6.

    Args:
        x: float32, (N, C, ...), any layout; not empty, and of more than one value a channel where the
            statistics are those of the batch.
        norm: The batch norm.
        bounds: Of the activation; infinities for none.
        grid: None for no fake quantization.
        drop: What is not fake-quantized all the same, with the gradient of the activation.
    """
    inputs = (x, norm.gamma, norm.beta)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        out: Tensor = _NormQuantize.apply(*inputs, norm, bounds, grid, drop)  # type: ignore[no-untyped-call]
        return out
    operator = torch.ops.qat.norm_quantize_forward.default
    result: Tensor = below_autograd(operator, x, *norm, *bounds, *_flat(grid), False, *(drop or ()))[0]
    return result


def add_quantize(x: Tensor, other: Tensor, bounds: Bounds, grid: Grid | None, drop: Drop | None = None) -> Tensor:
    """Return `fake_quantize(clamp(x + other, *bounds))`, its gradient as that of `norm_quantize`.

    Args:
        x: float32, any layout.
        other: Likewise, of the same shape.
        bounds: Of the activation; infinities for none.
        grid: None for no fake quantization.
        drop: As in `norm_quantize`.
    """
    if torch.is_grad_enabled() and (x.requires_grad or other.requires_grad):
        out: Tensor = _AddQuantize.apply(x, other, bounds, grid, drop)  # type: ignore[no-untyped-call]
        return out
    operator = torch.ops.qat.add_quantize_forward.default
    result: Tensor = below_autograd(operator, x, other, *bounds, *_flat(grid), False, *(drop or ()))[0]
    return result


def _flat(grid: Grid | None) -> tuple[Any, ...]:
    """Return the arguments of the operators from `low` to `power_of_two`."""
    if grid is None:
        return None, None, None, None, None, False, 0.0, 0, 1, False, 0, False
    rule = grid.rule
    return (
        *grid.state, grid.track, grid.momentum, rule.qmin, rule.qmax, rule.symmetric, rule.middle, rule.power_of_two,
    )  # fmt: skip


class _NormQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        norm: Norm,
        bounds: Bounds,
        grid: Grid | None,
        drop: Drop | None,
    ) -> Tensor:
        y, bits, mean, invstd = below_autograd(
            torch.ops.qat.norm_quantize_forward.default,
            x, gamma, beta, *norm[2:], *bounds, *_flat(grid), True, *(drop or ()),
        )  # fmt: skip
        ctx.save_for_backward(x, gamma, bits, mean, invstd)
        ctx.batch_statistics = norm.batch_statistics
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, bits, mean, invstd = ctx.saved_tensors
        _, with_gamma, with_beta, *_ = ctx.needs_input_grad
        dx, dgamma, dbeta = below_autograd(
            torch.ops.qat.norm_quantize_backward.default,
            grad,
            x,
            bits,
            gamma,
            mean,
            invstd,
            ctx.batch_statistics,
            with_gamma or with_beta,
        )
        return dx, dgamma if with_gamma else None, dbeta if with_beta else None, None, None, None, None


class _AddQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor, bounds: Bounds, grid: Grid | None, drop: Drop | None) -> Tensor:
        operator = torch.ops.qat.add_quantize_forward.default
        y, bits = below_autograd(operator, x, other, *bounds, *_flat(grid), True, *(drop or ()))
        ctx.save_for_backward(bits)
        ctx.strides = y.stride()
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        both = below_autograd(torch.ops.qat.fake_quantize_backward.default, grad, bits, ctx.strides)
        return both if ctx.needs_input_grad[0] else None, both if ctx.needs_input_grad[1] else None, None, None, None


def register() -> None:
    """Register fake kernels, once, after the library is loaded."""
    torch.library.register_fake("qat::norm_quantize_forward", _fake_norm)
    torch.library.register_fake("qat::norm_quantize_backward", _fake_norm_backward)
    torch.library.register_fake("qat::add_quantize_forward", _fake_add)
    torch.library.register_fake("qat::drop_numbers", _fake_numbers)


def _fake_numbers(like: Tensor, seed: Tensor) -> Tensor:
    return torch.empty_like(like)


def _fake_norm(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = x.new_empty((x.shape[1],), dtype=torch.float32)
    return torch.empty_like(x), _fake_bits(x, arguments, 22), statistics, torch.empty_like(statistics)


def _fake_add(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _fake_bits(x, arguments, 16)


def _fake_bits(x: Tensor, arguments: tuple[Any, ...], count: int) -> Tensor:
    """Return the mask; `with_mask`, argument number `count`, is True where it is not given."""
    with_mask = len(arguments) < count or arguments[count - 1]
    return x.new_empty(((x.numel() + 7) // 8 if with_mask else 0,), dtype=torch.uint8)


def _fake_norm_backward(
    grad: Tensor,
    x: Tensor,
    mask_bits: Tensor,
    gamma: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    batch_statistics: bool,
    with_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = x.new_empty((x.shape[1] if batch_statistics or with_parameters else 0,), dtype=torch.float32)
    return torch.empty_like(x), parameters, torch.empty_like(parameters)
