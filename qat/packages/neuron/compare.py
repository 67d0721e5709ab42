"""A `.tflite` file beside the Neuron model that MediaTek's plug-in made of it: nothing missing, every grid the same."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from qat.errors import VerificationError
from qat.export.tflite.schema import schema
from qat.packages.neuron.record import NeuronModel, Operand, Operation

_RESHAPE = 22
#: Neuron's operation for each TFLite operator that qat writes; the numbers are those of Android's NNAPI up to 102
CODES = {
    "ABS": 38,
    "ADD": 0,
    "AVERAGE_POOL_2D": 1,
    "BATCH_MATMUL": 102,
    "CAST": 45,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 4,
    "DEQUANTIZE": 6,
    "FULLY_CONNECTED": 9,
    "GELU": 109,
    "HARD_SWISH": 99,
    "LEAKY_RELU": 71,
    "LOGISTIC": 14,
    "MAXIMUM": 65,
    "MAX_POOL_2D": 17,
    "MEAN": 31,
    "MINIMUM": 66,
    "MUL": 18,
    "PAD": 32,
    "PADV2": 69,
    "PRELU": 71,
    "QUANTIZE": 72,
    "RELU": 19,
    "RESHAPE": _RESHAPE,
    "RESIZE_BILINEAR": 23,
    "RESIZE_NEAREST_NEIGHBOR": 94,
    "SLICE": 86,
    "SOFTMAX": 25,
    "STRIDED_SLICE": 35,
    "SUB": 36,
    "TANH": 28,
    "TRANSPOSE": 37,
    "TRANSPOSE_CONV": 91,
}
_SYMMETRIC, _CHANNELS, _ASYMMETRIC = 13, 11, 14
_FLOAT, _INT = 3, 4


@dataclass(frozen=True)
class Agreement:
    """What was found equal.

    Attributes:
        operators: Number of operators.
        activations: Number of tensors that are computed or given, with the type, the sizes, the scale and the zero
            point of their operand.
        constants: Number of weights and biases, with the same bytes as well.
    """

    operators: int
    activations: int
    constants: int


def compare(content: bytes, model: NeuronModel) -> Agreement:
    """Compare every operator and tensor of a `.tflite` file with a Neuron model.

    int32 biases have no scale in Neuron: it is the product of the input's and the weight's. Shapes, axes, permutations
    and other int32 constants may become numbers of the operation and are not compared.

    Args:
        content: The file.
        model: What the plug-in made of all its operators.

    Raises:
        VerificationError: An operator became another operation or none, or a tensor has another type, size, scale,
            zero point or other bytes; it is named.
    """
    return _Comparison(content, model).run()


class _Comparison:
    """Walks through both in the order of execution; `operands` is the operand of each tensor seen so far."""

    def __init__(self, content: bytes, model: NeuronModel) -> None:
        tflite = schema()
        self._types = {code: name for name, code in vars(tflite.TensorType).items() if isinstance(code, int)}
        self._kinds = {code: name for name, code in vars(tflite.BuiltinOperator).items() if isinstance(code, int)}
        self._file = tflite.ModelT.InitFromPackedBuf(content, 0)
        self._graph = self._file.subgraphs[0]
        self._model = model
        self._operands: dict[int, int] = {}
        self._constants = 0

    def run(self) -> Agreement:
        """Compare; see `compare`."""
        self._borders("input", self._graph.inputs, self._model.inputs)
        operations = iter(self._model.operations)
        for op in self._graph.operators:
            self._operator(op, operations)
        extra = sum(1 for _ in operations)
        if extra:
            raise VerificationError(f"the Neuron model has {extra} operations more than the file has operators", _MEND)
        self._borders("output", self._graph.outputs, self._model.outputs)
        return Agreement(len(self._graph.operators), len(self._operands), self._constants)

    def _borders(self, role: str, tensors: Sequence[int], operands: Sequence[int]) -> None:
        if len(tensors) != len(operands):
            raise VerificationError(f"the Neuron model has {len(operands)} {role}s and the file {len(tensors)}", _MEND)
        for tensor, operand in zip(tensors, operands, strict=True):
            self._same(tensor, operand)

    def _operator(self, op: Any, operations: Iterator[Operation]) -> None:
        code = self._file.operatorCodes[op.opcodeIndex]
        kind = self._kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]
        name = f"{kind} {self._name(op.outputs[0])!r}"
        operation = next(operations, None)
        if operation is None:
            raise VerificationError(f"operator {name} has no Neuron operation", _MEND)
        if kind not in CODES or operation.code != CODES[kind]:
            known = f"not {CODES[kind]}" if kind in CODES else "and which one it should be is not known"
            raise VerificationError(f"operator {name} became Neuron operation {operation.code}, {known}", _MEND)
        inputs, spare = set(operation.inputs), list(operation.inputs)
        for tensor in op.inputs:
            if tensor >= 0:
                self._input(name, tensor, inputs, spare)
        # Neuron's fully connected layer has two dimensions, and a reshape after it where the file has more
        if kind == "FULLY_CONNECTED" and self._is_flattened(op.outputs[0], operation):
            flat, operation = operation.outputs[0], next(operations, Operation(-1, (), ()))
            if operation.code != _RESHAPE or flat not in operation.inputs:
                raise VerificationError(f"the result of operator {name} is not reshaped to its sizes", _MEND)
        if len(op.outputs) != len(operation.outputs):
            raise VerificationError(
                f"operator {name} has {len(op.outputs)} results and its Neuron operation {len(operation.outputs)}",
                _MEND,
            )
        for tensor, operand in zip(op.outputs, operation.outputs, strict=True):
            self._same(tensor, operand)

    def _input(self, name: str, tensor: int, inputs: set[int], spare: list[int]) -> None:
        if tensor in self._operands:
            if self._operands[tensor] not in inputs:
                raise VerificationError(f"operator {name} does not read {self._name(tensor)!r} in Neuron", _MEND)
            return
        held = self._graph.tensors[tensor]
        quantized = held.quantization is not None and held.quantization.scale is not None
        if not quantized:
            return
        content = np.asarray(self._file.buffers[held.buffer].data, np.uint8).tobytes()
        for operand in spare:
            found = self._model.operands[operand]
            if found.crc == zlib.crc32(content) and not self._differences(held, found):
                spare.remove(operand)
                self._constants += 1
                return
        raise VerificationError(
            f"no operand of operator {name} has the type, sizes, scales and bytes of {self._name(tensor)!r}", _MEND
        )

    def _is_flattened(self, tensor: int, operation: Operation) -> bool:
        sizes = self._graph.tensors[tensor].shape
        return len(operation.outputs) == 1 and len(self._model.operands[operation.outputs[0]].sizes) != len(sizes)

    def _same(self, tensor: int, operand: int) -> None:
        """Hold that a tensor is an operand, now and later."""
        if self._operands.setdefault(tensor, operand) != operand:
            raise VerificationError(f"tensor {self._name(tensor)!r} is two operands in Neuron", _MEND)
        differences = self._differences(self._graph.tensors[tensor], self._model.operands[operand])
        if differences:
            raise VerificationError(f"tensor {self._name(tensor)!r} is another in Neuron: {differences[0]}", _MEND)

    def _differences(self, tensor: Any, operand: Operand) -> list[str]:
        kind = self._types[tensor.type]
        grid = tensor.quantization
        scales = [] if grid is None or grid.scale is None else np.asarray(grid.scale, np.float32).tolist()
        zero_points = [0] if grid is None or grid.zeroPoint is None else np.asarray(grid.zeroPoint).tolist()
        found = []
        if operand.type not in _operand_types(kind, len(scales), zero_points[0]):
            found.append(f"{kind} became {operand.type_name}")
        if (operand.sizes or (1,)) != (tuple(int(size) for size in tensor.shape) or (1,)):
            found.append(f"sizes {tuple(int(size) for size in tensor.shape)} became {operand.sizes}")
        if kind == "INT8" and len(scales) > 1:
            if np.asarray(operand.channel_scales, np.float32).tolist() != scales:
                found.append("the scales of its channels differ")
            if operand.channel_axis != grid.quantizedDimension:
                found.append(f"its channels are dimension {operand.channel_axis} and not {grid.quantizedDimension}")
        elif kind == "INT8":
            if np.float32(operand.scale) != np.float32(scales[0]):
                found.append(f"scale {scales[0]:.9g} became {operand.scale:.9g}")
            if operand.zero_point != zero_points[0]:
                found.append(f"zero point {zero_points[0]} became {operand.zero_point}")
        return found

    def _name(self, tensor: int) -> str:
        name: str = self._graph.tensors[tensor].name.decode()
        return name


def _operand_types(kind: str, scales: int, zero_point: int) -> tuple[int, ...]:
    """Types of an operand that say the same as a TFLite type; the symmetric one has no zero point."""
    if kind == "INT8" and scales > 1:
        return (_CHANNELS,)
    if kind == "INT8":
        return (_ASYMMETRIC, _SYMMETRIC) if zero_point == 0 else (_ASYMMETRIC,)
    return {"FLOAT32": (_FLOAT,), "INT32": (_INT,)}.get(kind, ())


def refuse_left_over(left: Sequence[str], what: str) -> None:
    """Stop where operators have no legalization.

    Raises:
        VerificationError: There are some; the first ones are named.
    """
    if left:
        _refuse(left, what)


def _refuse(left: Sequence[str], what: str) -> NoReturn:
    shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    raise VerificationError(
        f"MediaTek's compiler plug-in has no legalization for {len(left)} operators of {what}: {shown}",
        'plan the model for the target "apu"',
    )


_MEND = "report this model: the APU would not compute what was simulated"
