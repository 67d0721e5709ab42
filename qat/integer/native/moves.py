"""What moves codes in a plan. A transpose only renames dimensions, and so do most reshapes."""

from __future__ import annotations

from dataclasses import replace

import torch

from qat.integer.kernels.requantize import quantize
from qat.integer.native.builder import Builder, Value
from qat.integer.native.fusion import Step
from qat.integer.native.order import Order, reshaped
from qat.integer.native.planfile import Kind

_PAD_MODES = {"constant": 0, "reflect": 1, "replicate": 2}


def identity(b: Builder, step: Step) -> None:
    """Write nothing: the result is the input."""
    b.values[step.output] = b.value(step.op.inputs[0])


def transpose(b: Builder, step: Step) -> None:
    """Write nothing: the dimensions are renamed where they lie."""
    x = b.value(step.op.inputs[0])
    perm = [p % len(x.shape) for p in step.op.attrs["perm"]]
    shape = tuple(x.shape[p] for p in perm)
    b.values[step.output] = replace(x, shape=shape, order=tuple(perm.index(d) for d in x.order))


def reshape(b: Builder, step: Step) -> None:
    """Write a `reshape`, with a copy before it where merged dimensions do not lie side by side."""
    x = b.value(step.op.inputs[0])
    shape = b.program.tensors[step.output].shape
    source, order = reshaped(x.shape, shape, x.order, b.want(step.output))
    x = b.ordered(x, source)
    y = b.define(step.output, order, x.grid)
    b.reshape(x, y)


def slice_(b: Builder, step: Step) -> None:
    """Write a `slice`."""
    op, x = step.op, b.value(step.op.inputs[0])
    starts, steps = [0] * len(x.shape), [1] * len(x.shape)
    for axis, start, end, stride in zip(
        op.attrs["axes"], op.attrs["starts"], op.attrs["ends"], op.attrs["steps"], strict=True
    ):
        picked = range(x.shape[axis])[slice(start, end, stride)]
        starts[x.axis(axis)], steps[x.axis(axis)] = picked.start, picked.step
    y = b.define(step.output, x.order, x.grid)
    b.emit(Kind.SLICE, op.name, (x.tensor,), y, (*starts, *steps))


def expand(b: Builder, step: Step) -> None:
    """Write an `expand`."""
    x = b.spread(b.value(step.op.inputs[0]), len(b.program.tensors[step.output].shape))
    y = b.define(step.output, x.order, x.grid)
    b.emit(Kind.EXPAND, step.op.name, (x.tensor,), y)


def pad(b: Builder, step: Step) -> None:
    """Write a `pad`."""
    op, x = step.op, b.value(step.op.inputs[0])
    pairs = list(op.attrs["pads"])
    pairs = [(0, 0)] * (len(x.shape) - len(pairs)) + pairs
    encoding = b.program.encoding_of(step.output)
    assert encoding is not None
    # the input may be known to have a narrower range than its encoding; what is padded with is in the whole range
    full = replace(x, grid=replace(x.grid, qmin=encoding.qmin, qmax=encoding.qmax))
    code = int(quantize(torch.tensor(op.attrs.get("value") or 0.0), full.params))
    grid = replace(x.grid, qmin=min(x.grid.qmin, code), qmax=max(x.grid.qmax, code))
    y = b.define(step.output, x.order, grid)
    sides = [side for d in x.order for side in pairs[d]]
    b.emit(Kind.PAD, op.name, (x.tensor,), y, (_PAD_MODES[op.attrs["mode"]], code, *sides))


def concat(b: Builder, step: Step) -> None:
    """Write a `concat`, in the order that most parts have."""
    parts = [b.value(name) for name in step.op.inputs]
    order = _order_of_most(b, step.output, parts)
    parts = [b.ordered(value, order) for value in parts]
    y = b.define(step.output, order)
    b.emit(Kind.CONCAT, step.op.name, [v.tensor for v in parts], y, (y.axis(step.op.attrs["axis"]),))


def _order_of_most(b: Builder, name: str, parts: list[Value]) -> Order:
    """The order that most parts have; the wanted one where all of them are constants."""
    orders = [v.order for v in parts if v.tensor in b.tensors]
    return max(orders, key=orders.count) if orders else b.want(name)
