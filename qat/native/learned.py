"""Native fake quantization on learned grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.native.operators import axis_of


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    grad_scale: float = 1.0,
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
    """
    out: Tensor = torch.ops.qat.fake_quantize_learned_forward(
        x, scale, zero_point, qmin, qmax, axis_of(x, axis), grad_scale
    )
    return out


def register() -> None:
    """Register fake kernels and the gradient, once, after the library is loaded."""
    torch.library.register_fake("qat::fake_quantize_learned_forward", _fake_forward)
    torch.library.register_fake("qat::fake_quantize_learned_backward", _fake_backward)
    torch.library.register_autograd("qat::fake_quantize_learned_forward", _gradient, setup_context=_keep)


def _fake_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int = -1, grad_scale: float = 1.0
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
) -> tuple[Tensor, Tensor, Tensor]:
    grids = (values.new_empty(values.shape, dtype=torch.float32) for values in (scale, zero_point))
    return torch.empty_like(x), *grids  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *ctx.rest = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.qat.fake_quantize_learned_backward(grad, *ctx.saved_tensors, *ctx.rest), *((None,) * 4)
