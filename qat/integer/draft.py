"""`Draft`: a program while lowering writes it, value by value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qat.encoding import Encoding
from qat.encodings import Encodings
from qat.graph.prepared import PreparedModel
from qat.graph.subgraph import constant_value
from qat.integer.program import FLOAT_SUFFIX, Constant, Op, TensorInfo
from qat.integer.weights import storage


class Draft:
    """Operators, tensors and constants written so far.

    A value that integer and float operators read has two tensors: its codes under its own name, its floats under
    that with `FLOAT_SUFFIX`. `codes` and `floats` give the one that is wanted, and write the conversion where it is
    not there yet.

    Attributes:
        ops: Operators, in the order of execution.
        tensors: What they compute, by name.
        constants: What else they read, by name.
        alias: Values that are another value's tensor.
    """

    def __init__(self, prepared: PreparedModel, encodings: Encodings) -> None:
        self.shapes = prepared.opgraph.shapes
        self.encodings = encodings
        self.constant_names = prepared.opgraph.constants()
        self.ops: list[Op] = []
        self.tensors: dict[str, TensorInfo] = {}
        self.constants: dict[str, Constant] = {}
        self.alias: dict[str, str] = {}
        self._value: Callable[[str], Tensor] = lambda name: constant_value(prepared, name)

    def tensor(self, name: str, shape_of: str, encoding: Encoding | None, dtype: torch.dtype = torch.float32) -> str:
        """Add a tensor of the shape of a value of the graph; return its name."""
        return self.new(name, self.shapes[shape_of], encoding, dtype)

    def new(
        self, name: str, shape: tuple[int, ...], encoding: Encoding | None, dtype: torch.dtype = torch.float32
    ) -> str:
        """Add a tensor; return its name."""
        self.tensors[name] = TensorInfo(name, tuple(shape), encoding, dtype)
        return name

    def constant(self, name: str, value: Tensor, encoding: Encoding | None) -> str:
        """Add a constant; return its name."""
        # a float may be the user's parameter itself, which training goes on to change
        self.constants[name] = Constant(name, value.detach().clone() if encoding is None else value, encoding)
        return name

    def emit(
        self, kind: str, name: str, inputs: tuple[str, ...], output: str, attrs: Mapping[str, Any] | None = None,
        macs: int = 0,
    ) -> None:  # fmt: skip
        """Add an operator."""
        self.ops.append(Op(kind, name, inputs, (output,), dict(attrs or {}), None, macs))

    def codes(self, name: str) -> str:
        """Name of the tensor or constant that holds the codes of a value."""
        name = self.alias.get(name, name)
        if name in self.constant_names and name not in self.constants:
            encoding = self.encodings[name]
            codes = encoding.quantize(self._value(name).float())
            self.constant(name, storage(codes, encoding.dtype), encoding)
        return name

    def floats(self, name: str) -> str:
        """Name of the tensor or constant that holds the floats of a value."""
        name = self.alias.get(name, name)
        if name in self.constant_names:
            twin = name + FLOAT_SUFFIX
            if twin not in self.constants:
                self.constant(twin, self._value(name), None)
            return twin
        if self.tensors.get(name) is not None and self.tensors[name].encoding is None:
            return name
        twin = name + FLOAT_SUFFIX
        if twin not in self.tensors:
            self.emit("dequantize", name, (name,), self.new(twin, self.tensors[name].shape, None))
        return twin

    def held(self, source: str) -> Encoding | None:
        """Return the encoding of a tensor or constant; None of floats."""
        return self.constants[source].encoding if source in self.constants else self.tensors[source].encoding

    def requantized(self, source: str, encoding: Encoding) -> str:
        """Name of a tensor with the codes of `source` on the grid of another encoding."""
        held = self.held(source)
        if held is None or held.same_grid(encoding):
            return source
        name = f"{source}:as:{encoding.dtype}:{encoding.scale[0]:.9g}:{encoding.zero_point[0]}"
        if name not in self.tensors:
            shape = self.tensors[source].shape if source in self.tensors else tuple(self.constants[source].value.shape)
            self.emit("requantize", name, (source,), self.new(name, shape, encoding.derived(f"requantized {source}")))
        return name
