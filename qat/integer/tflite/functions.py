"""Functions of one tensor: for each the table of 256 codes that TFLite's reference kernel gives.

Sources: TensorFlow Lite `kernels/activations.cc`, `kernels/gelu.cc`, `LUTPopulateInt8` in `kernels/internal/common.h`,
`kernels/internal/reference/{gelu,hard_swish,leaky_relu}.h`. The float functions are evaluated in float64 and rounded to
float32; the C library's are off by at most a unit in the last place, which moves a code only where a value lies that
close to a tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qat import numerics
from qat.integer.kernels import table
from qat.integer.kernels.qparams import QParams, float32_scalar, round_to_float32
from qat.integer.tflite.arithmetic import Multiplier, divide_by_power, doubling_high_mul, multiply, quantize

#: Encoding of the result that the Logistic operator prescribes.
LOGISTIC = QParams(1.0 / 256.0, -128, -128, 127)
#: Encoding of the result that the specification prescribes for Tanh.
TANH = QParams(1.0 / 128.0, 0, -128, 127)

#: (input, output, parameters) to int32 codes of shape (256,), entry i for input code i - 128
Table = Callable[[QParams, QParams, Mapping[str, Any]], Tensor]


def all_codes() -> Tensor:
    """Every int8 code in order, int64."""
    return torch.arange(-128, 128, dtype=torch.int64)


def _real(x: QParams) -> Tensor:
    return float32_scalar(x.scale, torch.empty(0)) * (all_codes() - x.zero_point).to(torch.float32)


def _lookup(values: Tensor, y: QParams) -> Tensor:
    """Codes of float32 results: multiplied by the inverse of the scale, ties away from zero."""
    inverse = 1.0 / float32_scalar(y.scale, values)
    steps = numerics.round_half(values * inverse, "half_away") + y.zero_point
    return steps.clamp(y.qmin, y.qmax).to(torch.int32)


def _sigmoid(x: QParams, y: QParams, params: Mapping[str, Any]) -> Tensor:
    return _lookup(1.0 / (1.0 + torch.exp(-_real(x).double()).to(torch.float32)), y)


def _tanh(x: QParams, y: QParams, params: Mapping[str, Any]) -> Tensor:
    return _lookup(table.tanh(_real(x)), y)


def _gelu(x: QParams, y: QParams, params: Mapping[str, Any]) -> Tensor:
    real = _real(x)
    if params.get("approximate", "none") == "tanh":
        cubic = real + round_to_float32(0.044715) * real * real * real
        inner = round_to_float32(math.sqrt(2.0 / math.pi)) * cubic
        return _lookup(0.5 * real * (1.0 + table.tanh(inner)), y)
    argument = real * round_to_float32(-math.sqrt(0.5))
    return _lookup(0.5 * real * torch.erfc(argument.double()).to(torch.float32), y)


def _leaky_relu(x: QParams, y: QParams, params: Mapping[str, Any]) -> Tensor:
    value = all_codes() - x.zero_point
    slope = round_to_float32(float(params.get("negative_slope", 0.01)))
    steep = round_to_float32(x.scale / y.scale)
    flat = round_to_float32(round_to_float32(x.scale * slope) / y.scale)
    result = torch.where(value >= 0, multiply(value, Multiplier.of(steep)), multiply(value, Multiplier.of(flat)))
    return (result + y.zero_point).clamp(y.qmin, y.qmax).to(torch.int32)


def hard_swish_exponent(x: QParams, y: QParams) -> int:
    """Exponent of the output multiplier of HardSwish; the kernel refuses a positive one."""
    return math.frexp(round_to_float32(x.scale / 128.0 / y.scale))[1]


def _hard_swish(x: QParams, y: QParams, params: Mapping[str, Any]) -> Tensor:
    """16-bit fixed point: the product of `x / 2 + 3 / 2`, clamped, and `x` in the output's scale."""
    hires = round_to_float32(x.scale / 128.0)
    out, out_exponent = _sixteen_bits(round_to_float32(hires / y.scale))
    inner, exponent = _sixteen_bits(round_to_float32(hires / round_to_float32(3.0 / 32768.0)))
    value = (all_codes() - x.zero_point) << 7
    preshift = doubling_high_mul(value, out, 15)
    reluish = value
    if exponent > 0:
        reluish = (reluish << (exponent - 1)).clamp(-32768, 32767)
    reluish = doubling_high_mul(reluish, inner, 15)
    if exponent > 0:
        reluish = (reluish << 1).clamp(-32768, 32767)
    elif exponent < 0:
        reluish = divide_by_power(reluish, -exponent)
    reluish = (reluish + (1 << 15)) >> 1
    product = torch.div(reluish * preshift, 1 << 15, rounding_mode="trunc")
    result = divide_by_power(product, -out_exponent)
    return (result + y.zero_point).clamp(y.qmin, y.qmax).to(torch.int32)


def _sixteen_bits(value: float) -> tuple[int, int]:
    """A multiplier as a 15-bit integer and a shift."""
    mantissa, shift = numerics.fixed_point_multiplier(value)
    offset = 1 << 15
    return (32767 if mantissa >= (1 << 31) - 1 - offset else (mantissa + offset) >> 16), shift


def _plain(name: str) -> Table:
    """A function without an operator of its own: the table is data of the model, read by Gather."""

    def compute(x: QParams, y: QParams, params: Mapping[str, Any]) -> Tensor:
        return quantize(table.function_of(name, params)(_real(x)), y)

    return compute


#: functions that TFLite has an int8 operator for; Elu is one too, but the reference kernels lack it
OPERATORS: Mapping[str, Table] = MappingProxyType(
    {
        "sigmoid": _sigmoid,
        "tanh": _tanh,
        "gelu": _gelu,
        "leaky_relu": _leaky_relu,
        "hardswish": _hard_swish,
    }
)


def has_operator(name: str, params: Mapping[str, Any], x: QParams, y: QParams) -> bool:
    """Whether TFLite has an int8 operator for a function with these parameters and encodings."""
    if name == "leaky_relu":
        return float(params.get("negative_slope", 0.01)) >= 0.0
    if name == "hardswish":
        return hard_swish_exponent(x, y) <= 0
    return name in OPERATORS


def codes_of(name: str, params: Mapping[str, Any], x: QParams, y: QParams) -> Tensor:
    """The table of a function, int32 of shape (256,); entry i belongs to input code i - 128.

    Raises:
        PlanError: There is no such function.
    """
    if has_operator(name, params, x, y):
        return OPERATORS[name](x, y, params)
    return _plain(name)(x, y, params)
