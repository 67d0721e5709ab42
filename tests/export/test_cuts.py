"""An exported model cut into its operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import ExportError
from qat.export.cuts import cut_layers
from qat.export.runtime import session

pytestmark = pytest.mark.filterwarnings("ignore:calibrated on")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Products, a branch, data movement, a table, a constant, two outputs of which one is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.act, self.head = nn.Hardswish(), nn.Linear(16, 5)
        self.c = nn.Parameter(torch.linspace(-1, 1, 8).reshape(1, 8, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(self.a(x))
        b = self.act(self.b(a)) + self.c
        joined = torch.cat([a, b], 1)
        return joined, self.head(joined.mean((2, 3)).reshape(-1, 16))


@pytest.fixture(scope="module")
def qmodel() -> qat.PreparedModel:
    torch.manual_seed(0)
    made = qat.prepare(Net().eval(), X, target=qat.load_target("arm-cpu", "hexagon-v73"))
    qat.calibrate(made, [X], progress=False)
    return made


@pytest.fixture(scope="module")
def model(qmodel: qat.PreparedModel, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    path = tmp_path_factory.mktemp("cuts") / "m.onnx"
    qat.export_onnx(qmodel, path, verify=False)
    return onnx.load(str(path))


def run(model: onnx.ModelProto, x: Tensor) -> dict[str, Any]:
    opened = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in opened.get_outputs()]
    return dict(zip(names, opened.run(names, {opened.get_inputs()[0].name: x.numpy()}), strict=True))


def codes_of(model: onnx.ModelProto, names: list[str], x: Tensor) -> dict[str, Any]:
    probe = onnx.shape_inference.infer_shapes(model)
    values = {value.name: value for value in probe.graph.value_info}
    probe.graph.output.extend(values[name] for name in names)
    found = session(probe.SerializeToString()).run(names, {"x": x.numpy()})
    return dict(zip(names, found, strict=True))


def test_every_operator_alone_gives_the_codes_of_the_whole(model: onnx.ModelProto) -> None:
    layers = cut_layers(model)
    names = [layer.codes for layer in layers]
    inner = ["act/hardswish/codes", "add/codes", "mean/pooled/codes"]
    assert names == ["a/codes", "relu/codes", "b/codes", *inner, "head/codes"]
    whole = codes_of(model, list({n for layer in layers for n in (*layer.given, layer.codes)} - {"x"}), X[:1])
    for layer in layers:
        feeds = {alias: whole[name] if name != "x" else X[:1].numpy() for name, alias in layer.given.items()}
        (alone,) = session(layer.model.SerializeToString()).run(None, feeds)
        assert alone.dtype == np.uint8
        np.testing.assert_array_equal(alone, whole[layer.codes])


def test_an_operator_reads_codes_only(model: onnx.ModelProto) -> None:
    for layer in cut_layers(model)[1:]:
        assert all(v.type.tensor_type.elem_type != onnx.TensorProto.FLOAT for v in layer.model.graph.input)


def test_an_open_batch_size_is_refused(tmp_path: Path) -> None:
    qmodel = qat.prepare(nn.Conv2d(3, 4, 1).eval(), X, target=qat.load_target("arm-cpu"))
    qat.calibrate(qmodel, [X], progress=False)
    qat.export_onnx(qmodel, tmp_path / "m.onnx", verify=False)
    with pytest.raises(ExportError, match="has no static shape; export with dynamic_batch=False"):
        cut_layers(onnx.load(str(tmp_path / "m.onnx")))
