"""Convolutions, fully connected layers and matrix products in a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qat.integer.native.builder import Builder, Value
from qat.integer.native.fusion import Step
from qat.integer.native.order import channels_last, logical
from qat.integer.native.planfile import Kind, Type
from qat.integer.native.pointwise import adds_right_first, lookup, narrowed
from qat.integer.native.support import TYPES, grid_of
from qat.scheme import int_type


@dataclass(frozen=True)
class _Layer:
    """A layer as the runner has it: a convolution of (N, H, W, C).

    Attributes:
        x: The input in four physical dimensions.
        sizes: Physical sizes of the result.
        geometry: stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups, transposed.
        weight: Codes (outputs, kernel_h, kernel_w, inputs / groups).
    """

    x: Value
    sizes: tuple[int, ...]
    geometry: tuple[int, ...]
    weight: Tensor


def layer(b: Builder, step: Step) -> None:
    """Write a `conv`, `conv_transpose` or `linear` with all that is fused into it."""
    op = step.op
    made = _linear(b, step) if op.kind == "linear" else _conv(b, step)
    own_encoding = b.program.encoding_of(op.outputs[0])
    assert own_encoding is not None
    own = narrowed(b, grid_of(own_encoding), step.own_clamp)
    # ONNX Runtime computes a transposed convolution in float
    own_wide = replace(own, wide=own.wide or op.kind == "conv_transpose")
    last = step.output
    rank = len(b.program.tensors[last].shape)
    order = logical(rank) if op.kind == "linear" else channels_last(rank)
    if op.kind == "linear":
        order = _rows_order(b.value(op.inputs[0]))
    grid = own if step.add is None and step.table is None else None
    if step.add is not None:
        encoding = b.program.encoding_of(step.add.outputs[0])
        assert encoding is not None
        grid = narrowed(b, grid_of(encoding), step.clamp)
    residual, residual_first = "", False
    if step.add is not None:
        residual, residual_first = _residual(b, step, made.sizes, order)
    y = b.define(last, order, grid)
    table = ""
    if step.table is not None:
        table = b.table(f"{step.table.name}:table", lookup(b, step.table, replace(y, grid=own, type=y.type)), y)
    target = y if y.sizes == made.sizes else b.temporary(f"{last}:4d", made.sizes, y)
    weights = _weights(b, step, made)
    own_type = TYPES[own_encoding.dtype]
    ints = (*made.geometry, residual_first, own_type, own.zero_point, own.qmin, own.qmax, own_wide.wide)
    inputs = (made.x.tensor, *weights, "", "", residual, table)
    b.emit(Kind.CONV, op.name, inputs, target, ints, (own.scale,))
    if target is not y:
        b.reshape(target, y)


def _rows_order(x: Value) -> tuple[int, ...]:
    """The order of `x` with the features last."""
    last = len(x.shape) - 1
    return (*(d for d in x.order if d != last), last)


def _linear(b: Builder, step: Step) -> _Layer:
    x = b.value(step.op.inputs[0])
    x = b.ordered(x, _rows_order(x))
    weight = b.constant(step.op.inputs[1])
    rows = math.prod(x.sizes[:-1])
    geometry = (1, 1, 0, 0, 1, 1, 1, 0)
    return _Layer(
        b.resized(x, (1, 1, rows, x.sizes[-1])), (1, 1, rows, weight.shape[0]), geometry, weight[:, None, None, :]
    )


def _conv(b: Builder, step: Step) -> _Layer:
    op = step.op
    transposed = op.kind == "conv_transpose"
    attrs: dict[str, Any] = dict(op.attrs)
    x = b.value(op.inputs[0])
    x = image(b, b.ordered(x, channels_last(len(x.shape))))
    y = b.program.tensors[op.outputs[0]].shape
    weight = b.constant(op.inputs[1])
    groups = attrs["groups"]
    if weight.dim() == 3:
        weight = weight[:, :, None]
        y = (*y[:2], 1, y[2])
        attrs = {key: value if key == "groups" else (*_NEUTRAL[key], *value) for key, value in attrs.items()}
    if transposed:
        # (inputs, outputs / groups, ...) to (outputs, inputs / groups, ...)
        parts = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        weight = parts.transpose(1, 2).flatten(0, 1)
    begins = [begin for begin, _ in attrs["padding"]]
    geometry = (*attrs["stride"], *begins, *attrs["dilation"], groups, int(transposed))
    return _Layer(x, (y[0], y[2], y[3], y[1]), geometry, weight.permute(0, 2, 3, 1))


#: attributes of the height of a one-dimensional operator
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {"stride": (1,), "padding": ((0, 0),), "dilation": (1,), "kernel": (1,), "output_padding": (0,)}
)


def image(b: Builder, x: Value) -> Value:
    """A channels-last tensor in four physical dimensions; (N, L, C) gets a height of 1."""
    sizes = x.sizes
    return b.resized(x, (sizes[0], 1, *sizes[1:]) if len(sizes) == 3 else sizes)


def _residual(b: Builder, step: Step, sizes: tuple[int, ...], order: tuple[int, ...]) -> tuple[str, bool]:
    """Name of what is added, in the sizes of the result, and whether it is the left operand of the sum."""
    assert step.add is not None
    own = (step.own_clamp or step.op).outputs[0]
    left = step.add.inputs[0] != own
    other = b.value(step.add.inputs[0] if left else step.add.inputs[1])
    moved = b.resized(b.ordered(other, order), sizes)
    return moved.tensor, left != adds_right_first(b, *step.add.inputs)


def _weights(b: Builder, step: Step, made: _Layer) -> tuple[str, str, str, str]:
    """Names of the weight, its zero points, its scales and the bias."""
    key = step.op.inputs[1]
    encoding = b.program.constants[key].encoding
    assert encoding is not None
    kind = int_type(encoding.dtype)
    # the runner's weights are signed; unsigned ones move with their zero points
    middle = 0 if kind.signed else 1 << (kind.bits - 1)
    codes = made.weight.to(torch.int32) - middle
    outputs = codes.shape[0]
    zeros = (encoding.zero_point_tensor - middle).expand(outputs)
    scales = encoding.scale_tensor.expand(outputs)
    name = f"{step.op.name}:weight"
    if kind.bits == 4:
        flat = torch.nn.functional.pad(codes.flatten() & 15, (0, codes.numel() % 2)).reshape(-1, 2)
        data = (flat[:, 0] | flat[:, 1] << 4).to(torch.uint8)
        weight = b.array(name, codes, Type.S4, data.numpy().tobytes())
    else:
        weight = b.array(name, codes, Type.S8, codes.to(torch.int8).contiguous().numpy().tobytes())
    return (
        weight,
        b.array(f"{name}:zero_points", zeros) if bool(zeros.any()) else "",
        b.array(f"{name}:scales", scales),
        b.array(f"{step.op.name}:bias", b.constant(step.op.inputs[2])) if step.op.inputs[2] else "",
    )


def matmul(b: Builder, step: Step) -> None:
    """Write a product of two activations, leading dimensions in their logical order."""
    op = step.op
    rank = len(b.program.tensors[step.output].shape)
    x, w = (b.spread(b.value(name), rank) for name in op.inputs)
    left = b.ordered(x, logical(rank))
    straight = logical(rank)
    crossed = (*straight[:-2], rank - 1, rank - 2)
    # whichever of its two dimensions is last as it lies
    transposed = w.axis(-2) > w.axis(-1)
    right = b.ordered(w, crossed if transposed else straight)
    encoding = b.program.encoding_of(op.outputs[0])
    assert encoding is not None
    y = b.define(step.output, straight, narrowed(b, grid_of(encoding), step.own_clamp))
    b.emit(Kind.MATMUL, op.name, (left.tensor, right.tensor), y, (transposed,))
