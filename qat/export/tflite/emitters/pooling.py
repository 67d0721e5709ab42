"""Pooling and means."""

from __future__ import annotations

from qat.export.tflite.context import Context, Emitter
from qat.export.tflite.emitters.padding import pad, padded
from qat.export.tflite.emitters.products import image, image_result
from qat.integer.program import Op


def _pool(ctx: Context, op: Op, op_type: str, fill: int) -> None:
    x = op.inputs[0]
    name, activation = ctx.result(op)
    two = len(ctx.shape(x)) == 4
    kernel, stride = (tuple(op.attrs[key]) if two else (1, *op.attrs[key]) for key in ("kernel", "stride"))
    padding = tuple(op.attrs["padding"]) if two else ((0, 0), *op.attrs["padding"])
    encoding = ctx.encoding(x)
    source, code = image(ctx, x), int(ctx.builder.schema.Padding.VALID)
    counted = op_type == "AVERAGE_POOL_2D" and op.attrs["count_include_pad"]
    if counted:
        # SAME does not count its padding
        source = _padded_apart(ctx, source, padding, op)
    else:
        source, code = padded(ctx, source, padding, kernel, stride, (1, 1), encoding, fill, op.name)
    result, finish = image_result(ctx, name)
    ctx.builder.operator(
        op_type, [source], [result], "Pool2D", padding=code, strideH=stride[0], strideW=stride[1],
        filterHeight=kernel[0], filterWidth=kernel[1], fusedActivationFunction=activation,
    )  # fmt: skip
    finish()


def _padded_apart(ctx: Context, source: int, padding: tuple[tuple[int, int], ...], op: Op) -> int:
    batch, height, width, channels = ctx.builder.shape(source)
    (top, bottom), (left, right) = padding
    encoding = ctx.encoding(op.inputs[0])
    grown = (batch, height + top + bottom, width + left + right, channels)
    result = ctx.scratch(f"{op.name}/padded", grown, encoding)
    pad(ctx, source, result, ((0, 0), *padding, (0, 0)), encoding, encoding.zero_point[0], op.name)
    return result


def max_pool(ctx: Context, op: Op) -> None:
    """MaxPool2D; what pads never wins."""
    _pool(ctx, op, "MAX_POOL_2D", -128)


def avg_pool(ctx: Context, op: Op) -> None:
    """AveragePool2D."""
    _pool(ctx, op, "AVERAGE_POOL_2D", ctx.encoding(op.inputs[0]).zero_point[0])


def mean(ctx: Context, op: Op) -> None:
    """Mean, over the axes where they are in the operand."""
    x, name = op.inputs[0], op.outputs[0]
    order, rank = ctx.order(x), len(ctx.shape(x))
    reduced = {axis % rank for axis in op.attrs["axes"]}
    keepdims = bool(op.attrs["keepdims"])
    axes = sorted(order.index(axis) for axis in reduced)
    kept = sorted(set(range(rank)) - reduced)
    result = order if keepdims else tuple(kept.index(d) for d in order if d not in reduced)
    operands = [ctx.read(x, order), ctx.builder.integers(axes, f"{op.name}/axes")]
    ctx.builder.operator("MEAN", operands, [ctx.new(name, result)], "Reducer", keepDims=keepdims)


EMITTERS: dict[str, Emitter] = {"max_pool": max_pool, "avg_pool": avg_pool, "mean": mean}
