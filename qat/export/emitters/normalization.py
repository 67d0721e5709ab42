"""Operators that reduce over dimensions and keep the shape: softmax, layer_norm."""

from __future__ import annotations

import numpy as np

from qat.encoding import Encoding
from qat.export.emitters.context import Context, Emitter
from qat.integer.program import Op

#: the encoding for which ONNX Runtime's integer softmax is right
_PROBABILITY = Encoding("uint8", (1.0 / 256.0,), (0,), 0, 255, provenance="fixed", method="softmax")


def softmax(ctx: Context, op: Op) -> None:
    """Softmax; 8-bit results of another encoding are first quantized to uint8 with scale 1/256.

    ONNX Runtime's QLinearSoftmax scales by `floor(1 / scale)` and lets int8 results wrap around, so it is
    given the one encoding that suits it, and QuantizeLinear does the rest, with saturation.
    """
    x, output = op.inputs[0], op.outputs[0]
    mine, theirs = ctx.info(output).encoding, ctx.info(x).encoding
    bytes_ = ("int8", "uint8")
    detour = (
        mine is not None
        and theirs is not None
        and mine.dtype in bytes_
        and theirs.dtype in bytes_
        and not mine.same_grid(_PROBABILITY)
    )
    operand = ctx.value(x)
    raw = ctx.fresh(f"{op.name}/softmax") if detour else ctx.result(output)
    ctx.node("Softmax", [operand], [raw], where=op.name, axis=op.attrs["axis"])
    if detour:
        raw = ctx.through(raw, _PROBABILITY, f"{op.name}/probability", ctx.dimensions(output))
    ctx.finish(output, raw, op)


def layer_norm(ctx: Context, op: Op) -> None:
    """LayerNormalization; its scale operand is not optional, so an absent weight is written as ones."""
    x, *rest = op.inputs
    weight, bias = [*rest, "", ""][:2]
    count = op.attrs["axes_count"]
    normalized = ctx.shape(x)[len(ctx.shape(x)) - count :]
    scale = ctx.value(weight) or ctx.constant(np.ones(normalized, dtype=np.float32), f"{op.name}/ones")
    raw = ctx.result(op.outputs[0])
    ctx.node(
        "LayerNormalization",
        [ctx.value(x), scale, ctx.value(bias)],
        [raw],
        where=op.name,
        axis=-count,
        epsilon=float(op.attrs["eps"]),
    )
    ctx.finish(op.outputs[0], raw, op)


EMITTERS: dict[str, Emitter] = {"softmax": softmax, "layer_norm": layer_norm}
