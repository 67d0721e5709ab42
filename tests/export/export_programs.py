"""Small programs made by hand, and a reference that executes them in float on dequantized values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.encoding import Encoding
from qat.integer.model import IntegerModel
from qat.integer.program import Constant, Op, Program, TensorInfo
from qat.scheme import Granularity, Scheme, int_type

B = -1  # the batch dimension


def enc(dtype: str = "uint8", low: float = -3.0, high: float = 3.0, **changes: Any) -> Encoding:
    return Encoding.from_range(low, high, Scheme(dtype=dtype, **changes))


def weight(name: str, value: Tensor, dtype: str = "int8", axis: int = 0) -> Constant:
    limit = float(int_type(dtype).qmax)
    other = [d for d in range(value.dim()) if d != axis]
    scale = value.abs().amax(other).clamp(min=1e-6) / limit
    e = Encoding(
        dtype,
        tuple(scale.tolist()),
        (0,) * len(scale),
        -int(limit),
        int(limit),
        True,
        Granularity("per_channel", axis),
    )
    return Constant(name, e.quantize(value).to(torch.int16 if dtype == "int16" else torch.int8), e)


def bias(name: str, value: Tensor, x: Encoding, w: Encoding) -> Constant:
    scales = (torch.tensor(w.scale) * torch.tensor(x.scale)).float()
    e = Encoding(
        "int32",
        tuple(scales.tolist()),
        (0,) * len(scales),
        -(2**31),
        2**31 - 1,
        True,
        Granularity("per_channel", 0),
    )
    return Constant(name, torch.round(value.double() / scales.double()).to(torch.int32), e)


class Builder:
    """Collects operators and tensors; `run` order is the order of the calls."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.constants: dict[str, Constant] = {}
        self.ops: list[Op] = []
        self.inputs: list[str] = []
        self.outputs: list[str] = []

    def input(self, name: str, shape: tuple[int, ...], encoding: Encoding | None) -> str:
        float_name = name if encoding is None else f"{name}:float"
        self.tensors[float_name] = TensorInfo(float_name, shape)
        self.inputs.append(float_name)
        if encoding is None:
            return name
        return self.op("quantize", name, (float_name,), shape, encoding)

    def constant(self, constant: Constant) -> str:
        self.constants[constant.name] = constant
        return constant.name

    def op(
        self,
        kind: str,
        name: str,
        inputs: tuple[str, ...],
        sizes: tuple[int, ...],
        encoding: Encoding | None,
        /,
        **attrs: Any,
    ) -> str:
        call = attrs.pop("call", None)
        self.tensors[name] = TensorInfo(name, sizes, encoding)
        self.ops.append(Op(kind, name.removesuffix(":float"), inputs, (name,), attrs, call))
        return name

    def output(self, name: str) -> None:
        info = self.tensors[name]
        if info.encoding is not None and f"{name}:float" in self.tensors:
            name = f"{name}:float"  # a quantized input, returned as it came
        elif info.encoding is not None:
            name = self.op("dequantize", f"{name}:float", (name,), info.shape, None)
        self.outputs.append(name)

    def program(self) -> Program:
        return Program(tuple(self.inputs), tuple(self.outputs), tuple(self.ops), self.tensors, self.constants)


def single(
    kind: str,
    x_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    x: Encoding | None,
    y: Encoding | None,
    others: tuple[Constant | None, ...] = (),
    /,
    **attrs: Any,
) -> Program:
    """A program of one operator between a quantized input and a quantized output."""
    b = Builder()
    source = b.input("x", x_shape, x)
    names = tuple(b.constant(c) if c else "" for c in others)
    b.output(b.op(kind, "block.y", (source, *names), y_shape, y, **attrs))
    return b.program()


# the reference --------------------------------------------------------------------------------------------


def execute(program: Program, inputs: tuple[Tensor, ...], collect: set[str]) -> Mapping[str, Tensor]:
    """Execute every operator as float on dequantized operands, then quantize its result."""
    values: dict[str, Tensor] = dict(zip(program.inputs, inputs, strict=True))
    batch = next(
        x.shape[axis] // -size
        for name, x in zip(program.inputs, inputs, strict=True)
        for axis, size in enumerate(program.tensors[name].shape)
        if size < 0
    )

    def real(name: str) -> Tensor | None:
        if not name:
            return None
        value = program.constants[name].value if name in program.constants else values[name]
        encoding = program.encoding_of(name)
        return value.double() if encoding is None else encoding.dequantize(value).double()

    for op in program.ops:
        operands = [real(name) for name in op.inputs]
        info = program.tensors[op.outputs[0]]
        sizes = tuple(-d * batch if d < 0 else d for d in info.shape)
        if op.kind == "rescale" and info.encoding is not None:
            values[op.outputs[0]] = values[op.inputs[0]]
            continue
        results = op.call(*(x.float() for x in operands)) if op.call else _float(op, operands, sizes)
        results = results if isinstance(results, tuple) else (results,)
        for name, result in zip(op.outputs, results, strict=True):
            encoding = program.encoding_of(name)
            assert op.call or result.shape == sizes, (op.kind, result.shape, sizes)
            values[name] = result.float() if encoding is None else encoding.quantize(result.float())
    return {name: values[name] for name in collect}


def _pad_flat(padding: Any) -> list[int]:
    return [side for pair in reversed(padding) for side in pair]


def _float(op: Op, xs: list[Any], sizes: tuple[int, ...]) -> Tensor:
    a, x = op.attrs, xs[0]
    match op.kind:
        case "quantize" | "dequantize" | "requantize" | "identity":
            return x
        case "conv":
            rank = xs[1].dim() - 2
            padded = F.pad(x, _pad_flat(a["padding"]))
            conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
            return conv(padded, xs[1], _at(xs, 2), a["stride"], 0, a["dilation"], a["groups"])
        case "conv_transpose":
            conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[xs[1].dim() - 3]
            padding = [low for low, _ in a["padding"]]
            return conv(x, xs[1], _at(xs, 2), a["stride"], padding, a["output_padding"], a["groups"], a["dilation"])
        case "linear":
            return F.linear(x, xs[1], _at(xs, 2))
        case "matmul":
            return x @ xs[1]
        case "add":
            return x + xs[1]
        case "sub":
            return x - xs[1]
        case "mul":
            return x * xs[1]
        case "div":
            return x / xs[1]
        case "rescale":
            return x * a["factor"]
        case "clamp":
            return x.clamp(a["low"], a["high"])
        case "prelu":
            return F.prelu(x, xs[1])
        case "softmax":
            return x.softmax(a["axis"])
        case "layer_norm":
            return F.layer_norm(x, x.shape[x.dim() - a["axes_count"] :], _at(xs, 1), _at(xs, 2), a["eps"])
        case "max_pool":
            pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
            return pool(x, a["kernel"], a["stride"], [p for p, _ in a["padding"]], a["dilation"], a["ceil_mode"])
        case "avg_pool":
            pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
            padding = [p for p, _ in a["padding"]]
            return pool(x, a["kernel"], a["stride"], padding, a["ceil_mode"], a["count_include_pad"])
        case "mean":
            return x.mean(a["axes"], keepdim=a["keepdims"])
        case "resize":
            mode = a["mode"] if a["mode"] == "nearest" else {3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()]
            align = None if mode == "nearest" else a["align_corners"]
            how = {"scale_factor": list(a["scales"])} if a["scales"] else {"size": list(a["size"])}
            return F.interpolate(x, mode=mode, align_corners=align, **how)
        case "pad":
            extra = {"value": a["value"]} if a["mode"] == "constant" else {}
            pads = a["pads"] if a["mode"] == "constant" else [p for p in a["pads"] if p != (0, 0)]
            return F.pad(x, _pad_flat(pads), a["mode"], **extra)
        case "concat":
            return torch.cat(xs, a["axis"])
        case "reshape":
            return x.reshape(a["shape"])
        case "transpose":
            return x.permute(a["perm"])
        case "slice":
            for axis, start, end, step in zip(a["axes"], a["starts"], a["ends"], a["steps"], strict=True):
                index = torch.tensor(list(range(x.shape[axis])[slice(start, end, step)]))
                x = x.index_select(axis, index)
            return x
        case "expand":
            return x.expand(sizes)
        case "table":
            return _table(a["function"], a["params"], x)
    raise AssertionError(op.kind)


def _at(xs: list[Any], index: int) -> Any:
    return xs[index] if len(xs) > index else None


def _table(function: str, p: Mapping[str, Any], x: Tensor) -> Tensor:
    functions = {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "hardsigmoid": F.hardsigmoid,
        "hardswish": F.hardswish,
        "silu": F.silu,
        "gelu": lambda v: F.gelu(v, approximate=p["approximate"]),
        "leaky_relu": lambda v: F.leaky_relu(v, p["negative_slope"]),
        "elu": lambda v: F.elu(v, p["alpha"]),
        "softplus": lambda v: F.softplus(v, p.get("beta", 1.0), p.get("threshold", 20.0)),
        "mish": F.mish,
        "exp": torch.exp,
        "log": torch.log,
        "sqrt": torch.sqrt,
        "rsqrt": torch.rsqrt,
        "abs": torch.abs,
        "neg": torch.neg,
        "reciprocal": torch.reciprocal,
        "pow": lambda v: torch.pow(v, p["exponent"]),
        "erf": torch.erf,
        "sin": torch.sin,
        "cos": torch.cos,
    }
    return functions[function](x)


def integer(program: Program, inputs: tuple[Tensor, ...], names: set[str]) -> Mapping[str, Tensor]:
    """The executor that users have: the integer kernels."""
    return IntegerModel(program).run(inputs, names)


def samples(program: Program, batch: int = 3, batches: int = 2, spread: float = 1.5) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [
        tuple(
            torch.randn([-d * batch if d < 0 else d for d in program.tensors[name].shape], generator=generator) * spread
            for name in program.inputs
        )
        for _ in range(batches)
    ]


def residual_network(dtype: str = "uint8", weight_dtype: str = "int8") -> Program:
    """Conv, depthwise conv, add, pooling and a classifier, named as in a user's model."""
    g = torch.Generator().manual_seed(1)
    b = Builder()
    x = b.input("x", (B, 3, 12, 12), enc(dtype))
    a_enc, d_enc, s_enc = enc(dtype, 0.0, 4.0), enc(dtype, -2.0, 2.0), enc(dtype, -2.0, 5.0)

    def conv(name: str, source: str, cin: int, cout: int, groups: int, size: int, e: Encoding) -> str:
        kernel = torch.randn(cout, cin // groups, 3, 3, generator=g) / math.sqrt(9 * cin / groups)
        w = weight(f"{name}.weight", kernel, weight_dtype)
        source_encoding = b.tensors[source].encoding
        assert source_encoding is not None
        assert w.encoding is not None
        bb = bias(f"{name}.bias", torch.randn(cout, generator=g) * 0.1, source_encoding, w.encoding)
        return b.op(
            "conv",
            name,
            (source, b.constant(w), b.constant(bb)),
            (B, cout, size, size),
            e,
            stride=(1, 1),
            padding=((1, 1), (1, 1)),
            dilation=(1, 1),
            groups=groups,
        )

    stem = conv("features.0", x, 3, 8, 1, 12, a_enc)
    deep = conv("features.1.conv", stem, 8, 8, 8, 12, d_enc)
    total = b.op("add", "features.1.add", (stem, deep), (B, 8, 12, 12), s_enc)
    pooled = b.op(
        "max_pool",
        "pool",
        (total,),
        (B, 8, 6, 6),
        s_enc.derived("max_pool"),
        kernel=(2, 2),
        stride=(2, 2),
        padding=((0, 0), (0, 0)),
        dilation=(1, 1),
        ceil_mode=False,
    )
    average = b.op("mean", "avgpool", (pooled,), (B, 8, 1, 1), enc(dtype, -1.0, 4.0), axes=(2, 3), keepdims=True)
    flat = b.op("reshape", "flatten", (average,), (B, 8), b.tensors["avgpool"].encoding, shape=(-1, 8))
    w = weight("classifier.weight", torch.randn(10, 8, generator=g) / 3, weight_dtype)
    assert w.encoding is not None
    bb = bias(
        "classifier.bias",
        torch.randn(10, generator=g) * 0.1,
        b.tensors["avgpool"].encoding or enc(),
        w.encoding,
    )
    b.output(b.op("linear", "classifier", (flat, b.constant(w), b.constant(bb)), (B, 10), enc(dtype, -4.0, 4.0)))
    return b.program()
