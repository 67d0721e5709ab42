"""Artifacts on emulated ARM processors: the runner on three, ONNX Runtime and LiteRT on one."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from runner_cases import Net, Program, check_arrays, check_usage, converted, images, laid, same, samples_of
from torch import Tensor, nn

import qat
from qat.errors import ExportError
from qat.export.io_mode import IoMode
from qat.integer.model import IntegerModel
from qat.packages import arm64, runner, sources
from qat.packages.artifact import Artifact
from qat.packages.executor import Executor

EMULATOR = "qemu-aarch64-static"


@pytest.fixture(scope="module")
def imodel() -> IntegerModel:
    torch.manual_seed(0)
    return converted(Net(), images())


def executor(name: str) -> Executor:
    """By name; skips, with the reason, where something is missing."""
    found = next(e for e in (*runner.runner_executors(), *arm64.arm64_executors()) if e.name == name)
    missing = found.missing()
    if missing is not None:
        pytest.skip(f"missing: {missing.what}; {missing.mend}")
    return found


# -- without an emulator


def test_what_is_missing_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QAT_ARM64_ROOT", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    found = arm64.missing_root()
    assert found is not None
    assert str(tmp_path) in found.what
    assert found.mend.startswith("scripts/arm64_root")
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    for one in (*runner.runner_executors()[:3], *arm64.arm64_executors()):
        found = one.missing()
        assert found is not None
        assert EMULATOR in found.what
        assert "apt-get install qemu-user-static" in found.mend


def test_where_the_root_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QAT_ARM64_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert arm64.arm64_root() == tmp_path / "qat" / "arm64-root"


def test_a_script_that_fails_in_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    emulator = tmp_path / EMULATOR
    emulator.write_text("#!/bin/sh\necho 'ValueError: no such model' >&2\nexit 1\n")
    emulator.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(ExportError, match="on emulated ARM64: ValueError: no such model"):
        arm64.run_emulated(tmp_path / "script.py")


def test_each_executor_takes_its_own_format() -> None:
    def takes(fmt: str) -> set[str]:
        artifact = Artifact("x", fmt, "onnx", (), ())  # type: ignore[arg-type]
        return {e.name for e in (*runner.runner_executors(), *arm64.arm64_executors()) if e.accepts(artifact)}

    assert takes("onnx") == {"onnxruntime-arm64"}
    assert takes("tflite") == {"litert-arm64", "litert-xnnpack-arm64"}
    assert takes("plan") == {"runner-cortex-a53", "runner-neoverse-n1", "runner-max", "runner-native"}


# -- the runner


@pytest.mark.heavy
@pytest.mark.parametrize("io", [IoMode(), IoMode("codes", "codes")], ids=["floats", "codes"])
@pytest.mark.parametrize("processor", runner.PROCESSORS)
def test_every_processor_gives_the_codes_of_the_simulation(
    imodel: IntegerModel, processor: str, io: IoMode, tmp_path: Path
) -> None:
    one = executor(f"runner-{processor}")
    artifact = runner.write_plan(imodel, tmp_path, io)
    given, expected = samples_of(artifact, imodel, images(1, 1), images(3, 2))
    found, notes = one.run(tmp_path / artifact.path, artifact, given)
    same(found, expected)
    assert notes == (f"instruction set {runner.PROCESSORS[processor]}",)


@pytest.mark.heavy
def test_other_sources_in_the_package_are_told(imodel: IntegerModel, tmp_path: Path) -> None:
    one = executor("runner-max")
    artifact = runner.write_plan(imodel, tmp_path)
    given, _ = samples_of(artifact, imodel, images(1))
    folder = sources.copy_sources(tmp_path)
    assert len(one.run(tmp_path / artifact.path, artifact, given)[1]) == 1
    (folder / "runner" / "main.cpp").write_text("int main() { return 7; }\n")
    # and not built: a package may come from anywhere
    notes = one.run(tmp_path / artifact.path, artifact, given)[1]
    assert any("sources in the package are of another version" in note for note in notes)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("processor", "isa"), [("cortex-a53", "neondot"), ("cortex-a53", "i8mm"), ("neoverse-n1", "i8mm")]
)
def test_a_wrong_choice_is_refused_and_would_be_fatal(
    imodel: IntegerModel, processor: str, isa: str, tmp_path: Path
) -> None:
    executor(f"runner-{processor}")
    artifact = runner.write_plan(imodel, tmp_path)
    np.save(tmp_path / "x.npy", laid(artifact.inputs[0], images(1)))
    program = str(sources.build_runner())

    def run(cpu: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [EMULATOR, "-cpu", cpu, program, "model.qatplan", "--input", "x.npy", "--isa", isa, *words]
        return subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)

    refused = run(processor)
    assert refused.returncode == 2
    assert f"isa '{isa}': this processor lacks the instructions" in refused.stderr
    # so the network does use them, and the tests above tell that the dispatch asks
    assert run(processor, "--unchecked-isa").returncode in {-signal.SIGILL, 128 + signal.SIGILL}
    assert f"instruction set: {isa}" in run("max", "--unchecked-isa").stdout


@pytest.mark.heavy
def test_what_the_program_refuses(imodel: IntegerModel, tmp_path: Path) -> None:
    executor("runner-max")
    program = Program(sources.build_runner(), (EMULATOR, "-cpu", "max"))
    check_usage(program, imodel, tmp_path)
    check_arrays(program, imodel, tmp_path)


@pytest.mark.heavy
def test_no_changed_array_crashes_the_program(imodel: IntegerModel, tmp_path: Path) -> None:
    executor("runner-max")
    artifact = runner.write_plan(imodel, tmp_path, IoMode("codes", "codes"))
    np.save(tmp_path / "x.npy", laid(artifact.inputs[0], images(1)))
    good = (tmp_path / "x.npy").read_bytes()
    random, statuses = np.random.default_rng(0), set()
    for _ in range(60):
        changed = bytearray(good[: random.integers(1, len(good))] if random.random() < 0.2 else good)
        for _ in range(random.integers(1, 4)):
            changed[random.integers(min(len(changed), 90))] = random.choice(list(b"\0\xff(){}',:0129-<>|ufi5 "))
        (tmp_path / "y.npy").write_bytes(bytes(changed))
        command = [EMULATOR, "-cpu", "max", sources.build_runner(), "model.qatplan", "--input", "y.npy"]
        done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
        assert done.returncode in {0, 2}, (bytes(changed[:128]), done.stderr)
        assert (done.returncode == 0) == (done.stderr == "")
        statuses.add(done.returncode)
    assert 2 in statuses


# -- ONNX Runtime and LiteRT


@pytest.mark.heavy
@pytest.mark.parametrize("io", [IoMode(), IoMode("codes", "codes")], ids=["floats", "codes"])
def test_onnxruntime_on_arm(imodel: IntegerModel, io: IoMode, tmp_path: Path) -> None:
    one = executor("onnxruntime-arm64")
    torch.manual_seed(0)
    qmodel = prepared()
    result = qat.export_onnx(qmodel, tmp_path / "model.onnx", verify=False, io=io)
    artifact = Artifact("model.onnx", "onnx", "onnx", result.inputs, result.outputs)
    given, expected = samples_of(artifact, qat.convert(qmodel, "onnx"), images(1, 1), images(1, 2))
    found, _ = one.run(tmp_path / "model.onnx", artifact, given)
    same(found, expected)
    assert "ONNX Runtime 1." in one.runtime()
    assert "aarch64" in one.runtime()


@pytest.mark.heavy
def test_litert_on_arm(tmp_path: Path) -> None:
    one = executor("litert-arm64")
    torch.manual_seed(0)
    qmodel = prepared()
    result = qat.export_tflite(qmodel, tmp_path / "model.tflite", verify=False, io=IoMode("codes", "codes"))
    artifact = Artifact("model.tflite", "tflite", "tflite", result.inputs, result.outputs)
    given, expected = samples_of(artifact, qat.convert(qmodel, "tflite"), images(1, 1), images(1, 2))
    found, _ = one.run(tmp_path / "model.tflite", artifact, given)
    same(found, expected)
    default = executor("litert-xnnpack-arm64")
    assert default.role == "record"
    found, _ = default.run(tmp_path / "model.tflite", artifact, given)
    for sample, wanted in zip(found, expected, strict=True):
        for name, codes in wanted.items():
            assert np.abs(sample[name].astype(int) - codes.astype(int)).max() <= 2
    (tmp_path / "model.tflite").write_bytes(b"no model")
    with pytest.raises(ExportError, match="on emulated ARM64: "):
        one.run(tmp_path / "model.tflite", artifact, given)


def prepared() -> qat.PreparedModel:
    inputs = images()
    qmodel = qat.prepare(Net().eval(), inputs, target=qat.load_target("arm-cpu"))
    qat.calibrate(qmodel, [inputs], progress=False)
    return qmodel


class Residual(nn.Module):
    """Additions of feature maps and of one value a channel, layer normalization, a product, and a hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head, self.act = nn.LayerNorm(16), nn.Linear(16, 10), nn.Hardswish()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.act(self.a(x))
        y = y + self.b(y)
        y = y * torch.sigmoid(y.mean((2, 3), keepdim=True))
        y = y + y.mean((2, 3), keepdim=True)
        y = nn.functional.interpolate(y, scale_factor=1.5, mode="bilinear")
        return y, self.head(self.norm(y.flatten(2).transpose(1, 2)))


@pytest.mark.heavy
def test_onnxruntime_on_arm_is_the_profile_of_its_own(tmp_path: Path) -> None:
    one = executor("onnxruntime-arm64")
    assert (one.numerics, one.bound) == ("onnx-arm64", 1.0)
    torch.manual_seed(0)
    x = torch.randn(16, 3, 20, 20)
    qmodel = qat.prepare(Residual().eval(), x, target=qat.load_target("arm-cpu"))
    qat.calibrate(qmodel, [x], progress=False)
    result = qat.export_onnx(qmodel, tmp_path / "model.onnx", verify=False, io=IoMode("codes", "codes"))
    artifact = Artifact("model.onnx", "onnx", "onnx", result.inputs, result.outputs)
    given, expected = samples_of(artifact, qat.convert(qmodel, "onnx-arm64"), x[:1], x[1:2])
    found, _ = one.run(tmp_path / "model.onnx", artifact, given)
    same(found, expected)
    _, other = samples_of(artifact, qat.convert(qmodel, "onnx"), x[:1], x[1:2])
    assert any((a[name] != b[name]).any() for a, b in zip(found, other, strict=True) for name in a)
