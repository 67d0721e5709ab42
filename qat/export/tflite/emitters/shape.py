"""Operators that move values without computing, and interpolation."""

from __future__ import annotations

import math

import numpy as np
import torch

from qat.export.tflite.context import Context, Emitter, Value, same_memory
from qat.export.tflite.emitters.padding import pad as emit_pad
from qat.export.tflite.emitters.products import image, image_result
from qat.integer.operators import qparams
from qat.integer.program import Op
from qat.integer.tflite.arithmetic import quantize


def reshape(ctx: Context, op: Op) -> None:
    """Reshape; no Transpose is needed where the order of the elements in memory is the program's already.

    Where only linear layers read the result, and the batch dimension is first, the elements of a row may stay in the
    order in which they are: the columns of the weights follow.
    """
    x, name = op.inputs[0], op.outputs[0]
    value, sizes, target = ctx.value(x), ctx.shape(x), ctx.shape(name)
    plain = tuple(range(len(sizes)))
    if same_memory(value.order, plain, sizes):
        ctx.reshape(value.tensor, ctx.new(name, tuple(range(len(target)))))
        return
    linear = all(reader.kind == "linear" for reader in ctx.readers.get(name, []))
    rows = math.prod(target[:-1])
    if linear and value.order[0] == 0 and rows == sizes[0] and target[-1] == math.prod(sizes[1:]):
        ctx.reshape(value.tensor, ctx.new(name, tuple(range(len(target)))))
        index = torch.arange(target[-1]).reshape(sizes[1:])
        features = index.permute([d - 1 for d in value.order[1:]]).flatten()
        ctx.alias(name, Value(ctx.values[name].tensor, ctx.values[name].order, tuple(features.tolist())))
        return
    ctx.reshape(ctx.read(x), ctx.new(name, tuple(range(len(target)))))


def transpose(ctx: Context, op: Op) -> None:
    """Nothing: the same tensor in another order."""
    value = ctx.value(op.inputs[0])
    if op.inputs[0] in ctx.program.constants:
        value = Value(ctx.read(op.inputs[0]), value.order)
    position = {source: d for d, source in enumerate(op.attrs["perm"])}
    ctx.alias(op.outputs[0], Value(value.tensor, tuple(position[d] for d in value.order)))


def identity(ctx: Context, op: Op) -> None:
    """Nothing."""
    ctx.alias(op.outputs[0], ctx.value(op.inputs[0]))


def concat(ctx: Context, op: Op) -> None:
    """Concatenation, in the order of the largest operand."""
    name, rank = op.outputs[0], len(ctx.shape(op.outputs[0]))
    computed = [x for x in op.inputs if x not in ctx.program.constants]
    largest = max(computed, key=lambda x: math.prod(ctx.shape(x)), default=op.inputs[0])
    order = ctx.order(largest)
    operands = [ctx.read(x, order) for x in op.inputs]
    axis = order.index(op.attrs["axis"] % rank)
    ctx.builder.operator("CONCATENATION", operands, [ctx.new(name, order)], "Concatenation", axis=axis)


def slice_(ctx: Context, op: Op) -> None:
    """Slice, or StridedSlice where a step is not 1."""
    x, name = op.inputs[0], op.outputs[0]
    order, sizes = ctx.order(x), ctx.shape(x)
    picked = [range(n) for n in sizes]
    for axis, start, end, step in zip(
        op.attrs["axes"], op.attrs["starts"], op.attrs["ends"], op.attrs["steps"], strict=True
    ):
        picked[axis % len(sizes)] = picked[axis % len(sizes)][slice(start, end, step)]
    ranges = [picked[d] for d in order]
    source, where, builder = ctx.read(x, order), op.name, ctx.builder
    begin = builder.integers([r.start for r in ranges], f"{where}/begin")
    if all(r.step == 1 for r in ranges):
        size = builder.integers([len(r) for r in ranges], f"{where}/size")
        builder.operator("SLICE", [source, begin, size], [ctx.new(name, order)], "Slice")
        return
    # an end before the first element, which a negative step needs, cannot be said by a number: it is masked
    stops = [r.start + len(r) * r.step for r in ranges]
    mask = sum(1 << d for d, stop in enumerate(stops) if stop < 0)
    end = builder.integers([max(stop, 0) for stop in stops], f"{where}/end")
    step = builder.integers([r.step for r in ranges], f"{where}/step")
    builder.operator("STRIDED_SLICE", [source, begin, end, step], [ctx.new(name, order)], "StridedSlice", endMask=mask)


def expand(ctx: Context, op: Op) -> None:
    """BroadcastTo."""
    x, name = op.inputs[0], op.outputs[0]
    target = ctx.shape(name)
    rank, missing = len(target), len(target) - len(ctx.shape(x))
    if ctx.shape(x) == target:
        ctx.alias(name, ctx.value(x))
        return
    order = ctx.order(x) if not missing else tuple(range(rank))
    source = ctx.read(x, order if not missing else None)
    sizes = [target[d] for d in order]
    shape = ctx.builder.integers(sizes, f"{op.name}/shape")
    ctx.builder.operator("BROADCAST_TO", [source, shape], [ctx.new(name, order)], "BroadcastTo")


def pad(ctx: Context, op: Op) -> None:
    """Pad, PadV2 or MirrorPad."""
    x, name = op.inputs[0], op.outputs[0]
    order, rank = ctx.order(x), len(ctx.shape(x))
    pads = [(0, 0)] * (rank - len(op.attrs["pads"])) + [tuple(pair) for pair in op.attrs["pads"]]
    pairs = tuple(pads[d] for d in order)
    source, result = ctx.read(x, order), ctx.new(name, order)
    encoding = ctx.encoding(x)
    if op.attrs["mode"] == "constant":
        fill = int(quantize(torch.tensor(float(op.attrs.get("value") or 0.0)), qparams(encoding)))
        emit_pad(ctx, source, result, pairs, encoding, fill, op.name)
        return
    widths = ctx.builder.integers(np.array(pairs), f"{op.name}/pads")
    ctx.builder.operator("MIRROR_PAD", [source, widths], [result], "MirrorPad", mode=0)


def resize(ctx: Context, op: Op) -> None:
    """ResizeNearestNeighbor or ResizeBilinear."""
    x, name = op.inputs[0], op.outputs[0]
    source = image(ctx, x)
    result, finish = image_result(ctx, name)
    size = ctx.builder.integers(ctx.builder.shape(result)[1:3], f"{op.name}/size")
    if op.attrs["mode"] == "nearest":
        ctx.builder.operator(
            "RESIZE_NEAREST_NEIGHBOR", [source, size], [result], "ResizeNearestNeighbor", alignCorners=False,
            halfPixelCenters=False,
        )  # fmt: skip
    else:
        align = bool(op.attrs["align_corners"])
        ctx.builder.operator(
            "RESIZE_BILINEAR", [source, size], [result], "ResizeBilinear", alignCorners=align,
            halfPixelCenters=not align,
        )  # fmt: skip
    finish()


EMITTERS: dict[str, Emitter] = {
    "reshape": reshape,
    "transpose": transpose,
    "identity": identity,
    "concat": concat,
    "slice": slice_,
    "expand": expand,
    "pad": pad,
    "resize": resize,
}
