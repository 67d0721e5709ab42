"""What treats every element alike, and what runs along one axis: tables, arithmetic, softmax, layer norm."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qat.integer.kernels import table as tables
from qat.integer.kernels.elementwise import _left_is_scalar
from qat.integer.native.builder import Builder, Value
from qat.integer.native.fusion import Step, clamp_bounds
from qat.integer.native.order import Order, logical
from qat.integer.native.planfile import Grid, Kind
from qat.integer.native.support import grid_of, shape_of
from qat.integer.program import Op

_ARITHMETIC = {"add": Kind.ADD, "sub": Kind.SUB, "mul": Kind.MUL, "div": Kind.DIV}


def narrowed(b: Builder, grid: Grid, clamp: Op | None) -> Grid:
    """The grid with the range that a fused clamp leaves."""
    bounds = None if clamp is None else clamp_bounds(b.program, clamp)
    return grid if bounds is None else replace(grid, qmin=bounds[0], qmax=bounds[1])


def own_grid(b: Builder, step: Step) -> Grid:
    """The grid of the result, with the range that a fused clamp leaves."""
    encoding = b.program.encoding_of(step.op.outputs[0])
    assert encoding is not None
    return narrowed(b, grid_of(encoding), step.own_clamp)


def quantize(b: Builder, step: Step) -> None:
    """Write a `quantize`, which gives the order that the readers want."""
    x = b.value(step.op.inputs[0])
    y = b.define(step.output, b.want(step.output))
    b.emit(Kind.QUANTIZE, step.op.name, (x.tensor,), y, tuple(x.axis(d) for d in y.order))


def dequantize(b: Builder, step: Step) -> None:
    """Write a `dequantize`, which gives the logical order."""
    x = b.value(step.op.inputs[0])
    y = b.define(step.output, logical(len(x.shape)))
    b.emit(Kind.DEQUANTIZE, step.op.name, (x.tensor,), y, tuple(x.axis(d) for d in y.order))


def requantize(b: Builder, step: Step) -> None:
    """Write a `requantize`."""
    x = b.value(step.op.inputs[0])
    b.emit(Kind.REQUANTIZE, step.op.name, (x.tensor,), b.define(step.output, x.order))


def lookup(b: Builder, op: Op, x: Value) -> Tensor:
    """Codes of a `table` or `clamp` for every code of `x`, int32."""
    encoding = b.program.encoding_of(op.outputs[0])
    assert encoding is not None
    grid = grid_of(encoding)
    y = replace(x, grid=grid).params
    if op.kind == "clamp":
        low, high = op.attrs["low"], op.attrs["high"]
        function = tables.clip(-math.inf if low is None else low, math.inf if high is None else high)
    else:
        function = tables.function_of(op.attrs["function"], op.attrs.get("params") or {})
    return tables.lookup_table(function, x.params, y)


def table(b: Builder, step: Step) -> None:
    """Write a `table` or `clamp`."""
    x = b.value(step.op.inputs[0])
    y = b.define(step.output, x.order)
    entries = b.table(f"{step.op.name}:table", lookup(b, step.op, x), y)
    b.emit(Kind.TABLE, step.op.name, (x.tensor, entries), y)


def rescale(b: Builder, step: Step) -> None:
    """Write a `rescale`: a table of equal codes, for the scale of a tensor is part of it."""
    x = b.value(step.op.inputs[0])
    encoding = b.program.encoding_of(step.output)
    assert encoding is not None
    y = b.define(step.output, x.order, replace(grid_of(encoding), qmin=x.grid.qmin, qmax=x.grid.qmax))
    entries = b.table(f"{step.op.name}:table", torch.arange(x.grid.qmin, x.grid.qmax + 1, dtype=torch.int32), y)
    b.emit(Kind.TABLE, step.op.name, (x.tensor, entries), y)


def adds_right_first(b: Builder, left: str, right: str) -> bool:
    """Whether ONNX Runtime swaps the operands of an addition, which the last bit depends on."""
    sizes = [
        torch.Size(size if size > 0 else -size * (1 if b.single else 2) for size in shape_of(b.program, name))
        for name in (left, right)
    ]
    return _left_is_scalar(*sizes)


def arithmetic(b: Builder, step: Step) -> None:
    """Write an addition, subtraction, multiplication or division; operands broadcast in the larger one's order."""
    op = step.op
    shape = b.program.tensors[step.output].shape
    operands = [b.spread(b.value(name), len(shape)) for name in op.inputs]
    order = _common_order(b, step.output, shape, operands)
    names = [b.ordered(value, order).tensor for value in operands]
    if op.kind == "add" and adds_right_first(b, *op.inputs):
        names.reverse()
    b.emit(_ARITHMETIC[op.kind], op.name, names, b.define(step.output, order, own_grid(b, step)))


def _common_order(b: Builder, name: str, shape: tuple[int, ...], operands: list[Value]) -> Order:
    tensors = [v for v in operands if v.tensor in b.tensors and v.shape == shape]
    return tensors[0].order if tensors else b.want(name)


def prelu(b: Builder, step: Step) -> None:
    """Write a `prelu`; several slopes run along dimension 1."""
    x = b.value(step.op.inputs[0])
    slope = b.floats(step.op.inputs[1]).flatten()
    y = b.define(step.output, x.order, own_grid(b, step))
    axis = x.axis(1) if slope.numel() > 1 else 0
    b.emit(Kind.PRELU, step.op.name, (x.tensor, b.array(f"{step.op.name}:slope", slope)), y, (axis,))


def softmax(b: Builder, step: Step) -> None:
    """Write a `softmax`."""
    x = b.value(step.op.inputs[0])
    y = b.define(step.output, x.order)
    b.emit(Kind.SOFTMAX, step.op.name, (x.tensor,), y, (x.axis(step.op.attrs["axis"]),))


def layer_norm(b: Builder, step: Step) -> None:
    """Write a `layer_norm`, whose axes have to be the last ones and in order."""
    op = step.op
    x = b.value(op.inputs[0])
    count = op.attrs["axes_count"]
    last = logical(len(x.shape))[-count:]
    x = b.ordered(x, (*(d for d in x.order if d not in last), *last))
    parameters = [
        b.array(f"{op.name}:{label}", b.floats(name)) if name else ""
        for label, name in zip(("weight", "bias"), op.inputs[1:], strict=True)
    ]
    y = b.define(step.output, x.order, own_grid(b, step))
    b.emit(Kind.LAYER_NORM, op.name, (x.tensor, *parameters), y, (count,), (op.attrs["eps"],))
