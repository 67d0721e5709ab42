"""Every formula of the numerics contract, as pure functions on tensors.

`docs/numerics.md` states the same formulas in prose. Kernels, fake quantizers and exporters are tested against this
module. Codes are int32 (int64 where they are accumulated), scales float32, zero points int32.

Sources: ONNX operator specification, QuantizeLinear and DequantizeLinear (opset 21); Jacob et al., "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (CVPR 2018), section 2; TensorFlow Lite
8-bit quantization specification and its reference kernels for the fixed-point multiplier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qat.errors import EncodingError
from qat.scheme import Granularity, Scheme

Rounding = Literal["half_even", "half_away"]

#: Smallest scale that a range gets: keeps the product of two scales, and its inverse, normal in float32.
SCALE_FLOOR = 2.0**-40
#: Ranges are cut to plus and minus this, so that no code is dequantized to infinity.
RANGE_LIMIT = 2.0**126
#: Codes of a larger magnitude are clamped in float64: float32 does not hold the bounds of int32.
_FLOAT32_CODES = 1 << 23


@dataclass(frozen=True)
class NumericsProfile:
    """How a runtime rounds and requantizes.

    Attributes:
        name: `onnx`, `onnx-arm64` or `tflite`.
        rounding: How QuantizeLinear rounds ties.
        requantize: `float32` multiplies the accumulator by a float32 multiplier and rounds half to even; `fixed_point`
            multiplies by a 31-bit integer and shifts.
    """

    name: str
    rounding: Rounding
    requantize: Literal["float32", "fixed_point"]


ONNX = NumericsProfile("onnx", "half_even", "float32")
ONNX_ARM64 = NumericsProfile("onnx-arm64", "half_even", "float32")
TFLITE = NumericsProfile("tflite", "half_away", "fixed_point")


def round_half(x: Tensor, rounding: Rounding = "half_even") -> Tensor:
    """Round to the nearest integer; ties to even or away from zero. Shape and dtype are kept."""
    if rounding == "half_even":
        return torch.round(x)
    # trunc(|x| + 0.5) would round 0.5 - 2**-25 up, because the sum is not exact in float32
    whole = torch.trunc(x)
    return whole + torch.where((x - whole).abs() >= 0.5, torch.sign(x), torch.zeros_like(x))


def expand_to(values: Tensor, like: Tensor, granularity: Granularity) -> Tensor:
    """Reshape per-channel or per-group values so that they broadcast against `like`.

    Args:
        values: Scalar for per-tensor; shape (C,) for per-channel; the shape of `like` with `axis` divided by the group
            size (rounded up) for per-group.
        like: The tensor to broadcast against.
        granularity: What shares a value.

    Raises:
        EncodingError: The number of values does not fit the tensor.
    """
    if granularity.kind == "per_tensor":
        if values.numel() != 1:
            raise EncodingError(f"{values.numel()} scales for a per-tensor encoding", "give exactly one")
        return values.reshape(())
    axis = granularity.axis
    if not -like.dim() <= axis < like.dim():
        raise EncodingError(f"axis {axis} of a tensor of shape {tuple(like.shape)}", "choose an axis that exists")
    axis %= like.dim()
    if granularity.kind == "per_channel":
        if values.numel() != like.shape[axis]:
            raise EncodingError(
                f"{values.numel()} scales for {like.shape[axis]} channels (axis {axis} of shape {tuple(like.shape)})",
                "give one scale a channel",
            )
        return values.reshape([-1 if d == axis else 1 for d in range(like.dim())])
    size = granularity.size or 1
    shape = list(like.shape)
    shape[axis] = -(-shape[axis] // size)
    if values.numel() != math.prod(shape):
        raise EncodingError(
            f"{values.numel()} scales for groups of {size} along axis {axis} of shape {tuple(like.shape)}",
            f"give {math.prod(shape)}",
        )
    spread = values.reshape(shape).repeat_interleave(size, dim=axis)
    return spread.narrow(axis, 0, like.shape[axis])


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    granularity: Granularity | None = None,
    rounding: Rounding = "half_even",
) -> Tensor:
    """Quantize: `q = clamp(round(x / scale) + zero_point, qmin, qmax)`, int32, in the shape of `x`.

    The division is a float32 division and not a multiplication by the inverse (ONNX QuantizeLinear). Infinities
    saturate. A nan has no code: ONNX leaves it undefined, and it becomes the zero point here.

    Args:
        x: Real values, any shape; rounded to float32 if they are float64.
        scale: Positive float32 values: one, (C,) for per-channel, one a group (row-major) for per-group.
        zero_point: As many integers.
        qmin: Smallest code.
        qmax: Largest code.
        granularity: What shares a scale; per-tensor if None.
        rounding: What happens to ties.

    Raises:
        EncodingError: The number of scales does not fit the tensor.
    """
    granularity = granularity or Granularity()
    # on the device of x: CUDA divides by a number of the host by multiplying with its inverse
    s = expand_to(scale.to(x.device, torch.float32), x, granularity)
    z = expand_to(zero_point.to(x.device), x, granularity)
    steps = round_half(x.to(torch.float32) / s, rounding)
    return _codes(torch.nan_to_num(steps, nan=0.0, posinf=math.inf, neginf=-math.inf), z, qmin, qmax)


def _codes(steps: Tensor, zero_point: Tensor | int, qmin: int, qmax: int) -> Tensor:
    """Return `clamp(steps + zero_point, qmin, qmax)`, int32, of whole float32 numbers that may be infinite."""
    if max(-qmin, qmax) > _FLOAT32_CODES:
        steps = steps.to(torch.float64)
    # clamped as float: the conversion of a large float to an integer is undefined
    return torch.clamp(steps + zero_point, qmin, qmax).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, granularity: Granularity | None = None) -> Tensor:
    """Dequantize: `x = (q - zero_point) * scale`, float32, in the shape of `q`.

    The difference is exact, and rounded once to float32 where it has more than 24 bits; then one float32 product.

    Args:
        q: Codes of any integer type, any shape.
        scale: Positive float32 values: one, (C,) for per-channel, one a group (row-major) for per-group.
        zero_point: As many integers.
        granularity: What shares a scale; per-tensor if None.

    Raises:
        EncodingError: The number of scales does not fit the tensor.
    """
    granularity = granularity or Granularity()
    s = expand_to(scale.to(q.device, torch.float32), q, granularity)
    z = expand_to(zero_point.to(q.device, torch.int64), q, granularity)
    return (q.to(torch.int64) - z).to(torch.float32) * s


def range_to_scale(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Turn observed ranges into scales and zero points.

    The range is first widened to hold zero, so zero is always exactly representable, and cut to `RANGE_LIMIT`.
    Affine: `scale = (high - low) / (qmax - qmin)`, `zero_point = clamp(round(qmin - low / scale), qmin, qmax)`.
    Symmetric: z is the middle of the type and `scale = max(|low|, |high|) / min(qmax - z, z - qmin)`; a side without
    codes is left out of both. Computed in float64; the scale is rounded to float32 before it gives the zero point.
    Scales below `SCALE_FLOOR` are raised to it. Power-of-two scales are rounded up, so nothing that was inside the
    range saturates.

    Values inside the range are dequantized with an error of at most half a step, plus `2**-24` steps for each code of
    the span (the rounding of the scale); see `docs/numerics.md`.

    Args:
        low: Smallest values, any shape.
        high: Largest values, same shape.
        scheme: The scheme; its dtype, range, symmetry and power_of_two are used.

    Returns:
        Scales (float32) and zero points (int32) in the shape of `low`.

    Raises:
        EncodingError: A bound is nan or infinite, or a low bound lies above its high bound.
    """
    low64, high64 = low.to(torch.float64), high.to(torch.float64)
    if not bool(torch.isfinite(low64).all() & torch.isfinite(high64).all()):
        raise EncodingError("the observed range is not finite", "check the data and the weights for inf and nan")
    if bool((low64 > high64).any()):
        raise EncodingError("the observed range is empty (low > high)", "calibrate with at least one batch")
    return _range_to_scale(low64, high64, scheme)


def range_to_scale_unchecked(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Do what `range_to_scale` does without looking at the values (no device synchronisation; used in training)."""
    return _range_to_scale(low.to(torch.float64), high.to(torch.float64), scheme)


def _range_to_scale(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    qmin, qmax = scheme.code_range
    low, high = torch.clamp(low, -RANGE_LIMIT, 0.0), torch.clamp(high, 0.0, RANGE_LIMIT)
    if scheme.symmetric:
        # [-128, 127]: 127 steps a side, -128 is spare; [0, 127] has no negative side, what lies there saturates at 0
        above, below = qmax - scheme.symmetric_zero_point, scheme.symmetric_zero_point - qmin
        extent = torch.maximum(-low, high) if above and below else high if above else -low
        scale = extent / (min(above, below) or max(above, below))
    else:
        scale = (high - low) / (qmax - qmin)
    # the upper bound is met by symmetric ranges with a much longer other side only
    scale = torch.clamp(scale, SCALE_FLOOR, 2.0 * RANGE_LIMIT / (qmax - qmin))
    if scheme.power_of_two:
        scale = _power_of_two_above(scale)
    scale32 = scale.to(torch.float32)
    if scheme.symmetric:
        zero_point = torch.full_like(scale32, scheme.symmetric_zero_point, dtype=torch.int32)
    else:
        exact = qmin - low / scale32.to(torch.float64)
        zero_point = torch.clamp(torch.round(exact), qmin, qmax).to(torch.int32)
    return scale32, zero_point


def _power_of_two_above(scale: Tensor) -> Tensor:
    mantissa, _ = torch.frexp(scale)
    # in [0.5, 1), so the quotient is exactly the power above; ldexp goes through pow, which may round
    above = scale / mantissa
    return torch.where(mantissa == 0.5, scale, above)


def representable_range(scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest float that has a code of its own, float32, in the shape of `scale`."""
    s, z = scale.to(torch.float32), zero_point.to(torch.float32)
    return (qmin - z) * s, (qmax - z) * s


def requantize_float(acc: Tensor, multiplier: Tensor, zero_point: int, qmin: int, qmax: int) -> Tensor:
    """Requantize in the `onnx` profile: `clamp(rint(float32(acc) * float32(multiplier)) + zero_point)`, int32.

    The accumulator is rounded to float32 (nearest, ties to even), which is exact up to 2**24, and so is the product.

    Args:
        acc: Accumulators, int32 or int64.
        multiplier: float32, broadcastable to `acc`; any positive value, also above 1.
        zero_point: Of the result.
        qmin: Smallest code of the result.
        qmax: Largest code of the result.
    """
    scaled = torch.round(acc.to(torch.float32) * multiplier.to(acc.device, torch.float32))
    return _codes(scaled, zero_point, qmin, qmax)


def fixed_point_multiplier(multiplier: float) -> tuple[int, int]:
    """Split a multiplier into a 31-bit integer and a shift: `multiplier ~ m * 2**(shift - 31)`.

    Source: `QuantizeMultiplier` of TensorFlow Lite (`kernels/internal/quantization_util.cc`).

    Returns:
        `m` in [2**30, 2**31) and `shift` in [-31, 30] (positive: left); (0, 0) where the multiplier rounds to less
        than 2**-32, zero included.

    Raises:
        EncodingError: The multiplier is negative, not finite, or rounds to 2**30 or more.
    """
    if not (math.isfinite(multiplier) and multiplier >= 0.0):
        raise EncodingError(f"multiplier {multiplier} is negative or not finite", "check the scales")
    if multiplier == 0.0:
        return 0, 0
    fraction, shift = math.frexp(multiplier)
    # half away from zero, as std::round in TFLite's QuantizeMultiplier; the product is exact in float64
    m = math.floor(fraction * (1 << 31) + 0.5)
    if m == 1 << 31:
        m, shift = m // 2, shift + 1
    if shift < -31:
        return 0, 0
    if shift > 30:
        raise EncodingError(f"multiplier {multiplier} is 2**30 or more", "check the scales of this layer")
    return m, shift


def requantize_fixed_point(
    acc: Tensor,
    multiplier: Tensor,
    shift: Tensor,
    zero_point: int,
    qmin: int,
    qmax: int,
    *,
    double_rounding: bool = True,
) -> Tensor:
    """Requantize in the `tflite` profile with a 31-bit multiplier and a shift, int32.

    Double rounding is `SaturatingRoundingDoublingHighMul` followed by `RoundingDivideByPOT` (half away from zero), as
    in TFLite's reference convolution; single rounding adds the rounding constant once to the 64-bit product, which
    rounds ties up. A left shift that leaves int32 saturates, where TFLite's reference is undefined.

    Source: `MultiplyByQuantizedMultiplier` of TensorFlow Lite (`kernels/internal/common.h`, with and without
    `TFLITE_SINGLE_ROUNDING`) and gemmlowp's `fixedpoint.h`.

    Args:
        acc: Accumulators within int32, of any integer dtype.
        multiplier: 0, or in [2**30, 2**31); broadcastable to `acc`.
        shift: In [-31, 30], positive is left; broadcastable to `acc`.
        zero_point: Of the result.
        qmin: Smallest code of the result.
        qmax: Largest code of the result.
        double_rounding: Which of the two roundings.
    """
    a, m, s = acc.to(torch.int64), multiplier.to(acc.device, torch.int64), shift.to(acc.device, torch.int64)
    left, right = torch.clamp(s, min=0), torch.clamp(-s, min=0)
    if double_rounding:
        low, high = -(1 << 31), (1 << 31) - 1
        shifted = torch.clamp(a << left, low, high)
        product = shifted * m
        nudge = torch.where(product >= 0, 1 << 30, 1 - (1 << 30))
        rounded = torch.div(product + nudge, 1 << 31, rounding_mode="trunc")
        mask = (torch.ones_like(right) << right) - 1
        threshold = (mask >> 1) + (rounded < 0).to(torch.int64)
        scaled = (rounded >> right) + ((rounded & mask) > threshold).to(torch.int64)
    else:
        total = 31 - s
        scaled = (a * m + (torch.ones_like(total) << (total - 1))) >> total
    return torch.clamp(scaled + zero_point, qmin, qmax).to(torch.int32)
