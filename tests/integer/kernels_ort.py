"""Small QDQ models, run in ONNX Runtime with its default options, for comparison with the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from qat.integer.kernels.qparams import QParams

DTYPES = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}


@dataclass
class Graph:
    """A graph under construction; every method returns the name of what it made."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    feeds: dict[str, np.ndarray] = field(default_factory=dict)
    count: int = 0

    def _name(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def constant(self, value: object, dtype: str) -> str:
        name = self._name()
        array = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
        self.constants.append(numpy_helper.from_array(array.astype(dtype), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = self._name()
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def input(self, value: Tensor, dtype: str) -> str:
        name = self._name()
        array = np.ascontiguousarray(value.numpy().astype(dtype))
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        self.inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
        self.feeds[name] = array
        return name

    def output(self, name: str, dtype: str) -> None:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.outputs.append(helper.make_tensor_value_info(name, kind, None))

    def quantize(self, name: str, q: QParams, dtype: str) -> str:
        return self.op("QuantizeLinear", name, self.constant(q.scale, "float32"), self.constant(q.zero_point, dtype))

    def dequantize(self, name: str, q: QParams, dtype: str) -> str:
        return self.op("DequantizeLinear", name, self.constant(q.scale, "float32"), self.constant(q.zero_point, dtype))

    def weight(self, codes: Tensor, scale: Tensor | float, dtype: str = "int8", axis: int = 0) -> str:
        """Dequantized constant with zero point 0, per tensor or per channel."""
        s = torch.as_tensor(scale, dtype=torch.float32)
        attributes = {"axis": axis} if s.dim() else {}
        zero = self.constant(np.zeros(tuple(s.shape)), dtype)
        return self.op("DequantizeLinear", self.constant(codes, dtype), self.constant(s, "float32"), zero, **attributes)

    def model(self) -> bytes:
        """The file."""
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return model.SerializeToString()

    def run(self, optimized: str | None = None, entries: Mapping[str, str] | None = None) -> list[Tensor]:
        """Run on the inputs; codes come back as int64, floats as float32."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        # exact sums on x86 CPUs without VNNI as well; nothing changes elsewhere
        options.add_session_config_entry("session.x64quantprecision", "1")
        for key, value in (entries or {}).items():
            options.add_session_config_entry(key, value)
        if optimized:
            options.optimized_model_filepath = optimized
        session = onnxruntime.InferenceSession(self.model(), options, providers=["CPUExecutionProvider"])
        results = session.run(None, self.feeds)
        return [torch.from_numpy(y if y.dtype == np.float32 else y.astype(np.int64)) for y in results]


def run_qdq(
    operands: Sequence[tuple[Tensor, QParams]],
    y: QParams,
    dtype: str,
    build: Callable[..., str],
    optimized: str | None = None,
) -> Tensor:
    """Codes in, DequantizeLinear, what `build(graph, *names)` adds, QuantizeLinear, codes out."""
    return qdq(operands, y, dtype, build).run(optimized)[0]


def qdq(operands: Sequence[tuple[Tensor, QParams]], y: QParams, dtype: str, build: Callable[..., str]) -> Graph:
    """The graph of `run_qdq`."""
    graph = Graph()
    names = [graph.dequantize(graph.input(codes, dtype), q, dtype) for codes, q in operands]
    graph.output(graph.quantize(build(graph, *names), y, dtype), dtype)
    return graph


def operators(path: str) -> list[str]:
    """Operator types of a saved model, in order."""
    return [node.op_type for node in onnx.load(path).graph.node]


def random_qparams(generator: torch.Generator, dtype: str, low: float = -8.0, high: float = -3.0) -> QParams:
    """Random encoding of a dtype; the scale is 2**uniform(low, high), and a power of two one time in four."""
    qmin, qmax = DTYPES[dtype]
    exponent = float(torch.empty(1).uniform_(low, high, generator=generator))
    if int(torch.randint(0, 4, (1,), generator=generator)) == 0:
        exponent = round(exponent)
    zero = int(torch.randint(qmin, qmax + 1, (1,), generator=generator))
    return QParams(2.0**exponent, zero, qmin, qmax)


def random_codes(generator: torch.Generator, shape: Sequence[int], q: QParams) -> Tensor:
    """Uniform codes of the whole range."""
    return torch.randint(q.qmin, q.qmax + 1, tuple(shape), generator=generator)


def random_integer(generator: torch.Generator, low: int, high: int) -> int:
    """Uniform integer of `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def generator(seed: int = 0) -> torch.Generator:
    """A generator of its own, so that tests do not depend on their order."""
    return torch.Generator().manual_seed(seed)


def unequal(a: Tensor, b: Tensor) -> tuple[int, int, int]:
    """Number of unequal codes, number of codes, largest difference."""
    assert a.shape == b.shape
    difference = (a.long() - b.long()).abs()
    return int((difference > 0).sum()), difference.numel(), int(difference.max()) if difference.numel() else 0
