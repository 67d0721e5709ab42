"""Elementwise operators: arithmetic, clamp, prelu and the unary functions of kind `table`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.export.emitters.context import Context, Emitter
from qat.integer.program import Op

#: kinds that compilers fuse functions with
_PRODUCTS = frozenset({"conv", "conv_transpose", "linear"})


def _binary(op_type: str) -> Emitter:
    def emit(ctx: Context, op: Op) -> None:
        raw = ctx.result(op.outputs[0])
        ctx.node(op_type, [_operand(ctx, name) for name in op.inputs], [raw], where=op.name)
        ctx.finish(op.outputs[0], raw, op)

    return emit


def _operand(ctx: Context, name: str) -> str:
    """A float value; ONNX does not promote an integer constant as PyTorch does."""
    constant = ctx.program.constants.get(name)
    promoted = constant is not None and constant.encoding is None and not constant.value.is_floating_point()
    return ctx.float_constant(name, ctx.shape(name)) if promoted else ctx.value(name)


def saturates(encoding: Encoding, low: float | None, high: float | None) -> bool:
    """Whether every code of `encoding` already lies within [low, high]."""
    smallest, largest = encoding.representable()
    return (low is None or low <= smallest) and (high is None or high >= largest)


def clamp(ctx: Context, op: Op) -> None:
    """Nothing where the codes saturate at the bounds already; else Relu or Clip."""
    x, output = op.inputs[0], op.outputs[0]
    low, high = op.attrs.get("low"), op.attrs.get("high")
    mine, theirs = ctx.info(output).encoding, ctx.info(x).encoding
    if mine is not None and theirs is not None and mine.same_grid(theirs):
        inside = theirs.qmin >= mine.qmin and theirs.qmax <= mine.qmax
        if inside and saturates(mine, low, high):
            ctx.alias(output, x)
            return
    operand, raw = ctx.value(x), ctx.result(output)
    if low == 0 and high is None:
        ctx.node("Relu", [operand], [raw], where=op.name)
    else:
        bounds = ["" if v is None else ctx.scalar(v, f"{op.name}/{end}") for v, end in ((low, "low"), (high, "high"))]
        ctx.node("Clip", [operand, *bounds], [raw], where=op.name)
    ctx.finish(output, raw, op)


def prelu(ctx: Context, op: Op) -> None:
    """PRelu; the slope is reshaped so that it broadcasts along the channels."""
    x, slope = op.inputs
    count = ctx.program.constants[slope].value.numel()
    rank = len(ctx.shape(x))
    shape = [1] if count == 1 or rank < 2 else [count] + [1] * (rank - 2)
    raw = ctx.result(op.outputs[0])
    ctx.node("PRelu", [ctx.value(x), ctx.float_constant(slope, shape)], [raw], where=op.name)
    ctx.finish(op.outputs[0], raw, op)


def rescale(ctx: Context, op: Op) -> None:
    """Another scale on the same codes; a multiplication where the encodings are not related that way."""
    x, output = op.inputs[0], op.outputs[0]
    factor = float(op.attrs["factor"])
    mine, theirs = ctx.info(output).encoding, ctx.info(x).encoding
    if mine is not None and theirs is not None and _rescaled(mine, theirs, factor):
        ctx.alias(output, x)
        return
    raw = ctx.result(output)
    ctx.node("Mul", [ctx.value(x), ctx.scalar(factor, f"{op.name}/factor")], [raw], where=op.name)
    ctx.finish(output, raw, op)


def _rescaled(mine: Encoding, theirs: Encoding, factor: float) -> bool:
    return (
        mine.dtype == theirs.dtype
        and mine.zero_point == theirs.zero_point
        and mine.granularity == theirs.granularity
        and mine.qmin <= theirs.qmin
        and mine.qmax >= theirs.qmax
        # the product was rounded to float32, perhaps from a factor that was rounded itself
        and all(abs(a - b * factor) <= 1e-6 * a for a, b in zip(mine.scale, theirs.scale, strict=True))
    )


# unary functions: (context, operand, result, parameters, base of names) -----------------------------------

Function = Callable[[Context, str, str, Mapping[str, Any], str], None]


def _simple(op_type: str, attributes: Mapping[str, Any] | None = None) -> Function:
    def emit(ctx: Context, x: str, y: str, params: Mapping[str, Any], where: str) -> None:
        ctx.node(op_type, [x], [y], where=where, **(attributes or {}))

    return emit


def _with_alpha(op_type: str, parameter: str) -> Function:
    def emit(ctx: Context, x: str, y: str, params: Mapping[str, Any], where: str) -> None:
        ctx.node(op_type, [x], [y], where=where, alpha=float(params[parameter]))

    return emit


def _silu(ctx: Context, x: str, y: str, params: Mapping[str, Any], where: str) -> None:
    ctx.node("Mul", [x, ctx.node("Sigmoid", [x], where=where)], [y], where=where)


def _gelu(ctx: Context, x: str, y: str, params: Mapping[str, Any], where: str) -> None:
    ctx.node("Gelu", [x], [y], where=where, approximate=params.get("approximate", "none"))


def _rsqrt(ctx: Context, x: str, y: str, params: Mapping[str, Any], where: str) -> None:
    ctx.node("Reciprocal", [ctx.node("Sqrt", [x], where=where)], [y], where=where)


def _pow(ctx: Context, x: str, y: str, params: Mapping[str, Any], where: str) -> None:
    ctx.node("Pow", [x, ctx.scalar(float(params["exponent"]), f"{where}/exponent")], [y], where=where)


def _softplus(ctx: Context, x: str, y: str, params: Mapping[str, Any], where: str) -> None:
    beta, threshold = float(params.get("beta", 1.0)), float(params.get("threshold", 20.0))
    if beta == 1.0 and threshold >= 20.0:  # the linear tail differs from the function by less than 2**-28
        ctx.node("Softplus", [x], [y], where=where)
        return
    factor = ctx.scalar(beta, f"{where}/beta")
    scaled = x if beta == 1.0 else ctx.node("Mul", [x, factor], where=where)
    soft = ctx.node("Softplus", [scaled], where=where)
    soft = soft if beta == 1.0 else ctx.node("Div", [soft, factor], where=where)
    linear = ctx.node("Greater", [scaled, ctx.scalar(threshold, f"{where}/threshold")], where=where)
    ctx.node("Where", [linear, x, soft], [y], where=where)


FUNCTIONS: dict[str, Function] = {
    "sigmoid": _simple("Sigmoid"),
    "tanh": _simple("Tanh"),
    "hardsigmoid": _simple("HardSigmoid", {"alpha": 1.0 / 6.0, "beta": 0.5}),
    "hardswish": _simple("HardSwish"),
    "silu": _silu,
    "gelu": _gelu,
    "leaky_relu": _with_alpha("LeakyRelu", "negative_slope"),
    "elu": _with_alpha("Elu", "alpha"),
    "softplus": _softplus,
    "mish": _simple("Mish"),
    "exp": _simple("Exp"),
    "log": _simple("Log"),
    "sqrt": _simple("Sqrt"),
    "rsqrt": _rsqrt,
    "abs": _simple("Abs"),
    "neg": _simple("Neg"),
    "reciprocal": _simple("Reciprocal"),
    "pow": _pow,
    "erf": _simple("Erf"),
    "sin": _simple("Sin"),
    "cos": _simple("Cos"),
}


def table(ctx: Context, op: Op) -> None:
    """A unary function, as the standard operators."""
    function = op.attrs["function"]
    if function not in FUNCTIONS:
        raise ExportError(
            f"operator {op.name!r} computes {function!r}, which has no ONNX spelling here",
            f"keep it float or use one of {', '.join(sorted(FUNCTIONS))}",
        )
    x, output = op.inputs[0], op.outputs[0]
    params = op.attrs.get("params", {})
    operand, raw = ctx.value(x), ctx.result(output)
    sizes = _another_shape(ctx, x) if op.attrs.get("apart") else None
    if sizes is None:
        FUNCTIONS[function](ctx, operand, raw, params, op.name)
    else:
        # Qualcomm's compiler fuses the function with a product before it, and does not saturate between the two
        whole = [ctx.dimensions(x)[0], *sizes]
        moved = ctx.node("Reshape", [operand, ctx.integers([-1, *sizes], f"{op.name}/apart")], where=op.name)
        moved = ctx.through(moved, ctx.info(x).encoding, f"{op.name}/apart", whole)
        inner = ctx.fresh(f"{op.name}/{function}")
        FUNCTIONS[function](ctx, moved, inner, params, op.name)
        inner = ctx.through(inner, ctx.info(output).encoding, f"{op.name}/{function}", whole)
        back = ctx.integers([-1, *ctx.shape(output)[1:]], f"{output}/shape")
        ctx.node("Reshape", [inner, back], [raw], where=op.name)
    ctx.finish(output, raw, op)


def _another_shape(ctx: Context, x: str) -> list[int] | None:
    """Sizes behind the batch: a row, or a column where it is one already; None where no product gives `x`."""
    product = next((o for o in ctx.program.ops if x in o.outputs and o.kind in _PRODUCTS), None)
    sizes = ctx.shape(x)
    if product is None or len(sizes) < 2 or min(sizes[1:]) < 1 or ctx.info(x).encoding is None:
        return None
    row, channels = math.prod(sizes[1:]), sizes[-1] if product.kind == "linear" else sizes[1]
    return [row, 1] if row == channels else [row]


EMITTERS: dict[str, Emitter] = {
    "add": _binary("Add"),
    "sub": _binary("Sub"),
    "mul": _binary("Mul"),
    "div": _binary("Div"),
    "clamp": clamp,
    "prelu": prelu,
    "rescale": rescale,
    "table": table,
}
