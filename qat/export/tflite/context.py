"""The TFLite graph under construction: where every value of the program lives in it, and in which layout.

TFLite's spatial operators want the channels last, PyTorch's programs have them second. A value therefore has an
*order*: physical dimension i of its tensor is dimension `order[i]` of the program's tensor. An operator asks for the
order it needs, and a Transpose is inserted only where the value has another one. A transposition of the program costs
nothing: its result is the same tensor in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.export.tflite.builder import ModelBuilder
from qat.integer.operators import qparams
from qat.integer.program import Constant, Op, Program
from qat.integer.tflite.elementwise import bounds

Order = tuple[int, ...]
Emitter = Callable[["Context", Op], None]

#: operators with a fused activation
_FUSING = frozenset({"conv", "linear", "add", "sub", "mul", "avg_pool", "max_pool"})
#: bounds of the fused activations and of the operators of the same name
ACTIVATIONS: dict[str, tuple[float | None, float | None]] = {
    "RELU": (0.0, None), "RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """Where a value of the program is.

    Attributes:
        tensor: Number of the tensor that holds it.
        order: Physical dimension i is dimension `order[i]` of the program's tensor.
        features: Where not None, the tensor's last dimension is a permutation of the value's: element j is element
            `features[j]`. Only `linear` reads such a value.
    """

    tensor: int
    order: Order
    features: tuple[int, ...] | None = None


def channels_last(rank: int) -> Order:
    """The order (N, *spatial, C) of a tensor (N, C, *spatial)."""
    return (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))


class Context:
    """The graph under construction.

    Args:
        program: What is exported, of the `tflite` profile.
        batch: The batch size.
        reserved: Names that the inputs and outputs of the file will have.
    """

    def __init__(self, program: Program, batch: int, reserved: frozenset[str]) -> None:
        self.program, self.batch = program, batch
        self.builder = ModelBuilder()
        self.values: dict[str, Value] = {}
        self.reserved = reserved
        self._transposed: dict[tuple[int, Order], int] = {}
        self.readers: dict[str, list[Op]] = {}
        for op in program.ops:
            for name in op.inputs:
                self.readers.setdefault(name, []).append(op)
        self._fused = self._find_fused()

    # -- what the program says

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor or constant in the program's order of dimensions."""
        if name in self.program.constants:
            return tuple(self.program.constants[name].value.shape)
        return tuple(-d * self.batch if d < 0 else d for d in self.program.tensors[name].shape)

    def encoding(self, name: str) -> Encoding:
        """Encoding of a tensor or constant."""
        found = self.program.encoding_of(name)
        assert found is not None
        return found

    def constant(self, name: str) -> Constant:
        """The constant of a name."""
        return self.program.constants[name]

    def _find_fused(self) -> dict[str, tuple[Op, str]]:
        found = {}
        for op in self.program.ops:
            readers = self.readers.get(op.outputs[0], [])
            if op.kind not in _FUSING or len(readers) != 1 or readers[0].kind != "clamp":
                continue
            activation = self.activation(readers[0])
            if activation is not None:
                found[op.outputs[0]] = (readers[0], activation)
        return found

    def activation(self, clamp: Op) -> str | None:
        """Name of the activation that clamps to the same codes, or None."""
        y = qparams(self.program.tensors[clamp.outputs[0]].encoding)
        wanted = bounds(clamp.attrs["low"], clamp.attrs["high"], y)
        return next((name for name, (low, high) in ACTIVATIONS.items() if bounds(low, high, y) == wanted), None)

    # -- values

    def result(self, op: Op) -> tuple[str, int]:
        """Name of the value that an operator computes, its fused clamp included, and the code of that activation."""
        clamp, activation = self._fused.get(op.outputs[0], (None, "NONE"))
        kinds = self.builder.schema.ActivationFunctionType
        return (op if clamp is None else clamp).outputs[0], int(getattr(kinds, activation))

    def new(self, name: str, order: Order) -> int:
        """Add the tensor of a value of the program in an order of dimensions; return its number."""
        shape = self.shape(name)
        tensor = self.scratch(name, [shape[d] for d in order], self.encoding(name))
        self.values[name] = Value(tensor, order)
        return tensor

    def scratch(self, name: str, shape: Sequence[int], encoding: Encoding) -> int:
        """Add an int8 tensor that is no value of the program; return its number."""
        return self.builder.tensor(f"{name}/codes" if name in self.reserved else name, shape, encoding)

    def value(self, name: str) -> Value:
        """Where a value or an int8 constant is; a constant is in the program's own order."""
        if name not in self.values:
            constant = self.program.constants.get(name)
            if constant is None:
                raise ExportError(f"tensor {name!r} is read before it is computed", "report this model")
            data = constant.value.numpy()
            self.values[name] = Value(self.builder.codes(data, self.encoding(name), name), tuple(range(data.ndim)))
        found = self.values[name]
        if found.features is not None:
            raise ExportError(f"tensor {name!r} is permuted for a linear layer only", "report this model")
        return found

    def order(self, name: str) -> Order:
        """Order of the dimensions of a value."""
        return self.value(name).order

    def read(self, name: str, order: Order | None = None) -> int:
        """Number of a tensor that holds a value in an order of dimensions, transposed if need be.

        Args:
            name: A tensor or int8 constant of the program.
            order: Wanted order; None for the program's.
        """
        value = self.value(name)
        wanted = order or tuple(range(len(value.order)))
        if value.order == wanted:
            return value.tensor
        constant = self.program.constants.get(name)
        if constant is not None:
            data = constant.value.numpy().transpose(wanted)
            return self.builder.codes(data, self.encoding(name), name)
        key = (value.tensor, wanted)
        if key not in self._transposed:
            self._transposed[key] = self._transpose(name, value, wanted)
        return self._transposed[key]

    def _transpose(self, name: str, value: Value, wanted: Order) -> int:
        sizes = self.shape(name)
        target = [sizes[d] for d in wanted]
        if same_memory(value.order, wanted, sizes):
            return self.reshaped(value.tensor, target, self.encoding(name), f"{name}/reshaped")
        perm = [value.order.index(d) for d in wanted]
        result = self.scratch(f"{name}/transposed", target, self.encoding(name))
        self.builder.operator(
            "TRANSPOSE", [value.tensor, self.builder.integers(perm, f"{name}/perm")], [result], "Transpose"
        )
        return result

    def reshaped(self, tensor: int, shape: Sequence[int], encoding: Encoding, name: str) -> int:
        """Number of a tensor with the same data in another shape; the tensor itself where it has that shape."""
        if self.builder.shape(tensor) == tuple(shape):
            return tensor
        result = self.scratch(name, shape, encoding)
        self.reshape(tensor, result)
        return result

    def reshape(self, tensor: int, result: int) -> None:
        """Add a Reshape from one tensor to another."""
        sizes = list(self.builder.shape(result))
        target = self.builder.integers(sizes, "shape")
        self.builder.operator("RESHAPE", [tensor, target], [result], "Reshape", newShape=sizes)

    def alias(self, name: str, value: Value) -> None:
        """Say that a value of the program is held already."""
        self.values[name] = value

    def weight(self, data: torch.Tensor, constant: Constant, axis: int, name: str) -> int:
        """Add a weight; return the number of its tensor.

        Args:
            data: Codes in their physical layout.
            constant: What it is made of.
            axis: Physical axis of the output channels.
            name: Its name.
        """
        return self.builder.tensor(name, data.shape, constant.encoding, axis=axis, data=data.numpy().astype(np.int8))

    def bias(self, name: str, weight: Constant, x: Encoding, channels: int) -> int:
        """Number of the tensor of an int32 bias, zeros where the operator has none.

        Its scales are those that the weight has: one, or one a channel.
        """
        assert weight.encoding is not None
        scales = (torch.tensor(weight.encoding.scale) * torch.tensor(x.scale[0])).tolist()
        encoding = Encoding(
            "int32", tuple(scales), (0,) * len(scales), -(1 << 31), (1 << 31) - 1, True, weight.encoding.granularity
        )
        data: npt.NDArray[np.int32] = np.zeros(channels, dtype=np.int32)
        if name:
            data = self.program.constants[name].value.numpy().astype(np.int32)
        return self.builder.tensor(name or f"{weight.name}/no_bias", data.shape, encoding, dtype="int32", data=data)


def same_memory(before: Sequence[int], after: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether two orders of dimensions lay the elements out alike: they differ in where dimensions of size 1 are."""
    return [d for d in before if sizes[d] != 1] == [d for d in after if sizes[d] != 1]
