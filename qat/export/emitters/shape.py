"""Operators that move values without computing: concat, reshape, transpose, slice, expand, identity.

Each still gets a QuantizeLinear and DequantizeLinear of its own: ONNX Runtime drops them, and runtimes
without float units (Hexagon) need them.
"""

from __future__ import annotations

from qat.export.emitters.context import Context, Emitter
from qat.export.emitters.products import reshape_target
from qat.integer.program import Op

_FAR = 2**31 - 1


def concat(ctx: Context, op: Op) -> None:
    """Concat."""
    raw = ctx.result(op.outputs[0])
    ctx.node("Concat", [ctx.value(name) for name in op.inputs], [raw], where=op.name, axis=op.attrs["axis"])
    ctx.finish(op.outputs[0], raw, op)


def reshape(ctx: Context, op: Op) -> None:
    """Reshape."""
    operand, raw = ctx.value(op.inputs[0]), ctx.result(op.outputs[0])
    ctx.node("Reshape", [operand, reshape_target(ctx, op.outputs[0])], [raw], where=op.name)
    ctx.finish(op.outputs[0], raw, op)


def transpose(ctx: Context, op: Op) -> None:
    """Transpose."""
    operand, raw = ctx.value(op.inputs[0]), ctx.result(op.outputs[0])
    ctx.node("Transpose", [operand], [raw], where=op.name, perm=list(op.attrs["perm"]))
    ctx.finish(op.outputs[0], raw, op)


def slice_(ctx: Context, op: Op) -> None:
    """Slice."""
    operands = [ctx.value(op.inputs[0])]
    # ONNX has no open end: beyond every size means the same
    steps = [int(step) for step in op.attrs["steps"]]
    starts = [(0 if s > 0 else _FAR) if v is None else v for v, s in zip(op.attrs["starts"], steps, strict=True)]
    ends = [(_FAR if s > 0 else -_FAR) if v is None else v for v, s in zip(op.attrs["ends"], steps, strict=True)]
    given = {"starts": starts, "ends": ends, "axes": op.attrs["axes"], "steps": steps}
    operands += [ctx.integers(values, f"{op.name}/{key}") for key, values in given.items()]
    raw = ctx.result(op.outputs[0])
    ctx.node("Slice", operands, [raw], where=op.name)
    ctx.finish(op.outputs[0], raw, op)


def expand(ctx: Context, op: Op) -> None:
    """Expand; a size that the operand has already is written as 1, so that mostly no batch size is needed."""
    x, output = op.inputs[0], op.outputs[0]
    target = ctx.shape(output)
    own = (1,) * (len(target) - len(ctx.shape(x))) + ctx.shape(x)
    sizes = [1 if mine == wanted else wanted for mine, wanted in zip(own, target, strict=True)]
    operand, raw = ctx.value(x), ctx.result(output)
    ctx.node("Expand", [operand, ctx.shape_tensor(sizes, op.name)], [raw], where=op.name)
    ctx.finish(output, raw, op)


def identity(ctx: Context, op: Op) -> None:
    """Nothing, unless the encodings differ."""
    x, output = op.inputs[0], op.outputs[0]
    mine, theirs = ctx.info(output).encoding, ctx.info(x).encoding
    same = mine is None if theirs is None else mine is not None and mine.same_grid(theirs)
    if same:
        ctx.alias(output, x)
    else:
        ctx.finish(output, ctx.value(x), op)


EMITTERS: dict[str, Emitter] = {
    "concat": concat,
    "reshape": reshape,
    "transpose": transpose,
    "slice": slice_,
    "expand": expand,
    "identity": identity,
}
