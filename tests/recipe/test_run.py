"""Running recipes: what is written, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qat
from qat.errors import CheckpointError, DataError, ExpectationError, OutputError, RecipeError, StateError, TrainError
from qat.recipe import stages, training
from qat.recipe.folder import RunFolder, RunState, first_difference
from qat.recipe.load import parse_recipe
from qat.recipe.report import check_expectations, last_quantized, results_table
from qat.recipe.run import run_recipe
from qat.recipe.schema import ExpectPart, Recipe
from qat.train.checkpoint import load_checkpoint
from qat.train.log import read_log

RESULTS = {
    "float": {"top1": 0.95, "top5": 1.0, "loss": 0.1, "n": 20},
    "PTQ": {"top1": 0.90, "top5": 1.0, "loss": 0.2, "n": 20},
    "ONNX Runtime": {"top1": 0.93, "top5": 1.0, "loss": 0.15, "n": 20},
}


def recipe(**changes: Any) -> Recipe:
    return parse_recipe(
        {
            "version": 1,
            "name": "tiny",
            "threads": 1,
            "model": {"factory": "qat.models:digits_cnn", "kwargs": {"width": 4}},
            "data": {"name": "digits", "batch_size": 32, "limit": {"train": 192, "test": 60}},
            "stages": [
                {"train": {"phase": "float", "epochs": 2, "optimizer": {"name": "adamw", "lr": 0.02}}},
                {"calibrate": {"images": 96}},
                {"train": {"epochs": 1, "freeze_ranges_after": 0, "freeze_bn_after": 0, "distill": {"weight": 0.5}}},
            ],
            "export": {"onnx": {"samples": 8}},
            **changes,
        }
    )


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    lines: list[str] = []
    run_recipe(recipe(), folder, quiet=True, say=lines.append)
    return folder, lines


def test_a_run_leaves_everything_in_one_folder(finished: tuple[Path, list[str]]) -> None:
    folder, lines = finished
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "recipe.resolved.yaml",
        "metrics.json",
        "encodings.json",
        "plan.json",
        "model.onnx",
        "log.txt",
        "metrics.jsonl",
        "train.png",
        "checkpoints/0-train-float.safetensors",
        "checkpoints/1-calibrate-ptq.safetensors",
        "checkpoints/2-train-qat.safetensors",
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["status"] == "done"
    assert list(metrics["results"]) == ["float", "PTQ", "QAT", "ONNX Runtime"]
    assert all(r["n"] == 60 for r in metrics["results"].values())
    assert metrics["details"]["integer_macs"] == 1.0
    assert metrics["details"]["verification"]["samples"] == 8
    assert metrics["details"]["versions"]["torch"] == torch.__version__
    assert len(metrics["stages"][0]["epochs"]) == 2
    text = "\n".join(lines)
    for row in ("float", "PTQ", "QAT", "ONNX Runtime", "verified: ONNX Runtime"):
        assert row in text
    log = (folder / "log.txt").read_text()
    assert "verified: ONNX Runtime" in log


def test_the_written_files_can_be_used(finished: tuple[Path, list[str]]) -> None:
    folder, _ = finished
    net = stages.build_model(recipe().model, 0)
    net.load_state_dict(load_file(folder / "checkpoints" / "0-train-float.safetensors"))
    encodings = qat.Encodings.load(folder / "encodings.json")
    assert "classifier.weight" in encodings
    assert RunFolder(folder).recipe().to_data() == recipe().to_data()
    assert load_checkpoint(folder / "checkpoints" / "2-train-qat.safetensors").info == {"stage": 2, "label": "QAT"}
    classify = stages.onnx_classifier(folder / "model.onnx")
    assert classify(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_a_run_is_reproducible(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = finished
    run_recipe(recipe(), tmp_path / "again", quiet=True)
    for name in ("encodings.json", "model.onnx", "recipe.resolved.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("finished_stages", [1, 2, 3])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished_stages: int
) -> None:
    folder, _ = finished
    owner, victim = [(stages, "calibrate"), (training, "train"), (stages, "export_onnx")][finished_stages - 1]
    original = getattr(owner, victim)

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        part = args[2] if victim == "train" else None
        if part is not None and part.phase == "float":
            return original(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, victim, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(), tmp_path / "r", quiet=True)
    monkeypatch.undo()
    state = RunFolder(tmp_path / "r").state()
    assert (state.status, len(state.stages)) == ("running", finished_stages)
    assert not list((tmp_path / "r").rglob("*.part"))
    assert not (tmp_path / "r" / "model.onnx").exists()
    lines: list[str] = []
    run_recipe(recipe(), tmp_path / "r", quiet=True, resume=True, say=lines.append)
    assert any(line.startswith(f"resuming after {finished_stages} finished stage") for line in lines)
    for name in ("encodings.json", "model.onnx"):
        assert (tmp_path / "r" / name).read_bytes() == (folder / name).read_bytes(), name
    assert RunFolder(tmp_path / "r").state().results == RunFolder(folder).state().results


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_stage_with_a_damaged_checkpoint_is_named_and_done_again(
    finished: tuple[Path, list[str]], tmp_path: Path, damaged: int
) -> None:
    folder = tmp_path / "r"
    shutil.copytree(finished[0], folder)
    path = folder / RunFolder(folder).state().stages[damaged].checkpoint
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    lines: list[str] = []
    run_recipe(recipe(), folder, quiet=True, resume=True, say=lines.append)
    assert (
        f"warning: {path} is damaged: its checksum is another; copy the file again; going on from the stage before"
        in lines
    )
    for name in ("encodings.json", "model.onnx", *(s.checkpoint for s in RunFolder(finished[0]).state().stages)):
        assert (folder / name).read_bytes() == (finished[0] / name).read_bytes(), name
    assert RunFolder(folder).state().results == RunFolder(finished[0]).state().results


def test_a_resumed_run_clears_up_and_tells_of_other_versions(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "r"
    shutil.copytree(finished[0], folder)
    (folder / "checkpoints" / ".x.safetensors.0123abcd.part").write_bytes(b"half")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["details"]["versions"]["torch"] = "1.0"
    (folder / "metrics.json").write_text(json.dumps(metrics))
    lines: list[str] = []
    run_recipe(recipe(), folder, quiet=True, resume=True, say=lines.append)
    assert not list(folder.rglob(".*"))
    told = f"warning: the run was begun with torch 1.0 and goes on with {torch.__version__}: it may end with other bits"
    assert any(line.startswith(told) for line in lines)


def test_what_a_first_stage_has_written_is_not_lost_by_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Tell, "epoch_end", interrupt)
    changes: dict[str, Any] = {"stages": [{"train": {"phase": "float", "epochs": 2, "checkpoint": {"every_steps": 2}}}]}
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(**changes, export={}), tmp_path / "r", quiet=True)
    monkeypatch.undo()
    with pytest.raises(OutputError, match="holds an unfinished run; add --resume"):
        run_recipe(recipe(**changes, export={}), tmp_path / "r", quiet=True)
    lines: list[str] = []
    run_recipe(recipe(**changes, export={}), tmp_path / "r", quiet=True, resume=True, say=lines.append)
    assert "  resuming at epoch 1, step 5" in lines
    assert not (tmp_path / "r" / "checkpoints" / "unfinished").exists()


def test_the_best_epoch_stays_where_the_last_one_is_kept(tmp_path: Path) -> None:
    data: dict[str, Any] = {"name": "digits", "batch_size": 32, "limit": {"train": 200, "test": 40}, "validation": 40}
    train = {"phase": "float", "epochs": 3, "optimizer": {"name": "adamw", "lr": 0.02}}
    result = run_recipe(recipe(stages=[{"train": train}], export={}, data=data), tmp_path / "r", quiet=True)
    names = sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir())
    assert names == ["0-train-float-best.safetensors", "0-train-float.safetensors"]
    scores = [e["validation_top1"] for e in result.state.stages[0].epochs]
    best = load_checkpoint(tmp_path / "r" / "checkpoints" / names[0])
    assert best.info == {"epoch": scores.index(max(scores)) + 1, "score": max(scores)}
    last = load_checkpoint(tmp_path / "r" / "checkpoints" / names[1])
    same = all(torch.equal(last.tensors[k], v) for k, v in best.tensors.items())
    assert same == (best.info["epoch"] == 3)


def test_everything_a_training_stage_can_do(tmp_path: Path) -> None:
    lines: list[str] = []
    train = {
        "epochs": 2,
        "optimizer": {"name": "sgd", "lr": 0.001},
        "quantizer_lr": 0.1,
        "accumulate": 2,
        "quantize_after": 0.5,
        "freeze_ranges_after": 1.5,
        "reestimate_bn": 64,
        "ema": 0.5,
        "patience": 1,
        "distill": {"features": ["stem.0", "pool"], "feature_loss": "cosine"},
        "log_every": 1,
    }
    data = {
        "name": "digits",
        "batch_size": 32,
        "limit": {"train": 200, "test": 40},
        "validation": 40,
        "last_batch": "keep",
    }
    whole = recipe(stages=[{"calibrate": {"images": 64}}, {"train": train}], export={}, data=data)
    result = run_recipe(whole, tmp_path / "r", quiet=True, say=lines.append)
    assert "  statistics of 4 batch norms taken anew" in lines
    assert any("validation top-1" in line for line in lines)
    records = read_log(tmp_path / "r" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == [2, 4, 5, 7, 9, 10]
    assert {r["stage"] for r in records} == {1}
    assert result.state.stages[1].epochs[0]["validation_top1"] == records[3]["validation_top1"]
    assert "QAT" in result.state.results


def test_without_the_package_tensorboard_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    asked = recipe(stages=["calibrate", {"train": {"epochs": 1, "tensorboard": True}}])
    with pytest.raises(StateError, match="pip install tensorboard"):
        run_recipe(asked, tmp_path / "r", quiet=True)
    assert not (tmp_path / "r").exists()


def test_a_run_is_never_lost_by_accident(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = finished
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(OutputError, match="holds a finished run; add --resume"):
        run_recipe(recipe(), folder)
    other = recipe(seed=1)
    with pytest.raises(RecipeError, match="is a run of another recipe: seed was 0 and is 1"):
        run_recipe(other, folder, resume=True)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="is not the folder of a run; choose another"):
        run_recipe(recipe(), tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        run_recipe(recipe(), tmp_path / "file")


def test_overwrite_replaces_a_run(tmp_path: Path) -> None:
    short = recipe(stages=[{"calibrate": {"images": 64}}], export={})
    run_recipe(short, tmp_path / "r", quiet=True)
    (tmp_path / "r" / "notes.md").write_text("mine")
    run_recipe(short, tmp_path / "r", quiet=True, overwrite=True)
    assert (tmp_path / "r" / "notes.md").read_text() == "mine"
    assert not (tmp_path / "r" / "model.onnx").exists()
    assert list(RunFolder(tmp_path / "r").state().results) == ["float", "PTQ"]


def test_a_broken_contract_fails_and_keeps_the_files(tmp_path: Path) -> None:
    strict = recipe(stages=[{"calibrate": {"images": 64}}], expect={"top1": 0.99})
    with pytest.raises(ExpectationError, match=r"top-1 of ONNX Runtime .* \(expected 99\.00 % or more\)"):
        run_recipe(strict, tmp_path / "r", quiet=True)
    assert (tmp_path / "r" / "model.onnx").is_file()
    state = RunFolder(tmp_path / "r").state()
    assert state.status == "failed"
    assert state.details["contract"] == "broken"


def test_wrong_input_is_found_before_the_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data": {"name": "cifar10", "root": str(tmp_path / "none")}}, DataError, "none does not exist"),
        (
            {"data": {"name": "digits", "input": {"format": "RGB"}}},
            DataError,
            r"does not take images of shape \(3, 8, 8\)",
        ),
        (
            {"model": {"factory": "qat.models:digits_cnn", "kwargs": {"num_classes": 3}}},
            DataError,
            "has 3 classes and the data 10",
        ),
        ({"model": {"factory": "qat.models:digits_cnn", "kwargs": {"wdth": 3}}}, RecipeError, "correct model.kwargs"),
        ({"model": {"factory": "qat.models:no_such"}}, RecipeError, "has no callable 'no_such'"),
        ({"model": {"factory": "no_such_package:f"}}, RecipeError, "cannot import no_such_package"),
        ({"model": {"factory": "qat.models:__all__"}}, RecipeError, "has no callable"),
        ({"model": {"factory": "torchvision.models:no_such"}}, RecipeError, "has no callable 'no_such'"),
        (
            {"model": {"factory": "json:dumps", "kwargs": {"obj": 1}}},
            RecipeError,
            "gives a str; it must give an nn.Module",
        ),
        (
            {"model": {"factory": "qat.models:digits_cnn", "weights": "none.pth"}},
            CheckpointError,
            "cannot read none.pth",
        ),
        ({"model": {"factory": "qat.models:digits_cnn", "weights": "${QAT_NO}/a"}}, RecipeError, "QAT_NO is not set"),
        ({"device": "cuda"}, RecipeError, "device is 'cuda' and torch finds no GPU"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            run_recipe(recipe(**changes), tmp_path / "r", quiet=True)
        assert not (tmp_path / "r").exists(), changes


def test_a_model_with_nothing_to_quantize_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "import torch\n"
        "class Flat(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.sort(x.flatten(1)[:, :10]).values\n"
    )
    monkeypatch.chdir(tmp_path)
    nothing = recipe(model={"factory": "my_nets:Flat"}, stages=[{"calibrate": {"images": 64}}])
    with pytest.raises(qat.QatError, match="nothing to quantize"):
        run_recipe(nothing, tmp_path / "r", quiet=True)


def test_a_diverging_run_is_kept_as_failed(tmp_path: Path) -> None:
    wild = recipe(
        stages=[{"train": {"phase": "float", "epochs": 3, "optimizer": {"name": "sgd", "lr": 1e30}}}], export={}
    )
    with pytest.raises(TrainError, match="the loss is"):
        run_recipe(wild, tmp_path / "r", quiet=True)
    state = RunFolder(tmp_path / "r").state()
    assert state.status == "failed"
    assert not state.stages
    assert "error: the loss is" in (tmp_path / "r" / "log.txt").read_text()
    run_recipe(
        recipe(stages=[{"calibrate": {"images": 64}}], export={}), tmp_path / "r", quiet=True
    )  # nothing was finished, so nothing can be lost


@pytest.mark.parametrize("victim", ["plan.json", "epoch-0002"])
def test_a_disk_that_is_full_is_named_and_nothing_is_half_written(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    import errno
    import os

    real = os.fsync

    def full(handle: int) -> None:
        if victim in Path(f"/proc/self/fd/{handle}").readlink().name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=rf"{victim}.* \(No space left on device\); free some space"):
        run_recipe(recipe(), tmp_path / "r", quiet=True)
    monkeypatch.undo()
    assert not list((tmp_path / "r").rglob("*.part"))
    assert RunFolder(tmp_path / "r").state().status in ("running", "failed")
    if "epoch" in victim:
        # what was written before is whole, and the run goes on from it
        (left,) = (tmp_path / "r" / "checkpoints" / "unfinished" / "0-float").iterdir()
        assert left.name == "epoch-0001-step-000000.safetensors"
        lines: list[str] = []
        run_recipe(recipe(), tmp_path / "r", quiet=True, resume=True, say=lines.append)
        assert "  resuming at epoch 2, step 1" in lines
        for name in ("encodings.json", "model.onnx"):
            assert (tmp_path / "r" / name).read_bytes() == (finished[0] / name).read_bytes(), name


def test_an_own_model_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_model_of_test.py").write_text(
        "from torch import nn\n"
        "def build(width):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    own = recipe(
        model={"factory": "own_model_of_test:build", "kwargs": {"width": 5}},
        stages=[{"calibrate": {"images": 64}}],
    )
    result = run_recipe(own, quiet=True)
    assert result.folder == Path("runs/tiny")
    assert (tmp_path / "runs" / "tiny" / "model.onnx").is_file()


def test_without_labels_a_model_can_be_calibrated_and_exported(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    unlabelled = recipe(
        data={"name": "image_folder", "root": str(tmp_path / "images"), "input": {"format": "GRAY"}},
        stages=[{"calibrate": {"images": 60}}],
    )
    result = run_recipe(unlabelled, tmp_path / "r", quiet=True)
    assert result.state.results == {}
    assert (tmp_path / "r" / "model.onnx").is_file()


# -- parts


def test_the_contract() -> None:
    assert last_quantized(RESULTS) == "ONNX Runtime"
    assert last_quantized({"float": RESULTS["float"]}) is None
    line = check_expectations(ExpectPart(top1=0.94, tolerance=0.01, max_drop=0.021, integer_macs=0.5), RESULTS, 0.75)
    assert line.startswith("contract: top-1 of ONNX Runtime 93.00 % (expected 93.00 % or more)")
    assert check_expectations(ExpectPart(), {}, None) == ""
    for part, message in (
        (ExpectPart(top1=0.94), r"93\.00 % \(expected 94\.00 % or more\)"),
        (ExpectPart(max_drop=0.01), r"drop from float to ONNX Runtime 2\.00 points \(expected 1\.00 or less\)"),
        (ExpectPart(integer_macs=0.9), r"75\.00 % of multiply-accumulates integer"),
    ):
        with pytest.raises(ExpectationError, match=message):
            check_expectations(part, RESULTS, 0.75)
    with pytest.raises(ExpectationError, match="nothing was measured"):
        check_expectations(ExpectPart(top1=0.1), {}, 1.0)
    with pytest.raises(ExpectationError, match="the float model was not measured"):
        check_expectations(ExpectPart(max_drop=0.1), {"PTQ": RESULTS["PTQ"]}, 1.0)


def test_the_table() -> None:
    assert results_table(RESULTS).splitlines() == [
        "                top-1     top-5    loss  images",
        "float         95.00 %  100.00 %  0.1000      20",
        "PTQ           90.00 %  100.00 %  0.2000      20",
        "ONNX Runtime  93.00 %  100.00 %  0.1500      20",
    ]


def test_first_difference_names_the_key() -> None:
    a = {"x": {"y": [1, {"z": 2}]}, "w": 1}
    assert first_difference(a, a) is None
    assert first_difference(a, {"x": {"y": [1, {"z": 3}]}, "w": 1}) == "x.y[1].z was 2 and is 3"
    assert first_difference(a, {"x": {"y": [1]}, "w": 1}) == "x.y was [1, {'z': 2}] and is [1]"
    assert first_difference(a, {"x": a["x"]}) == "w is only in the run"
    assert first_difference({"a": 1}, {"a": True}) == "a was 1 and is True"


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        RunFolder(tmp_path).state()
    for text, message in (
        ("{", "is damaged"),
        ("[]", "is not the metrics file"),
        ('{"schema": "qat-run", "version": 9}', "has version 9"),
        ('{"schema": "qat-run", "version": 1}', "is damaged"),
    ):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            RunFolder(tmp_path).state()
    state = RunState("a", "done", (), {"float": {"top1": 0.5}}, {"x": 1})
    assert RunState.from_json(json.loads(json.dumps(state.to_json())), "m") == state


def test_phases_survive_a_checkpoint(finished: tuple[Path, list[str]]) -> None:
    from qat.recipe.session import Session

    folder, _ = finished
    session = Session(RunFolder(folder).recipe(), run=RunFolder(folder))
    qmodel = session.quantized()
    assert isinstance(qmodel, nn.Module)
    qmodel.train()
    norms = [m for m in qmodel.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)
