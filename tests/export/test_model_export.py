"""`export_onnx`: from a prepared model to a verified file, its options, and what happens when something is wrong."""

from __future__ import annotations

import errno
import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.errors import DataError, ExportError, OutputError, StateError, VerificationError
from qat.export import runtime, verify
from qat.export.islands import _Island
from qat.integer.kernels import linear


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stem(image).mean((2, 3)))


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8)


def prepared(model: nn.Module | None = None, *inputs: Tensor) -> qat.PreparedModel:
    given = inputs or (images(),)
    qmodel = qat.prepare((model or Small()).eval(), given, target=qat.load_target("onnxruntime-cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [given])
    return qmodel


@pytest.fixture
def qmodel() -> qat.PreparedModel:
    return prepared()


def run(path: Path, **feeds: Tensor) -> list[Any]:
    return runtime.session(str(path)).run(None, {name: x.numpy() for name, x in feeds.items()})


# what is written ----------------------------------------------------------------------------------------------------


def test_a_verified_file_and_its_record(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    result = qat.export_onnx(qmodel, tmp_path / "folder" / "m.onnx", verify="layers")
    assert result.path == tmp_path / "folder" / "m.onnx"
    assert result.sha256 == hashlib.sha256(result.path.read_bytes()).hexdigest()
    assert result.verification is not None
    # calibration has kept its samples
    assert result.verification.samples == 6
    assert result.verification.worst.max_difference == 0
    assert {t.name for t in result.verification.tensors} == {"image", "stem.2", "mean", "head"}
    assert result.overflow.worst is not None
    assert "verified in ONNX Runtime" in str(result)


def test_the_file_in_a_runtime_is_the_integer_model(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    path = qat.export_onnx(qmodel, tmp_path / "m.onnx").path
    imodel = qat.convert(qmodel)
    for count in (1, 7):
        x = images(count)
        (got,) = run(path, image=x)
        np.testing.assert_array_equal(got, imodel(x).numpy())


def test_names_are_the_users(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    graph = onnx.load(qat.export_onnx(qmodel, tmp_path / "m.onnx", name="small", metadata={"owner": "me"}).path)
    assert [v.name for v in graph.graph.input] == ["image"]
    assert [v.name for v in graph.graph.output] == ["head"]
    assert graph.graph.name == "small"
    assert {(p.key, p.value) for p in graph.metadata_props} >= {("owner", "me"), ("qat.numerics", "onnx")}
    made = {name for node in graph.graph.node for name in node.output}
    assert {"stem.2", "stem.2/codes", "stem.0.weight", "stem.0.bias", "head.weight"} <= made


@pytest.mark.parametrize("opset", [21, 22, 23])
def test_opsets(qmodel: qat.PreparedModel, tmp_path: Path, opset: int) -> None:
    result = qat.export_onnx(qmodel, tmp_path / "m.onnx", opset=opset, verify="layers")
    assert result.opset == opset
    assert result.verification is not None
    assert result.verification.worst.max_difference == 0
    assert {o.version for o in onnx.load(result.path).opset_import if not o.domain} == {opset}


def test_the_same_model_gives_the_same_bytes(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    first, second = (qat.export_onnx(qmodel, tmp_path / f"{i}.onnx") for i in range(2))
    assert first.sha256 == second.sha256


def test_without_verification_nothing_is_executed(
    qmodel: qat.PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("executed")

    monkeypatch.setattr(verify, "verify_onnx", never)
    result = qat.export_onnx(qmodel, tmp_path / "m.onnx", verify=False)
    assert result.verification is None
    assert result.path.exists()
    assert "not executed" in str(result)


@pytest.mark.parametrize("size", [1, 4, 6, 20])
def test_a_fixed_batch_is_verified_on_all_samples(qmodel: qat.PreparedModel, tmp_path: Path, size: int) -> None:
    result = qat.export_onnx(qmodel, tmp_path / "m.onnx", dynamic_batch=False, batch_size=size)
    value = onnx.load(result.path).graph.input[0]
    assert value.type.tensor_type.shape.dim[0].dim_value == size
    assert result.verification is not None
    # the last batch is filled up from the beginning
    assert result.verification.samples == -(-6 // size) * size


def test_samples_may_be_given_in_any_form(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    forms = [[images(2), images(3)], [(images(2), torch.zeros(2))], [{"image": images(4)}], (x for x in [images(1)])]
    for samples, count in zip(forms, (5, 2, 4, 1), strict=True):
        result = qat.export_onnx(qmodel, tmp_path / "m.onnx", samples=samples)
        assert result.verification is not None
        assert result.verification.samples == count


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        z = F.relu(self.a(x) + y)
        return {"z": z, "again": z, "y": y, "more": (z.flatten(1), 3)}


def test_outputs_that_are_inputs_views_and_repeated(tmp_path: Path) -> None:
    x, y = images(4), torch.randn(4, 4, 8, 8)
    qmodel = prepared(Outputs(), x, y)
    path = qat.export_onnx(qmodel, tmp_path / "m.onnx", verify="layers").path
    wanted = qat.convert(qmodel)(x, y)
    got = run(path, x=x, y=y)
    for have, want in zip(got, (wanted["z"], wanted["again"], wanted["y"], wanted["more"][0]), strict=True):
        np.testing.assert_array_equal(have, want.numpy())


# convert does not disturb ---------------------------------------------------------------------------------------------


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.GroupNorm(2, 6), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(x)) if x.shape[1] == len([1] * 6) else torch.cumsum(x, 1)


def test_exporting_in_the_middle_of_training_changes_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.LayerNorm((6, 6)), Untraceable(), nn.Conv2d(6, 4, 1))
    qmodel = prepared(model)
    qmodel.train()
    modes = {name: module.training for name, module in qmodel.named_modules()}
    imodel = qat.convert(qmodel)
    qat.export_onnx(qmodel, tmp_path / "m.onnx")
    assert {name: module.training for name, module in qmodel.named_modules()} == modes
    assert all(p.requires_grad for p in qmodel.parameters())
    before = imodel(images(2))
    x = images(2)
    before = imodel(x)
    with torch.no_grad():
        for parameter in qmodel.parameters():
            parameter.add_(0.5)
    assert torch.equal(imodel(x), before)


# what is wrong --------------------------------------------------------------------------------------------------------


def wrong_conv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the simulation be off by 9 codes."""
    original = linear.linear

    def off(*args: Any, **kwargs: Any) -> Tensor:
        return torch.clamp(original(*args, **kwargs) + 9, max=255)

    monkeypatch.setattr(linear, "linear", off)


def test_a_difference_is_an_error_and_leaves_no_file(
    qmodel: qat.PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"the one before")
    wrong_conv(monkeypatch)
    with pytest.raises(VerificationError, match=r"output 'head' of .*m\.onnx differs .* by up to 9 codes") as caught:
        qat.export_onnx(qmodel, tmp_path / "m.onnx")
    assert caught.value.exit_status == 1
    assert (tmp_path / "m.onnx").read_bytes() == b"the one before"
    assert len(list(tmp_path.iterdir())) == 1
    # the bounds are the caller's
    assert qat.export_onnx(qmodel, tmp_path / "m.onnx", bound=9, unequal_share=None).path.exists()


def test_a_full_disk_and_an_interrupt_leave_no_file(
    qmodel: qat.PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match=r"cannot write .*m\.onnx \(No space left on device\); free some space"):
            qat.export_onnx(qmodel, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "verify_onnx", interrupt)
    with pytest.raises(KeyboardInterrupt):
        qat.export_onnx(qmodel, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_of_a_folder(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        qat.export_onnx(qmodel, tmp_path / "taken" / "m.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(OutputError, match="give the path of a file"):
        qat.export_onnx(qmodel, tmp_path / "folder.onnx")
    assert not list((tmp_path / "folder.onnx").iterdir())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"opset": 20}, ExportError, "opset 20 cannot be exported; use 21 to 23"),
        ({"verify": "everything"}, ExportError, "unknown verification level 'everything'; use outputs or layers"),
        ({"dynamic_batch": False, "batch_size": 0}, ExportError, "batch size 0 is not positive"),
        ({"samples": []}, DataError, "no samples to verify with"),
        ({"samples": [torch.zeros(2, 3, 9, 8)]}, DataError, "the input 'image' of a batch has shape"),
        ({"samples": [torch.zeros(2, 3, 8, 8, dtype=torch.int64)]}, DataError, "has dtype torch.int64"),
        ({"samples": [{"picture": torch.zeros(2, 3, 8, 8)}]}, DataError, "a batch lacks the input 'image'"),
    ],
    ids=["opset", "level", "batch", "empty", "shape", "dtype", "name"],
)
def test_wrong_options_and_samples_are_named(
    qmodel: qat.PreparedModel, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        qat.export_onnx(qmodel, tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_what_was_not_calibrated_is_not_exported(tmp_path: Path) -> None:
    raw = qat.prepare(Small().eval(), images(), target=qat.load_target("onnxruntime-cpu"))
    with pytest.raises(StateError, match="'image'"):
        qat.export_onnx(raw, tmp_path / "m.onnx")


def test_samples_are_asked_for_where_none_were_kept(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    qmodel.samples = ()
    with pytest.raises(StateError, match="there are no samples to verify the export on; give samples"):
        qat.export_onnx(qmodel, tmp_path / "m.onnx")
    assert qat.export_onnx(qmodel, tmp_path / "m.onnx", verify=False).path.exists()


def test_an_island_that_pytorch_exports_wrongly_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out of another exporter is executed and compared like everything else."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 1))
    qmodel = prepared(model)
    monkeypatch.setattr(_Island, "forward", lambda self, *inputs: self.call(*inputs) * 1.5)
    with pytest.raises(VerificationError, match="output '2'"):
        qat.export_onnx(qmodel, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
