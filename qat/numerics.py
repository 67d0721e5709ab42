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

#: Scale of a tensor whose range is empty or too small: keeps the product of two scales, and its inverse, normal in float32.
SCALE_FLOOR = 2.0**-40
#: Largest scale: the largest power of two whose product with any 16-bit code is still finite in float32.
SCALE_CEILING = 2.0**111


@dataclass(frozen=True)
class NumericsProfile:
    """How a runtime rounds and requantizes.

    Attributes:
        name: `onnx` or `tflite`.
        rounding: How QuantizeLinear rounds ties.
        requantize: `float32` multiplies the accumulator by a float32 multiplier and rounds half to even; `fixed_point`
            multiplies by a 31-bit integer and shifts.
    """

    name: str
    rounding: Rounding
    requantize: Literal["float32", "fixed_point"]


ONNX = NumericsProfile("onnx", "half_even", "float32")
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

    The division is a float32 division and not a multiplication by the inverse (ONNX QuantizeLinear). Infinities saturate;
    nan becomes the zero point.
    """
    granularity = granularity or Granularity()
    s = expand_to(scale.to(torch.float32), x, granularity)
    z = expand_to(zero_point.to(torch.float32), x, granularity)
    steps = round_half(x.to(torch.float32) / s, rounding)
    # clamped as float first: the conversion of a large float to an integer is undefined
    codes = torch.clamp(torch.nan_to_num(steps, nan=0.0, posinf=math.inf, neginf=-math.inf) + z, qmin, qmax)
    return codes.to(torch.int32)


def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, granularity: Granularity | None = None
) -> Tensor:
    """Dequantize: `x = (q - zero_point) * scale`, float32, in the shape of `q`."""
    granularity = granularity or Granularity()
    s = expand_to(scale.to(torch.float32), q, granularity)
    z = expand_to(zero_point.to(torch.int32), q, granularity)
    return (q.to(torch.int32) - z).to(torch.float32) * s


def range_to_scale(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Turn observed ranges into scales and zero points.

    The range is first widened to hold zero, so zero is always exactly representable. Affine:
    `scale = (high - low) / (qmax - qmin)`, `zero_point = clamp(round(qmin - low / scale))`. Symmetric:
    `scale = max(|low|, |high|) / min(qmax - z, z - qmin)` with z the middle of the type, or with only the positive side
    where the negative one is a single code shorter. Empty ranges get `SCALE_FLOOR`. Power-of-two scales are rounded up, so
    nothing that was inside the range saturates.

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
    low, high = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
    if scheme.symmetric:
        middle = scheme.symmetric_zero_point
        # [-128, 127]: 127 steps a side, -128 is spare; a range without a negative side uses the positive one
        sides = [side for side in (qmax - middle, middle - qmin) if side > 0]
        scale = torch.maximum(-low, high) / min(sides)
    else:
        scale = (high - low) / (qmax - qmin)
    scale = torch.clamp(scale, SCALE_FLOOR, SCALE_CEILING)
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
    mantissa, exponent = torch.frexp(scale)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(scale), exponent)


def representable_range(scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest float that has a code of its own, float32, in the shape of `scale`."""
    s, z = scale.to(torch.float32), zero_point.to(torch.float32)
    return (qmin - z) * s, (qmax - z) * s


def requantize_float(acc: Tensor, multiplier: Tensor, zero_point: int, qmin: int, qmax: int) -> Tensor:
    """Requantize in the `onnx` profile: `clamp(rint(float32(acc) * float32(multiplier)) + zero_point)`, int32.

    Args:
        acc: Accumulators, int32 or int64.
        multiplier: float32, broadcastable to `acc`; any positive value, also above 1.
        zero_point: Of the result.
        qmin: Smallest code of the result.
        qmax: Largest code of the result.
    """
    scaled = torch.round(acc.to(torch.float32) * multiplier.to(torch.float32))
    return (torch.clamp(scaled, qmin - zero_point, qmax - zero_point) + zero_point).to(torch.int32)


def fixed_point_multiplier(multiplier: float) -> tuple[int, int]:
    """Split a positive multiplier into a 31-bit integer and a shift: `multiplier ~ m * 2**(shift - 31)`.

    Returns:
        `m` in [2**30, 2**31) and `shift` (positive: left), or (0, 0) where the multiplier is below 2**-32.

    Raises:
        EncodingError: The multiplier is not positive and finite, or is above 2**30.
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
        raise EncodingError(f"multiplier {multiplier} is above 2**30", "check the scales of this layer")
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

    Double rounding is `SaturatingRoundingDoublingHighMul` followed by `RoundingDivideByPOT` (half away from zero), as in
    TFLite's reference convolution; single rounding adds the rounding constant once to the 64-bit product.

    Args:
        acc: int32 accumulators (as any integer dtype).
        multiplier: int32 in [2**30, 2**31), broadcastable to `acc`.
        shift: int32, positive is left, broadcastable to `acc`.
        zero_point: Of the result.
        qmin: Smallest code of the result.
        qmax: Largest code of the result.
        double_rounding: Which of the two roundings.
    """
    a, m, s = acc.to(torch.int64), multiplier.to(torch.int64), shift.to(torch.int64)
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
