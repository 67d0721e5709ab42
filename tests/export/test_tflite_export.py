"""`export_tflite`: from a prepared model to a verified file, its inputs and outputs, and what goes wrong by name."""

from __future__ import annotations

import hashlib
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.errors import DataError, ExportError, StateError, VerificationError
from qat.export.tflite.runtime import Runtime
from qat.export.tflite.verify import verify_tflite
from qat.export.tflite.writer import program_to_tflite
from qat.integer.tflite import products

litert = pytest.importorskip("ai_edge_litert.interpreter")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.mix = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.stem(image)
        x = F.silu(self.mix(x)) + x
        return {"map": x, "scores": self.head(x.mean((2, 3)))}


def prepared(model: nn.Module, *inputs: Tensor, target: str = "arm-cpu", **options: Any) -> qat.PreparedModel:
    qmodel = qat.prepare(model.eval(), inputs, target=qat.load_target(target), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [inputs])
    return qmodel


@pytest.fixture
def qmodel() -> qat.PreparedModel:
    return prepared(Small(), torch.randn(6, 3, 8, 8))


def test_a_verified_file_and_its_record(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    result = qat.export_tflite(qmodel, path, verify="layers")
    assert result.path == path
    assert result.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.read_bytes()[4:8] == b"TFL3"
    assert result.verification is not None
    assert result.default is not None
    assert result.verification.samples == 6
    assert result.verification.runtime.startswith("LiteRT ")
    assert [t.name for t in result.verification.tensors if t.unequal] == []
    assert {"stem.0", "mix", "map", "head"} & {t.name for t in result.verification.tensors}
    assert "verified in LiteRT" in str(result)
    assert "kernels=default" in str(result)
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


def test_equal_models_give_equal_bytes(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    first = qat.export_tflite(qmodel, tmp_path / "a.tflite", verify=False)
    second = qat.export_tflite(qmodel, tmp_path / "b.tflite", verify=False)
    assert (tmp_path / "a.tflite").read_bytes() == (tmp_path / "b.tflite").read_bytes()
    assert first.verification is None
    assert "not executed" in str(first)
    assert second.sha256 == first.sha256


@pytest.mark.parametrize("io", ["float", "codes"])
def test_what_a_reader_of_the_file_finds(qmodel: qat.PreparedModel, tmp_path: Path, io: Any) -> None:
    """Names, channels-last shapes, types and scales; and a run by hand gives what the integer model gives."""
    result = qat.export_tflite(qmodel, tmp_path / "m.tflite", io=io)
    reader = litert.Interpreter(
        str(tmp_path / "m.tflite"), experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF
    )
    reader.allocate_tensors()
    (given,), outputs = reader.get_input_details(), reader.get_output_details()
    dtype = np.float32 if io == "float" else np.int8
    assert given["name"] == result.inputs[0].name == "image"
    assert tuple(given["shape"]) == result.inputs[0].shape == (1, 8, 8, 3)
    assert [tuple(o["shape"]) for o in outputs] == [c.shape for c in result.outputs] == [(1, 4, 4, 6), (1, 4)]
    assert [o["name"] for o in outputs] == [c.name for c in result.outputs]
    assert {given["dtype"], *(o["dtype"] for o in outputs)} == {dtype}
    image = torch.randn(1, 3, 8, 8)
    x = image.permute(0, 2, 3, 1).numpy()
    if io == "codes":
        scale, zero = given["quantization"]
        x = np.clip(np.floor(np.abs(x / np.float32(scale)) + 0.5) * np.sign(x) + zero, -128, 127).astype(np.int8)
    reader.set_tensor(given["index"], np.ascontiguousarray(x))
    reader.invoke()
    wanted = qat.convert(qmodel, numerics="tflite")(image)
    for output, key in zip(outputs, ("map", "scores"), strict=True):
        have = reader.get_tensor(output["index"])
        if io == "codes":
            scale, zero = output["quantization"]
            have = (have.astype(np.float32) - zero) * np.float32(scale)
        want = wanted[key].permute(0, 2, 3, 1) if key == "map" else wanted[key]
        assert np.array_equal(have, want.numpy())


def test_another_batch_size(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    result = qat.export_tflite(qmodel, tmp_path / "m.tflite", batch_size=4)
    assert result.inputs[0].shape == (4, 8, 8, 3)
    assert result.verification is not None
    assert result.verification.samples == 8  # six, filled up
    with pytest.raises(ExportError, match="batch size 0 is not positive"):
        qat.export_tflite(qmodel, tmp_path / "m.tflite", batch_size=0)


@pytest.mark.parametrize("activations", ["int8", "uint8"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_schemes(activations: str, granularity: str, tmp_path: Path) -> None:
    scheme = {"activations": {"dtype": activations}, "weights": {"dtype": "int8", "granularity": granularity}}
    qmodel = prepared(Small(), torch.randn(6, 3, 8, 8), target="onnxruntime-cpu", scheme=scheme)
    qat.export_tflite(qmodel, tmp_path / "m.tflite")
    # and it is the network
    image = torch.randn(8, 3, 8, 8)
    onnx, tflite = qat.convert(qmodel, "onnx")(image), qat.convert(qmodel, "tflite")(image)
    for key in onnx:
        assert float((onnx[key] - tflite[key]).abs().max()) <= 0.05 * float(onnx[key].abs().max())


def test_the_integer_model_of_the_profile(qmodel: qat.PreparedModel) -> None:
    imodel = qat.convert(qmodel, numerics="tflite")
    assert imodel.program.numerics == "tflite"
    assert {t.encoding.dtype for t in imodel.program.tensors.values() if t.encoding} == {"int8"}
    assert not imodel.native.active
    assert "tflite profile" in imodel.native.reason
    assert qat.convert(qmodel).program.numerics == "onnx"
    with pytest.raises(ExportError, match=r"unknown numerics profile 'tensorrt'.*onnx, onnx-arm64, tflite"):
        qat.convert(qmodel, numerics="tensorrt")


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = a + b
        return total, (a * b).mean(2), total.transpose(1, 2)


@pytest.mark.parametrize("io", ["float", "codes"])
def test_two_inputs_and_a_value_that_is_returned_twice(tmp_path: Path, io: Any) -> None:
    result = qat.export_tflite(
        prepared(Two(), torch.randn(4, 5, 6), torch.randn(4, 5, 6)), tmp_path / "m.tflite", io=io, verify="layers"
    )
    assert [c.name for c in result.inputs] == ["a", "b"]
    names = [c.name for c in result.outputs]
    assert names == ["add", "mean", "transpose"]
    reader = litert.Interpreter(str(tmp_path / "m.tflite"))
    assert [o["name"] for o in reader.get_output_details()] == names


# what goes wrong ------------------------------------------------------------------------------------------------------


def test_a_difference_leaves_no_file(
    qmodel: qat.PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(acc: Tensor, bias: Tensor | None, x: Any, w_scale: Tensor, y: Any) -> Tensor:
        return (right(acc, bias, x, w_scale, y) + 1).clamp(-128, 127)

    right = products.connected
    monkeypatch.setattr(products, "connected", wrong)
    with pytest.raises(VerificationError, match=r"output 'head' of .*m\.tflite differs .* 1 codes") as error:
        qat.export_tflite(qmodel, tmp_path / "m.tflite")
    assert error.value.exit_status == 1
    assert list(tmp_path.iterdir()) == []


def test_a_float_layer_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    qmodel = prepared(Small(), torch.randn(6, 3, 8, 8), scheme={"layers": {"mix": "float"}})
    with pytest.raises(ExportError, match=r"operator 'mix' \(conv\) is computed in float"):
        qat.export_tflite(qmodel, tmp_path / "m.tflite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["ai_edge_litert", "flatbuffers"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    qmodel: qat.PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ExportError, match=rf"needs {missing}.*pip install 'qat\[litert\]'"):
        qat.export_tflite(qmodel, tmp_path / "m.tflite")
    assert list(tmp_path.iterdir()) == []


def test_no_samples(tmp_path: Path, qmodel: qat.PreparedModel) -> None:
    qmodel.samples = ()
    with pytest.raises(StateError, match="no samples to verify"):
        qat.export_tflite(qmodel, tmp_path / "m.tflite")
    with pytest.raises(DataError, match="no samples to verify with"):
        qat.export_tflite(qmodel, tmp_path / "m.tflite", samples=[])


def test_options_that_are_none(qmodel: qat.PreparedModel) -> None:
    program = qat.convert(qmodel, numerics="tflite").program
    with pytest.raises(ExportError, match="unknown kind 'uint8' of inputs or outputs; use float or codes"):
        program_to_tflite(program, io="uint8")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="batch size -1 is not positive"):
        program_to_tflite(program, batch_size=-1)
    with pytest.raises(ExportError, match=r'the onnx profile.*convert with numerics="tflite"'):
        program_to_tflite(qat.convert(qmodel).program)
    bad = replace(program, ops=(replace(program.ops[0], kind="sort"), *program.ops[1:]))
    with pytest.raises(ExportError, match="'image' of kind 'sort' has no TFLite spelling"):
        program_to_tflite(bad)


def test_verification_refuses_what_does_not_fit(qmodel: qat.PreparedModel) -> None:
    imodel = qat.convert(qmodel, numerics="tflite")
    model = program_to_tflite(imodel.program)

    def run(*samples: Tensor, **options: Any) -> Any:
        return verify_tflite(
            model, imodel.program, samples, lambda program, inputs, names: imodel.run(inputs, names), **options
        )

    assert run(torch.randn(1, 3, 8, 8)).worst.max_difference == 0
    with pytest.raises(DataError, match=r"input 'image' is \(2, 3, 8, 8\), .* the file takes \(1, 8, 8, 3\)"):
        run(torch.randn(2, 3, 8, 8))
    with pytest.raises(ExportError, match="unknown verification level 'all'"):
        run(torch.randn(1, 3, 8, 8), level="all")
    with pytest.raises(ExportError, match="the default kernels do not keep every tensor"):
        run(torch.randn(1, 3, 8, 8), level="layers", kernels="default")
    with pytest.raises(ExportError, match="LiteRT refuses the model"):
        run(torch.randn(1, 3, 8, 8), content=model.content[:200])
    with pytest.raises(ExportError, match="LiteRT refuses the model"):
        Runtime(b"not a model at all")
