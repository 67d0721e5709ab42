"""Layer normalization, in the order of operations of ONNX Runtime's x86 kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.integer.kernels.elementwise import fma
from qat.integer.kernels.qparams import QParams, float32_scalar
from qat.integer.kernels.requantize import dequantize, quantize

#: float32 values that the kernel adds at a time
_LANES = 8


def layer_norm(
    codes: Tensor,
    x: QParams,
    weight: Tensor | None,
    bias: Tensor | None,
    y: QParams,
    normalized_dims: int = 1,
    epsilon: float = 1e-5,
) -> Tensor:
    """Layer normalization over the last axes: DequantizeLinear, LayerNormalization, QuantizeLinear.

    The runtime's float32 result is reproduced to the bit (1.31 on x86 with AVX2): the mean from a double sum, the
    squared deviations by fused multiply-adds in 8 lanes that are folded in halves, then `(x - mean) * inverse * weight
    + bias` with a fused last step. Elsewhere the last bits may differ, and a code where it is next to a tie.

    Args:
        codes: Integer, any shape.
        x: Parameters of the input.
        weight: float32, the shape of the last `normalized_dims` axes, or None.
        bias: Like `weight`.
        y: Parameters of the result.
        normalized_dims: Number of trailing axes.
        epsilon: Added to the variance.

    Returns:
        int32 codes, shape of `codes`.
    """
    rows = rows_of(codes, x, normalized_dims)
    mean, squares = _welford(rows) if rows.shape[1] < _LANES else _two_passes(rows)
    count = float32_scalar(rows.shape[1], rows)
    inverse = float32_scalar(1.0, rows) / root(squares / count + float32_scalar(epsilon, rows))
    real = affine((rows - mean[:, None]) * inverse[:, None], weight, bias)
    return quantize(real.reshape(codes.shape), y)


def rows_of(codes: Tensor, x: QParams, normalized_dims: int) -> Tensor:
    """Return what is normalized as float32 of shape (rows, values)."""
    values = codes.shape[-normalized_dims:].numel()
    return dequantize(codes, x).flatten(-normalized_dims).reshape(-1, values)


def root(x: Tensor) -> Tensor:
    """Square root, float32: PyTorch's is not always correctly rounded; by way of float64 it is."""
    return torch.sqrt(x.double()).to(torch.float32)


def affine(real: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`real * weight + bias` of rows, rounded once; what is None is left out."""
    if weight is not None and bias is not None:
        return fma(real, weight.to(real.device).reshape(1, -1), bias.to(real.device).reshape(1, -1))
    if weight is not None:
        return real * weight.to(real.device).reshape(1, -1)
    return real if bias is None else real + bias.to(real.device).reshape(1, -1)


def _two_passes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and sum of squared deviations, of each row."""
    mean = (rows.double().sum(1) / rows.shape[1]).to(torch.float32)
    deviations = (rows - mean[:, None]).t().contiguous()
    whole = len(deviations) // _LANES * _LANES
    lanes = torch.zeros((_LANES, rows.shape[0]), dtype=torch.float32, device=rows.device)
    for start in range(0, whole, _LANES):
        block = deviations[start : start + _LANES]
        lanes = fma(block, block, lanes)
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    total = lanes[0]
    # what is left over: four at a time with a rounded product, then one by one
    fours = whole + (len(deviations) - whole) // 4 * 4
    for term in deviations[whole:fours].unbind(0):
        total = total + term * term
    for term in deviations[fours:].unbind(0):
        total = fma(term, term, total)
    return mean, total


def _welford(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and sum of squared deviations, of short rows, value by value (Welford 1962)."""
    mean = torch.zeros_like(rows[:, 0])
    total = torch.zeros_like(mean)
    for number, value in enumerate(rows.unbind(1), start=1):
        deviation = value - mean
        mean = mean + deviation / float32_scalar(number, rows)
        total = total + deviation * (value - mean)
    return mean, total
