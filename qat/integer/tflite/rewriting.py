"""A program while it is rewritten for TFLite: reading what is int8 already, adding operators, tensors and constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.integer.kernels.qparams import QParams
from qat.integer.operators import qparams
from qat.integer.program import Constant, Op, Program, TensorInfo
from qat.integer.tflite.arithmetic import INT32_MAX
from qat.integer.tflite.signed import signed, signed_constant, signed_weight

#: what to do about an operator that cannot be int8
MEND = "give the operators around it schemes that make it integer, or leave it out of the exported model"
_WEIGHTED = frozenset({"conv", "conv_transpose", "linear"})

#: what is done with an operator of a kind
Rule = Callable[["Rewriting", Op], None]


@dataclass
class Rewriting:
    """The program under construction.

    Attributes:
        program: What is rewritten.
        rules: What is done with each kind of operator; others are refused.
        ops: Operators so far.
        tensors: Their tensors.
        constants: Constants as int8.
    """

    program: Program
    rules: Mapping[str, Rule]
    ops: list[Op] = field(default_factory=list)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.program.inputs:
            self.tensors[name] = self.program.tensors[name]

    # -- reading and writing

    def grid(self, name: str) -> QParams:
        """Parameters of a tensor or constant that is int8 already."""
        held = self.constants[name].encoding if name in self.constants else self.tensors[name].encoding
        return qparams(held)

    def encoding(self, name: str) -> Encoding:
        """Encoding of a tensor."""
        held = self.tensors[name].encoding
        assert held is not None
        return held

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor or constant."""
        return tuple(self.constants[name].value.shape) if name in self.constants else self.tensors[name].shape

    def emit(self, op: Op, **changes: Any) -> None:
        """Add an operator, with changes."""
        self.ops.append(replace(op, **changes) if changes else op)

    def between(self, name: str, like: str, encoding: Encoding, shape: tuple[int, ...] | None = None) -> str:
        """Add a tensor between two steps of what was one operator."""
        self.tensors[name] = TensorInfo(name, shape or self.shape(like), encoding)
        return name

    def constant(self, name: str, value: float) -> str:
        """Add a scalar of int8 codes; its scale makes it exact to float32 rounding."""
        scale = abs(value) / 127.0 if value else 1.0
        encoding = Encoding("int8", (scale,), (0,), -128, 127, True, provenance="fixed", method="scalar")
        codes = torch.tensor(0 if not value else 127 if value > 0 else -127, dtype=torch.int8)
        self.constants[name] = Constant(name, codes, encoding)
        return name

    # -- operators

    def operator(self, op: Op) -> None:
        """Rewrite an operator of the program.

        Raises:
            ExportError: It, or a tensor of it, has no int8 form; it is named.
        """
        if op.kind == "island":
            raise in_float(op)
        rule = self.rules.get(op.kind)
        if rule is None:
            raise ExportError(
                f"operator {op.name!r}: TFLite has no int8 {op.kind}", "keep it out of the exported model"
            )
        self._read(op)
        for name in op.outputs:
            info = self.program.tensors[name]
            self.tensors[name] = info if info.encoding is None else replace(info, encoding=signed(name, info.encoding))
        if op.kind != "dequantize" and self.tensors[op.outputs[0]].encoding is None:
            raise in_float(op)
        rule(self, op)

    def _read(self, op: Op) -> None:
        """Turn the constants that an operator reads to int8."""
        for number, name in enumerate(op.inputs):
            constant = self.program.constants.get(name)
            if constant is None or name in self.constants:
                continue
            if op.kind in _WEIGHTED and number == 1:
                self.constants[name] = signed_weight(constant, op.name)
            elif op.kind in _WEIGHTED and number == 2:
                self.constants[name] = constant
            elif op.kind == "prelu" and number == 1:
                continue
            elif constant.encoding is None:
                raise ExportError(f"operator {op.name!r} ({op.kind}) reads the float constant {name!r}", MEND)
            else:
                self.constants[name] = signed_constant(constant)

    def keeps_encoding(self, op: Op, **changes: Any) -> None:
        """Emit an operator whose result has the encoding of its input, and a requantization where it has another."""
        x, y = op.inputs[0], op.outputs[0]
        if self.grid(x) == self.grid(y):
            self.emit(op, **changes)
            return
        held = self.constants[x].encoding if x in self.constants else self.encoding(x)
        assert held is not None
        kept = self.between(f"{y}:kept", y, held.derived(f"{op.kind} of {x}"))
        self.emit(op, outputs=(kept,), **changes)
        self.requantize(op, kept)

    def requantize(self, op: Op, source: str) -> None:
        """Emit the requantization of `source` to the result of `op`."""
        check_multiplier(op, self.grid(source).scale / self.grid(op.outputs[0]).scale, bound=255)
        self.emit(Op("requantize", op.name, (source,), op.outputs))

    def fixed(self, op: Op, prescribed: QParams) -> None:
        """Emit an operator whose result has a prescribed encoding."""
        y = op.outputs[0]
        if self.grid(y) == prescribed:
            self.emit(op)
            return
        self.emit(op, outputs=(self.between(f"{y}:fixed", y, fixed_encoding(prescribed, op.kind)),))
        self.requantize(op, f"{y}:fixed")


def in_float(op: Op) -> ExportError:
    """The error of an operator that is computed in float, with its cause."""
    if op.kind == "island":
        cause = str(op.attrs.get("cause", "")) or "it cannot be traced"
        return ExportError(f"operator {op.name!r} is a float island ({cause})", MEND)
    return ExportError(f"operator {op.name!r} ({op.kind}) is computed in float", MEND)


def fixed_encoding(q: QParams, method: str) -> Encoding:
    """The encoding that an operator prescribes for its result."""
    return Encoding("int8", (q.scale,), (q.zero_point,), q.qmin, q.qmax, provenance="fixed", method=method)


def check_multiplier(op: Op, value: float, where: str = "", bound: int = 0) -> None:
    """Refuse a multiplier that 31 bits and a shift cannot hold, or with which a left shift would leave 32 bits.

    Args:
        op: The operator, for the message.
        value: Its real multiplier.
        where: More of the message.
        bound: Largest magnitude of what is multiplied, where it is known.

    Raises:
        ExportError: It is 2**30 or more, or too large for the bound; the operator is named.
    """
    if not value < 1 << 30 or bound << max(math.frexp(value)[1], 0) > INT32_MAX:
        raise ExportError(
            f"operator {op.name!r}{where} needs the multiplier {value:g}, more than TFLite's fixed point holds",
            "its result has a scale far too small: check its range",
        )
