"""Operators that multiply and accumulate: convolutions, linear, matmul."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qat.errors import ExportError
from qat.export.tflite.context import Context, Emitter, channels_last
from qat.export.tflite.emitters.padding import padded
from qat.integer.program import Op


def conv(ctx: Context, op: Op) -> None:
    """Conv2D or DepthwiseConv2D; one dimension is computed as a row of an image."""
    x, weight_name, bias_name = op.inputs
    name, activation = ctx.result(op)
    weight, x_encoding = ctx.constant(weight_name), ctx.encoding(x)
    codes, groups = weight.value, op.attrs["groups"]
    channels_in, channels_out = ctx.shape(x)[1], codes.shape[0]
    two = codes.dim() == 4
    stride, dilation = (tuple(op.attrs[key]) if two else (1, *op.attrs[key]) for key in ("stride", "dilation"))
    padding = tuple(op.attrs["padding"]) if two else ((0, 0), *op.attrs["padding"])
    codes = codes if two else codes.unsqueeze(2)
    source = image(ctx, x)
    source, code = padded(
        ctx, source, padding, tuple(codes.shape[2:]), stride, dilation, x_encoding, x_encoding.zero_point[0], op.name
    )
    bias = ctx.bias(bias_name, weight, x_encoding, channels_out)
    result, finish = image_result(ctx, name)
    common = {
        "padding": code, "strideH": stride[0], "strideW": stride[1], "dilationHFactor": dilation[0],
        "dilationWFactor": dilation[1], "fusedActivationFunction": activation,
    }  # fmt: skip
    if groups == channels_in and groups > 1:
        # (C_out, 1, H, W) to (1, H, W, C_out)
        laid = ctx.weight(codes.permute(1, 2, 3, 0), weight, 3, weight_name)
        ctx.builder.operator(
            "DEPTHWISE_CONV_2D", [source, laid, bias], [result], "DepthwiseConv2D",
            depthMultiplier=channels_out // channels_in, **common,
        )  # fmt: skip
    else:
        laid = ctx.weight(codes.permute(0, 2, 3, 1), weight, 0, weight_name)
        ctx.builder.operator("CONV_2D", [source, laid, bias], [result], "Conv2D", **common)
    finish()


def image(ctx: Context, name: str) -> int:
    """Number of a tensor (N, H, W, C) that holds a value of one or two spatial dimensions."""
    sizes = ctx.shape(name)
    tensor = ctx.read(name, channels_last(len(sizes)))
    if len(sizes) == 4:
        return tensor
    return ctx.reshaped(tensor, (sizes[0], 1, sizes[2], sizes[1]), ctx.encoding(name), f"{name}/row")


def image_result(ctx: Context, name: str) -> tuple[int, Callable[[], None]]:
    """Return the tensor (N, H, W, C) to compute a value in, and what is to be called when it is computed."""
    sizes = ctx.shape(name)
    if len(sizes) == 4:
        return ctx.new(name, channels_last(4)), lambda: None
    row = ctx.scratch(f"{name}/row", (sizes[0], 1, sizes[2], sizes[1]), ctx.encoding(name))
    return row, lambda: ctx.reshape(row, ctx.new(name, channels_last(3)))


def conv_transpose(ctx: Context, op: Op) -> None:
    """TransposeConv of the whole result, of which a Slice takes what the padding leaves."""
    x, weight_name, bias_name = op.inputs
    name = op.outputs[0]
    weight, encoding = ctx.constant(weight_name), ctx.encoding(name)
    two = weight.value.dim() == 4
    codes = weight.value if two else weight.value.unsqueeze(2)
    stride = tuple(op.attrs["stride"]) if two else (1, *op.attrs["stride"])
    padding = tuple(op.attrs["padding"]) if two else ((0, 0), *op.attrs["padding"])
    source = image(ctx, x)
    result, finish = image_result(ctx, name)
    batch, *sizes_in, _ = ctx.builder.shape(source)
    sizes_out, channels = ctx.builder.shape(result)[1:3], codes.shape[1]
    # at least what the kernel reaches, and at least what is cut out of it: output padding is bias only
    full = [
        max((n - 1) * s + k, low + out)
        for n, s, k, (low, _), out in zip(sizes_in, stride, codes.shape[2:], padding, sizes_out, strict=True)
    ]
    cropped = tuple(full) != tuple(sizes_out)
    whole = ctx.scratch(f"{name}/whole", (batch, *full, channels), encoding) if cropped else result
    # (C_in, C_out, H, W) to (C_out, H, W, C_in)
    laid = ctx.weight(codes.permute(1, 2, 3, 0), weight, 0, weight_name)
    bias = ctx.bias(bias_name, weight, ctx.encoding(x), channels)
    shape = ctx.builder.integers((batch, *full, channels), f"{op.name}/shape")
    ctx.builder.operator(
        "TRANSPOSE_CONV", [shape, laid, source, bias], [whole], "TransposeConv",
        padding=ctx.builder.schema.Padding.VALID, strideH=stride[0], strideW=stride[1],
    )  # fmt: skip
    if cropped:
        begin = ctx.builder.integers((0, *(low for low, _ in padding), 0), f"{op.name}/begin")
        size = ctx.builder.integers((batch, *sizes_out, channels), f"{op.name}/size")
        ctx.builder.operator("SLICE", [whole, begin, size], [result], "Slice")
    finish()


def linear(ctx: Context, op: Op) -> None:
    """FullyConnected over the last dimension; a permuted operand is met by permuted columns of the weight."""
    x, weight_name, bias_name = op.inputs
    name, activation = ctx.result(op)
    weight = ctx.constant(weight_name)
    codes, held = weight.value, ctx.values.get(x)
    if held is not None and held.features is not None:
        codes = codes[:, torch.tensor(held.features)]
        source, order = held.tensor, held.order
    else:
        order = ctx.order(x)
        last = len(order) - 1
        if order[-1] != last:
            order = (*(d for d in order if d != last), last)
        source = ctx.read(x, order)
    bias = ctx.bias(bias_name, weight, ctx.encoding(x), codes.shape[0])
    laid = ctx.weight(codes, weight, 0, weight_name)
    ctx.builder.operator(
        "FULLY_CONNECTED", [source, laid, bias], [ctx.new(name, order)], "FullyConnected",
        fusedActivationFunction=activation, keepNumDims=len(order) != 2,
    )  # fmt: skip


def matmul(ctx: Context, op: Op) -> None:
    """BatchMatMul; an operand whose last two dimensions are swapped is not transposed but declared so."""
    name = op.outputs[0]
    rank = len(ctx.shape(name))
    operands, adjoint = [], []
    for operand in op.inputs:
        order = ctx.order(operand)
        mine = len(order)
        plain, swapped = tuple(range(mine)), (*range(mine - 2), mine - 1, mine - 2)
        adjoint.append(order == swapped)
        tensor = ctx.read(operand, swapped if order == swapped else plain)
        if mine > rank:
            raise ExportError(f"operator {op.name!r} multiplies {mine} dimensions to {rank}", "report this model")
        operands.append(tensor)
    ctx.builder.operator(
        "BATCH_MATMUL", operands, [ctx.new(name, tuple(range(rank)))], "BatchMatMul", adjX=adjoint[0], adjY=adjoint[1]
    )


EMITTERS: dict[str, Emitter] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "linear": linear,
    "matmul": matmul,
}
