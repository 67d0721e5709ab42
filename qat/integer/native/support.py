"""Which operators of a program the native runner has, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from qat.encoding import Encoding
from qat.integer.native.planfile import Grid, Type
from qat.integer.operators import qparams
from qat.integer.program import Op, Program

#: The type of the runner that stores the codes of a dtype; it computes with 8 and 16 bits.
TYPES: Mapping[str, Type] = MappingProxyType({"uint8": Type.U8, "int8": Type.S8, "uint16": Type.U16, "int16": Type.S16})
_WEIGHT_TYPES = frozenset({"int4", "uint4", "int8", "uint8"})
_MAX_RANK = 8

#: Why an operator stays in PyTorch; empty if it does not.
Check = Callable[[Program, Op], str]


def grid_of(encoding: Encoding) -> Grid:
    """The grid of a tensor with a per-tensor encoding."""
    q = qparams(encoding)
    return Grid(q.scale, q.zero_point, q.qmin, q.qmax, q.wide)


def shape_of(program: Program, name: str) -> tuple[int, ...]:
    """Sizes of a tensor or constant."""
    if name in program.constants:
        return tuple(program.constants[name].value.shape)
    return program.tensors[name].shape


def why_not(program: Program, op: Op) -> str:
    """Why the runner does not have an operator, in some words; empty if it has it."""
    if op.kind == "island":
        return f"float island: {op.attrs.get('cause', '')}".rstrip(": ")
    check = _CHECKS.get(op.kind)
    if check is None:
        return f"the runner has no {op.kind}"
    codes = [*_read_codes(op), *(() if op.kind == "dequantize" else op.outputs)]
    for name in codes:
        reason = _why_no_codes(program, name)
        if reason:
            return reason
    for name in (*op.inputs, *op.outputs):
        if name and name not in program.constants:
            shape = program.tensors[name].shape
            if len(shape) > _MAX_RANK:
                return f"{len(shape)} dimensions, the runner has {_MAX_RANK}"
            if sum(size < 0 for size in shape) > 1:
                return "the batch size appears in two dimensions"
            if 0 in shape:
                return "an empty tensor"
    return check(program, op)


def _read_codes(op: Op) -> tuple[str, ...]:
    """Names of the activations that an operator reads as codes."""
    if op.kind == "quantize":
        return ()
    if op.kind in ("conv", "conv_transpose", "linear", "layer_norm", "prelu"):
        return op.inputs[:1]
    return op.inputs


def _why_no_codes(program: Program, name: str) -> str:
    encoding = program.encoding_of(name)
    if encoding is None:
        return "computed in float"
    if not encoding.per_tensor:
        return f"{name} has several scales"
    kind = TYPES.get(encoding.dtype)
    if kind is None:
        return f"{encoding.dtype} activations"
    if kind.bits == 16 and not grid_of(encoding).wide:
        return f"{name} holds 8 bits in {encoding.dtype}"
    return ""


def _always(program: Program, op: Op) -> str:
    return ""


def _quantize(program: Program, op: Op) -> str:
    info = program.tensors.get(op.inputs[0])
    return "" if info is not None and info.dtype.is_floating_point else "it quantizes a constant or integers"


def _dequantize(program: Program, op: Op) -> str:
    return "" if op.inputs[0] in program.tensors else "it dequantizes a constant"


def _weighted(program: Program, op: Op) -> str:
    weight = program.constants.get(op.inputs[1])
    if weight is None or weight.encoding is None:
        return "its weight is not quantized"
    if weight.encoding.granularity.kind == "per_group":
        return "its weight has a scale for each group"
    if weight.encoding.dtype not in _WEIGHT_TYPES:
        return f"{weight.encoding.dtype} weights"
    if op.kind == "linear":
        return "" if shape_of(program, op.inputs[0])[-1] > 0 else "it reduces over the batch"
    dims = weight.value.dim() - 2
    return _spatial(dims) or _batch_first(shape_of(program, op.inputs[0]))


def _spatial(dims: int) -> str:
    return "" if dims in (1, 2) else f"{dims} spatial dimensions"


def _batch_first(shape: tuple[int, ...]) -> str:
    return "" if all(size > 0 for size in shape[1:]) else "the batch size is no leading dimension"


def _pool(program: Program, op: Op) -> str:
    shape = shape_of(program, op.inputs[0])
    reason = _spatial(len(shape) - 2) or _batch_first(shape)
    if not reason and op.kind == "max_pool":
        x, y = program.encoding_of(op.inputs[0]), program.encoding_of(op.outputs[0])
        assert x is not None
        assert y is not None
        reason = "" if x.same_grid(y) else "its result has another scale than its input"
    return reason


def _resize(program: Program, op: Op) -> str:
    shape = shape_of(program, op.inputs[0])
    if op.attrs["mode"] == "nearest" or len(shape) == 4:
        return _spatial(len(shape) - 2) or _batch_first(shape)
    return f"linear interpolation of {len(shape) - 2} dimensions"


def _pad(program: Program, op: Op) -> str:
    shape = shape_of(program, op.inputs[0])
    pads = list(op.attrs["pads"])
    if any(side < 0 for pair in pads for side in pair):
        return "padding that crops"
    batch = [pair for pair, size in zip(pads, shape[len(shape) - len(pads) :], strict=True) if size < 0]
    return "padding of the batch" if any(any(pair) for pair in batch) else ""


def _slice(program: Program, op: Op) -> str:
    shape, axes = shape_of(program, op.inputs[0]), [a % len(shape_of(program, op.inputs[0])) for a in op.attrs["axes"]]
    if len(set(axes)) < len(axes):
        return "two slices of one dimension"
    return "a slice of the batch" if any(shape[a] < 0 for a in axes) else ""


def _matmul(program: Program, op: Op) -> str:
    shapes = [shape_of(program, name) for name in op.inputs]
    if any(len(shape) < 2 for shape in shapes):
        return "a product with a vector"
    return "a product over the batch" if any(size < 0 for shape in shapes for size in shape[-2:]) else ""


def _softmax(program: Program, op: Op) -> str:
    return "" if shape_of(program, op.inputs[0])[op.attrs["axis"]] > 0 else "softmax over the batch"


def _mean(program: Program, op: Op) -> str:
    shape = shape_of(program, op.inputs[0])
    return "" if all(shape[a] > 0 for a in op.attrs["axes"]) else "a mean over the batch"


def _layer_norm(program: Program, op: Op) -> str:
    shape = shape_of(program, op.inputs[0])[-op.attrs["axes_count"] :]
    return "" if all(size > 0 for size in shape) else "it normalizes over the batch"


_CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "quantize": _quantize,
        "dequantize": _dequantize,
        "conv": _weighted,
        "conv_transpose": _weighted,
        "linear": _weighted,
        "matmul": _matmul,
        "max_pool": _pool,
        "avg_pool": _pool,
        "resize": _resize,
        "pad": _pad,
        "slice": _slice,
        "softmax": _softmax,
        "mean": _mean,
        "layer_norm": _layer_norm,
        **dict.fromkeys(
            ("requantize", "rescale", "add", "sub", "mul", "div", "clamp", "table", "prelu", "concat"), _always
        ),
        **dict.fromkeys(("reshape", "transpose", "expand", "identity"), _always),
    }
)
