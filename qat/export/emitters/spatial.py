"""Operators on the spatial grid: resize and pad."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qat.export.emitters.context import Context, Emitter
from qat.export.emitters.products import pads
from qat.integer.program import Op

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}


def nearest_indices(size_in: int, size_out: int, scale: float | None, rank: int) -> npt.NDArray[np.int64]:
    """Source index of each output position as PyTorch's `nearest` computes it (float32)."""
    step = np.float32(1.0 / scale) if scale else np.float32(size_in) / np.float32(size_out)
    if rank > 1 and size_out in (size_in, 2 * size_in):  # PyTorch then takes the exact step, whatever the scale
        step = np.float32(size_in / size_out)
    positions = np.floor(np.arange(size_out, dtype=np.float32) * step)
    indices: npt.NDArray[np.int64] = np.minimum(positions, size_in - 1).astype(np.int64)
    return indices


def _onnx_nearest_indices(size_in: int, size_out: int, scale: float | None) -> npt.NDArray[np.int64]:
    """Source index as ONNX Resize computes it (asymmetric, floor; float32)."""
    factor = np.float32(scale) if scale else np.float32(size_out) / np.float32(size_in)
    positions = np.floor(np.arange(size_out, dtype=np.float32) / factor)
    indices: npt.NDArray[np.int64] = np.clip(positions, 0, size_in - 1).astype(np.int64)
    return indices


def _says(ratio: float, given: float | None, size_in: int, size_out: int) -> bool:
    """Whether ONNX gets `size_out` from the float32 scale `ratio`, which is exact or the one given."""
    rounded = np.float32(ratio)
    exact = given is not None or float(rounded) * size_in == size_out
    return exact and int(np.floor(np.float32(size_in) * rounded)) == size_out


def resize(ctx: Context, op: Op) -> None:
    """Resize; nearest, where ONNX would round differently, is written as one Gather a dimension."""
    x, output = op.inputs[0], op.outputs[0]
    sizes_out = tuple(op.attrs["size"])
    rank = len(sizes_out)
    outer = len(ctx.shape(x)) - rank
    sizes_in = ctx.shape(x)[outer:]
    given = op.attrs.get("scales")
    scales: tuple[float | None, ...] = tuple(given) if given else (None,) * rank
    nearest = op.attrs["mode"] == "nearest"
    operand = ctx.value(x)
    if nearest:
        ours = [nearest_indices(*args, rank) for args in zip(sizes_in, sizes_out, scales, strict=True)]
        theirs = [_onnx_nearest_indices(*args) for args in zip(sizes_in, sizes_out, scales, strict=True)]
        if not all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            _gather(ctx, op, operand, ours, outer)
            return
    raw = ctx.result(output)
    ratios = [s or o / i for s, o, i in zip(scales, sizes_out, sizes_in, strict=True)]
    align = bool(op.attrs.get("align_corners"))
    mode = "asymmetric" if nearest else "align_corners" if align else "half_pixel"
    # scales wherever they say the same as the sizes: more runtimes take them
    if all(_says(*args) for args in zip(ratios, scales, sizes_in, sizes_out, strict=True)):
        factors = ctx.constant(np.array([1.0] * outer + ratios, dtype=np.float32), f"{op.name}/scales")
        operands, axes = [operand, "", factors], None
    else:
        operands = [operand, "", "", ctx.integers(sizes_out, f"{op.name}/sizes")]
        axes = list(range(outer, outer + rank))
    ctx.node(
        "Resize",
        operands,
        [raw],
        where=op.name,
        mode="nearest" if nearest else "linear",
        coordinate_transformation_mode=mode,
        nearest_mode="floor" if nearest else None,
        axes=axes,
    )
    ctx.finish(output, raw, op)


def _gather(ctx: Context, op: Op, operand: str, indices: list[npt.NDArray[np.int64]], outer: int) -> None:
    output = op.outputs[0]
    sizes = ctx.dimensions(op.inputs[0])
    for d, index in enumerate(indices):
        last = d == len(indices) - 1
        sizes[outer + d] = len(index)
        raw = ctx.result(output) if last else ctx.fresh(f"{op.name}/axis{outer + d}")
        ctx.node(
            "Gather",
            [operand, ctx.constant(index, f"{op.name}/index{d}")],
            [raw],
            where=f"{op.name}/{d}",
            axis=outer + d,
        )
        operand = raw if last else ctx.through(raw, ctx.info(output).encoding, raw, sizes)
    ctx.finish(output, operand, op)


def pad(ctx: Context, op: Op) -> None:
    """Pad; zeros are the operator's own default."""
    mode, value = op.attrs["mode"], float(op.attrs.get("value") or 0.0)
    operands = [ctx.value(op.inputs[0]), ctx.integers(pads(tuple(op.attrs["pads"])), f"{op.name}/pads")]
    if mode == "constant" and value:
        operands.append(ctx.scalar(value, f"{op.name}/value"))
    raw = ctx.result(op.outputs[0])
    ctx.node("Pad", operands, [raw], where=op.name, mode=_PAD_MODES[mode])
    ctx.finish(op.outputs[0], raw, op)


EMITTERS: dict[str, Emitter] = {"resize": resize, "pad": pad}
