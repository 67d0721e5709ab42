"""Static fake quantization: quantize-dequantize of the numerics contract, straight-through gradient.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (CVPR 2018), section 3; Bengio et al., "Estimating or Propagating Gradients Through Stochastic
Neurons" (2013).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qat import native, numerics
from qat.errors import DataError, EncodingError
from qat.scheme import PER_TENSOR, Granularity

#: Largest magnitude of a code or zero point for which float32 arithmetic on codes is exact.
_EXACT = 1 << 23
_NATIVE_VALUES = frozenset({torch.float32, torch.bfloat16})
_NATIVE_CODES = frozenset({torch.float32, torch.int32, torch.int64})


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    granularity: Granularity = PER_TENSOR,
    *,
    factor: Tensor | None = None,
) -> Tensor:
    """Return `dequantize(quantize(x))`, or with a factor `dequantize(quantize(x * factor)) / factor`.

    The values are those of `numerics.quantize` (half to even) and `numerics.dequantize`, to the bit. They are
    computed in float32 and returned in the dtype of `x`. The gradient of `x` is straight through a range
    mask: it passes unchanged where the code before clamping lies in `[qmin, qmax]`, and is zero elsewhere
    (also for nan). `scale`, `zero_point` and `factor` get no gradient. Only the mask (one byte an element, or
    one bit in the native extension) is kept for the backward pass.

    The native extension, where it is there and has kernels for the device of `x`, computes the same bits in one
    pass over memory.

    Args:
        x: Floating-point tensor of any shape.
        scale: float32; a scalar, (C,) for per-channel, one a group (row-major) for per-group.
        zero_point: Integers in the shape of `scale`.
        qmin: Smallest code.
        qmax: Largest code.
        granularity: What shares a scale.
        factor: float32, broadcastable to the shape of `x`, not zero (see `WeightFakeQuantize`).

    Raises:
        DataError: `x` is not floating point.
        EncodingError: The number of scales does not fit `x`, or codes are too wide to be exact in float32.
    """
    if not x.is_floating_point():
        raise DataError(f"cannot fake-quantize a tensor of {x.dtype}", "quantize only floating-point tensors")
    if not -_EXACT <= qmin < qmax <= _EXACT:
        raise EncodingError(f"integer range [{qmin}, {qmax}] is too wide for fake quantization", "use 16 bits or fewer")
    if factor is None and is_for_native(x, granularity) and _fits(x, scale, zero_point, granularity):
        axis = None if granularity.kind == "per_tensor" else granularity.axis
        return native.fake_quantize(x, scale.detach().to(torch.float32), zero_point, qmin, qmax, axis)
    s = numerics.expand_to(scale.detach().to(torch.float32), x, granularity)
    z = numerics.expand_to(zero_point.to(torch.float32), x, granularity)
    f = None if factor is None else factor.detach()
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _StraightThrough.apply(x, s, z, f, qmin, qmax)  # type: ignore[no-untyped-call]
        return out
    return _forward(x, s, z, f, qmin, qmax, with_mask=False)[0]


def is_for_native(x: Tensor, granularity: Granularity, *, compiled: bool = False) -> bool:
    """Tell whether the native extension is there and computes with such a tensor on its device.

    Args:
        x: The tensor.
        granularity: What shares a scale.
        compiled: In compiled code too; else it keeps to PyTorch's operations, which the compiler fuses with their
            neighbours.
    """
    return (
        x.dtype in _NATIVE_VALUES
        and granularity.kind != "per_group"
        and (granularity.kind == "per_tensor" or -x.dim() <= granularity.axis < x.dim())
        and (compiled or not torch.compiler.is_compiling())
        and native.runs_on(x.device)
    )


def _fits(x: Tensor, scale: Tensor, zero_point: Tensor, granularity: Granularity) -> bool:
    """Tell whether the native extension has such a grid; what is wrong is left to the other path."""
    count = 1 if granularity.kind == "per_tensor" else x.shape[granularity.axis]
    return (
        scale.numel() == count == zero_point.numel()
        and zero_point.dtype in _NATIVE_CODES
        and x.device == scale.device == zero_point.device
    )


def _forward(
    x: Tensor, s: Tensor, z: Tensor, factor: Tensor | None, qmin: int, qmax: int, with_mask: bool
) -> tuple[Tensor, Tensor | None]:
    x32 = x.to(torch.float32)
    steps = torch.round((x32 if factor is None else x32 * factor) / s)
    codes = _nan_to_zero(steps).add_(z).clamp_(qmin, qmax)
    # nan differs from every code, an infinity from every clamped one
    mask = steps.add_(z) == codes if with_mask else None
    out = codes.sub_(z).mul_(s)
    if factor is not None:
        out = out.div_(factor)
    return out.to(x.dtype), mask


def _nan_to_zero(steps: Tensor) -> Tensor:
    """Return a copy with zero for nan, infinities kept."""
    if torch.compiler.is_compiling():
        # inductor's C++ backend does not vectorize nan_to_num, and in eager mode this would be an extra pass
        return torch.where(torch.eq(steps, steps), steps, 0.0)
    return torch.nan_to_num(steps, nan=0.0, posinf=math.inf, neginf=-math.inf)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, z: Tensor, factor: Tensor | None, qmin: int, qmax: int) -> Tensor:
        out, mask = _forward(x, s, z, factor, qmin, qmax, with_mask=True)
        ctx.save_for_backward(mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, grad, 0), None, None, None, None, None
