"""Canonical operators on codes, in the `onnx-arm64` numerics profile: the bridge from a program to the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from qat.encoding import Encoding
from qat.integer.arm64 import elementwise, floats
from qat.integer.kernels.table import RealFunction, apply_table, lookup_table
from qat.integer.operators import CODE_OPERATORS, CodeOperator, Operand, binary, qparams

#: functions of one tensor that are computed otherwise, by the name that a `table` gives
_FUNCTIONS: Mapping[str, RealFunction] = MappingProxyType(
    {"hardsigmoid": floats.hard_sigmoid, "hardswish": floats.hard_swish}
)


def _table(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    function = _FUNCTIONS.get(attrs["function"])
    if function is None:
        return CODE_OPERATORS["table"](attrs, inputs, y)
    (x,) = inputs
    assert x is not None
    return apply_table(x.value, lookup_table(function, x.params, qparams(y)), x.params)


def _layer_norm(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    x, weight, bias = inputs
    assert x is not None
    return floats.layer_norm(
        x.value, x.params, None if weight is None else weight.floats, None if bias is None else bias.floats, qparams(y),
        attrs["axes_count"], attrs["eps"],
    )  # fmt: skip


def _resize(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    if attrs["mode"] == "nearest" or x.value.dim() != 4:
        return CODE_OPERATORS["resize"](attrs, inputs, y)
    return floats.resize_bilinear(
        x.value, x.params, qparams(y), attrs["size"], attrs["align_corners"], attrs.get("scales")
    )


#: operators on codes by kind
OPERATORS: Mapping[str, CodeOperator] = MappingProxyType(
    {
        **CODE_OPERATORS,
        "add": binary(elementwise.add),
        "mul": binary(elementwise.mul),
        "table": _table,
        "layer_norm": _layer_norm,
        "resize": _resize,
    }
)
