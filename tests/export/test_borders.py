"""Exported ONNX models that take or give codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import ExportError
from qat.export.contract import TensorContract
from qat.export.io_mode import Border, IoMode
from qat.export.runtime import session


class Net(nn.Module):
    """Two outputs, one of which is also read further on."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(self.a(image))
        return a, self.b(a.mean((2, 3)))


def prepared(model: nn.Module, *example: Tensor, scheme: dict[str, object] | None = None) -> qat.PreparedModel:
    torch.manual_seed(0)
    qmodel = qat.prepare(model.eval(), example, target=qat.load_target("onnxruntime-cpu"), scheme=scheme)
    qat.calibrate(qmodel, [example], progress=False)
    return qmodel


IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def codes(given: TensorContract, x: Tensor) -> np.ndarray:
    """By the formula of ONNX's QuantizeLinear."""
    assert given.scale is not None
    q = np.rint(x.numpy() / np.float32(given.scale)) + given.zero_point
    return np.clip(q, given.qmin, given.qmax).astype(given.code_dtype)


@pytest.mark.parametrize("inputs", ["float", "codes"])
@pytest.mark.parametrize("outputs", ["float", "codes"])
def test_four_modes_give_the_same_codes(inputs: Border, outputs: Border, tmp_path: Path) -> None:
    qmodel = prepared(Net(), IMAGE)
    simulated = qat.convert(qmodel)(IMAGE)
    result = qat.export_onnx(qmodel, tmp_path / "m.onnx", io=IoMode(inputs, outputs), verify="layers")
    assert result.verification is not None
    assert result.verification.worst.max_difference == 0
    runtime = session(str(tmp_path / "m.onnx"))
    (given,) = result.inputs
    assert [i.name for i in runtime.get_inputs()] == ["image"] == [given.tensor]
    assert [o.name for o in runtime.get_outputs()] == [c.name for c in result.outputs] == ["relu", "b"]
    assert given.dtype == ("float32" if inputs == "float" else "uint8")
    found = runtime.run(None, {"image": IMAGE.numpy() if inputs == "float" else codes(given, IMAGE)})
    for border, array, wanted in zip(result.outputs, found, simulated, strict=True):
        assert array.dtype == np.dtype(border.dtype) == (np.float32 if outputs == "float" else np.uint8)
        real = (
            array if outputs == "float" else (array.astype(np.float32) - border.zero_point) * np.float32(border.scale)
        )
        assert np.abs(codes(border, torch.from_numpy(real)).astype(int) - codes(border, wanted).astype(int)).max() == 0
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert (kinds[0] == "QuantizeLinear") == (inputs == "float")
    assert (kinds[-1] == "DequantizeLinear") == (outputs == "float")


def test_a_narrower_input_is_taken_as_it_is_clipped(tmp_path: Path) -> None:
    scheme = {"layers": {"image": {"activations": {"qmin": 0, "qmax": 15}}}}
    qmodel = prepared(Net(), IMAGE, scheme=scheme)
    result = qat.export_onnx(qmodel, tmp_path / "m.onnx", io="codes")
    assert (result.inputs[0].qmin, result.inputs[0].qmax) == (0, 15)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [node.op_type for node in graph.node if "image" in node.input] == ["DequantizeLinear"]


class Twice(nn.Module):
    """Returns one value under two names, and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return y, y


def test_an_output_that_is_returned_twice(tmp_path: Path) -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    result = qat.export_onnx(prepared(Twice(), x), tmp_path / "m.onnx", io="codes")
    assert [c.dtype for c in result.outputs] == ["uint8", "uint8"]
    first, second = session(str(tmp_path / "m.onnx")).run(None, {"x": codes(result.inputs[0], x)})
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)


class Half(nn.Module):
    """Its output is float, and so is its second input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cumsum(self.a(x), 1) + torch.cumsum(y, 1)


def test_what_has_no_codes_is_named(tmp_path: Path) -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    qmodel = prepared(Half(), x, x)
    with pytest.raises(ExportError, match=r"'y' is not quantized and has no codes"):
        qat.export_onnx(qmodel, tmp_path / "m.onnx", io=IoMode(inputs="codes"))
    with pytest.raises(ExportError, match=r"unknown kind 'int8'"):
        qat.export_onnx(qmodel, tmp_path / "m.onnx", io="int8")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_four_bits_have_no_border(tmp_path: Path) -> None:
    qmodel = prepared(Net(), IMAGE, scheme={"layers": {"image": {"activations": {"dtype": "uint4"}}}})
    with pytest.raises(ExportError, match="'image' has codes of 4 bits"):
        qat.export_onnx(qmodel, tmp_path / "m.onnx", io="codes")
