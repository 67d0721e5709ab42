"""Fake quantization on a learned grid: the value of the static one, and gradients of scale and zero point.

Source: Esser et al., "Learned Step Size Quantization" (ICLR 2020), section 2.1; Bhalgat et al., "LSQ+: Improving
low-bit quantization through learnable offsets and better initialization" (CVPR workshops 2020), section 3.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qat import native, numerics
from qat.quantizers.static import is_for_native
from qat.scheme import PER_TENSOR, Granularity


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    granularity: Granularity = PER_TENSOR,
    grad_scale: float = 1.0,
    *,
    clips: bool = False,
) -> Tensor:
    """Return `fake_quantize(x, scale, z, qmin, qmax)` with z the code nearest to `zero_point`.

    With c the code of an element, clamped, the gradients of its result y = (c - z) s are

        inside the range    dy/dx = 1    dy/ds = (c - z) - x / s    dy/dz = 0
        outside             dy/dx = 0    dy/ds = c - z              dy/dz = -s

    times the gradient of y, summed over the elements that share a grid (in float64), and for s and z times
    `grad_scale`. A nan has none. The rounding and the clamp of the zero point pass gradients through unchanged, so one
    that has left the range of codes can come back.

    With `clips` they are those of a learned clip, of which the rounding error is no part: dy/dx = 1 and dy/ds = 0 where
    x lies between the ends of the grid or on one, dy/dx = 0 and dy/ds = c - z beyond them, and dy/dz = 0.

    Args:
        x: float32 or bfloat16, any shape.
        scale: Positive float32: one value, or (C,) for per-channel.
        zero_point: As many float32 numbers, whole or not.
        qmin: Smallest code.
        qmax: Largest code.
        granularity: Per-tensor or per-channel.
        grad_scale: Balances the gradients of the grid with those of weights (see `qat.quantizers.lsq`).
        clips: The gradients are those of a learned clip (see `qat.quantizers.pact`).

    Raises:
        EncodingError: The number of scales does not fit `x`.
    """
    of_one_kind = scale.dtype == zero_point.dtype == torch.float32 and scale.device == zero_point.device == x.device
    if is_for_native(x, granularity) and of_one_kind:
        axis = None if granularity.kind == "per_tensor" else granularity.axis
        if scale.numel() == zero_point.numel() == (1 if axis is None else x.shape[axis]):
            return native.fake_quantize_learned(x, scale, zero_point, qmin, qmax, axis, grad_scale, clips)
    s = numerics.expand_to(scale, x, granularity)
    z = numerics.expand_to(zero_point, x, granularity)
    out: Tensor = _Learned.apply(x, s, z, qmin, qmax, grad_scale, clips)  # type: ignore[no-untyped-call]
    return out


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, s: Tensor, z: Tensor, qmin: int, qmax: int, grad_scale: float, clips: bool
    ) -> Tensor:
        ctx.save_for_backward(x, s, z)
        ctx.codes, ctx.grad_scale, ctx.clips = (qmin, qmax), grad_scale, clips
        code, _, whole = _codes(x, s, z, qmin, qmax)
        return ((code - whole) * s).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, s, z = ctx.saved_tensors
        code, steps, whole = _codes(x, s, z, *ctx.codes)
        inside, number = steps + whole == code, steps == steps  # noqa: PLR0124 (nan)
        reached, g = code - whole, grad.to(torch.float32)
        x32 = x.to(torch.float32)
        if ctx.clips:
            low, high = ((bound - whole) * s for bound in ctx.codes)
            inside = torch.eq(x32, torch.clamp(x32, low, high))
            ds = torch.where(number & ~inside, g * reached, 0.0)
            dz = torch.zeros_like(ds)
        else:
            of_scale = torch.where(inside, reached - x32 / s, reached)
            ds = torch.where(number, g * of_scale, 0.0)
            dz = torch.where(number & ~inside, g * -s, 0.0)
        sums = (_summed(each, like) * ctx.grad_scale for each, like in ((ds, s), (dz, z)))
        return torch.where(inside, grad, 0), *(each.to(torch.float32) for each in sums), None, None, None, None


def _codes(x: Tensor, s: Tensor, z: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return clamped codes, steps before zero point and clamp, and the zero point as a code; float32."""
    whole = torch.round(z).clamp(qmin, qmax)
    steps = torch.round(x.to(torch.float32) / s)
    codes = torch.nan_to_num(steps, nan=0.0, posinf=math.inf, neginf=-math.inf).add_(whole).clamp_(qmin, qmax)
    return codes, steps, whole


def _summed(each: Tensor, like: Tensor) -> Tensor:
    """Sum in float64 what was broadcast from the shape of `like`."""
    return each.to(torch.float64).sum_to_size(like.shape)
