"""Operators that treat every element alike, in whatever order the dimensions are; softmax; requantization."""

from __future__ import annotations

import numpy as np
import torch

from qat.export.tflite.context import ACTIVATIONS, Context, Emitter, Order
from qat.integer.operators import qparams
from qat.integer.program import Op
from qat.integer.tflite import functions
from qat.integer.tflite.elementwise import bounds


def _binary(op_type: str, options: str) -> Emitter:
    def emit(ctx: Context, op: Op) -> None:
        name, activation = ctx.result(op)
        rank = len(ctx.shape(name))
        order = _common_order(ctx, op, rank)
        operands = [_aligned(ctx, operand, order, rank) for operand in op.inputs]
        ctx.builder.operator(op_type, operands, [ctx.new(name, order)], options, fusedActivationFunction=activation)

    return emit


def _common_order(ctx: Context, op: Op, rank: int) -> Order:
    """The order of the largest operand that is computed and has all dimensions, else the program's."""
    computed = [x for x in op.inputs if x not in ctx.program.constants and len(ctx.shape(x)) == rank]
    if not computed:
        return tuple(range(rank))
    return ctx.order(max(computed, key=lambda x: int(np.prod(ctx.shape(x)))))


def _aligned(ctx: Context, name: str, order: Order, rank: int) -> int:
    """Number of a tensor that broadcasts against a result in `order`."""
    sizes = ctx.shape(name)
    missing = rank - len(sizes)
    if name in ctx.program.constants:
        data = ctx.constant(name).value.numpy()
        if data.size == 1:
            return ctx.builder.codes(data.reshape(()), ctx.encoding(name), name)
        return ctx.builder.codes(data.reshape((1,) * missing + sizes).transpose(order), ctx.encoding(name), name)
    if not missing:
        return ctx.read(name, order)
    plain = ctx.read(name)
    full = (1,) * missing + sizes
    # dimensions that the operand lacks are of size 1, so only its own may have to move
    own = tuple(d - missing for d in order if d >= missing)
    source = ctx.read(name, own) if len(own) > 1 else plain
    return ctx.reshaped(source, [full[d] for d in order], ctx.encoding(name), f"{name}/broadcast")


def clamp(ctx: Context, op: Op) -> None:
    """Relu, Relu6 or ReluN1To1 where one gives the same codes; else Maximum and Minimum with constants."""
    x, name = op.inputs[0], op.outputs[0]
    order, encoding = ctx.order(x), ctx.encoding(name)
    source = ctx.read(x, order)
    activation = ctx.activation(op)
    first, last = bounds(op.attrs["low"], op.attrs["high"], qparams(encoding))
    if (first, last) == (-128, 127):
        ctx.alias(name, ctx.value(x))
    elif activation in ACTIVATIONS:
        ctx.builder.operator(activation, [source], [ctx.new(name, order)])
    else:
        _limit(ctx, op, source, order, first, last)


def _limit(ctx: Context, op: Op, source: int, order: Order, first: int, last: int) -> None:
    name = op.outputs[0]
    encoding = ctx.encoding(name)
    if first > -128:
        low = ctx.builder.codes(np.array(first), encoding, f"{op.name}/low")
        result = (
            ctx.new(name, order)
            if last == 127
            else ctx.scratch(f"{op.name}/raised", ctx.builder.shape(source), encoding)
        )
        ctx.builder.operator("MAXIMUM", [source, low], [result], "MaximumMinimum")
        source = result
    if last < 127:
        high = ctx.builder.codes(np.array(last), encoding, f"{op.name}/high")
        ctx.builder.operator("MINIMUM", [source, high], [ctx.new(name, order)], "MaximumMinimum")


def requantize(ctx: Context, op: Op) -> None:
    """Quantize from one int8 encoding to another."""
    x = op.inputs[0]
    order = ctx.order(x)
    ctx.builder.operator("QUANTIZE", [ctx.read(x, order)], [ctx.new(op.outputs[0], order)], "Quantize")


def prelu(ctx: Context, op: Op) -> None:
    """PRelu."""
    x, slopes = op.inputs
    order, name = ctx.order(x), op.outputs[0]
    operands = [ctx.read(x, order), _aligned(ctx, slopes, order, len(order))]
    ctx.builder.operator("PRELU", operands, [ctx.new(name, order)])


_OPERATORS = {
    "sigmoid": ("LOGISTIC", ""),
    "tanh": ("TANH", ""),
    "hardswish": ("HARD_SWISH", "HardSwish"),
}


def table(ctx: Context, op: Op) -> None:
    """The function's own operator; else its table of 256 codes, read by Gather."""
    x, name = op.inputs[0], op.outputs[0]
    function, params = op.attrs["function"], dict(op.attrs.get("params") or {})
    order = ctx.order(x)
    source = ctx.read(x, order)
    grids = qparams(ctx.encoding(x)), qparams(ctx.encoding(name))
    if not functions.has_operator(function, params, *grids):
        _gather(ctx, op, source, order, functions.codes_of(function, params, *grids))
    elif function == "leaky_relu":
        slope = float(params.get("negative_slope", 0.01))
        ctx.builder.operator("LEAKY_RELU", [source], [ctx.new(name, order)], "LeakyRelu", alpha=slope)
    elif function == "gelu":
        approximate = params.get("approximate", "none") == "tanh"
        ctx.builder.operator("GELU", [source], [ctx.new(name, order)], "Gelu", approximate=approximate)
    else:
        op_type, options = _OPERATORS[function]
        ctx.builder.operator(op_type, [source], [ctx.new(name, order)], options)


def _gather(ctx: Context, op: Op, source: int, order: Order, codes: torch.Tensor) -> None:
    """Cast the codes to int32, add 128, and look them up."""
    name = op.outputs[0]
    sizes, builder = ctx.builder.shape(source), ctx.builder
    wide = builder.tensor(f"{op.name}/wide", sizes, None, dtype="int32")
    types = builder.schema.TensorType
    builder.operator("CAST", [source], [wide], "Cast", inDataType=types.INT8, outDataType=types.INT32)
    index = builder.tensor(f"{op.name}/index", sizes, None, dtype="int32")
    builder.operator("ADD", [wide, builder.integers(128, "offset")], [index], "Add")
    values = builder.codes(codes.numpy(), ctx.encoding(name), f"{op.name}/table")
    builder.operator("GATHER", [values, index], [ctx.new(name, order)], "Gather", axis=0)


def softmax(ctx: Context, op: Op) -> None:
    """Softmax over the last dimension, which the axis is made."""
    x = op.inputs[0]
    order, axis = ctx.order(x), op.attrs["axis"] % len(ctx.shape(x))
    if order[-1] != axis:
        order = (*(d for d in order if d != axis), axis)
    ctx.builder.operator("SOFTMAX", [ctx.read(x, order)], [ctx.new(op.outputs[0], order)], "Softmax", beta=1.0)


def quantize(ctx: Context, op: Op) -> None:
    """Quantize from float."""
    value = ctx.values[op.inputs[0]]
    ctx.builder.operator("QUANTIZE", [value.tensor], [ctx.new(op.outputs[0], value.order)], "Quantize")


EMITTERS: dict[str, Emitter] = {
    "add": _binary("ADD", "Add"),
    "sub": _binary("SUB", "Sub"),
    "mul": _binary("MUL", "Mul"),
    "clamp": clamp,
    "requantize": requantize,
    "table": table,
    "prelu": prelu,
    "softmax": softmax,
    "quantize": quantize,
}
