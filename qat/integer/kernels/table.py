"""Unary functions as lookup tables over the codes, and PReLU.

A function of one quantized tensor has at most 65536 results, so it is evaluated once for every code:
dequantize, the function in float32, quantize. That is what ONNX Runtime does, either literally
(QLinearSigmoid and QLinearLeakyRelu build this very table) or element by element (DequantizeLinear, the float
operator, QuantizeLinear).

Functions made of additions and multiplications follow the runtime's order of float32 operations and are
exact. The transcendental ones are evaluated in float64 and rounded to float32; the runtime's polynomials are
off by some units in the last place, which can move a code only if the value lies that close to a rounding
boundary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qat.errors import PlanError
from qat.integer.kernels.qparams import QParams, float32_scalar, round_to_float32
from qat.integer.kernels.requantize import dequantize, quantize

#: A real function, float32 to float32 of the same shape.
RealFunction = Callable[[Tensor], Tensor]


def lookup_table(function: RealFunction, x: QParams, y: QParams) -> Tensor:
    """Evaluate `function` for every input code.

    Args:
        function: float32 to float32.
        x: Parameters of the input.
        y: Parameters of the result.

    Returns:
        int32 codes, shape (x.levels,); entry i belongs to input code `x.qmin + i`.
    """
    codes = torch.arange(x.qmin, x.qmax + 1, dtype=torch.int32)
    return quantize(function(dequantize(codes, x)), y)


def apply_table(codes: Tensor, table: Tensor, x: QParams) -> Tensor:
    """Look every code up in a table of `lookup_table`; int32, shape of `codes`."""
    index = (codes.to(torch.int32) - x.qmin).flatten()
    return table.to(codes.device).index_select(0, index).reshape(codes.shape)


def relu(x: Tensor) -> Tensor:
    """`max(x, 0)`."""
    return x.clamp(min=0.0)


def clip(low: float, high: float) -> RealFunction:
    """`min(max(x, low), high)`; ReLU6 is `clip(0, 6)`."""
    return lambda x: x.clamp(low, high)


def leaky_relu(negative_slope: float) -> RealFunction:
    """`x` where it is not negative, `negative_slope * x` elsewhere."""
    return lambda x: torch.where(x >= 0, x, float32_scalar(negative_slope, x) * x)


def hard_sigmoid(x: Tensor) -> Tensor:
    """`min(max(x / 6 + 1 / 2, 0), 1)`, the sixth as a float32 factor."""
    return (float32_scalar(1 / 6, x) * x + float32_scalar(0.5, x)).clamp(0.0, 1.0)


def hard_swish(x: Tensor) -> Tensor:
    """`x * hard_sigmoid(x)`."""
    return x * hard_sigmoid(x)


def _in_double(function: RealFunction) -> RealFunction:
    return lambda x: function(x.double()).to(torch.float32)


def sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + exp(-x))`."""
    return torch.sigmoid(x.double()).to(torch.float32)


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`, the sigmoid rounded to float32 before the product, as in Sigmoid followed by Mul."""
    return x * sigmoid(x)


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent."""
    return torch.tanh(x.double()).to(torch.float32)


def gelu(x: Tensor) -> Tensor:
    """`x * Phi(x)`, with the error function."""
    return torch.nn.functional.gelu(x.double()).to(torch.float32)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh approximation."""
    return torch.nn.functional.gelu(x.double(), approximate="tanh").to(torch.float32)


def elu(alpha: float) -> RealFunction:
    """`x` where it is positive, `alpha * (exp(x) - 1)` elsewhere."""
    return _in_double(lambda x: torch.where(x > 0, x, alpha * torch.expm1(x)))


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`, without a threshold."""
    wide = x.double()
    return (wide.clamp(min=0) + torch.log1p(torch.exp(-wide.abs()))).to(torch.float32)


def mish(x: Tensor) -> Tensor:
    """`x * tanh(softplus(x))`, each step rounded to float32."""
    return x * tanh(softplus(x))


def power(exponent: float) -> RealFunction:
    """`x ** exponent`."""
    return _in_double(lambda x: torch.pow(x, exponent))


def softplus_with(beta: float, threshold: float) -> RealFunction:
    """`log(1 + exp(beta * x)) / beta`, and `x` itself where `beta * x` exceeds the threshold."""
    if beta == 1.0 and threshold >= 20.0:
        return softplus  # the linear tail differs by less than 2**-28
    factor = round_to_float32(beta)

    def compute(x: Tensor) -> Tensor:
        scaled = x * float32_scalar(factor, x)
        return torch.where(scaled > threshold, x, softplus(scaled) / float32_scalar(factor, x))

    return compute


def sqrt(x: Tensor) -> Tensor:
    """Square root, correctly rounded (PyTorch's float32 one is not everywhere); nan below zero."""
    return torch.sqrt(x.double()).to(torch.float32)


#: Functions without parameters.
FUNCTIONS: Mapping[str, RealFunction] = MappingProxyType(
    {
        "relu": relu,
        "relu6": clip(0.0, 6.0),
        "hardsigmoid": hard_sigmoid,
        "hardswish": hard_swish,
        "sigmoid": sigmoid,
        "silu": silu,
        "tanh": tanh,
        "mish": mish,
        "exp": _in_double(torch.exp),
        "log": _in_double(torch.log),
        "sqrt": sqrt,
        "rsqrt": lambda x: torch.reciprocal(sqrt(x)),
        "abs": torch.abs,
        "neg": torch.neg,
        "reciprocal": torch.reciprocal,
        "erf": _in_double(torch.erf),
        "sin": _in_double(torch.sin),
        "cos": _in_double(torch.cos),
    }
)

#: Functions with parameters: what makes them, and PyTorch's defaults.
_PARAMETRIC: Mapping[str, tuple[Callable[..., RealFunction], Mapping[str, float | str]]] = MappingProxyType(
    {
        "leaky_relu": (leaky_relu, {"negative_slope": 0.01}),
        "elu": (elu, {"alpha": 1.0}),
        "softplus": (
            softplus_with,
            {"beta": 1.0, "threshold": 20.0},
        ),
        "gelu": (lambda approximate: gelu_tanh if approximate == "tanh" else gelu, {"approximate": "none"}),
        "pow": (power, {"exponent": 1.0}),
        "clamp": (clip, {"low": -math.inf, "high": math.inf}),
    }
)


def function_of(name: str, params: Mapping[str, Any] | None = None) -> RealFunction:
    """The real function of a name, with its parameters.

    Args:
        name: A key of `FUNCTIONS`, or `leaky_relu` (negative_slope), `elu` (alpha), `softplus` (beta,
            threshold), `gelu` (approximate: none or tanh), `pow` (exponent), `clamp` (low, high).
        params: The parameters; PyTorch's defaults where absent.

    Raises:
        PlanError: A name or a parameter that does not exist.
    """
    given = dict(params or {})
    if name in _PARAMETRIC:
        make, defaults = _PARAMETRIC[name]
        if given.keys() <= defaults.keys():
            return make(**{**defaults, **given})
    elif name in FUNCTIONS and not given:
        return FUNCTIONS[name]
    raise PlanError(
        f"no unary function {name!r} with parameters {sorted(given)}",
        f"use one of {', '.join(sorted([*FUNCTIONS, *_PARAMETRIC]))}",
    )


def prelu(codes: Tensor, x: QParams, slope: Tensor, y: QParams, channel_axis: int = 1) -> Tensor:
    """PReLU with one slope, or one a channel: DequantizeLinear, PRelu with a float slope, QuantizeLinear.

    Args:
        codes: Integer, any shape.
        x: Parameters of the input.
        slope: float32, shape () or (1,) or (channels,).
        y: Parameters of the result.
        channel_axis: Axis that the slopes run along.

    Returns:
        int32 codes, shape of `codes`.
    """
    real = dequantize(codes, x)
    factor = slope.to(real.device, torch.float32)
    if factor.numel() == 1:
        factor = factor.reshape(())
    else:
        axis = channel_axis % codes.dim()
        factor = factor.reshape([-1 if d == axis else 1 for d in range(codes.dim())])
    return quantize(torch.where(real > 0, real, real * factor), y)
