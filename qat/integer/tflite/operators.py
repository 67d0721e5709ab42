"""Canonical operators on int8 codes, in the `tflite` numerics profile: the bridge from a program to the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qat.encoding import Encoding
from qat.integer.kernels.accumulate import conv_accumulate, linear_accumulate, matmul_accumulate
from qat.integer.kernels.resize import resize_nearest
from qat.integer.operators import CODE_OPERATORS, CodeOperator, Operand, planned, qparams, sides
from qat.integer.tflite import elementwise, functions, products, reduce, resize, softmax
from qat.integer.tflite.arithmetic import quantize, requantize_codes


def _conv(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    x, weight, bias = inputs
    assert x is not None
    assert weight is not None
    plan, scale = planned(weight, x.params, "conv", attrs["groups"])
    acc = conv_accumulate(
        x.value, x.params.zero_point, weight.value, attrs["stride"], sides(attrs["padding"]), attrs["dilation"],
        attrs["groups"], plan=plan,
    )  # fmt: skip
    return products.convolved(acc, None if bias is None else bias.value, x.params, scale.cpu(), qparams(y))


def _conv_transpose(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    x, weight, bias = inputs
    assert x is not None
    assert weight is not None
    plan, scale = planned(weight, x.params, "conv_transpose", attrs["groups"])
    acc = conv_accumulate(
        x.value, x.params.zero_point, weight.value, attrs["stride"], sides(attrs["padding"]), attrs["dilation"],
        attrs["groups"], transposed=True, output_padding=attrs["output_padding"], plan=plan,
    )  # fmt: skip
    return products.convolved(acc, None if bias is None else bias.value, x.params, scale.cpu(), qparams(y))


def _linear(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    x, weight, bias = inputs
    assert x is not None
    assert weight is not None
    plan, scale = planned(weight, x.params, "linear")
    acc = linear_accumulate(x.value, x.params.zero_point, plan)
    return products.connected(acc, None if bias is None else bias.value, x.params, scale.cpu(), qparams(y))


def _matmul(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    a, b = inputs
    assert a is not None
    assert b is not None
    acc = matmul_accumulate(a.value, a.params.zero_point, b.value, b.params.zero_point)
    return products.multiplied(acc, a.params, b.params, qparams(y))


def _binary(run: Callable[..., Tensor]) -> CodeOperator:
    def compute(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
        a, b = inputs
        assert a is not None
        assert b is not None
        return run(a.value, a.params, b.value, b.params, qparams(y))

    return compute


def _clamp(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    return elementwise.clamp(x.value, attrs["low"], attrs["high"], qparams(y))


def _table(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    codes = functions.codes_of(attrs["function"], attrs.get("params") or {}, x.params, qparams(y))
    index = (x.value.to(torch.int32) + 128).flatten()
    return codes.to(index.device).index_select(0, index).reshape(x.value.shape)


def _prelu(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    x, slope = inputs
    assert x is not None
    assert slope is not None
    return elementwise.prelu(x.value, x.params, slope.value, slope.params, qparams(y))


def _softmax(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    return softmax.softmax(x.value, x.params, attrs["axis"])


def _avg_pool(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    fill = x.params.zero_point if attrs["count_include_pad"] else None
    return reduce.avg_pool(x.value, attrs["kernel"], attrs["stride"], attrs["padding"], fill)


def _mean(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    return reduce.mean(x.value, x.params, qparams(y), attrs["axes"], attrs["keepdims"])


def _resize(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    if attrs["mode"] == "nearest":
        return resize_nearest(x.value, attrs["size"], attrs.get("scales"))
    return resize.resize_bilinear(x.value, attrs["size"], attrs["align_corners"])


def _pad(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    if attrs["mode"] != "constant":
        return CODE_OPERATORS["pad"](attrs, inputs, y)
    flat = [side for pair in reversed(attrs["pads"]) for side in pair]
    fill = int(quantize(torch.tensor(float(attrs.get("value") or 0.0)), x.params))
    return torch.nn.functional.pad(x.value.to(torch.int32), flat, value=fill)


def _requantize(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    return requantize_codes(x.value, x.params, qparams(y))


def _concat(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    return torch.cat([i.value.to(torch.int32) for i in inputs if i is not None], attrs["axis"])


#: operators on codes by kind; a kind that is not here has been legalized away or refused
OPERATORS: Mapping[str, CodeOperator] = MappingProxyType(
    {
        "conv": _conv,
        "conv_transpose": _conv_transpose,
        "linear": _linear,
        "matmul": _matmul,
        "add": _binary(elementwise.add),
        "sub": _binary(elementwise.sub),
        "mul": _binary(elementwise.mul),
        "clamp": _clamp,
        "table": _table,
        "prelu": _prelu,
        "softmax": _softmax,
        "max_pool": CODE_OPERATORS["max_pool"],
        "avg_pool": _avg_pool,
        "mean": _mean,
        "resize": _resize,
        "pad": _pad,
        "concat": _concat,
        "requantize": _requantize,
        **{kind: CODE_OPERATORS[kind] for kind in ("reshape", "transpose", "slice", "identity")},
    }
)
