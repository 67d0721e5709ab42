"""A TFLite model under construction: buffers, tensors, operator codes and operators, and its bytes.

The file has one subgraph. Everything is numbered in the order in which it is added, so that equal calls give equal
bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.export.tflite.schema import flatbuffers, schema

#: A file of 2 GiB or more cannot be addressed by the offsets of its format.
_LARGEST = (1 << 31) - 1

#: Version of each operator from which it has what is used here: int8, and the options that the emitters set
#: (`tflite/tools/versioning/op_version.cc`).
VERSIONS: Mapping[str, int] = MappingProxyType(
    {
        "ADD": 2, "AVERAGE_POOL_2D": 2, "BATCH_MATMUL": 2, "BROADCAST_TO": 3, "CAST": 1, "CONCATENATION": 2,
        "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "DEQUANTIZE": 2, "FULLY_CONNECTED": 5, "GATHER": 2, "GELU": 2,
        "HARD_SWISH": 1, "LEAKY_RELU": 2, "LOGISTIC": 2, "MAXIMUM": 2, "MAX_POOL_2D": 2, "MEAN": 2, "MINIMUM": 2,
        "MIRROR_PAD": 2, "MUL": 2, "PAD": 2, "PADV2": 2, "PRELU": 1, "QUANTIZE": 2, "RELU": 2, "RELU6": 2,
        "RELU_N1_TO_1": 1, "RESHAPE": 1, "RESIZE_BILINEAR": 3, "RESIZE_NEAREST_NEIGHBOR": 3, "SLICE": 2, "SOFTMAX": 2,
        "STRIDED_SLICE": 2, "SUB": 3, "TANH": 2, "TRANSPOSE": 2, "TRANSPOSE_CONV": 3,
    }
)  # fmt: skip


class ModelBuilder:
    """Collects the parts of a model; `to_bytes` packs them.

    Raises:
        ExportError: The schema is not installed.
    """

    def __init__(self) -> None:
        self.schema = schema()
        # buffer 0 is by convention the empty one, which tensors without data name
        self._buffers: list[Any] = [self.schema.BufferT()]
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes, str], int] = {}
        self._names: set[str] = set()

    @property
    def op_types(self) -> tuple[str, ...]:
        """Builtin operators of the model so far, in the order of their first use."""
        return tuple(self._codes)

    def fresh(self, wanted: str) -> str:
        """Reserve `wanted`, or the first of `wanted~2`, `wanted~3`, ... that is free."""
        name, count = wanted, 1
        while name in self._names:
            count += 1
            name = f"{wanted}~{count}"
        self._names.add(name)
        return name

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        encoding: Encoding | None,
        *,
        dtype: str = "int8",
        axis: int = 0,
        data: npt.NDArray[Any] | None = None,
    ) -> int:
        """Add a tensor and return its number.

        Args:
            name: Its name, made unique.
            shape: Physical sizes.
            encoding: Scale and zero point, or None for a float or index tensor.
            dtype: `int8`, `int32`, `int64` or `float32`.
            axis: Physical axis that the scales of a per-channel encoding run along.
            data: Its values, where it is a constant.
        """
        s = self.schema
        item = s.TensorT()
        item.name = self.fresh(name)
        item.shape = [int(d) for d in shape]
        item.type = getattr(s.TensorType, dtype.upper())
        item.buffer = 0
        if data is not None:
            buffer = s.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), dtype=np.uint8)
            item.buffer = len(self._buffers)
            self._buffers.append(buffer)
        if encoding is not None:
            quantization = s.QuantizationParametersT()
            quantization.scale = np.array(encoding.scale, dtype=np.float32)
            quantization.zeroPoint = np.array(encoding.zero_point, dtype=np.int64)
            quantization.quantizedDimension = axis if len(encoding.scale) > 1 else 0
            item.quantization = quantization
        self._tensors.append(item)
        return len(self._tensors) - 1

    def integers(self, values: npt.ArrayLike, name: str) -> int:
        """Return the number of an int32 constant; equal ones are shared."""
        data = np.asarray(values, dtype=np.int32)
        key = ("int32", data.shape, data.tobytes(), "")
        if key not in self._constants:
            self._constants[key] = self.tensor(name, data.shape, None, dtype="int32", data=data)
        return self._constants[key]

    def codes(self, values: npt.NDArray[Any], encoding: Encoding, name: str) -> int:
        """Return the number of an int8 constant with one scale; equal ones are shared."""
        data = np.asarray(values, dtype=np.int8)
        key = ("int8", data.shape, data.tobytes(), f"{encoding.scale} {encoding.zero_point}")
        if key not in self._constants:
            self._constants[key] = self.tensor(name, data.shape, encoding, data=data)
        return self._constants[key]

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Physical sizes of a tensor."""
        return tuple(self._tensors[tensor].shape)

    def rename(self, tensor: int, name: str) -> None:
        """Give a tensor another name."""
        self._tensors[tensor].name = self.fresh(name)

    def name(self, tensor: int) -> str:
        """Name of a tensor."""
        found: str = self._tensors[tensor].name
        return found

    def operator(
        self, op_type: str, inputs: Sequence[int], outputs: Sequence[int], options: str = "", /, **fields: Any
    ) -> None:
        """Add an operator.

        Args:
            op_type: Name of the builtin operator.
            inputs: Numbers of tensors; -1 for an absent optional one.
            outputs: Numbers of tensors.
            options: Name of its options type without `Options`, or "" for none.
            **fields: Values of the options.
        """
        s = self.schema
        item = s.OperatorT()
        item.opcodeIndex = self._codes.setdefault(op_type, len(self._codes))
        item.inputs, item.outputs = list(inputs), list(outputs)
        if options:
            chosen = getattr(s, f"{options}OptionsT")()
            for key, value in fields.items():
                setattr(chosen, key, value)
            item.builtinOptionsType = getattr(s.BuiltinOptions, f"{options}Options")
            item.builtinOptions = chosen
        self._operators.append(item)

    def to_bytes(self, inputs: Sequence[int], outputs: Sequence[int], name: str, metadata: Mapping[str, str]) -> bytes:
        """Pack the model.

        Args:
            inputs: Numbers of the input tensors.
            outputs: Numbers of the output tensors.
            name: Name of the subgraph.
            metadata: Entries of the model's metadata.

        Raises:
            ExportError: The file would be larger than 2 GiB.
        """
        s = self.schema
        graph = s.SubGraphT()
        graph.name = name
        graph.tensors, graph.operators = self._tensors, self._operators
        graph.inputs, graph.outputs = list(inputs), list(outputs)
        model = s.ModelT()
        model.version = 3
        model.description = "qat"
        model.subgraphs = [graph]
        model.operatorCodes = [self._code(op_type) for op_type in self._codes]
        model.buffers = list(self._buffers)
        model.metadata = []
        for key, value in sorted(metadata.items()):
            buffer = s.BufferT()
            buffer.data = np.frombuffer(value.encode("utf-8"), dtype=np.uint8)
            entry = s.MetadataT()
            entry.name, entry.buffer = key, len(model.buffers)
            model.buffers.append(buffer)
            model.metadata.append(entry)
        size = sum(len(b.data) for b in model.buffers if b.data is not None)
        if size > _LARGEST:
            raise ExportError(f"model {name!r} has {size} bytes, too many for one .tflite file", "split the model")
        packer = flatbuffers().Builder(max(size, 1024))
        packer.Finish(model.Pack(packer), b"TFL3")
        return bytes(packer.Output())

    def _code(self, op_type: str) -> Any:
        s = self.schema
        code = s.OperatorCodeT()
        number = getattr(s.BuiltinOperator, op_type)
        code.builtinCode = number
        # the older 8-bit field; 127 says that the number is in the newer one
        code.deprecatedBuiltinCode = min(number, 127)
        code.version = VERSIONS[op_type]
        return code
