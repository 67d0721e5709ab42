"""Borders between floats and codes: quantize, dequantize, requantize."""

from __future__ import annotations

from qat.export.emitters.context import Context, Emitter
from qat.integer.program import Op


def quantize(ctx: Context, op: Op) -> None:
    """Float to codes."""
    ctx.finish(op.outputs[0], ctx.shielded(ctx.value(op.inputs[0]), op.outputs[0]), op)


def dequantize(ctx: Context, op: Op) -> None:
    """Codes to float."""
    ctx.bind(op.outputs[0], ctx.value(op.inputs[0]))


def requantize(ctx: Context, op: Op) -> None:
    """Codes to codes of another encoding: DequantizeLinear followed by QuantizeLinear."""
    ctx.finish(op.outputs[0], ctx.value(op.inputs[0]), op)


EMITTERS: dict[str, Emitter] = {"quantize": quantize, "dequantize": dequantize, "requantize": requantize}
