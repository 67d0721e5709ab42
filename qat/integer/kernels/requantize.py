"""Quantize, dequantize and requantize as ONNX Runtime's CPU provider does, in float32 and half to even.

Sources: ONNX operator specification, QuantizeLinear, DequantizeLinear and QLinearConv; the arithmetic was
found by reading ONNX Runtime's `mlas` and is proven by the tests, which compare every code with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.integer.kernels.qparams import QParams, float32_scalar


def quantize(x: Tensor, q: QParams) -> Tensor:
    """QuantizeLinear: `clamp(rint(x / scale) + zero_point)`, the division in float32, ties to even.

    Args:
        x: Real values, any shape. Infinities saturate; nan becomes `qmin` (what the x86 kernel gives; ONNX
            leaves it undefined).
        q: Parameters of the result.

    Returns:
        int32 codes, shape of `x`.
    """
    # in place from here on: fresh memory costs more than the arithmetic
    steps = x.to(torch.float32) / float32_scalar(q.scale, x)
    torch.nan_to_num_(steps, nan=float(q.qmin - q.zero_point), posinf=torch.inf, neginf=-torch.inf)
    return steps.clamp_(q.qmin - q.zero_point, q.qmax - q.zero_point).round_().add_(q.zero_point).to(torch.int32)


def dequantize(codes: Tensor, q: QParams) -> Tensor:
    """DequantizeLinear: `scale * (code - zero_point)` in float32, shape of `codes`."""
    return (codes.to(torch.int32) - q.zero_point).to(torch.float32).mul_(float32_scalar(q.scale, codes))


def multiplier(a_scale: float | Tensor, b_scale: float | Tensor, y_scale: float) -> Tensor:
    """The requantization multiplier `(a_scale * b_scale) / y_scale`, each operation in float32.

    Args:
        a_scale: Scale of the left operand.
        b_scale: Scale of the right operand: one, or shape (channels,).
        y_scale: Scale of the result.

    Returns:
        float32, shape () or (channels,).
    """
    a = torch.as_tensor(a_scale, dtype=torch.float32)
    b = torch.as_tensor(b_scale, dtype=torch.float32)
    return (a.to(b.device) if b.dim() else a) * b / torch.as_tensor(y_scale, dtype=torch.float32, device=b.device)


def requantize(acc: Tensor, scale: Tensor, q: QParams, channel_axis: int | None = None) -> Tensor:
    """Accumulator to codes: `clamp(rint(float32(acc) * scale) + zero_point)`.

    ONNX Runtime clamps before it rounds; the bounds are integers, so the order is of no consequence.
    `float32(acc)` rounds to nearest even above 2**24, as the runtime's conversion does. Multipliers of 1 and
    above are fine.

    Args:
        acc: Integer accumulators, any shape.
        scale: float32 multiplier, shape () or (channels,).
        q: Parameters of the result.
        channel_axis: Axis of `acc` that a per-channel multiplier runs along.

    Returns:
        int32 codes, shape of `acc`.
    """
    factor = scale.to(acc.device)
    if factor.dim() == 1 and channel_axis is not None:
        axis = channel_axis % acc.dim()
        factor = factor.reshape([-1 if d == axis else 1 for d in range(acc.dim())])
    steps = acc.to(torch.float32, copy=True).mul_(factor)
    return steps.clamp_(q.qmin - q.zero_point, q.qmax - q.zero_point).round_().add_(q.zero_point).to(torch.int32)


def requantize_wide(acc: Tensor, a_scale: float, b_scale: float | Tensor, q: QParams, channel_axis: int) -> Tensor:
    """Accumulator to codes where ONNX Runtime computes in float (16-bit tensors, transposed convolution).

    The accumulator is exact, so this is the result of `DequantizeLinear -> operator -> QuantizeLinear` with
    the operator computed without error: its real value is rounded once to float32 and then quantized.

    Args:
        acc: Integer accumulators, any shape.
        a_scale: Scale of the activation.
        b_scale: Scale of the weight: one, or shape (channels,).
        q: Parameters of the result.
        channel_axis: Axis of `acc` that a per-channel scale runs along.

    Returns:
        int32 codes, shape of `acc`.
    """
    factor = torch.as_tensor(b_scale, dtype=torch.float32, device=acc.device).double() * a_scale
    if factor.dim() == 1:
        axis = channel_axis % acc.dim()
        factor = factor.reshape([-1 if d == axis else 1 for d in range(acc.dim())])
    return quantize((acc.double() * factor).to(torch.float32), q)


def requantize_codes(codes: Tensor, a: QParams, q: QParams) -> Tensor:
    """`QuantizeLinear(DequantizeLinear(codes))` from one encoding to another; a copy if they are equal."""
    if a == q:
        return codes.to(torch.int32)
    return quantize(dequantize(codes, a), q)
