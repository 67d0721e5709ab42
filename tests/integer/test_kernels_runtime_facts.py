"""What the exporter relies on in ONNX Runtime's graph optimizations; see docs/onnxruntime.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernels_ort import DTYPES, Graph, generator, operators, run_qdq
from torch import Tensor

from qat.integer.kernels import elementwise
from qat.integer.kernels.linear import conv
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import dequantize, quantize, requantize_codes


def _residual(dtype: str, path: str, **entries: str) -> tuple[Tensor, Tensor]:
    """A convolution whose quantized input is also added to its result: the runtime's floats, and ours."""
    g = generator(1)
    low, high = DTYPES[dtype]
    x, y, z = (
        QParams(0.03, low + 131, low, high),
        QParams(0.05, low + 120, low, high),
        QParams(0.08, low + 100, low, high),
    )
    w, scale = torch.randint(-127, 128, (8, 8, 3, 3), generator=g), torch.rand(8, generator=g) * 0.002 + 1e-3
    image = torch.randn(1, 8, 12, 12, generator=g)
    graph = Graph()

    def between(value: str, q: QParams) -> str:
        return graph.dequantize(graph.quantize(value, q, dtype), q, dtype)

    source = between(graph.input(image, "float32"), x)
    h = between(graph.op("Conv", source, graph.weight(w, scale), pads=[1] * 4), y)
    graph.output(between(graph.op("Add", h, source), z), "float32")
    codes = quantize(image, x)
    result = elementwise.add(conv(codes, x, w, scale, None, y, 1, 1), y, codes, x, z)
    return graph.run(path, entries)[0], dequantize(result, z)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_a_tensor_with_two_readers_is_integer_in_uint8_and_with_int8_allowed(dtype: str, tmp_path: Path) -> None:
    path = str(tmp_path / "model.onnx")
    # the precision entry turns int8 weights to uint8, which no kernel takes together with int8 activations
    entries = {"session.qdqisint8allowed": "1", "session.x64quantprecision": "0"} if dtype == "int8" else {}
    runtime, ours = _residual(dtype, path, **entries)
    assert "QLinearConv" in operators(path)
    assert "QLinearAdd" in operators(path)
    assert torch.equal(runtime, ours)


@pytest.mark.parametrize("rel", [0.0, 0.5])
def test_the_scale_of_the_bias_must_be_the_product_of_the_others(rel: float, tmp_path: Path) -> None:
    x, path = QParams(0.03, 3, 0, 255), str(tmp_path / "model.onnx")
    w, bias, scale = torch.ones(4, 4, 1, 1), torch.arange(4), torch.tensor([0.001, 0.002, 0.003, 0.004])

    def build(graph: Graph, name: str) -> str:
        return graph.op("Conv", name, graph.weight(w, scale), graph.weight(bias, scale * x.scale * (1 + rel), "int32"))

    run_qdq([(torch.zeros(1, 4, 2, 2), x)], x, "uint8", build, path)
    assert ("QLinearConv" in operators(path)) == (rel == 0)


def test_a_relu_that_the_zero_point_does_not_imply_keeps_the_convolution_float(tmp_path: Path) -> None:
    path, w, scale = str(tmp_path / "model.onnx"), torch.ones(4, 4, 1, 1), torch.tensor(0.01)
    x = QParams(0.03, 3, 0, 255)
    for y, fused in ((QParams(0.05, 0, 0, 255), True), (QParams(0.05, 10, 0, 255), False)):

        def build(graph: Graph, name: str) -> str:
            return graph.op("Relu", graph.op("Conv", name, graph.weight(w, scale)))

        run_qdq([(torch.zeros(1, 4, 2, 2), x)], y, "uint8", build, path)
        assert ("QLinearConv" in operators(path)) == fused


@pytest.mark.parametrize("separate", [False, True])
def test_two_pairs_in_a_row_are_merged_unless_something_stands_between(separate: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "model.onnx")
    x, y = QParams(0.03, 3, 0, 255), QParams(0.05, 100, 0, 255)
    values = torch.linspace(-3, 9, 200)
    graph = Graph()
    h = graph.dequantize(graph.quantize(graph.input(values, "float32"), x, "uint8"), x, "uint8")
    h = graph.op("Concat", h, axis=0) if separate else h
    graph.output(graph.dequantize(graph.quantize(h, y, "uint8"), y, "uint8"), "float32")
    runtime = graph.run(path)[0]
    ours = dequantize(requantize_codes(quantize(values, x), x, y), y)
    assert operators(path).count("QuantizeLinear") == 1
    assert torch.equal(runtime, ours) == separate
