"""Addition, subtraction, multiplication and division of two quantized tensors, with broadcasting.

8-bit addition and multiplication are ONNX Runtime's QLinearAdd (AVX2 kernel) and QLinearMul; subtraction,
division and 16-bit operands are computed in float between DequantizeLinear and QuantizeLinear. All of them
are elementwise, hence reproducible bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qat.integer.kernels.qparams import QParams, float32_scalar
from qat.integer.kernels.requantize import dequantize, multiplier, quantize

#: an elementwise operator: codes and parameters of the left operand, of the right one, parameters of the result
Kernel = Callable[[Tensor, QParams, Tensor, QParams, QParams], Tensor]


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c` of float32 tensors with one rounding, as a fused multiply-add.

    The product is exact in float64. The sum is rounded to odd there, which makes the second rounding, to
    float32, correct (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    shift = total - product
    error = (product - (total - shift)) + (addend - shift)
    even = (total.view(torch.int64) & 1) == 0
    neighbour = torch.nextafter(total, torch.where(error > 0, math.inf, -math.inf).to(total.dtype))
    return torch.where((error != 0) & even, neighbour, total).to(torch.float32)


def saturate(v: Tensor, y: QParams) -> Tensor:
    """Real codes, the zero point added already, to int32 codes: `rint` after the clamp."""
    return torch.clamp(v, y.qmin, y.qmax).round().to(torch.int32)


def _qlinear_add(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    scale_y = float32_scalar(y.scale, a_codes)
    ratio_a, ratio_b = float32_scalar(a.scale, a_codes) / scale_y, float32_scalar(b.scale, a_codes) / scale_y
    zero_a, zero_b = float32_scalar(a.zero_point, a_codes), float32_scalar(b.zero_point, a_codes)
    fixed = float32_scalar(y.zero_point, a_codes) - fma(ratio_a, zero_a, ratio_b * zero_b)
    partial = fma(b_codes.to(torch.float32), ratio_b, fixed)
    return saturate(fma(a_codes.to(torch.float32), ratio_a, partial), y)


def _left_is_scalar(a: torch.Size, b: torch.Size) -> bool:
    """Whether the runtime sees a single left element in its innermost loop; it then swaps the operands."""
    for d in range(1, max(len(a), len(b)) + 1):
        size_a, size_b = (s[-d] if d <= len(s) else 1 for s in (a, b))
        if (size_a, size_b) != (1, 1):
            return size_a == 1
    return True


def add(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    """Quantized addition (QLinearAdd).

    Args:
        a_codes: Integer codes within `[a.qmin, a.qmax]`.
        a: Parameters of `a_codes`.
        b_codes: Integer codes within `[b.qmin, b.qmax]`; shapes broadcast.
        b: Parameters of `b_codes`.
        y: Parameters of the result.

    Returns:
        int32 codes of the broadcast shape.
    """
    return add_by(_qlinear_add, a_codes, a, b_codes, b, y)


def add_by(kernel: Kernel, a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    """Quantized addition as the runtime runs its kernel: operands in its order, wide ones in float.

    Args:
        kernel: QLinearAdd of one instruction set, for 8-bit codes; arguments and result as for `add`.
        a_codes: As for `add`.
        a: As for `add`.
        b_codes: As for `add`.
        b: As for `add`.
        y: As for `add`.
    """
    if a.wide or b.wide or y.wide:
        return quantize(dequantize(a_codes, a) + dequantize(b_codes, b), y)
    if _left_is_scalar(a_codes.shape, b_codes.shape):
        a_codes, a, b_codes, b = b_codes, b, a_codes, a
    return by_pairs(kernel, a_codes, a, b_codes, b, y)


def by_pairs(kernel: Kernel, a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    """Run an elementwise kernel for 8-bit codes, by a table where there are more elements than pairs of codes."""
    shape = torch.broadcast_shapes(a_codes.shape, b_codes.shape)  # type: ignore[no-untyped-call]
    if math.prod(shape) <= a.levels * b.levels:
        return kernel(a_codes, a, b_codes, b, y)
    # every pair of codes once, then one lookup an element instead of float64 arithmetic
    left = torch.arange(a.qmin, a.qmax + 1, device=a_codes.device)[:, None]
    right = torch.arange(b.qmin, b.qmax + 1, device=a_codes.device)
    table = kernel(left, a, right, b, y).flatten()
    index = (a_codes.to(torch.int32) - a.qmin) * b.levels + (b_codes.to(torch.int32) - b.qmin)
    return table.index_select(0, index.flatten()).reshape(index.shape)


def sub(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    """Quantized subtraction `a - b`, computed in float by the runtime; arguments and result as for `add`."""
    return quantize(dequantize(a_codes, a) - dequantize(b_codes, b), y)


def mul(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    """Quantized multiplication (QLinearMul); arguments and result as for `add`."""
    if a.wide or b.wide or y.wide:
        return quantize(dequantize(a_codes, a) * dequantize(b_codes, b), y)
    product, ratio, zero = mul_terms(a_codes, a, b_codes, b, y)
    return saturate(product * ratio + zero, y)


def mul_terms(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> tuple[Tensor, Tensor, Tensor]:
    """Return product, multiplier and zero point of an 8-bit multiplication, float32: its result is their sum."""
    product = (a_codes.to(torch.int32) - a.zero_point) * (b_codes.to(torch.int32) - b.zero_point)
    ratio = multiplier(a.scale, b.scale, y.scale).to(a_codes.device)
    return product.to(torch.float32), ratio, float32_scalar(y.zero_point, a_codes)


def div(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    """Quantized division `a / b`, computed in float by the runtime; arguments and result as for `add`.

    Division by zero saturates, and 0 / 0 becomes `qmin`.
    """
    return quantize(dequantize(a_codes, a) / dequantize(b_codes, b), y)
