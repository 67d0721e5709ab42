"""Pooling and reduction to means.

PyTorch's `ceil_mode` is written as explicit padding at the high end and `ceil_mode=0`, because runtimes
disagree on the last window and on what it divides by.
"""

from __future__ import annotations

import math

from qat.export.emitters.context import Context, Emitter
from qat.export.emitters.products import pads, reshape_target
from qat.integer.program import Op

Padding = tuple[tuple[int, int], ...]


def _ceil_padding(ctx: Context, op: Op, dilation: tuple[int, ...]) -> Padding:
    """Padding with which floor mode gives the output size of the program."""
    rank = len(op.attrs["kernel"])
    sizes_in, sizes_out = ctx.shape(op.inputs[0])[-rank:], ctx.shape(op.outputs[0])[-rank:]
    result = []
    for d in range(rank):
        low, high = op.attrs["padding"][d]
        reach = (sizes_out[d] - 1) * op.attrs["stride"][d] + dilation[d] * (op.attrs["kernel"][d] - 1) + 1
        result.append((low, max(high, reach - sizes_in[d] - low)))
    return tuple(result)


def max_pool(ctx: Context, op: Op) -> None:
    """MaxPool; its padding is minus infinity, so that more of it changes no maximum."""
    dilation = tuple(op.attrs["dilation"])
    operand, raw = ctx.value(op.inputs[0]), ctx.result(op.outputs[0])
    ctx.node(
        "MaxPool",
        [operand],
        [raw],
        where=op.name,
        kernel_shape=list(op.attrs["kernel"]),
        strides=list(op.attrs["stride"]),
        pads=pads(_ceil_padding(ctx, op, dilation)),
        dilations=list(dilation) if any(d != 1 for d in dilation) else None,
    )
    ctx.finish(op.outputs[0], raw, op)


def avg_pool(ctx: Context, op: Op) -> None:
    """AveragePool.

    Where padding counts and ceil mode adds a partial window, the divisor counts the padding but not what
    ceil mode adds: the padding becomes a Pad of its own and the added part the (uncounted) padding of the
    pool.
    """
    x, output = op.inputs[0], op.outputs[0]
    rank = len(op.attrs["kernel"])
    padding: Padding = tuple(op.attrs["padding"])
    full = _ceil_padding(ctx, op, (1,) * rank)
    counted = bool(op.attrs["count_include_pad"]) and any(low or high for low, high in padding)
    operand = ctx.value(x)
    if counted and full != padding:
        outer = len(ctx.shape(x)) - rank
        borders = ((0, 0),) * outer + padding
        padded = ctx.node("Pad", [operand, ctx.integers(pads(borders), f"{op.name}/pads")], where=op.name)
        sizes = ctx.dimensions(x)
        for d, (low, high) in enumerate(padding):
            sizes[outer + d] = ctx.shape(x)[outer + d] + low + high
        operand = ctx.through(padded, ctx.info(x).encoding, f"{op.name}/pad", sizes)
        full = tuple((0, f[1] - p[1]) for f, p in zip(full, padding, strict=True))
        counted = False
    raw = ctx.result(output)
    ctx.node(
        "AveragePool",
        [operand],
        [raw],
        where=op.name,
        kernel_shape=list(op.attrs["kernel"]),
        strides=list(op.attrs["stride"]),
        pads=pads(full),
        count_include_pad=int(counted),
    )
    ctx.finish(output, raw, op)


def mean(ctx: Context, op: Op) -> None:
    """GlobalAveragePool, the mean that runtimes have in integers; ReduceMean where the codes are not 8-bit.

    A mean over other than exactly the spatial dimensions is brought to that form by Transpose and Reshape.
    """
    x, output = op.inputs[0], op.outputs[0]
    rank = len(ctx.shape(x))
    axes = sorted(axis % rank for axis in op.attrs["axes"])
    keepdims = bool(op.attrs["keepdims"])
    kept = [axis for axis in range(rank) if axis not in axes]
    encodings = [ctx.info(name).encoding for name in (x, output)]
    eight_bits = all(e is not None and e.dtype in ("int8", "uint8") for e in encodings)
    open_sizes = sum(ctx.shape(x)[axis] < 0 for axis in kept)
    spatial = rank >= 3 and kept == [0, 1]
    # where the open batch size is averaged over, or two sizes are open, no Reshape can say the sizes
    if not axes or not (spatial or (eight_bits and open_sizes <= 1 and all(ctx.shape(x)[a] > 0 for a in axes))):
        raw = ctx.result(output)
        operands = [ctx.value(x), ctx.integers(axes, f"{op.name}/axes")]
        ctx.node("ReduceMean", operands, [raw], where=op.name, keepdims=int(keepdims), noop_with_empty_axes=1)
        ctx.finish(output, raw, op)
        return
    operand, shape = _channels_first(ctx, op, kept, axes)
    if spatial and keepdims:
        raw = ctx.result(output)
        ctx.node("GlobalAveragePool", [operand], [raw], where=op.name)
    else:
        pooled = ctx.node("GlobalAveragePool", [operand], where=op.name)
        sizes = [*shape[:2], *([1] * (len(shape) - 2))]
        inner = ctx.through(pooled, encodings[1], f"{op.name}/pooled", _named(sizes))
        raw = ctx.result(output)
        ctx.node("Reshape", [inner, reshape_target(ctx, output)], [raw], where=op.name)
    ctx.finish(output, raw, op)


def _named(sizes: list[int]) -> list[int | str]:
    return [d if d >= 0 else "batch" if d == -1 else f"{-d}*batch" for d in sizes]


def _channels_first(ctx: Context, op: Op, kept: list[int], axes: list[int]) -> tuple[str, list[int]]:
    """Return the operand in shape (N, C, *reduced), and that shape."""
    x = op.inputs[0]
    operand, encoding = ctx.value(x), ctx.info(x).encoding
    order = [*kept, *axes]
    shape = [ctx.shape(x)[axis] for axis in order]
    if order != sorted(order):
        turned = ctx.node("Transpose", [operand], where=op.name, perm=order)
        operand = ctx.through(turned, encoding, f"{op.name}/transposed", _named(shape))
    if len(kept) != 2:
        # to (first kept size, product of the others, product of the reduced)
        first = shape[0] if kept else 1
        others, reduced = math.prod(shape[1 : len(kept)]), math.prod(shape[len(kept) :])
        shape = [first, others, reduced]
        target = ctx.integers([-1 if d < 0 else d for d in shape], f"{op.name}/rows")
        folded = ctx.node("Reshape", [operand, target], where=op.name)
        operand = ctx.through(folded, encoding, f"{op.name}/folded", _named(shape))
    return operand, shape


EMITTERS: dict[str, Emitter] = {"max_pool": max_pool, "avg_pool": avg_pool, "mean": mean}
