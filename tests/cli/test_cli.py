"""The command line: every verb, its exit status, and one clear line for everything that is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from PIL import Image

from qat.cli import main

ROOT = Path(__file__).resolve().parents[2]

TINY: dict[str, Any] = {
    "version": 1,
    "name": "tiny",
    "threads": 1,
    "model": {"factory": "qat.models:digits_cnn", "kwargs": {"width": 4}},
    "data": {"name": "digits", "batch_size": 32, "limit": {"train": 192, "test": 60}},
    "target": "arm-cpu",
    "stages": [
        {"train": {"phase": "float", "epochs": 1, "optimizer": {"name": "adamw", "lr": 0.02}}},
        {"calibrate": {"images": 96}},
    ],
    "export": {"onnx": {"samples": 8}},
}

Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(folder: Path, **changes: Any) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return str(path)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cli")
    assert main(["run", write(folder), "--out", str(folder / "r"), "--quiet"]) == 0
    return str(folder / "r")


def fails(capsys: Out, argv: list[str], status: int, *parts: str) -> str:
    """Run, expecting failure: the status, and one line on standard error that has all the parts."""
    assert main(argv) == status
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("qat: warning:")]
    assert len(lines) == 1, error
    assert lines[0].startswith("qat: error: ")
    assert "Traceback" not in error
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


# -- verbs


def test_run_prints_the_table_and_the_verification(tmp_path: Path, capsys: Out) -> None:
    assert main(["run", write(tmp_path), "data.limit.test=30", "--out", str(tmp_path / "r"), "--quiet"]) == 0
    out = capsys.readouterr().out
    for part in ("float", "PTQ", "ONNX Runtime", "verified: ONNX Runtime"):
        assert part in out
    assert "epoch" not in out
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["results"]["PTQ"]["n"] == 30


def test_run_as_json_prints_only_json(tmp_path: Path, capsys: Out) -> None:
    argv = ["run", write(tmp_path, stages=["calibrate"], export={}), "--out", str(tmp_path / "r"), "--json"]
    assert main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "done"
    assert set(document["results"]) == {"float", "PTQ"}


def test_plan_needs_no_data(tmp_path: Path, capsys: Out) -> None:
    data = {"name": "fashion_mnist", "root": "${QAT_NOT_SET}/nowhere"}
    recipe = write(tmp_path, data=data, model={"factory": "qat.models:fashion_cnn"})
    assert main(["plan", recipe, "--out", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    assert "classifier" in out
    assert "100.00 % of" in out
    assert json.loads((tmp_path / "plan.json").read_text())["schema"] == "qat-plan"
    assert main(["plan", recipe, "--summary", "scheme.layers.classifier=float"]) == 0
    assert "float: classifier (linear)" in capsys.readouterr().out
    assert main(["plan", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "arm-cpu"


def test_plan_for_other_targets(tmp_path: Path, capsys: Out) -> None:
    recipe = write(tmp_path)
    names = ["--target", "arm-cpu", "--target", "hexagon-v73", "--target", "apu"]
    assert main(["plan", recipe, *names, "scheme.layers.classifier.activations.dtype=uint16", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["target"] == "arm-cpu+hexagon-v73+apu"
    layers = [t for t in made["tensors"] if t["kind"] == "linear" and t["role"] == "activation"]
    assert layers
    # the third for reading 8 bits and writing 16
    assert all(t["refused_by"] == ["arm-cpu", "hexagon-v73", "apu"] for t in layers)
    assert all(t["nearest"] == "uint8/int8 read and written" for t in layers)
    assert {t["forecast"] for t in layers} == {"refused"}
    assert main(["plan", recipe, "target=hexagon-v73", "--summary"]) == 0
    assert "hexagon-v73, numerics onnx" in capsys.readouterr().out
    fails(capsys, ["plan", recipe, "--target", "hexagon-v74"], 2, "unknown target 'hexagon-v74'; did you mean")


def test_calibrate_export_verify_compare_from_a_recipe(tmp_path: Path, capsys: Out) -> None:
    recipe, table, file = write(tmp_path), str(tmp_path / "e.json"), str(tmp_path / "m.onnx")
    assert main(["calibrate", recipe, "--out", table, "--images", "64"]) == 0
    assert "from 64 images" in capsys.readouterr().out
    assert main(["export", recipe, "--encodings", table, "--out", file, "--layers"]) == 0
    assert "classifier" in capsys.readouterr().out
    onnx.checker.check_model(file, full_check=True)
    assert main(["verify", recipe, "--encodings", table, "--onnx", file, "--samples", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 5
    assert main(["compare", recipe, "--encodings", table, "--images", "40", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 40


def test_a_run_folder_serves_every_verb(run_folder: str, tmp_path: Path, capsys: Out) -> None:
    assert main(["verify", run_folder, "--layers"]) == 0
    assert "verified: ONNX Runtime" in capsys.readouterr().out
    assert main(["compare", run_folder, "--images", "20", "--worst", "3"]) == 0
    assert "SQNR" in capsys.readouterr().out
    assert main(["plan", run_folder, "--summary"]) == 0
    assert main(["export", run_folder, "--out", str(tmp_path / "again.onnx"), "--json"]) == 0
    capsys.readouterr()
    assert (tmp_path / "again.onnx").read_bytes() == (Path(run_folder) / "model.onnx").read_bytes()
    assert main(["calibrate", run_folder, "--out", str(tmp_path / "e.json"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["encodings", "diff", str(tmp_path / "e.json"), str(Path(run_folder) / "encodings.json")]) == 0


def test_verify_finds_a_file_that_computes_something_else(run_folder: str, tmp_path: Path, capsys: Out) -> None:
    model = onnx.load(str(Path(run_folder) / "model.onnx"))
    bias = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT32 and len(t.dims) == 1)
    array = onnx.numpy_helper.to_array(bias) + 5000
    bias.CopyFrom(onnx.numpy_helper.from_array(array.astype("int32"), bias.name))
    file = str(tmp_path / "tampered.onnx")
    onnx.save(model, file)
    fails(capsys, ["verify", run_folder, "--onnx", file, "--quiet"], 1, "tampered.onnx differs from the simulation")
    (tmp_path / "noise.onnx").write_bytes(b"noise")
    fails(capsys, ["verify", run_folder, "--onnx", str(tmp_path / "noise.onnx")], 2, "noise.onnx")


def test_encodings_show_and_diff(run_folder: str, tmp_path: Path, capsys: Out) -> None:
    table = str(Path(run_folder) / "encodings.json")
    assert main(["encodings", "show", table, "*.weight"]) == 0
    out = capsys.readouterr().out
    assert "classifier.weight" in out
    assert "relu" not in out
    assert main(["encodings", "diff", table, table]) == 0
    document = json.loads(Path(table).read_text())
    document["encodings"]["classifier"]["scale"][0] *= 2
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(document))
    capsys.readouterr()
    assert main(["encodings", "diff", table, str(changed)]) == 1
    assert capsys.readouterr().out.startswith("classifier: scale")
    assert main(["encodings", "diff", table, str(changed), "--json"]) == 1
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["classifier"]
    fails(capsys, ["encodings", "show", table, "no*such"], 2, "matches 'no*such'")
    fails(capsys, ["encodings", "show", str(tmp_path / "none.json")], 2, "cannot read", "none.json")
    changed.write_text("{}")
    fails(capsys, ["encodings", "show", str(changed)], 2, "is not a table of encodings")


def test_targets_and_env(capsys: Out) -> None:
    assert main(["targets"]) == 0
    assert "arm-cpu" in capsys.readouterr().out
    assert main(["targets", "arm-cpu", "onnxruntime-cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "arm-cpu+onnxruntime-cpu"
    assert main(["targets", "arm-cpu"]) == 0
    assert "softmax" in capsys.readouterr().out
    assert main(["targets", "hexagon-v73", "apu"]) == 0
    out = capsys.readouterr().out
    assert "what is not integer is refused" in out
    assert "instead: x * sigmoid(x)" in out
    fails(capsys, ["targets", "arm-cpo"], 2, "unknown target 'arm-cpo'; did you mean arm-cpu?")
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"].startswith(torch.__version__.split("+")[0])


def test_recipe_verbs(tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(tmp_path)
    assert main(["recipe", "lint", recipe]) == 0
    assert main(["recipe", "lint", recipe, "--deep"]) == 0
    assert "integer" in capsys.readouterr().out
    assert main(["recipe", "lint", recipe, "colour=red", "seed=x"]) == 2
    captured = capsys.readouterr()
    assert "seed is 'x'; it should be an integer" in captured.out
    assert "unknown key colour" in captured.err
    assert main(["recipe", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"
    monkeypatch.setenv("QAT_TEST_ROOT", "/somewhere")
    assert main(["recipe", "show", recipe, "data.root=${QAT_TEST_ROOT}/x", "data.batch_size=7"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["data"]["root"] == "/somewhere/x"
    assert shown["data"]["batch_size"] == 7
    assert shown["data"]["input"]["scale"] == 1
    monkeypatch.delenv("QAT_TEST_ROOT")
    assert main(["recipe", "show", recipe, "data.root=${QAT_TEST_ROOT}/x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["root"] == "${QAT_TEST_ROOT}/x"


# -- usage


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["frobnicate"], "frobnicate"),
        (["run"], "RECIPE"),
        (["run", "a.yaml", "--nonsense"], "--nonsense"),
        (["compare", "r", "--images", "0"], "--images"),
        (["compare", "r", "--images", "many"], "--images"),
        (["run", str(ROOT / "recipes" / "digits.yaml"), "--resume", "--overwrite"], "exclude each other"),
    ],
)
def test_wrong_usage(capsys: Out, argv: list[str], part: str) -> None:
    fails(capsys, argv, 2, part, "--help")


def test_help_and_no_arguments(capsys: Out) -> None:
    assert main(["--help"]) == 0
    assert "Usage: qat" in capsys.readouterr().out
    assert main([]) == 2
    assert "Usage: qat" in capsys.readouterr().err
    assert main(["run", "-h"]) == 0
    assert "--resume" in capsys.readouterr().out


# -- bad input


def test_an_unknown_key_names_its_path_and_the_nearest(tmp_path: Path, capsys: Out) -> None:
    recipe = write(tmp_path, data={"name": "digits", "bacth_size": 4})
    fails(capsys, ["run", recipe], 2, "tiny.yaml: unknown key data.bacth_size; did you mean 'batch_size'?")


def test_a_wrong_type_is_named(tmp_path: Path, capsys: Out) -> None:
    fails(capsys, ["run", write(tmp_path), "seed=soon"], 2, "seed is 'soon'; it should be an integer")


def test_a_missing_data_folder_is_named(tmp_path: Path, capsys: Out) -> None:
    out = tmp_path / "r"
    recipe = write(tmp_path, data={"name": "fashion_mnist", "root": str(tmp_path / "none")})
    fails(capsys, ["run", recipe, "--out", str(out)], 2, "none does not exist; correct data.root")
    assert not out.exists()


def images(folder: Path, count: int = 60) -> dict[str, Any]:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count // 2):
                Image.new("L", (8, 8), (7 * i) % 256).save(folder / split / name / f"{i}.png")
    return {"name": "image_folder", "root": str(folder), "input": {"format": "GRAY"}}


def test_a_bad_image_is_named_and_skipped_on_request(tmp_path: Path, capsys: Out) -> None:
    data = images(tmp_path / "data")
    bad = tmp_path / "data" / "train" / "a" / "3.png"
    bad.write_bytes(b"no image")
    recipe = write(tmp_path, data=data, stages=["calibrate"])
    fails(capsys, ["run", recipe, "--out", str(tmp_path / "r")], 2, str(bad), "--skip-bad")
    assert not (tmp_path / "r" / "model.onnx").exists()
    assert main(["run", recipe, "--out", str(tmp_path / "r"), "--skip-bad", "--quiet"]) == 0
    assert f"skipped 1 unreadable file: {bad}" in capsys.readouterr().out


def test_an_empty_data_set_is_named(tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "data" / "train" / "a").mkdir(parents=True)
    data = {"name": "image_folder", "root": str(tmp_path / "data"), "input": {"size": 8, "format": "GRAY"}}
    fails(capsys, ["run", write(tmp_path, data=data)], 2, "has no JPEG or PNG images; put at least one there")


def test_a_wrong_input_shape_is_named(tmp_path: Path, capsys: Out) -> None:
    recipe = write(tmp_path, data={"name": "digits", "input": {"format": "RGB"}})
    fails(capsys, ["run", recipe], 2, "does not take images of shape (3, 8, 8)", "correct data.input")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, capsys: Out, value: float) -> None:
    from qat.models import digits_cnn

    state = digits_cnn(4).state_dict()
    state["down.0.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "w.pth")
    recipe = write(tmp_path, model={**TINY["model"], "weights": str(tmp_path / "w.pth")})
    fails(capsys, ["run", recipe], 2, "w.pth: down.0.weight holds nan or inf")


def test_calibration_data_that_is_not_finite_is_named(tmp_path: Path, capsys: Out) -> None:
    # a mean and a tiny standard deviation push the values over the largest float
    data = {"name": "digits", "input": {"mean": [3.0e38], "std": [1.0e-30]}}
    recipe = write(tmp_path, data=data, stages=[{"calibrate": {"images": 64}}], export={})
    line = fails(capsys, ["run", recipe, "--out", str(tmp_path / "r")], 2)
    assert "nan or inf" in line or "finite" in line
    assert "'x'" in line
    assert not (tmp_path / "r" / "encodings.json").exists()


def test_zero_calibration_images_are_refused(tmp_path: Path, capsys: Out) -> None:
    recipe = write(tmp_path, stages=[{"calibrate": {"images": 0}}])
    fails(capsys, ["run", recipe], 2, "stages[0].calibrate.images is 0; it should be greater than 0")


def test_a_model_with_nothing_to_quantize_is_named(
    tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nothing_net.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return torch.sort(x).values\n"
    )
    monkeypatch.chdir(tmp_path)
    fails(capsys, ["plan", write(tmp_path, model={"factory": "nothing_net:Net"})], 2, "nothing to quantize")


def test_checkpoints_that_cannot_be_used_are_named(tmp_path: Path, capsys: Out) -> None:
    from qat.models import digits_cnn

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save(digits_cnn(6).state_dict(), tmp_path / "other.pth")
    torch.save({"stem.0.weight": Evil()}, tmp_path / "evil.pth")
    whole = tmp_path / "whole.pth"
    torch.save(digits_cnn(4).state_dict(), whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:2000])
    for name, part in (
        ("other.pth", "is of another model: stem.0.weight is (6, 1, 3, 3) where the model has (4, 1, 3, 3)"),
        ("evil.pth", "holds more than tensors and was not opened further"),
        ("cut.pth", "is truncated or no checkpoint"),
        ("none.pth", "cannot read"),
    ):
        recipe = write(tmp_path, model={**TINY["model"], "weights": str(tmp_path / name)})
        fails(capsys, ["run", recipe, "--out", str(tmp_path / "r")], 2, name, part)
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "r").exists()


def test_output_that_cannot_be_written_is_named(run_folder: str, tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "file").write_text("")
    inside = str(tmp_path / "file" / "x")
    fails(capsys, ["run", write(tmp_path), "--out", inside], 2, "cannot write", "choose")
    fails(capsys, ["export", run_folder, "--out", inside], 2, "cannot write", "choose")
    fails(capsys, ["calibrate", run_folder, "--out", inside, "--quiet"], 2, "cannot write", "choose")
    assert (tmp_path / "file").read_text() == ""


def test_sources_that_have_no_ranges_or_no_file_are_named(run_folder: str, tmp_path: Path, capsys: Out) -> None:
    fails(capsys, ["export", write(tmp_path)], 2, "the recipe alone has no ranges; give the folder of a finished run")
    fails(capsys, ["verify", write(tmp_path)], 2, "give --onnx FILE")
    fails(capsys, ["plan", str(tmp_path)], 2, "is not the folder of a run")
    fails(capsys, ["plan", run_folder, "seed=1"], 2, "its recipe cannot be changed")


def test_a_broken_contract_is_status_1(tmp_path: Path, capsys: Out) -> None:
    recipe = write(tmp_path, stages=["calibrate"], export={}, expect={"top1": 0.99})
    fails(capsys, ["run", recipe, "--out", str(tmp_path / "r"), "--quiet"], 1, "the recipe's contract does not hold")


def test_a_defect_is_told_apart_and_debug_shows_the_traceback(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    from qat.targets import load

    def broken() -> tuple[str, ...]:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(load, "target_names", broken)
    fails(capsys, ["targets"], 1, "defect of qat: ZeroDivisionError: oh; run again with --debug")
    assert main(["targets", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


# -- processes


def start(argv: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qat", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_ctrl_c_is_130_and_the_run_can_be_resumed(tmp_path: Path, capsys: Out) -> None:
    stages = [{"calibrate": {"images": 64}}, {"train": {"epochs": 100000, "optimizer": {"lr": 1e-6}}}]
    recipe, folder = write(tmp_path, stages=stages), tmp_path / "r"
    process = start(["run", recipe, "--out", str(folder)])
    try:
        log = folder / "log.txt"
        deadline = time.monotonic() + 120
        while not (log.is_file() and "epoch 2/" in log.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "qat: error: interrupted"
    assert "Traceback" not in error
    assert not list(folder.rglob("*.part"))
    assert not (folder / "model.onnx").exists()
    state = json.loads((folder / "metrics.json").read_text())
    assert (state["status"], len(state["stages"])) == ("running", 1)
    fails(capsys, ["run", recipe, "--out", str(folder)], 2, "holds an unfinished run; add --resume")
    fails(
        capsys, ["run", write(tmp_path), "--out", str(folder), "--resume"], 2, "is a run of another recipe: stages[0]"
    )


def test_a_closed_pipe_is_no_error() -> None:
    process = start(["recipe", "schema"])
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    error = process.stderr.read()
    assert process.wait(timeout=60) == 0
    assert error == ""
