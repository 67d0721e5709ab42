"""Linear layers and matrix products."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qat.graph.recognize.base import Site
from qat.graph.recognize.types import NotCanonical, Operator, ParamRef, Recognizer


def _linear(site: Site, x: Any, weight: ParamRef, bias: ParamRef | None) -> Operator:
    shape = site.shape_of(weight)
    if len(shape) != 2:
        raise NotCanonical(f"its weight has {len(shape)} dimensions instead of 2")
    return Operator("linear", (site.tensor(x), weight, bias), {}, site.macs(site.shape, shape[1]))


def _module(site: Site, module: nn.Module, x: Any) -> Operator:
    return _linear(site, x, site.own_required("weight"), site.own("bias"))


def _functional(site: Site, x: Any, weight: Any, bias: Any = None) -> Operator:
    return _linear(site, x, site.parameter(weight, "weight"), site.optional_parameter(bias, "bias"))


def _matmul(site: Site, x: Any, other: Any) -> Operator:
    shape = site.shape_of(x)
    if len(shape) < 2 or len(site.shape_of(other)) < 2:
        raise NotCanonical("a product with a vector")
    if shape[-1] < 0:
        raise NotCanonical("a matrix product that sums along the batch")
    return Operator("matmul", (site.tensor(x), site.tensor(other)), {}, site.macs(site.shape, shape[-1]))


def _mm(site: Site, x: Any, mat2: Any) -> Operator:
    return _matmul(site, x, mat2)


def _einsum(site: Site, equation: Any, *operands: Any) -> Operator:
    """A plain batched matrix product, such as `bhqd,bhdk->bhqk`; nothing else has a kind."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    terms, arrow, result = str(equation).replace(" ", "").partition("->")
    factors = terms.split(",")
    if len(operands) == 2 == len(factors) and arrow:
        left, right = factors
        batch, rows, inner, columns = left[:-2], left[-2:-1], left[-1:], right[-1:]
        letters = batch + rows + inner + columns
        plain = (
            len(left) >= 2
            and right == batch + inner + columns
            and result == batch + rows + columns
            and letters.isalpha()
            and len(set(letters)) == len(letters)
        )
        if plain:
            return _matmul(site, *operands)
    raise NotCanonical(f"einsum {equation!r} is no plain matrix product; write it with transpose and matmul")


MODULES: Mapping[type[nn.Module], Recognizer] = {nn.Linear: _module}
FUNCTIONS: Mapping[Callable[..., Any], Recognizer] = {
    F.linear: _functional,
    torch.matmul: _matmul,
    operator.matmul: _matmul,
    torch.bmm: _mm,
    torch.mm: _mm,
    torch.einsum: _einsum,
}
METHODS: Mapping[str, Recognizer] = {
    "matmul": _matmul,
    "bmm": _mm,
    "mm": _mm,
}
