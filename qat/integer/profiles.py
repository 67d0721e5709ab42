"""What a numerics profile computes with: its quantization at the borders and its integer operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor

from qat.errors import ExportError
from qat.integer.arm64 import operators as arm64
from qat.integer.kernels import requantize
from qat.integer.kernels.qparams import QParams
from qat.integer.operators import CODE_OPERATORS, CodeOperator
from qat.integer.program import Program
from qat.integer.tflite import arithmetic
from qat.integer.tflite import operators as tflite
from qat.integer.tflite.legalize import legalize


@dataclass(frozen=True)
class Arithmetic:
    """How an integer model executes a program.

    Attributes:
        name: As in `numerics.NumericsProfile`.
        quantize: Floats to codes.
        operators: Integer operators by canonical kind.
        prepare: What makes a program of this profile of what lowering gives.
        native: Why the native runner does not have the profile; empty if it has.
    """

    name: str
    quantize: Callable[[Tensor, QParams], Tensor]
    operators: Mapping[str, CodeOperator]
    prepare: Callable[[Program], Program]
    native: str = ""


def _as_it_is(name: str) -> Callable[[Program], Program]:
    return lambda program: replace(program, numerics=name)


_PROFILES: Mapping[str, Arithmetic] = MappingProxyType(
    {
        "onnx": Arithmetic("onnx", requantize.quantize, CODE_OPERATORS, _as_it_is("onnx")),
        "onnx-arm64": Arithmetic(
            "onnx-arm64",
            requantize.quantize,
            arm64.OPERATORS,
            _as_it_is("onnx-arm64"),
            "the runner has no kernels of the onnx-arm64 profile",
        ),
        "tflite": Arithmetic(
            "tflite", arithmetic.quantize, tflite.OPERATORS, legalize, "the runner has no kernels of the tflite profile"
        ),
    }
)


def arithmetic_of(name: str) -> Arithmetic:
    """Return what the numerics profile of a name computes with.

    Raises:
        ExportError: There is none.
    """
    if name not in _PROFILES:
        raise ExportError(f"unknown numerics profile {name!r}", f"use one of {', '.join(_PROFILES)}")
    return _PROFILES[name]


def same_arithmetic(program: Program, name: str) -> bool:
    """Whether a profile runs the program of another one with the very same operators, so that every code is the same.

    Args:
        program: What lowering or a conversion gave.
        name: The profile.

    Raises:
        ExportError: There is no such profile.
    """
    mine, other = arithmetic_of(program.numerics), arithmetic_of(name)
    return mine.quantize is other.quantize and all(
        mine.operators.get(op.kind) is other.operators.get(op.kind) for op in program.ops
    )
