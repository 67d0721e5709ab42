"""What becomes of each canonical kind in TFLite's int8 operators.

What TFLite has under narrower conditions is taken apart: an operator whose result must keep the encoding of its input,
or must have a prescribed one, computes to that and a requantization follows; functions without an operator become two
or three that exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from qat.errors import ExportError
from qat.integer.kernels.qparams import QParams, round_to_float32
from qat.integer.kernels.resize import nearest_source
from qat.integer.program import Op
from qat.integer.tflite import elementwise, functions, products, resize, softmax
from qat.integer.tflite.rewriting import MEND, Rewriting, Rule, check_multiplier, fixed_encoding, in_float
from qat.integer.tflite.signed import signed_slope


def _moves(work: Rewriting, op: Op) -> None:
    for name in op.inputs:
        if work.grid(name) != work.grid(op.outputs[0]):
            raise ExportError(
                f"operator {op.name!r} ({op.kind}) has another encoding for its result than for {name!r}",
                "let them share one: do not give the result a scheme of its own",
            )
    work.emit(op)


def _dims(work: Rewriting, op: Op, legal: tuple[int, ...]) -> int:
    dims = len(work.shape(op.inputs[0])) - 2
    if dims not in legal:
        raise ExportError(f"operator {op.name!r}: TFLite has no int8 {op.kind} of {dims} spatial dimensions", MEND)
    return dims


def _weighted(work: Rewriting, op: Op) -> None:
    weight = work.constants.get(op.inputs[1])
    if weight is None or weight.encoding is None:
        raise ExportError(f"operator {op.name!r}: its weight {op.inputs[1]!r} is no constant", MEND)
    if op.kind != "linear":
        _dims(work, op, (1, 2))
    if op.kind == "conv_transpose" and (op.attrs["groups"] != 1 or any(d != 1 for d in op.attrs["dilation"])):
        raise ExportError(f"operator {op.name!r}: TFLite's TransposeConv has neither groups nor dilation", MEND)
    x, y = work.grid(op.inputs[0]), work.grid(op.outputs[0])
    for channel, value in enumerate(products.real_multipliers(x, weight.encoding.scale_tensor, y)):
        check_multiplier(op, value, f", channel {channel},")
    work.emit(op)


def _sum(work: Rewriting, op: Op) -> None:
    a, b, y = (work.grid(name) for name in (*op.inputs, op.outputs[0]))
    # the kernel aborts the process where the multiplier of the result is not below 1
    if not elementwise.sum_multipliers(a, b, y)[2] < 1.0:
        raise ExportError(
            f"operator {op.name!r}: its operands have 2**19 times the scale of its result",
            "check the range of the result",
        )
    work.emit(op)


def _mul(work: Rewriting, op: Op) -> None:
    a, b, y = (work.grid(name) for name in (*op.inputs, op.outputs[0]))
    check_multiplier(op, a.scale * b.scale / y.scale, bound=255 * 255)
    work.emit(op)


def _matmul(work: Rewriting, op: Op) -> None:
    a, b, y = (work.grid(name) for name in (*op.inputs, op.outputs[0]))
    ranks = [len(work.shape(name)) for name in op.inputs]
    if min(ranks) < 2 or max(ranks) > 5:
        raise ExportError(f"operator {op.name!r} multiplies tensors of {ranks} dimensions; TFLite takes 2 to 5", MEND)
    check_multiplier(op, products.product_multiplier(a, b, y))
    work.emit(op)


def _requantize(work: Rewriting, op: Op) -> None:
    check_multiplier(op, work.grid(op.inputs[0]).scale / work.grid(op.outputs[0]).scale, bound=255)
    work.emit(op)


def _clamp(work: Rewriting, op: Op) -> None:
    x, y = op.inputs[0], op.outputs[0]
    if work.grid(x) == work.grid(y):
        work.emit(op)
        return
    wide = work.between(f"{y}:unclamped", y, work.encoding(y).derived(f"clamped into {y}"))
    _requantize(work, Op("requantize", op.name, (x,), (wide,)))
    work.emit(op, inputs=(wide,))


def _rescale(work: Rewriting, op: Op) -> None:
    """Multiply by a constant whose code is 127: the result has the same codes, and its own scale."""
    factor = work.constant(f"{op.name}.factor", float(op.attrs["factor"]))
    x, y = work.grid(op.inputs[0]), work.grid(op.outputs[0])
    if x.zero_point != y.zero_point or abs(y.scale / (x.scale * float(op.attrs["factor"])) - 1.0) > 1e-5:
        raise ExportError(f"operator {op.name!r} rescales to another zero point or scale", "report this model")
    work.emit(Op("mul", op.name, (op.inputs[0], factor), op.outputs))


def _softmax(work: Rewriting, op: Op) -> None:
    if not work.grid(op.inputs[0]).scale > softmax.SMALLEST_SCALE:
        raise ExportError(f"operator {op.name!r}: the scale of its input is below 2**-26", "calibrate it again")
    work.fixed(op, softmax.PROBABILITY)


def _max_pool(work: Rewriting, op: Op) -> None:
    _dims(work, op, (1, 2))
    if any(d != 1 for d in op.attrs["dilation"]):
        raise ExportError(f"operator {op.name!r}: TFLite's MaxPool has no dilation", MEND)
    full, _ = _windows(work, op)
    work.keeps_encoding(op, attrs={**op.attrs, "padding": full, "ceil_mode": False})


def _avg_pool(work: Rewriting, op: Op) -> None:
    _dims(work, op, (1, 2))
    given = tuple(tuple(pair) for pair in op.attrs["padding"])
    full, sizes = _windows(work, op)
    padded = any(any(pair) for pair in given)
    counted = bool(op.attrs["count_include_pad"]) and padded
    if counted and full != given:
        raise ExportError(
            f"operator {op.name!r} counts its padding, but not what ceil_mode adds", "use count_include_pad=False"
        )
    attrs = {**op.attrs, "padding": full, "ceil_mode": False, "count_include_pad": counted}
    if not counted and any(any(pair) for pair in full) and not same_padding(sizes, attrs):
        raise ExportError(
            f"operator {op.name!r} does not count its padding, which TFLite can only where it is its own SAME padding",
            "use count_include_pad=True, or another padding",
        )
    work.keeps_encoding(op, attrs=attrs)


def _windows(work: Rewriting, op: Op) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Padding with which every window is whole (`ceil_mode` adds to the end), and the input sizes."""
    sizes_in, sizes_out = work.shape(op.inputs[0])[2:], work.shape(op.outputs[0])[2:]
    full = []
    for d, (low, high) in enumerate(op.attrs["padding"]):
        reach = (sizes_out[d] - 1) * op.attrs["stride"][d] + op.attrs["kernel"][d]
        full.append((low, max(high, reach - sizes_in[d] - low)))
    return tuple(full), sizes_in


def same_padding(sizes: tuple[int, ...], attrs: Mapping[str, Any]) -> bool:
    """Whether a padding is what TFLite's SAME gives for these input sizes."""
    for size, kernel, stride, pair in zip(sizes, attrs["kernel"], attrs["stride"], attrs["padding"], strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        if tuple(pair) != (total // 2, total - total // 2):
            return False
    return True


def _mean(work: Rewriting, op: Op) -> None:
    shape = work.shape(op.inputs[0])
    if not op.attrs["axes"] or any(shape[a] < 0 for a in op.attrs["axes"]):
        raise ExportError(f"operator {op.name!r} takes a mean over the batch or over nothing", MEND)
    # the sum of n codes is up to 255 n, and the n that is worked into the multiplier takes at least n / 2 of it back
    check_multiplier(op, work.grid(op.inputs[0]).scale / work.grid(op.outputs[0]).scale, bound=510)
    work.emit(op)


def _resize(work: Rewriting, op: Op) -> None:
    _dims(work, op, (1, 2) if op.attrs["mode"] == "nearest" else (2,))
    sizes_in, sizes_out = work.shape(op.inputs[0])[2:], op.attrs["size"]
    scales = op.attrs.get("scales") or (None,) * len(sizes_in)
    if op.attrs["mode"] == "nearest":
        for size, length, scale in zip(sizes_out, sizes_in, scales, strict=True):
            ours = nearest_source(size, length, scale, single=len(sizes_in) == 1)
            if not bool((ours == resize.nearest_source(size, length)).all()):
                raise ExportError(
                    f"operator {op.name!r} picks other neighbours from {length} to {size} than TFLite does",
                    "resize to a size instead of by a scale, or by a whole factor",
                )
    else:
        for size, length, scale in zip(sizes_out, sizes_in, scales, strict=True):
            if scale is not None and abs(scale * length - size) > 1e-6 * size and not op.attrs["align_corners"]:
                raise ExportError(
                    f"operator {op.name!r} interpolates by the scale {scale} from {length} to {size}, and TFLite by "
                    "the sizes alone",
                    "resize to a size instead of by a scale",
                )
        for index, size in enumerate(sizes_out):
            if op.attrs["align_corners"] and size == 1 and sizes_in[index] > 1:
                raise ExportError(f"operator {op.name!r} aligns the corners of a single row", "use align_corners=False")
    work.keeps_encoding(op)


def _pad(work: Rewriting, op: Op) -> None:
    pads = [tuple(pair) for pair in op.attrs["pads"]]
    if any(side < 0 for pair in pads for side in pair):
        raise ExportError(f"operator {op.name!r} crops by a negative padding", "slice instead")
    if op.attrs["mode"] not in ("constant", "reflect"):
        raise ExportError(f"operator {op.name!r}: TFLite has no padding of mode {op.attrs['mode']!r}", MEND)
    _moves(work, op)


def _table(work: Rewriting, op: Op) -> None:
    name, params = op.attrs["function"], dict(op.attrs.get("params") or {})
    if name in ("relu", "relu6", "clamp"):
        low, high = {"relu": (0.0, None), "relu6": (0.0, 6.0)}.get(name, (params.get("low"), params.get("high")))
        _clamp(work, replace(op, kind="clamp", attrs={"low": low, "high": high}))
    elif name == "sigmoid":
        work.fixed(op, functions.LOGISTIC)
    elif name == "tanh":
        work.fixed(op, functions.TANH)
    elif name == "silu":
        _silu(work, op)
    elif name == "hardsigmoid":
        _hard_sigmoid(work, op)
    else:
        if name == "leaky_relu":
            _slopes(work, op, float(params.get("negative_slope", 0.01)))
        work.emit(op)


def _prelu(work: Rewriting, op: Op) -> None:
    """LeakyRelu where there is one slope; else PRelu, whose slopes are int8."""
    given = work.program.constants[op.inputs[1]]
    slopes = replace(given, value=given.floats(), encoding=None)
    if slopes.value.numel() == 1:
        params = {"negative_slope": float(slopes.value)}
        work.operator(Op("table", op.name, op.inputs[:1], op.outputs, {"function": "leaky_relu", "params": params}))
        return
    rank = len(work.shape(op.inputs[0]))
    constant = signed_slope(slopes, (slopes.value.numel(), *([1] * (rank - 2))))
    work.constants[constant.name] = constant
    _slopes(work, op, float(slopes.value.abs().max()))
    work.emit(op, inputs=(op.inputs[0], constant.name))


def _slopes(work: Rewriting, op: Op, slope: float) -> None:
    """Check the multipliers of a function of two slopes, 1 and the one given."""
    check_multiplier(
        op, work.grid(op.inputs[0]).scale / work.grid(op.outputs[0]).scale * max(1.0, abs(slope)), bound=255
    )


def _silu(work: Rewriting, op: Op) -> None:
    """Logistic and Mul."""
    y = op.outputs[0]
    gate = work.between(f"{y}:sigmoid", y, fixed_encoding(functions.LOGISTIC, "sigmoid"))
    work.emit(Op("table", f"{op.name}:sigmoid", op.inputs, (gate,), {"function": "sigmoid"}))
    _mul(work, Op("mul", op.name, (op.inputs[0], gate), op.outputs))


def _hard_sigmoid(work: Rewriting, op: Op) -> None:
    """`relu6(x + 3) / 6` as Add, clamped, and Mul."""
    y = op.outputs[0]
    six = QParams(round_to_float32(6.0 / 255.0), -128, -128, 127)
    shifted = work.between(f"{y}:plus3", y, fixed_encoding(six, "[0, 6]"))
    _sum(work, Op("add", shifted, (op.inputs[0], work.constant(f"{op.name}.three", 3.0)), (shifted,)))
    _mul(work, Op("mul", op.name, (shifted, work.constant(f"{op.name}.sixth", 1.0 / 6.0)), op.outputs))


def _quantize(work: Rewriting, op: Op) -> None:
    if op.inputs[0] not in work.program.inputs:
        raise ExportError(f"tensor {op.inputs[0]!r} is computed in float", MEND)
    if work.tensors[op.inputs[0]].dtype != torch.float32:
        raise ExportError(f"input {op.inputs[0]!r} has dtype {work.tensors[op.inputs[0]].dtype}", "use float32 inputs")
    work.emit(op)


def _dequantize(work: Rewriting, op: Op) -> None:
    for reader in work.program.ops:
        if op.outputs[0] in reader.inputs:
            raise in_float(reader)
    work.emit(op)


#: what is done with each kind; others are refused
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "quantize": _quantize,
        "dequantize": _dequantize,
        "requantize": _requantize,
        "conv": _weighted,
        "conv_transpose": _weighted,
        "linear": _weighted,
        "matmul": _matmul,
        "add": _sum,
        "sub": _sum,
        "mul": _mul,
        "clamp": _clamp,
        "rescale": _rescale,
        "table": _table,
        "prelu": _prelu,
        "softmax": _softmax,
        "max_pool": _max_pool,
        "avg_pool": _avg_pool,
        "mean": _mean,
        "resize": _resize,
        "pad": _pad,
        **dict.fromkeys(("concat", "reshape", "transpose", "slice", "expand", "identity"), _moves),
    }
)
