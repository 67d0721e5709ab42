"""QLinearAdd and QLinearMul of ONNX Runtime for 64-bit ARM.

Sources: ONNX Runtime's `mlas/lib/qladd.cpp` and `qlmul.cpp` (NEON); which sums its compiler fuses was found by running
it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qat.integer.kernels.elementwise import add_by, by_pairs, fma, mul_terms, saturate
from qat.integer.kernels.qparams import QParams, float32_scalar
from qat.integer.kernels.requantize import dequantize, quantize

#: bits of the larger multiplier
_BITS = 22
_SMALLEST_RATIO, _LARGEST_RATIO = 2.0**-14, 2.0**8
_LARGEST_SHIFT = 31


def add(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    """Quantized addition (QLinearAdd); arguments and result as for `kernels.elementwise.add`."""
    return add_by(_qlinear_add, a_codes, a, b_codes, b, y)


def mul(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    """Quantized multiplication (QLinearMul); arguments and result as for `kernels.elementwise.add`."""
    if a.wide or b.wide or y.wide:
        return quantize(dequantize(a_codes, a) * dequantize(b_codes, b), y)
    return by_pairs(_qlinear_mul, a_codes, a, b_codes, b, y)


def add_multipliers(ratio_a: float, ratio_b: float) -> tuple[int, int, int] | None:
    """Multipliers of both operands and the shift to the right, or None where the kernel computes in float.

    The larger of the ratios of scales becomes an integer of 22 bits, the other one gets the same shift.

    Args:
        ratio_a: Scale of the left operand over that of the result, a float32 value.
        ratio_b: The same of the right operand.
    """
    if not all(_SMALLEST_RATIO <= ratio < _LARGEST_RATIO for ratio in (ratio_a, ratio_b)):
        return None
    shift = _BITS - math.frexp(max(ratio_a, ratio_b))[1]
    # exact products; half to even, as Python's round is
    factors = [round(math.ldexp(ratio, shift)) for ratio in (ratio_a, ratio_b)]
    if shift > _LARGEST_SHIFT or max(factors) >> _BITS:
        return None
    return factors[0], factors[1], shift


def _qlinear_add(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    scale_y = float32_scalar(y.scale, a_codes)
    ratios = [float(float32_scalar(q.scale, a_codes) / scale_y) for q in (a, b)]
    left, right = a_codes.to(torch.int64) - a.zero_point, b_codes.to(torch.int64) - b.zero_point
    found = add_multipliers(*ratios)
    if found is not None:
        factor_a, factor_b, shift = found
        total = left * factor_a + right * factor_b
        # to nearest, ties away from zero: one less below zero, then half up
        steps = (total - (total < 0).to(torch.int64) + (1 << (shift - 1))) >> shift
        return torch.clamp(steps + y.zero_point, y.qmin, y.qmax).to(torch.int32)
    real_b = right.to(torch.float32) * float32_scalar(b.scale, a_codes)
    real = fma(left.to(torch.float32), float32_scalar(a.scale, a_codes), real_b)
    return saturate(real / scale_y + float32_scalar(y.zero_point, a_codes), y)


def _qlinear_mul(a_codes: Tensor, a: QParams, b_codes: Tensor, b: QParams, y: QParams) -> Tensor:
    return saturate(fma(*mul_terms(a_codes, a, b_codes, b, y)), y)
