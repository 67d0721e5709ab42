"""Pooling, means and interpolation in a plan; (N, L, C) is (N, 1, L, C)."""

from __future__ import annotations

from typing import Any

import torch

from qat.integer.kernels import resize as resizing
from qat.integer.native.builder import Builder, Value
from qat.integer.native.fusion import Step
from qat.integer.native.order import channels_last
from qat.integer.native.planfile import Grid, Kind
from qat.integer.native.pointwise import own_grid
from qat.integer.native.products import image


def pool(b: Builder, step: Step) -> None:
    """Write a `max_pool` or `avg_pool`."""
    attrs = step.op.attrs
    largest = step.op.kind == "max_pool"
    x = _image_of(b, step)
    line = len(b.program.tensors[step.output].shape) == 3

    def each(name: str, neutral: Any) -> list[Any]:
        return [neutral, *attrs[name]] if line else list(attrs[name])

    pads = each("padding", (0, 0))
    ints = [*each("kernel", 1), *each("stride", 1), *(begin for begin, _ in pads), *(end for _, end in pads)]
    ints += each("dilation", 1) if largest else [int(attrs["count_include_pad"])]
    grid = x.grid if largest else own_grid(b, step)
    _emit(b, step, Kind.MAX_POOL if largest else Kind.AVG_POOL, (x.tensor,), grid, ints)


def _image_of(b: Builder, step: Step) -> Value:
    x = b.value(step.op.inputs[0])
    return image(b, b.ordered(x, channels_last(len(x.shape))))


def _emit(b: Builder, step: Step, kind: Kind, inputs: tuple[str, ...], grid: Grid | None, ints: list[int]) -> None:
    rank = len(b.program.tensors[step.output].shape)
    y = b.define(step.output, channels_last(rank), grid)
    if rank == 4:
        b.emit(kind, step.op.name, inputs, y, ints)
        return
    target = b.temporary(f"{step.output}:4d", (y.sizes[0], 1, *y.sizes[1:]), y)
    b.emit(kind, step.op.name, inputs, target, ints)
    b.reshape(target, y)


def mean(b: Builder, step: Step) -> None:
    """Write a `mean` over any dimensions but the batch."""
    x = b.value(step.op.inputs[0])
    axes = {axis % len(x.shape) for axis in step.op.attrs["axes"]}
    order = x.order
    if not step.op.attrs["keepdims"]:
        kept = [d for d in range(len(x.shape)) if d not in axes]
        order = tuple(kept.index(d) for d in x.order if d not in axes)
    y = b.define(step.output, order, own_grid(b, step))
    b.emit(Kind.MEAN, step.op.name, (x.tensor,), y, sorted(x.axis(axis) for axis in axes))


def resize(b: Builder, step: Step) -> None:
    """Write a `resize` with its source positions as tables."""
    op = step.op
    x = _image_of(b, step)
    inputs = b.program.tensors[op.inputs[0]].shape[2:]
    scales = op.attrs.get("scales")
    given = [None] * len(inputs) if scales is None else list(scales)
    rows = [*zip(op.attrs["size"], inputs, given, strict=True)]
    if op.attrs["mode"] == "nearest":
        found = [resizing.nearest_source(*row, single=len(rows) == 1) for row in rows]
        tables = [torch.zeros(1, dtype=torch.int64), *found] if len(rows) == 1 else found
        names = [b.array(f"{op.name}:{label}", t) for label, t in zip(("rows", "columns"), tables, strict=True)]
        _emit(b, step, Kind.RESIZE_NEAREST, (x.tensor, *names), None, [])
        return
    names = []
    for label, (size, length, scale) in zip(("rows", "columns"), rows, strict=True):
        low, high, to_low, _ = resizing.linear_taps(size, scale, length, op.attrs["align_corners"])
        parts = (("low", low), ("high", high), ("weights", to_low))
        names += [b.array(f"{op.name}:{part} {label}", t) for part, t in parts]
    _emit(b, step, Kind.RESIZE_LINEAR, (x.tensor, *names), None, [])
