"""Elementwise functions of one tensor: clamps, lookup tables, PReLU; and softmax."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qat.graph.recognize.base import Site
from qat.graph.recognize.types import NotCanonical, Operator, Recognizer, ScalarConst

# --- clamps


def _clamp(site: Site, x: Any, min: Any = None, max: Any = None) -> Operator:  # noqa: A002 - torch's names
    bounds = []
    for bound in (min, max):
        operand = None if bound is None else site.operand(bound)
        if operand is not None and not isinstance(operand, ScalarConst):
            raise NotCanonical("its bounds are tensors")
        bounds.append(None if operand is None else operand.value)
    return site.unary("clamp", x, low=bounds[0], high=bounds[1])


def _clamp_min(site: Site, x: Any, min: Any) -> Operator:  # noqa: A002
    return _clamp(site, x, min=min)


def _clamp_max(site: Site, x: Any, max: Any) -> Operator:  # noqa: A002
    return _clamp(site, x, max=max)


def _relu(site: Site, x: Any, inplace: Any = False) -> Operator:
    return _clamp(site, x, 0.0)


def _relu6(site: Site, x: Any, inplace: Any = False) -> Operator:
    return _clamp(site, x, 0.0, 6.0)


def _hardtanh(site: Site, x: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: Any = False) -> Operator:
    return _clamp(site, x, min_val, max_val)


def _threshold(site: Site, x: Any, threshold: Any, value: Any, inplace: Any = False) -> Operator:
    if site.number(threshold) != site.number(value):
        raise NotCanonical("a threshold whose replacement value differs from it")
    return _clamp(site, x, threshold)


# --- tables


def _table(site: Site, x: Any, function: str, **params: Any) -> Operator:
    return site.unary("table", x, function=function, params=params)


def _plain(function: str) -> Recognizer:
    def recognizer(site: Site, x: Any, inplace: Any = False) -> Operator:
        return _table(site, x, function)

    return recognizer


def _plain_module(function: str) -> Recognizer:
    def recognizer(site: Site, module: nn.Module, x: Any) -> Operator:
        return _table(site, x, function)

    return recognizer


def _gelu(site: Site, x: Any, approximate: Any = "none") -> Operator:
    return _table(site, x, "gelu", approximate=str(approximate))


def _leaky_relu(site: Site, x: Any, negative_slope: Any = 0.01, inplace: Any = False) -> Operator:
    return _table(site, x, "leaky_relu", negative_slope=site.number(negative_slope))


def _rrelu(
    site: Site,
    x: Any,
    lower: Any = 1.0 / 8,
    upper: Any = 1.0 / 3,
    training: Any = False,
    inplace: Any = False,
) -> Operator:
    if training is not False:
        raise NotCanonical("its slope is random")
    return _leaky_relu(site, x, (site.number(lower) + site.number(upper)) / 2)


def _elu(site: Site, x: Any, alpha: Any = 1.0, inplace: Any = False) -> Operator:
    return _table(site, x, "elu", alpha=site.number(alpha))


def _celu(site: Site, x: Any, alpha: Any = 1.0, inplace: Any = False) -> Operator:
    if site.number(alpha) != 1.0:
        raise NotCanonical(f"celu with alpha={alpha} (alpha=1 is an elu)")
    return _elu(site, x)


def _softplus(site: Site, x: Any, beta: Any = 1.0, threshold: Any = 20.0) -> Operator:
    # above a threshold of 20 the linear branch differs from the formula by less than 3e-9
    if site.number(beta) != 1.0 or site.number(threshold) < 20.0:
        raise NotCanonical(
            f"softplus with beta={beta}, threshold={threshold} (beta=1 and a threshold of 20 have a kind)"
        )
    return _table(site, x, "softplus")


def _pow(site: Site, x: Any, exponent: Any) -> Operator:
    power = site.operand(exponent)
    if not isinstance(power, ScalarConst):
        raise NotCanonical("its exponent is a tensor")
    return _table(site, x, "pow", exponent=power.value)


def _square(site: Site, x: Any) -> Operator:
    return _pow(site, x, 2.0)


def _prelu_module(site: Site, module: nn.Module, x: Any) -> Operator:
    return Operator("prelu", (site.tensor(x), site.own_required("weight")))


def _prelu(site: Site, x: Any, weight: Any) -> Operator:
    return Operator("prelu", (site.tensor(x), site.parameter(weight, "slope")))


# --- softmax


def _softmax(site: Site, x: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Operator:
    site.same_dtype(dtype)
    rank = len(site.shape_of(x))
    # torch's legacy choice of an axis where none is given (`torch.nn.functional._get_softmax_dim`)
    axis = site.axis((0 if rank in (0, 1, 3) else 1) if dim is None else dim, x)
    site.length(x, axis, "softmax")
    return site.unary("softmax", x, axis=axis)


def _torch_softmax(site: Site, x: Any, dim: Any, dtype: Any = None) -> Operator:
    return _softmax(site, x, dim, dtype=dtype)


def _of_module(function: Recognizer, *attributes: str) -> Recognizer:
    """The recognizer of a module that keeps the arguments of `function` in `attributes`."""

    def recognizer(site: Site, module: nn.Module, x: Any) -> Operator:
        return function(site, x, *(getattr(module, name) for name in attributes))

    return recognizer


MODULES: Mapping[type[nn.Module], Recognizer] = {
    nn.ReLU: _of_module(_relu),
    nn.ReLU6: _of_module(_relu6),
    nn.Hardtanh: _of_module(_hardtanh, "min_val", "max_val"),
    nn.Threshold: _of_module(_threshold, "threshold", "value"),
    nn.Sigmoid: _plain_module("sigmoid"),
    nn.Tanh: _plain_module("tanh"),
    nn.Hardsigmoid: _plain_module("hardsigmoid"),
    nn.Hardswish: _plain_module("hardswish"),
    nn.SiLU: _plain_module("silu"),
    nn.Mish: _plain_module("mish"),
    nn.GELU: _of_module(_gelu, "approximate"),
    nn.LeakyReLU: _of_module(_leaky_relu, "negative_slope"),
    nn.RReLU: _of_module(_rrelu, "lower", "upper"),
    nn.ELU: _of_module(_elu, "alpha"),
    nn.CELU: _of_module(_celu, "alpha"),
    nn.Softplus: _of_module(_softplus, "beta", "threshold"),
    nn.PReLU: _prelu_module,
    nn.Softmax: _of_module(_softmax, "dim"),
    nn.Softmax2d: lambda site, module, x: _softmax(site, x, -3),
}
_PLAIN = {
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    torch.special.expit: "sigmoid",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    F.hardsigmoid: "hardsigmoid",
    F.hardswish: "hardswish",
    F.silu: "silu",
    F.mish: "mish",
    torch.exp: "exp",
    torch.log: "log",
    torch.sqrt: "sqrt",
    torch.rsqrt: "rsqrt",
    torch.abs: "abs",
    torch.absolute: "abs",
    operator.abs: "abs",
    torch.neg: "neg",
    torch.negative: "neg",
    operator.neg: "neg",
    torch.reciprocal: "reciprocal",
    torch.erf: "erf",
    torch.special.erf: "erf",
    torch.sin: "sin",
    torch.cos: "cos",
}
FUNCTIONS: Mapping[Callable[..., Any], Recognizer] = {
    **{function: _plain(name) for function, name in _PLAIN.items()},
    torch.relu: _relu,
    F.relu: _relu,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.threshold: _threshold,
    torch.threshold: _threshold,
    torch.clamp: _clamp,
    torch.clip: _clamp,
    torch.clamp_min: _clamp_min,
    torch.clamp_max: _clamp_max,
    F.gelu: _gelu,
    F.leaky_relu: _leaky_relu,
    F.rrelu: _rrelu,
    F.elu: _elu,
    F.celu: _celu,
    torch.celu: _celu,
    F.softplus: _softplus,
    F.prelu: _prelu,
    torch.prelu: _prelu,
    torch.pow: _pow,
    operator.pow: _pow,
    torch.square: _square,
    F.softmax: _softmax,
    torch.softmax: _torch_softmax,
    torch.special.softmax: _torch_softmax,
}
METHODS: Mapping[str, Recognizer] = {
    **{
        name: _plain(name)
        for name in (
            "sigmoid",
            "tanh",
            "exp",
            "log",
            "sqrt",
            "rsqrt",
            "abs",
            "neg",
            "reciprocal",
            "erf",
            "sin",
            "cos",
        )
    },
    "absolute": _plain("abs"),
    "negative": _plain("neg"),
    "relu": _relu,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "pow": _pow,
    "square": _square,
    "prelu": _prelu,
    "softmax": _torch_softmax,
}
