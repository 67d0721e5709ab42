"""Packages: what is in them, what is refused, and what a later verification finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import (
    ExportError,
    OutputError,
    PackageError,
    QatError,
    StateError,
    TargetError,
    VerificationError,
)
from qat.export.io_mode import Border
from qat.packages import arm_cpu, kinds, verify
from qat.packages.artifact import Artifact
from qat.packages.executor import Check, Executor, Missing, Sample
from qat.packages.golden import read_golden
from qat.packages.manifest import read_manifest, standing
from qat.packages.runtimes import ONNXRUNTIME

pytestmark = pytest.mark.filterwarnings("ignore:calibrated on")


class Net(nn.Module):
    """Two outputs, one of them an image."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(self.a(image))
        return a, self.b(a.mean((2, 3)))


@pytest.fixture(scope="module")
def qmodel() -> qat.PreparedModel:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    prepared = qat.prepare(Net().eval(), x, target=qat.load_target("arm-cpu"))
    with pytest.warns(UserWarning, match="calibrated on"):
        qat.calibrate(prepared, [x], progress=False)
    return prepared


@pytest.fixture
def made(qmodel: qat.PreparedModel, tmp_path: Path) -> Path:
    folder = tmp_path / "p"
    qat.package(qmodel, "arm-cpu", folder, golden=2)
    return folder


@pytest.mark.parametrize("inputs", ["float", "codes"])
@pytest.mark.parametrize("outputs", ["float", "codes"])
def test_a_package_in_every_io_mode(qmodel: qat.PreparedModel, inputs: Border, outputs: Border, tmp_path: Path) -> None:
    """Its runtimes agree with the simulation, and its golden samples are what the files take and give."""
    found = qat.package(qmodel, "arm-cpu", tmp_path / "p", golden=2, io=qat.IoMode(inputs, outputs))
    executed = {check.executor: check for check in found.manifest.checks}
    assert executed["onnxruntime"].status == "passed"
    assert executed["onnxruntime"].samples == 2
    assert [o.name for o in executed["onnxruntime"].outputs] == ["relu", "b"]
    onnx = next(a for a in found.manifest.artifacts if a.format == "onnx")
    given, expected = read_golden(tmp_path / "p", onnx, 2)
    assert given[0]["image"].dtype == (np.float32 if inputs == "float" else np.uint8)
    assert expected[0]["b"].dtype == (np.float32 if outputs == "float" else np.uint8)
    assert qmodel.samples is not None
    simulated = qat.convert(qmodel)(qmodel.samples[0][1:2])[1]
    b = expected[1]["b"] if outputs == "float" else (expected[1]["b"].astype(np.float32) - onnx.outputs[1].zero_point)
    assert np.allclose(b if outputs == "float" else b * onnx.outputs[1].scale, simulated, atol=1e-6)


def test_tflite_is_part_of_it_and_equal_in_every_code(made: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    checks = {check.executor: check for check in read_manifest(made).checks}
    assert checks["litert"].status == "passed"
    assert all(o.max_difference == 0 and o.equal_share == 1 for o in checks["litert"].outputs)
    assert checks["litert-xnnpack"].status == "recorded"


def test_the_same_model_gives_the_same_bytes(qmodel: qat.PreparedModel, made: Path, tmp_path: Path) -> None:
    again = qat.package(qmodel, "arm-cpu", tmp_path / "again", golden=2)
    assert dict(again.manifest.files) == dict(read_manifest(made).files)
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (made / "manifest.json").read_bytes()


def test_a_manifest_is_read_as_it_was_written(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    preprocessing = {"format": "RGB", "mean": [0.5, 0.5, 0.5]}
    found = qat.package(qmodel, "arm-cpu", tmp_path / "p", golden=1, preprocessing=preprocessing)
    assert read_manifest(tmp_path / "p") == found.manifest
    assert found.manifest.preprocessing == preprocessing
    text = (tmp_path / "p" / "README.md").read_text()
    assert "- format: RGB" in text
    assert "model.onnx in ONNX Runtime" in text
    table = qat.Encodings.load(tmp_path / "p" / "encodings.json")
    assert table["b"].scale[0] == found.manifest.artifacts[0].outputs[1].scale


def test_verifying_again_executes_again(made: Path) -> None:
    lines: list[Check] = []
    found = qat.verify_package(made, say=lines.append)
    assert found.standing in ("verified", "partly verified")
    assert lines == list(found.manifest.checks)
    assert {check.executor for check in lines} >= {"onnxruntime", "litert"}
    assert "passed, 2 samples, largest difference 0 codes" in str(found)


def test_a_golden_output_that_is_wrong_is_found(made: Path) -> None:
    """With the checksum put right: what is executed is compared, not only counted."""
    file = made / "golden" / "model.onnx" / "001" / "output_1.npy"
    values = np.load(file)
    manifest = read_manifest(made)
    scale = manifest.artifacts[0].outputs[1].scale
    assert scale is not None
    np.save(file, values + np.float32(2 * scale))
    data = json.loads((made / "manifest.json").read_text())
    from qat.packages.manifest import checksum

    data["files"]["golden/model.onnx/001/output_1.npy"] = checksum(file)
    (made / "manifest.json").write_text(json.dumps(data))
    found = qat.verify_package(made)
    assert found.standing == "failed"
    check = next(c for c in found.manifest.checks if c.executor == "onnxruntime")
    assert check.status == "failed"
    assert check.outputs[1].max_difference == 2
    assert check.outputs[1].equal_share == 0.5


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / "model.onnx").write_bytes((p / "model.onnx").read_bytes()[:-9]), "model.onnx was changed"),
        (lambda p: (p / "encodings.json").unlink(), "encodings.json is missing"),
        (lambda p: (p / "extra.sh").write_text("rm"), "extra.sh is not in the manifest"),
    ],
)
def test_a_package_that_was_tampered_with(made: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(made)
    found = qat.verify_package(made)
    assert found.standing == "failed"
    assert found.tampered == (f"{said}{found.tampered[0][len(said) :]}",)
    assert said in str(found)
    assert not found.manifest.checks


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "C:\\x", "golden/..", ""])
def test_a_manifest_that_leads_out_of_the_folder(made: Path, name: str) -> None:
    data = json.loads((made / "manifest.json").read_text())
    data["files"][name] = "0" * 64
    (made / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(PackageError, match="which is not in the package"):
        qat.verify_package(made)
    data["files"].pop(name)
    data["artifacts"][0]["path"] = name
    (made / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(PackageError, match="which is not in the package"):
        qat.verify_package(made)


def test_a_link_out_of_the_package(made: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    (made / "model.onnx").unlink()
    (made / "model.onnx").symlink_to(tmp_path / "other")
    with pytest.raises(PackageError, match="which is not in the package"):
        qat.verify_package(made)
    (made / "model.onnx").unlink()
    (made / "link").symlink_to(made / "README.md")
    with pytest.raises(PackageError, match="is a link"):
        qat.verify_package(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("golden"), "key 'golden' is missing"),
        (lambda d: d.update(version=99), "has version 99"),
        (lambda d: d.update(schema="other"), "is not the manifest of a package"),
        (lambda d: d["artifacts"][0].update(format="exe"), "'exe' is none of onnx"),
        (lambda d: d["artifacts"][0].update(also_simulated=["x"]), "'x' is none of onnx, onnx-arm64, tflite"),
        (lambda d: d.update(golden="many"), "golden is 'many'"),
        (lambda d: d["files"].update(x=3), "3 is no text"),
        (lambda d: d["artifacts"][0]["inputs"][0].update(extra=1), "extra"),
        (lambda d: d.update(kind="toaster"), "no package of kind 'toaster'"),
    ],
)
def test_a_malformed_manifest(made: Path, change: Callable[[dict[str, object]], object], said: str) -> None:
    data = json.loads((made / "manifest.json").read_text())
    change(data)
    (made / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(PackageError, match=said):
        qat.verify_package(made)


def test_what_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"has no manifest.json; give the folder of a package"):
        qat.verify_package(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(PackageError, match="manifest"):
        qat.verify_package(tmp_path)


def test_a_folder_that_is_not_ours_is_left_alone(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists and is no package of qat"):
            qat.package(qmodel, "arm-cpu", theirs, overwrite=overwrite)
    (theirs / "manifest.json").write_text('{"name": "a browser extension"}')
    with pytest.raises(OutputError, match="exists and is no package of qat"):
        qat.package(qmodel, "arm-cpu", theirs, overwrite=True)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match="exists and is no folder"):
        qat.package(qmodel, "arm-cpu", file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "theirs"]
    assert (theirs / "thesis.tex").read_text() == "years of work"


def test_replacing_a_package_is_said_and_whole(qmodel: qat.PreparedModel, made: Path) -> None:
    (made / "old").write_text("x")
    with pytest.raises(OutputError, match="exists; say overwrite"):
        qat.package(qmodel, "arm-cpu", made)
    assert (made / "old").exists()
    qat.package(qmodel, "arm-cpu", made, golden=1, overwrite=True)
    assert not (made / "old").exists()
    assert read_manifest(made).golden == 1
    assert [p.name for p in made.parent.iterdir()] == ["p"]


def use(monkeypatch: pytest.MonkeyPatch, *executors: Executor) -> None:
    kind = replace(kinds.kind_named("arm-cpu"), executors=lambda targets: executors)
    monkeypatch.setattr(kinds, "KINDS", (kind,))


def off_by(codes: float) -> Executor:
    def run(file: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
        found, _ = ONNXRUNTIME.run(file, artifact, samples)
        step = {c.name: np.float32(codes * (c.scale or 0)) for c in artifact.outputs}
        return [{name: array + step[name] for name, array in sample.items()} for sample in found], ("as told",)

    return replace(ONNXRUNTIME, name="off", run=run)


class Residual(Net):
    """With an addition, which ONNX Runtime computes otherwise on ARM64."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(self.a(image))
        return a + a.mean((2, 3), keepdim=True), self.b(a.mean((2, 3)))


def by(profile: str, model: qat.PreparedModel) -> Executor:
    """A runtime that computes as a profile says."""

    def run(file: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
        imodel = qat.convert(model, numerics=profile)
        outputs = [imodel(*(torch.from_numpy(sample[c.name]) for c in artifact.inputs)) for sample in samples]
        names = [c.name for c in artifact.outputs]
        return [{n: y.numpy() for n, y in zip(names, found, strict=True)} for found in outputs], ()

    return replace(ONNXRUNTIME, name=profile, run=run, numerics=profile, bound=0.0)


def test_a_runtime_with_a_profile_of_its_own_is_compared_with_it(
    qmodel: qat.PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    # powers of two: many sums are ties, where the profiles differ
    scheme = {"activations": {"power_of_two": True}}
    model = qat.prepare(Residual().eval(), x, target=qat.load_target("arm-cpu"), scheme=scheme)
    qat.calibrate(model, [x], progress=False)
    use(monkeypatch, by("onnx", model), by("onnx-arm64", model))
    made = qat.package(model, "arm-cpu", tmp_path / "p", golden=2)
    checks = {check.executor: check for check in made.manifest.checks if check.artifact == "model.onnx"}
    assert [checks[name].status for name in ("onnx", "onnx-arm64")] == ["passed", "passed"]
    artifact = next(a for a in made.manifest.artifacts if a.format == "onnx")
    assert artifact.also_simulated == ("onnx-arm64",)
    own, other = (read_golden(tmp_path / "p", artifact, 2, profile)[1] for profile in ("onnx", "onnx-arm64"))
    assert any((a[name] != b[name]).any() for a, b in zip(own, other, strict=True) for name in a)
    assert qat.verify_package(tmp_path / "p").manifest.checks == made.manifest.checks
    # with the other profile's outputs it would have failed
    use(monkeypatch, replace(by("onnx", model), numerics="onnx-arm64"))
    assert qat.verify_package(tmp_path / "p").standing == "failed"
    # a model that both compute alike has one set
    use(monkeypatch, by("onnx", qmodel), by("onnx-arm64", qmodel))
    alike = qat.package(qmodel, "arm-cpu", tmp_path / "q", golden=2)
    assert not list((tmp_path / "q").rglob("onnx-arm64"))
    executed = {check.executor: check for check in alike.manifest.checks if check.artifact == "model.onnx"}
    assert executed["onnx-arm64"].status == "passed"


def test_a_package_from_before_a_profile(
    made: Path, qmodel: qat.PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = json.loads((made / "manifest.json").read_text())
    for artifact in data["artifacts"]:
        del artifact["also_simulated"]
    (made / "manifest.json").write_text(json.dumps(data))
    use(monkeypatch, ONNXRUNTIME, by("onnx-arm64", qmodel))
    found = qat.verify_package(made)
    check = next(c for c in found.manifest.checks if c.executor == "onnx-arm64" and c.artifact == "model.onnx")
    assert check.status == "not run"
    assert check.notes == ("golden samples of the profile onnx-arm64 are missing", "make the package again")
    assert found.standing == "partly verified"


def test_a_runtime_that_differs_leaves_no_package(
    qmodel: qat.PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, off_by(2))
    with pytest.raises(VerificationError, match=r"model\.onnx in ONNX Runtime.* failed, .* 2 codes.*bound: 1"):
        qat.package(qmodel, "arm-cpu", tmp_path / "p")
    assert not list(tmp_path.iterdir())
    use(monkeypatch, off_by(1))
    found = qat.package(qmodel, "arm-cpu", tmp_path / "p", golden=1)
    assert found.manifest.checks[0].outputs[0].max_difference == 1
    assert found.manifest.checks[0].notes == ("as told",)


def test_a_runtime_that_refuses(qmodel: qat.PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(file: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
        raise ExportError("this runtime has no such operator", "use another")

    use(monkeypatch, replace(ONNXRUNTIME, run=run))
    with pytest.raises(VerificationError, match="this runtime has no such operator"):
        qat.package(qmodel, "arm-cpu", tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named_and_the_package_says_so(
    qmodel: qat.PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = replace(ONNXRUNTIME, name="lab", missing=lambda: Missing("the phone", "plug it in"))
    use(monkeypatch, absent)
    found = qat.package(qmodel, "arm-cpu", tmp_path / "p", golden=1)
    assert found.manifest.standing == "unverified"
    assert "model.onnx in lab: NOT RUN, the phone is missing; plug it in" in str(found)
    assert "UNVERIFIED" in (tmp_path / "p" / "README.md").read_text()
    use(monkeypatch, ONNXRUNTIME, absent)
    assert qat.verify_package(tmp_path / "p").standing == "partly verified"


def test_standing() -> None:
    a = tuple(Artifact(name, "onnx", "onnx", (), ()) for name in ("x", "y"))
    passed = [Check(name, "e", "r", "passed") for name in ("x", "y")]
    assert standing(a, tuple(passed)) == "verified"
    assert standing(a, (passed[0],)) == "partly verified"
    assert standing(a, (*passed, Check("x", "f", "", "not run"))) == "partly verified"
    assert standing(a, (*passed, Check("x", "f", "r", "failed"))) == "failed"
    assert standing(a, (Check("x", "e", "r", "recorded"),)) == "unverified"
    # what is optional may be missing, but not fail
    extra = Check("y", "f", "", "not run", optional=True)
    assert standing(a, (passed[0], extra)) == "verified"
    assert standing(a, (*passed, extra)) == "verified"
    assert standing(a, (passed[0], replace(extra, status="failed"))) == "failed"
    assert standing(a, (extra,)) == "unverified"


def test_what_cannot_be_packaged(qmodel: qat.PreparedModel, tmp_path: Path) -> None:
    def fails(error: type[QatError], said: str, *target: str, **options: object) -> None:
        with pytest.raises(error, match=said):
            qat.package(qmodel, target, tmp_path / "p", **options)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())

    fails(TargetError, "no package for mace-dsp; targets that have one", "mace-dsp")
    fails(TargetError, "no package for no target")
    fails(ExportError, "0 golden samples verify nothing", "arm-cpu", golden=0)
    fails(StateError, "no golden samples", "arm-cpu", samples=[])
    fails(ExportError, "unknown kind 'bytes'", "arm-cpu", io="bytes")
    other = qat.prepare(Net().eval(), torch.randn(1, 3, 8, 8), target=qat.load_target("onnxruntime-cpu"))
    with pytest.raises(TargetError, match="was prepared for onnxruntime-cpu, not for arm-cpu; prepare it with"):
        qat.package(other, "arm-cpu", tmp_path / "p")


class Normed(nn.Module):
    """Has a layer norm, which TFLite has not."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.n = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.n(self.a(x)))


def test_what_tflite_has_not_is_left_out_and_said(tmp_path: Path) -> None:
    x = torch.randn(600, 6)
    prepared = qat.prepare(Normed().eval(), x, target=qat.load_target("arm-cpu"))
    qat.calibrate(prepared, [x], progress=False)
    found = qat.package(prepared, "arm-cpu", tmp_path / "p", golden=1)
    assert [a.path for a in found.manifest.artifacts if a.format != "plan"] == ["model.onnx"]
    assert "'n'" in found.manifest.omitted["model.tflite"]
    assert "model.tflite is not in the package" in str(found)
    assert "**model.tflite is not in this package**" in (tmp_path / "p" / "README.md").read_text()


def test_float_outputs_without_codes_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(self.a(x), 1)

    x = torch.randn(8, 6)
    prepared = qat.prepare(Island().eval(), x, target=qat.load_target("arm-cpu"))
    qat.calibrate(prepared, [x], progress=False)
    use(monkeypatch, ONNXRUNTIME)
    found = qat.package(prepared, "arm-cpu", tmp_path / "p", golden=1)
    assert found.manifest.artifacts[0].outputs[0].scale is None
    assert found.manifest.checks[0].status == "passed"
    file = tmp_path / "p" / "golden" / "model.onnx" / "000" / "output_0.npy"
    np.save(file, np.load(file) * np.float32(1.1))
    artifact = found.manifest.artifacts[0]
    (check,) = verify.execute(tmp_path / "p", [artifact], 1, [ONNXRUNTIME])
    assert check.status == "failed"
    np.save(file, np.load(file) * np.float32(np.nan))
    (check,) = verify.execute(tmp_path / "p", [artifact], 1, [ONNXRUNTIME])
    assert check.outputs[0].max_difference == float("inf")


def test_a_golden_sample_that_does_not_fit(made: Path) -> None:
    artifact = read_manifest(made).artifacts[0]
    file = made / "golden" / "model.onnx" / "000" / "input_0.npy"
    np.save(file, np.zeros((1, 3, 8, 9), np.float32))
    with pytest.raises(QatError, match=r"input_0\.npy is float32 \(1, 3, 8, 9\) where the package says float32"):
        read_golden(made, artifact, 1)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(QatError, match=r"cannot read the golden sample .*input_0\.npy"):
        read_golden(made, artifact, 1)
    shutil.rmtree(file.parent)
    with pytest.raises(QatError, match="cannot read the golden sample"):
        read_golden(made, artifact, 1)


def test_kinds() -> None:
    groups = {kind.name: names for kind, names in kinds.by_kind(["arm-cpu", "onnxruntime-cpu"]).items()}
    assert groups == {"arm-cpu": ("arm-cpu",)}
    assert arm_cpu.executors(("arm-cpu",))[0].name == "onnxruntime"
