"""Canonical operators on codes, in the `onnx` numerics profile: the bridge from a program to the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qat.encoding import Encoding
from qat.integer import floats
from qat.integer.kernels import elementwise, layer_norm, layout, linear, normalize, pool, resize, table
from qat.integer.kernels.accumulate import Plan, plan_conv, plan_linear
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import dequantize, quantize, requantize_codes
from qat.scheme import int_type


@dataclass(frozen=True)
class Operand:
    """A tensor or constant as an operator reads it.

    Attributes:
        value: Codes, or floats where there is no encoding.
        encoding: How codes are read.
        prepared: What operators have made of a constant once and use again, by the operator's own key.
    """

    value: Tensor
    encoding: Encoding | None
    prepared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def floats(self) -> Tensor:
        """The values as floats."""
        return self.value if self.encoding is None else self.encoding.dequantize(self.value)

    @property
    def params(self) -> QParams:
        """Per-tensor parameters of the codes as an operator reads them."""
        assert self.encoding is not None
        return replace(qparams(self.encoding), float_reader=int_type(self.encoding.dtype).bits < 8)


def qparams(encoding: Encoding | None) -> QParams:
    """Per-tensor kernel parameters of an encoding."""
    assert encoding is not None
    return QParams(encoding.scale[0], encoding.zero_point[0], encoding.qmin, encoding.qmax)


CodeOperator = Callable[[Mapping[str, Any], list[Operand | None], Encoding], Tensor]


def sides(padding: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Return ((begin, end), ...) in ONNX order: all begins, then all ends."""
    return tuple(begin for begin, _ in padding) + tuple(end for _, end in padding)


def planned(weight: Operand, x: QParams, kind: str, groups: int = 1) -> tuple[Plan, Tensor]:
    """Return the weight prepared for an input, made once, and its scale: () or (channels,)."""
    encoding, largest = weight.encoding, linear.largest(x)
    assert encoding is not None
    key = (kind, groups, largest)
    if key not in weight.prepared:
        zero = encoding.zero_point_tensor.to(weight.value.device)
        if zero.dim():
            axis = 1 if kind == "conv_transpose" else 0
            zero = zero.reshape([-1 if d == axis else 1 for d in range(weight.value.dim())])
        centred = weight.value.to(torch.int32) - zero
        if kind == "linear":
            plan = plan_linear(centred, largest)
        else:
            plan = plan_conv(centred, largest, groups, transposed=kind == "conv_transpose")
        weight.prepared[key] = plan, encoding.scale_tensor.to(weight.value.device)
    found: tuple[Plan, Tensor] = weight.prepared[key]
    return found


def _conv(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    x, weight, bias = inputs
    assert x is not None
    assert weight is not None
    plan, scale = planned(weight, x.params, "conv", attrs["groups"])
    return linear.conv(
        x.value, x.params, weight.value, scale, None if bias is None else bias.value, qparams(y),
        attrs["stride"], sides(attrs["padding"]), attrs["dilation"], attrs["groups"], plan=plan,
    )  # fmt: skip


def _conv_transpose(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    x, weight, bias = inputs
    assert x is not None
    assert weight is not None
    plan, scale = planned(weight, x.params, "conv_transpose", attrs["groups"])
    return linear.conv_transpose(
        x.value, x.params, weight.value, scale, None if bias is None else bias.value, qparams(y),
        attrs["stride"], sides(attrs["padding"]), attrs["output_padding"], attrs["dilation"], attrs["groups"],
        plan=plan,
    )  # fmt: skip


def _linear(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    x, weight, bias = inputs
    assert x is not None
    assert weight is not None
    assert weight.encoding is not None
    bias_codes = None if bias is None else bias.value
    if weight.encoding.granularity.kind == "per_group":
        real = linear.linear_per_group(x.value, x.params, weight.value, weight.encoding)
        if bias is not None and bias.encoding is not None:
            real = real + bias.encoding.dequantize(bias.value)
        return quantize(real, qparams(y))
    plan, scale = planned(weight, x.params, "linear")
    return linear.linear(x.value, x.params, weight.value, scale, bias_codes, qparams(y), plan)


def binary(run: Callable[..., Tensor]) -> CodeOperator:
    """Return the operator that a kernel of two tensors of codes is."""

    def compute(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
        a, b = inputs
        assert a is not None
        assert b is not None
        return run(a.value, a.params, b.value, b.params, qparams(y))

    return compute


def _clamp(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    low, high = attrs["low"], attrs["high"]
    clip = table.clip(-torch.inf if low is None else low, torch.inf if high is None else high)
    return table.apply_table(x.value, table.lookup_table(clip, x.params, qparams(y)), x.params)


def _table(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    function = table.function_of(attrs["function"], attrs.get("params") or {})
    return table.apply_table(x.value, table.lookup_table(function, x.params, qparams(y)), x.params)


def _prelu(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    x, slope = inputs
    assert x is not None
    assert slope is not None
    return table.prelu(x.value, x.params, slope.floats, qparams(y))


def _softmax(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    return normalize.softmax(x.value, x.params, qparams(y), attrs["axis"])


def _layer_norm(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    x, weight, bias = inputs
    assert x is not None
    return layer_norm.layer_norm(
        x.value, x.params, None if weight is None else weight.floats, None if bias is None else bias.floats, qparams(y),
        attrs["axes_count"], attrs["eps"],
    )  # fmt: skip


def _max_pool(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    return pool.max_pool(
        x.value, attrs["kernel"], attrs["stride"], sides(attrs["padding"]), attrs["dilation"], attrs["ceil_mode"]
    )


def _avg_pool(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    return pool.avg_pool(
        x.value, x.params, qparams(y), attrs["kernel"], attrs["stride"], sides(attrs["padding"]), attrs["ceil_mode"],
        attrs["count_include_pad"],
    )  # fmt: skip


def _mean(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    return pool.reduce_mean(x.value, x.params, qparams(y), attrs["axes"], attrs["keepdims"])


def _resize(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    if attrs["mode"] == "nearest":
        return requantize_codes(
            resize.resize_nearest(x.value, attrs["size"], attrs.get("scales")), x.params, qparams(y)
        )
    if x.value.dim() == 4:
        return resize.resize_bilinear(
            x.value, x.params, qparams(y), attrs["size"], attrs["align_corners"], attrs.get("scales")
        )
    return quantize(floats.resize(attrs, [dequantize(x.value, x.params)]), qparams(y))


def _pad(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    # reflection wants the pads of the spatial dimensions, all of them and no others
    spatial = len(attrs["pads"]) if attrs["mode"] == "constant" else max(x.value.dim() - 2, 1)
    flat = [side for pair in reversed(attrs["pads"][-spatial:]) for side in pair]
    return layout.pad(x.value, x.params, flat, attrs["mode"], attrs.get("value") or 0.0)


def _concat(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    return layout.concat([(i.value, i.params) for i in inputs if i is not None], qparams(y), attrs["axis"])


def _requantize(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    return requantize_codes(x.value, x.params, qparams(y))


def _rescale(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
    (x,) = inputs
    assert x is not None
    return x.value.to(torch.int32)


def _move(run: floats.FloatOperator) -> CodeOperator:
    def compute(attrs: Mapping[str, Any], inputs: list[Operand | None], y: Encoding) -> Tensor:
        (x,) = inputs
        assert x is not None
        return run(attrs, [x.value])

    return compute


#: operators on codes by kind
CODE_OPERATORS: Mapping[str, CodeOperator] = MappingProxyType(
    {
        "conv": _conv,
        "conv_transpose": _conv_transpose,
        "linear": _linear,
        "matmul": binary(linear.matmul),
        "add": binary(elementwise.add),
        "sub": binary(elementwise.sub),
        "mul": binary(elementwise.mul),
        "div": binary(elementwise.div),
        "clamp": _clamp,
        "table": _table,
        "prelu": _prelu,
        "softmax": _softmax,
        "layer_norm": _layer_norm,
        "max_pool": _max_pool,
        "avg_pool": _avg_pool,
        "mean": _mean,
        "resize": _resize,
        "pad": _pad,
        "concat": _concat,
        "requantize": _requantize,
        "rescale": _rescale,
        **{kind: _move(run) for kind, run in floats.MOVES.items()},
    }
)
