"""Small programs made by hand, legalized, written, executed in LiteRT's reference kernels, compared in every code."""

from __future__ import annotations

import math
from typing import Any

import torch
from export_programs import Builder, integer
from torch import Tensor

from qat.encoding import Encoding
from qat.export.tflite.verify import verify_tflite
from qat.export.tflite.writer import TfliteModel, program_to_tflite
from qat.integer.program import Constant, Program
from qat.integer.tflite.legalize import legalize
from qat.scheme import Granularity


def grid(scale: float = 0.02, zero_point: int = 0, dtype: str = "int8") -> Encoding:
    """An encoding with all codes of 8 bits; the zero point is that of int8."""
    offset = 0 if dtype == "int8" else 128
    return Encoding(dtype, (scale,), (zero_point + offset,), -128 + offset, 127 + offset)


def real(codes: Tensor, encoding: Encoding) -> Tensor:
    """Values that are quantized to these int8 codes."""
    offset = 0 if encoding.dtype == "int8" else 128
    return encoding.dequantize(codes + offset)


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed))


def every_code(shape: tuple[int, ...], encoding: Encoding, batches: int, seed: int = 0) -> list[tuple[Tensor, ...]]:
    """Batches of one sample that go through all codes, in random order."""
    count = batches * math.prod(shape)
    codes = (torch.arange(count) % 256 - 128)[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    return [(real(part.reshape(1, *shape), encoding),) for part in codes.chunk(batches)]


def weight_of(name: str, codes: Tensor, scales: list[float], axis: int = 0) -> Constant:
    """An int8 weight of these codes, with one scale or one a channel."""
    per = Granularity("per_channel", axis) if len(scales) > 1 else Granularity()
    encoding = Encoding("int8", tuple(scales), (0,) * len(scales), -127, 127, True, per)
    return Constant(name, codes.to(torch.int8), encoding)


def bias_of(name: str, codes: Tensor, x: Encoding, weight: Constant) -> Constant:
    assert weight.encoding is not None
    scales = [x.scale[0] * s for s in weight.encoding.scale]
    scales = scales if len(scales) > 1 else scales * len(codes)
    encoding = Encoding(
        "int32", tuple(scales), (0,) * len(scales), -(1 << 31), (1 << 31) - 1, True, Granularity("per_channel", 0)
    )
    return Constant(name, codes.to(torch.int32), encoding)


def at_ties(scales: list[float], x: Encoding, y: Encoding, channels: int, seed: int = 0) -> Tensor:
    """Biases whose products with the multiplier of their channel lie next to a tie, where roundings differ."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-100, 100, (channels,), generator=generator).double() + 0.5
    nudge = torch.randint(-2, 3, (channels,), generator=generator)
    multipliers = torch.tensor([x.scale[0] * s / y.scale[0] for s in scales], dtype=torch.float64)
    return (torch.round(codes / multipliers) + nudge).clamp(-(2**30), 2**30)


def one(
    kind: str,
    x: Encoding,
    y: Encoding,
    x_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    constants: tuple[Constant | None, ...] = (),
    clamp: tuple[float | None, float | None] | None = None,
    /,
    **attrs: Any,
) -> Program:
    """One operator between a quantized input and a quantized output, and perhaps a clamp after it."""
    b = Builder()
    source = b.input("x", (-1, *x_shape), x)
    names = tuple(b.constant(c) if c else "" for c in constants)
    result = b.op(kind, "block.y", (source, *names), (-1, *y_shape), y, **attrs)
    if clamp is not None:
        result = b.op("clamp", "block.act", (result,), (-1, *y_shape), y, low=clamp[0], high=clamp[1])
    b.output(result)
    return b.program()


def check(
    program: Program, batches: list[tuple[Tensor, ...]], operators: set[str] | None = None, io: str = "codes"
) -> TfliteModel:
    """Every code of every tensor is the same in the integer model and in LiteRT's reference kernels.

    Args:
        program: Not legalized yet.
        batches: Samples of batch size 1.
        operators: TFLite operators that the file must consist of, if given.
        io: Kind of the file's inputs and outputs.
    """
    ready = legalize(program)
    model = program_to_tflite(ready, io=io)  # type: ignore[arg-type]
    result = verify_tflite(model, ready, batches, integer, level="layers")
    assert [(t.name, t.max_difference, t.unequal) for t in result.tensors if t.unequal] == [], str(result)
    assert all(t.count for t in result.tensors)
    if operators is not None:
        assert set(model.operators) == operators
    return model
