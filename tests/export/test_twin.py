"""The float network of a program, and the encodings that make it the program again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import qat
from qat.export.twin import FloatTwin, float_twin
from qat.integer.model import IntegerModel

pytestmark = pytest.mark.filterwarnings("ignore:calibrated on")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Products, a branch, data movement, tables, constants, a requantized input of a concat, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.act, self.head = nn.SiLU(), nn.Linear(16, 5)
        self.c = nn.Parameter(torch.linspace(-1, 1, 8).reshape(1, 8, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.softmax(torch.relu(self.a(x)), 1)
        b = 0.5 * self.act(self.b(a)) + self.c
        joined = torch.cat([a, b], 1)
        return joined, self.head(joined.mean((2, 3)).reshape(-1, 16))


def integer(model: nn.Module, x: Tensor, *targets: str) -> tuple[qat.PreparedModel, IntegerModel]:
    torch.manual_seed(0)
    qmodel = qat.prepare(model.eval(), x, target=qat.load_target(*targets),
                         scheme={"activations": {"observer": "minmax"}})  # fmt: skip
    qat.calibrate(qmodel, [x], progress=False)
    return qmodel, qat.convert(qmodel)


def run(model: onnx.ModelProto, x: Tensor) -> list[Any]:
    options = onnxruntime.SessionOptions()
    # its optimizer would quantize weights by rules of its own
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    opened = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return opened.run(None, {opened.get_inputs()[0].name: x.numpy()})


@pytest.fixture(scope="module")
def imodel() -> IntegerModel:
    torch.manual_seed(0)
    return integer(Net(), X, "arm-cpu", "hexagon-v73")[1]


@pytest.fixture(scope="module")
def twin(imodel: IntegerModel) -> FloatTwin:
    return float_twin(imodel.program)


def test_it_is_the_float_network(imodel: IntegerModel, twin: FloatTwin) -> None:
    assert not {"QuantizeLinear", "DequantizeLinear", "Cast"} & {node.op_type for node in twin.model.graph.node}
    assert [value.name for value in twin.model.graph.output] == ["cat", "head"]
    with torch.no_grad():
        wanted = imodel(X[:1])
    for name, found, expected in zip(("cat", "head"), run(twin.model, X[:1]), wanted, strict=True):
        step = twin.activations[name].scale[0]
        # apart by what quantization is, and by no more
        assert 0.01 * step < np.abs(found - expected.numpy()).max() < 8 * step


def test_clamps_stay(twin: FloatTwin) -> None:
    (relu,) = (node for node in twin.model.graph.node if node.op_type == "Relu")
    assert relu.output[0] == "relu"
    # one integer operator, one encoding
    assert "relu" in twin.activations
    assert relu.input[0] not in twin.activations


@pytest.mark.parametrize("low", [0.0, -0.5])
def test_clamps_that_codes_do_and_that_they_do_not(low: float) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).clamp(low, 0.8)
            return torch.cat([y, x], 1) if low else y

    _, imodel = integer(Clamped(), X, "arm-cpu")
    twin = float_twin(imodel.program)
    (found,) = run(twin.model, X[:1])
    assert found[:, :4].min() == pytest.approx(low)
    assert found[:, :4].max() == pytest.approx(0.8)
    assert "conv" not in twin.activations


def test_every_value_between_operators_is_in_the_table(imodel: IntegerModel, twin: FloatTwin) -> None:
    outputs = {name for node in twin.model.graph.node for name in node.output} | {"x"}
    assert twin.activations.keys() <= outputs
    for name in ("x", "relu", "softmax", "b", "act.sigmoid", "act", "add", "cat", "head"):
        encoding = imodel.program.encoding_of(name)
        assert encoding is not None
        assert twin.activations[name].same_grid(encoding)
    # the mean takes its shape in an operator of its own
    (pool,) = (node.output[0] for node in twin.model.graph.node if node.op_type == "GlobalAveragePool")
    assert twin.activations[pool].same_grid(twin.activations["mean"])


def test_rounding_its_weights_gives_the_codes_again(imodel: IntegerModel, twin: FloatTwin) -> None:
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in twin.model.graph.initializer}
    assert {"a.weight", "a.bias", "head.weight", "c"} <= twin.parameters.keys()
    for name, encoding in twin.parameters.items():
        codes = encoding.quantize(torch.tensor(floats[name]))
        assert torch.equal(codes.flatten(), imodel.program.constants[name].value.int().flatten())


def test_quantizing_it_by_the_table_gives_the_codes_of_the_outputs(imodel: IntegerModel, twin: FloatTwin) -> None:
    """The file, read back as another tool would: round at every tensor of the table."""
    model = onnx.ModelProto()
    model.CopyFrom(twin.model)
    nodes = []
    renamed: dict[str, str] = {}
    for value in ["x", *(name for node in twin.model.graph.node for name in node.output)]:
        if value in twin.activations and value not in ("cat", "head"):
            renamed[value] = f"{value}:rounded"

    def rounding(name: str) -> list[onnx.NodeProto]:
        e = twin.activations[name]
        model.graph.initializer.extend([
            numpy_helper.from_array(np.array(e.scale[0], np.float32), f"{name}:scale"),
            numpy_helper.from_array(np.array(e.zero_point[0], np.uint8), f"{name}:zero"),
        ])  # fmt: skip
        parameters = [f"{name}:scale", f"{name}:zero"]
        return [
            onnx.helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}:q"]),
            onnx.helper.make_node("DequantizeLinear", [f"{name}:q", *parameters], [renamed[name]]),
        ]

    nodes += rounding("x")
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        nodes.append(node)
        for name in list(node.output):
            nodes += rounding(name) if name in renamed else []
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    with torch.no_grad():
        wanted = imodel(X[:1])
    for name, found, expected in zip(("cat", "head"), run(model, X[:1]), wanted, strict=True):
        e = twin.activations[name]
        apart = (e.quantize(torch.from_numpy(found)) - e.quantize(expected)).abs()
        assert apart.max() <= 1
        assert name == "head" or (apart == 0).float().mean() > 0.95


def test_an_input_that_is_returned() -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.conv(x)

    found = run(float_twin(integer(Echo(), X, "hexagon-v73")[1].program).model, X[:1])
    np.testing.assert_array_equal(found[0], X[:1].numpy())


def test_float_islands_and_slopes(tmp_path: Path) -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 6, 1), nn.PReLU(6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.erf(self.act(self.conv(x)))

    _, imodel = integer(Island(), X, "hexagon-v73")
    twin = float_twin(imodel.program)
    assert {node.op_type for node in twin.model.graph.node} == {"Conv", "PRelu", "Erf"}
    assert "act.weight" in twin.parameters
    with torch.no_grad():
        assert np.abs(run(twin.model, X[:1])[0] - imodel(X[:1]).numpy()).max() < 0.1


@pytest.mark.parametrize("sizes", [(3, 20), (3, 8, 8), (3, 4, 5, 6)])
def test_clamps_of_every_rank_run_everywhere(sizes: tuple[int, ...]) -> None:
    make = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(sizes)]
    x = torch.randn(4, *sizes, generator=torch.Generator().manual_seed(0))
    _, imodel = integer(nn.Sequential(make(3, 4, 1), nn.ReLU()), x, "arm-cpu")
    assert [op.saturates for op in imodel.program.ops if op.kind == "conv"] == [{"low": 0.0, "high": None}]
    with torch.no_grad():
        assert torch.equal(imodel(x), imodel.run((x,))[imodel.program.outputs[0]])
    assert run(float_twin(imodel.program).model, x[:1])[0].min() == 0
