"""The package for ARM CPUs: what is in it, and what it goes without."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runner_cases import Net, images
from torch import Tensor, nn

import qat
from qat.errors import StateError
from qat.packages import arm_cpu, kinds
from qat.packages.executor import Executor
from qat.packages.runner import runner_executors
from qat.packages.sources import sources_folder, sources_hash

EXECUTORS = arm_cpu.executors


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built or emulated."""

    def executors(targets: Sequence[str]) -> tuple[Executor, ...]:
        return tuple(e for e in EXECUTORS(targets) if e.name in {"onnxruntime", "litert", "runner-native"})

    def program(folder: Path) -> None:
        raise StateError("not here: aarch64-linux-gnu-g++, to build the runner", "scripts/setup --system")

    monkeypatch.setattr(arm_cpu, "copy_program", program)
    monkeypatch.setattr(kinds, "KINDS", (replace(kinds.kind_named("arm-cpu"), executors=executors),))


def prepared(model: nn.Module, x: Tensor) -> qat.PreparedModel:
    qmodel = qat.prepare(model.eval(), x, target=qat.load_target("arm-cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [x], progress=False)
    return qmodel


def test_every_runtime_is_asked() -> None:
    assert [e.name for e in EXECUTORS(["arm-cpu"])] == [
        *("onnxruntime", "litert", "litert-xnnpack"),
        *(e.name for e in runner_executors()),
        *("onnxruntime-arm64", "litert-arm64", "litert-xnnpack-arm64"),
    ]


def test_three_models_and_the_sources_of_the_runner(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = qat.package(prepared(Net(), images()), "arm-cpu", tmp_path / "p", golden=2)
    assert [a.path for a in made.manifest.artifacts] == ["model.onnx", "model.tflite", "model.qatplan"]
    checks = {check.executor: check for check in made.manifest.checks}
    assert checks["runner-native"].status == "passed"
    assert [output.max_difference for output in checks["runner-native"].outputs] == [0, 0]
    assert sources_hash(tmp_path / "p" / "runner") == sources_hash(sources_folder())
    assert "runner/runtime/qat_runtime.h" in made.manifest.files
    # without a cross-compiler it is told, and the rest is there
    (path, cause), *others = made.manifest.omitted.items()
    assert (path, others) == ("runner/bin/aarch64-linux/qat_run", [])
    assert "aarch64-linux-gnu-g++, to build the runner; scripts/setup --system" in cause


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 4, 3)
        self.flat = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.volume(x).mean((2, 3, 4)))


def test_a_network_that_the_runner_lacks_goes_without(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = qat.package(prepared(Volume(), torch.randn(4, 1, 5, 5, 5)), "arm-cpu", tmp_path / "p", golden=1)
    assert "model.qatplan" not in [a.path for a in made.manifest.artifacts]
    assert "volume (" in made.manifest.omitted["model.qatplan"]
    assert not (tmp_path / "p" / "runner").exists()
    assert "model.qatplan is not in this package" in (tmp_path / "p" / "README.md").read_text()
