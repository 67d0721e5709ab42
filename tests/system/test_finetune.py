"""The script that shows quantization in a user's own loop."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import onnxruntime
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "finetune.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accuracies(text: str) -> list[float]:
    wanted = ("float: ", "after calibration: ", "after training: ")
    return [float(line.split(": ")[1].split()[0]) for line in text.splitlines() if line.startswith(wanted)]


def test_digits(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits.onnx"
    script.main(["--images", "700", "--float-epochs", "6", "--epochs", "2", "--out", str(out)])
    text = capsys.readouterr().out
    real, calibrated, trained = accuracies(text)
    assert real > 85
    assert calibrated > real - 5
    assert trained > real - 5
    assert "largest difference" in text
    assert onnxruntime.InferenceSession(str(out)).get_inputs()[0].shape[1:] == [1, 8, 8]


@pytest.mark.heavy
def test_cifar10(script: ModuleType, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = data_root / "weights" / "cifar_resnet20.pth"
    out = tmp_path / "resnet20.onnx"
    arguments = ["--data", "cifar10", "--root", str(data_root / "cifar10"), "--weights", str(weights)]
    script.main([*arguments, "--images", "640", "--epochs", "1", "--lr", "1e-5", "--out", str(out)])
    real, calibrated, trained = accuracies(capsys.readouterr().out)
    assert real > 88
    assert calibrated > real - 2
    assert trained > real - 3
    assert out.is_file()


def test_wrong_arguments(script: ModuleType) -> None:
    with pytest.raises(SystemExit):
        script.main(["--data", "mnist"])
