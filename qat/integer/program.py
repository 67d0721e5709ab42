"""`Program`: a converted network as flat, typed data, the one thing that executors and exporters read.

A program knows nothing of modules, observers or files. Its operators are the canonical kinds of
`docs/architecture.md`; a tensor that has an encoding holds integer codes, one that has none holds floats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qat.encoding import Encoding

#: suffix of the float twin of a quantized tensor
FLOAT_SUFFIX = ":float"


@dataclass(frozen=True)
class TensorInfo:
    """A value that flows through the program.

    Attributes:
        name: Unique in the program: the user's tensor name, with `FLOAT_SUFFIX` for the float side of a quantized
            value.
        shape: Sizes; a negative size -k means k times the batch size.
        encoding: How its codes are read, or None for a float (or index) tensor.
        dtype: Element type where there is no encoding.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding | None = None
    dtype: torch.dtype = torch.float32

    @property
    def public_name(self) -> str:
        """The user's tensor name."""
        return self.name.removesuffix(FLOAT_SUFFIX)


@dataclass(frozen=True)
class Constant:
    """A weight, bias or other constant.

    Attributes:
        name: `state_dict` key, or the tensor name of the value that was folded.
        value: Codes in their own integer dtype (int8 also for int4, int32 for bias), or float32 values.
        encoding: How the codes are read, or None for floats.
    """

    name: str
    value: Tensor
    encoding: Encoding | None = None

    def floats(self) -> Tensor:
        """The values, float32 where they are codes."""
        return self.value if self.encoding is None else self.encoding.dequantize(self.value)


@dataclass(frozen=True)
class Op:
    """One operator.

    Attributes:
        kind: Canonical kind.
        name: Name of the operator, the user's tensor name of its (first) output.
        inputs: Names of tensors or constants, in the order of the kind; an absent optional input is "".
        outputs: Names of tensors.
        attrs: Attributes of the kind.
        call: For kind `island`: the float function of the input tensors; returns a tensor or a tuple of tensors.
        macs: Multiply-accumulates for one sample.
        saturates: `low` and `high` of a clamp that was fused with the operator and that its codes do by themselves, for
            who goes back to floats; None where there was none.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] | None = None
    macs: int = 0
    saturates: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Program:
    """A converted network.

    Attributes:
        inputs: Names of the float input tensors, in the order of the model's arguments.
        outputs: Names of the float output tensors, flattened.
        ops: Operators in execution order.
        tensors: Every tensor by name.
        constants: Every constant by name.
        pack_outputs: Turns the flat list of outputs into the structure that the user's model returns.
        numerics: Name of the numerics profile.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[Op, ...]
    tensors: Mapping[str, TensorInfo]
    constants: Mapping[str, Constant]
    pack_outputs: Callable[[list[Any]], Any] = field(default=lambda flat: flat[0] if len(flat) == 1 else tuple(flat))
    numerics: str = "onnx"

    def encoding_of(self, name: str) -> Encoding | None:
        """The encoding of a tensor or constant."""
        if name in self.constants:
            return self.constants[name].encoding
        return self.tensors[name].encoding
