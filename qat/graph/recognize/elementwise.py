"""Arithmetic of two operands: tensors, parameters and numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qat.graph.recognize.base import Site
from qat.graph.recognize.types import NotCanonical, Operator, Recognizer, ScalarConst


def _unscaled(site: Site, alpha: Any) -> None:
    if site.number(alpha) != 1.0:
        raise NotCanonical(f"alpha={alpha} scales the second operand; write the factor as a multiplication")


def _add(site: Site, x: Any, other: Any, *, alpha: Any = 1) -> Operator:
    _unscaled(site, alpha)
    a, b = site.operand(x), site.operand(other)
    if isinstance(a, ScalarConst):
        a, b = b, a
    if b == ScalarConst(0.0):
        return Operator("identity", (a,))
    return Operator("add", (a, b))


def _sub(site: Site, x: Any, other: Any, *, alpha: Any = 1) -> Operator:
    _unscaled(site, alpha)
    a, b = site.operand(x), site.operand(other)
    if b == ScalarConst(0.0):
        return Operator("identity", (a,))
    if a == ScalarConst(0.0):
        return Operator("table", (b,), {"function": "neg", "params": {}})
    return Operator("sub", (a, b))


def _rsub(site: Site, x: Any, other: Any, *, alpha: Any = 1) -> Operator:
    _unscaled(site, alpha)
    return _sub(site, other, x)


def _mul(site: Site, x: Any, other: Any) -> Operator:
    a, b = site.operand(x), site.operand(other)
    if isinstance(a, ScalarConst):
        a, b = b, a
    if isinstance(b, ScalarConst):
        if b.value == 1.0:
            return Operator("identity", (a,))
        if b.value == -1.0:
            return Operator("table", (a,), {"function": "neg", "params": {}})
        if b.value > 0.0:
            return Operator("rescale", (a,), {"factor": b.value})
    return Operator("mul", (a, b))


def _div(site: Site, x: Any, other: Any, *, rounding_mode: Any = None) -> Operator:
    if rounding_mode is not None:
        raise NotCanonical(f"a division with rounding_mode={rounding_mode!r}")
    a, b = site.operand(x), site.operand(other)
    if isinstance(b, ScalarConst):
        if b.value == 0.0:
            raise NotCanonical("a division by zero")
        return _mul(site, x, 1.0 / b.value)
    if a == ScalarConst(1.0):
        return Operator("table", (b,), {"function": "reciprocal", "params": {}})
    return Operator("div", (a, b))


def _positive(site: Site, x: Any) -> Operator:
    return site.unary("identity", x)


MODULES: Mapping[type[nn.Module], Recognizer] = {}
FUNCTIONS: Mapping[Callable[..., Any], Recognizer] = {
    torch.add: _add,
    operator.add: _add,
    torch.sub: _sub,
    torch.subtract: _sub,
    operator.sub: _sub,
    torch.rsub: _rsub,
    torch.mul: _mul,
    torch.multiply: _mul,
    operator.mul: _mul,
    torch.div: _div,
    torch.divide: _div,
    torch.true_divide: _div,
    operator.truediv: _div,
    operator.pos: _positive,
    torch.positive: _positive,
}
METHODS: Mapping[str, Recognizer] = {
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "mul": _mul,
    "multiply": _mul,
    "div": _div,
    "divide": _div,
    "true_divide": _div,
    "positive": _positive,
}
