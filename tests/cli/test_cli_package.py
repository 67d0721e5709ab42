"""`qat package`, `qat verify PACKAGE`, and packages in a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qat.cli.main import main
from qat.errors import RecipeError
from qat.recipe.load import parse_recipe

Out = pytest.CaptureFixture[str]

TINY: dict[str, Any] = {
    "version": 1,
    "name": "tiny",
    "threads": 1,
    "model": {"factory": "qat.models:digits_cnn", "kwargs": {"width": 4}},
    "data": {"name": "digits", "batch_size": 32, "limit": {"train": 96, "test": 40}},
    "target": ["arm-cpu", "onnxruntime-cpu"],
    "stages": [{"calibrate": {"images": 64}}],
    "export": {"packages": True},
}


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_recipe_and_the_command_line_make_the_same_package(tmp_path: Path, capsys: Out) -> None:
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "r"
    recipe.write_text(yaml.safe_dump(TINY))
    assert main(["run", str(recipe), "--out", str(run)]) == 0
    said = capsys.readouterr().out
    assert "no package for onnxruntime-cpu" in said
    assert "model.onnx in ONNX Runtime" in said
    ours = run / "packages" / "arm-cpu"
    record = json.loads((run / "metrics.json").read_text())["details"]["packages"]["arm-cpu"]
    assert record["checks"][0]["executor"] == "onnxruntime"
    assert record["checks"][0]["samples"] == 4
    assert main(["package", str(run), "--out", str(tmp_path / "p"), "--target", "arm-cpu", "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)
    assert made["folder"] == str(tmp_path / "p")
    assert (ours / "manifest.json").read_bytes() == (tmp_path / "p" / "manifest.json").read_bytes()
    # again into the same folder
    assert main(["package", str(run), "--out", str(tmp_path / "p")]) == 2
    assert "exists; say overwrite" in capsys.readouterr().err
    command = ["package", str(run), "-o", str(tmp_path / "p"), "--overwrite", "--golden", "1", "--inputs", "codes"]
    assert main(command) == 0
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert manifest["golden"] == 1
    assert manifest["artifacts"][0]["inputs"][0]["dtype"] == "uint8"
    assert manifest["artifacts"][0]["outputs"][0]["dtype"] == "float32"


def test_verifying_a_package(tmp_path: Path, capsys: Out) -> None:
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "r"
    recipe.write_text(yaml.safe_dump(TINY))
    assert main(["run", str(recipe), "--out", str(run), "--quiet"]) == 0
    capsys.readouterr()
    package = run / "packages" / "arm-cpu"
    assert main(["verify", str(package)]) == 0
    assert "model.onnx in ONNX Runtime" in capsys.readouterr().out
    assert main(["verify", str(package), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["checks"][0]["status"] == "passed"
    assert main(["verify", str(package), "--require-all"]) == (0 if said["standing"] == "verified" else 1)
    capsys.readouterr()
    (package / "encodings.json").write_text("{}")
    assert main(["verify", str(package)]) == 1
    assert "encodings.json was changed" in capsys.readouterr().err
    (package / "manifest.json").write_text("{}")
    assert main(["verify", str(package)]) == 2
    assert "is not the manifest of a package" in capsys.readouterr().err


def test_recipes_whose_targets_have_no_package() -> None:
    with pytest.raises(RecipeError, match=r"export\.packages: no target of the recipe has a package"):
        parse_recipe({**TINY, "target": "onnxruntime-cpu"})
    with pytest.raises(RecipeError, match=r"export\.packages needs ranges"):
        parse_recipe({**TINY, "stages": []})
    with pytest.raises(RecipeError, match=r"export\.packages\.golden"):
        parse_recipe({**TINY, "export": {"packages": {"golden": 0}}})
    assert parse_recipe({**TINY, "target": "onnxruntime-cpu", "export": {"packages": False}}).export.packages is None


def test_targets_without_a_package_are_refused(tmp_path: Path, capsys: Out) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TINY))
    assert main(["package", str(recipe), "--target", "mace-dsp", "--out", str(tmp_path / "p")]) == 2
    assert "no package for mace-dsp" in capsys.readouterr().err
    assert main(["package", str(recipe), "--out", str(tmp_path / "p")]) == 2
    assert "has no ranges" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
