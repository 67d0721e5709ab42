"""A `.tflite` file from a recipe and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qat.cli import main
from qat.errors import RecipeError
from qat.recipe.load import parse_recipe

Out = pytest.CaptureFixture[str]

TINY: dict[str, Any] = {
    "version": 1,
    "name": "tiny",
    "threads": 1,
    "model": {"factory": "qat.models:digits_cnn", "kwargs": {"width": 4}},
    "data": {"name": "digits", "batch_size": 32, "limit": {"train": 96, "test": 40}},
    "target": "arm-cpu",
    "stages": [{"calibrate": {"images": 64}}],
    "export": {"tflite": {"io": "codes", "samples": 4}},
}


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_recipe_and_the_command_line_write_the_same_file(tmp_path: Path, capsys: Out) -> None:
    pytest.importorskip("ai_edge_litert")
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "r"
    recipe.write_text(yaml.safe_dump(TINY))
    assert main(["run", str(recipe), "--out", str(run)]) == 0
    assert "verified in LiteRT" in capsys.readouterr().out
    record = json.loads((run / "metrics.json").read_text())["details"]["tflite"]
    assert record["reference"]["tensors"][0]["max_difference"] == 0
    assert record["reference"]["samples"] == 4
    assert record["default"]["options"] == ["kernels=default"]
    # the ending names the format, and so does the option
    again, other = tmp_path / "again.tflite", tmp_path / "other.bin"
    assert main(["export", str(run), "--out", str(again), "--layers"]) == 0
    assert "compared: layers" in capsys.readouterr().out
    assert main(["export", str(run), "--out", str(other), "--format", "tflite", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["io"] == {"inputs": "codes", "outputs": "codes"}
    assert said["path"] == str(other)
    assert said["verification"]["tensors"][0]["unequal"] == 0
    assert again.read_bytes() == other.read_bytes() == (run / "model.tflite").read_bytes()


def test_ranges_are_needed_and_options_are_checked() -> None:
    with pytest.raises(RecipeError, match=r"export\.tflite needs ranges; add a calibrate stage"):
        parse_recipe({**TINY, "stages": []})
    with pytest.raises(RecipeError, match=r"export\.tflite\.io"):
        parse_recipe({**TINY, "export": {"tflite": {"io": "uint8"}}})
    with pytest.raises(RecipeError, match="samples"):
        parse_recipe({**TINY, "export": {"tflite": {"sampels": 3}}})
