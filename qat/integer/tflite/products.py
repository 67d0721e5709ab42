"""Convolution, transposed convolution, fully connected layer and matrix product of TFLite's reference kernels.

The accumulators are exact (`qat.integer.kernels.accumulate`); what differs from kernel to kernel is how they become
codes. Convolutions round twice, with a multiplier computed in float64. The fully connected kernel of LiteRT 2 has no
fixed point at all: it multiplies by the float64 multiplier and rounds once. The matrix product takes the product of the
scales in float32.

Sources: TensorFlow Lite `kernels/internal/reference/integer_ops/{conv,depthwise_conv,transpose_conv,
fully_connected}.h`, `kernels/internal/reference/batch_matmul.h`, and `PopulateConvolutionQuantizationParams` and
`GetQuantizedConvolutionMultipler` in `kernels/kernel_util.cc`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat import numerics
from qat.integer.kernels.qparams import QParams, round_to_float32
from qat.integer.tflite.arithmetic import Multiplier, requantize


def real_multipliers(x: QParams, w_scale: Tensor, y: QParams) -> list[float]:
    """The multiplier of each channel in float64: `x.scale * w_scale / y.scale`, in this order."""
    return [x.scale * float(scale) / y.scale for scale in w_scale.reshape(-1).tolist()]


def multiplier(x: QParams, w_scale: Tensor, y: QParams) -> Multiplier:
    """The fixed-point multiplier of a convolution; `w_scale` is float32 of shape () or (channels,)."""
    values = real_multipliers(x, w_scale, y)
    return Multiplier.of(values if w_scale.dim() else values[0])


def convolved(acc: Tensor, bias: Tensor | None, x: QParams, w_scale: Tensor, y: QParams) -> Tensor:
    """Codes of the accumulators of a convolution.

    Args:
        acc: Integer, shape (N, C_out, *spatial).
        bias: int32 of shape (C_out,), or None.
        x: Parameters of the input.
        w_scale: Scales of the weight, float32 of shape () or (C_out,).
        y: Parameters of the result.

    Returns:
        int32 codes, shape of `acc`.
    """
    if bias is not None:
        acc = acc + bias.to(acc.device).reshape(-1, *([1] * (acc.dim() - 2)))
    return requantize(acc, multiplier(x, w_scale, y).along(1, acc.dim()), y)


def connected(acc: Tensor, bias: Tensor | None, x: QParams, w_scale: Tensor, y: QParams) -> Tensor:
    """Codes of the accumulators of a fully connected layer: `round(float64(acc) * multiplier)`, ties away from zero.

    Args:
        acc: Integer, shape (*, N).
        bias: int32 of shape (N,), or None.
        x: Parameters of the input.
        w_scale: Scales of the weight, float32 of shape () or (N,).
        y: Parameters of the result.

    Returns:
        int32 codes, shape of `acc`.
    """
    if bias is not None:
        acc = acc + bias.to(acc.device)
    factor = torch.tensor(real_multipliers(x, w_scale, y), dtype=torch.float64, device=acc.device)
    steps = numerics.round_half(acc.double() * factor, "half_away")
    return torch.clamp(steps + y.zero_point, y.qmin, y.qmax).to(torch.int32)


def product_multiplier(a: QParams, b: QParams, y: QParams) -> float:
    """The multiplier of a matrix product: the product of the scales in float32, the quotient in float64."""
    return round_to_float32(a.scale * b.scale) / y.scale


def multiplied(acc: Tensor, a: QParams, b: QParams, y: QParams) -> Tensor:
    """Codes of the accumulators of a matrix product, int32."""
    return requantize(acc, Multiplier.of(product_multiplier(a, b, y)), y)
