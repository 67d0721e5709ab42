"""Operators that multiply and accumulate: convolutions, linear, matmul."""

from __future__ import annotations

import math

from qat.export.emitters.context import Context, Emitter
from qat.integer.program import Op


def pads(padding: tuple[tuple[int, int], ...]) -> list[int]:
    """Return ((low, high), ...) in the order of ONNX: all low ones, then all high ones."""
    return [low for low, _ in padding] + [high for _, high in padding]


def _convolution(ctx: Context, op: Op, op_type: str) -> None:
    x, weight, *bias = op.inputs
    operands = [ctx.value(x), ctx.value(weight), ctx.value(bias[0]) if bias else ""]
    raw = ctx.result(op.outputs[0])
    ctx.node(
        op_type,
        operands,
        [raw],
        where=op.name,
        kernel_shape=list(ctx.shape(weight)[2:]),
        strides=list(op.attrs["stride"]),
        pads=pads(op.attrs["padding"]),
        dilations=list(op.attrs["dilation"]),
        group=op.attrs["groups"],
        output_padding=list(op.attrs["output_padding"]) if op_type == "ConvTranspose" else None,
    )
    ctx.finish(op.outputs[0], raw, op)


def conv(ctx: Context, op: Op) -> None:
    """Conv."""
    _convolution(ctx, op, "Conv")


def conv_transpose(ctx: Context, op: Op) -> None:
    """ConvTranspose."""
    _convolution(ctx, op, "ConvTranspose")


def linear(ctx: Context, op: Op) -> None:
    """Gemm with the weight as PyTorch stores it; other ranks than 2 are reshaped to 2 and back.

    A MatMul on more dimensions would have to keep the bias as a separate Add, which no runtime fuses to one
    integer operator with an int32 bias.
    """
    x, weight, *bias = op.inputs
    output = op.outputs[0]
    features_out, features_in = ctx.shape(weight)
    rank = len(ctx.shape(x))
    operand = ctx.value(x)
    if rank != 2:
        flat = ctx.node("Reshape", [operand, ctx.integers([-1, features_in], f"{op.name}/flat")], where=op.name)
        rows = _rows(ctx, x)
        operand = ctx.through(flat, ctx.info(x).encoding, f"{op.name}/flat", [rows, features_in])
    raw = ctx.result(output) if rank == 2 else ctx.fresh(f"{op.name}/gemm")
    ctx.node(
        "Gemm",
        [operand, ctx.value(weight), ctx.value(bias[0]) if bias else ""],
        [raw],
        where=op.name,
        transB=1,
    )
    if rank != 2:
        inner = ctx.through(raw, ctx.info(output).encoding, f"{op.name}/gemm", [_rows(ctx, x), features_out])
        raw = ctx.result(output)
        ctx.node("Reshape", [inner, reshape_target(ctx, output)], [raw], where=op.name)
    ctx.finish(output, raw, op)


def _rows(ctx: Context, x: str) -> int | str:
    leading = ctx.shape(x)[:-1]
    rows = math.prod(abs(d) for d in leading)
    open_sizes = sum(d < 0 for d in leading)
    if open_sizes > 1:
        return f"{rows}*batch**{open_sizes}"
    return rows if not open_sizes else "batch" if rows == 1 else f"{rows}*batch"


def reshape_target(ctx: Context, output: str) -> str:
    """Return the operand of a Reshape to the shape of tensor `output`; one open size is written as -1."""
    sizes = ctx.shape(output)
    if sum(d < 0 for d in sizes) <= 1:
        return ctx.integers([-1 if d < 0 else d for d in sizes], f"{output}/shape")
    return ctx.shape_tensor(sizes, output)


def matmul(ctx: Context, op: Op) -> None:
    """MatMul."""
    raw = ctx.result(op.outputs[0])
    ctx.node("MatMul", [ctx.value(name) for name in op.inputs], [raw], where=op.name)
    ctx.finish(op.outputs[0], raw, op)


EMITTERS: dict[str, Emitter] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "linear": linear,
    "matmul": matmul,
}
