"""Two processes train as one does; what they say where one of them fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from distributed_cases import CPU, TRAININGS, blobs_or, digits, free_port, network, norm_cases, normalize, run_trainings
from distributed_cases import worker as work
from hypothesis import given
from hypothesis import strategies as st

import qat
from qat.cli.main import main
from qat.errors import DataError, ProcessError
from qat.train import parallel, processes
from qat.train.data import Share, Split
from qat.train.evaluate import evaluate
from qat.train.log import read_log

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.filterwarnings("ignore:batches? of:UserWarning")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of everything."""
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_trainings(folder)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make of it."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(work, args=(str(folder), free_port()), nprocs=2)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", TRAININGS)
def test_the_curve_is_that_of_one_process(one: Path, two: Path, name: str) -> None:
    alone, first, second = (read(folder / f"{name}.json") for folder in (one, two / "0", two / "1"))
    assert first == second
    assert len(first) == len(alone) > 0
    # a code at the border of two may be the other one after another rounding
    rough = name in ("tracked", "learned", "scheduled", "diverging")
    for mine, theirs in zip(first, alone, strict=True):
        # and then an image or two of 192 may be on the other side
        shares = {key: mine.pop(key) - theirs.pop(key) for key in ("top1", "validation_top1")}
        assert all(abs(v) <= (2.5 / 192 if rough else 0) for v in shares.values()), name
        assert mine == pytest.approx(theirs, rel=2e-3 if rough else 1e-5), name
    if name == "diverging":
        assert first[0]["lr"] <= 0.05 * 3e4, "it did not go back"
    states = [torch.load(folder / f"{name}.pt", weights_only=True) for folder in (one, two / "0", two / "1")]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    for key, expected in states[0].items():
        assert torch.equal(states[1][key], states[2][key]), key
        if not rough:
            torch.testing.assert_close(states[1][key], expected, rtol=1e-4, atol=1e-5)


def test_calibrated_ranges_are_those_of_one_process(one: Path, two: Path) -> None:
    alone, first, second = (qat.Encodings.load(f / "calibrated.json") for f in (one, two / "0", two / "1"))
    assert alone == first == second
    assert alone["input"].samples == 100


@pytest.mark.parametrize("name", ["tracked", "scheduled"])
def test_ranges_are_those_of_one_process(one: Path, two: Path, name: str) -> None:
    alone, first, second = (qat.Encodings.load(f / f"{name}-encodings.json") for f in (one, two / "0", two / "1"))
    assert first == second
    assert list(first) == list(alone)
    for tensor, encoding in alone.items():
        assert (first[tensor].provenance, first[tensor].samples) == (encoding.provenance, encoding.samples), tensor
        assert first[tensor].scale == pytest.approx(encoding.scale, rel=1e-2), tensor
    assert first["input"] == alone["input"]
    assert first["input"].provenance == "qat"


def test_batch_norms_are_those_of_the_whole_batch(two: Path) -> None:
    torch.manual_seed(3)
    whole = [normalize(*case) for case in norm_cases()]
    parts = [torch.load(two / str(rank) / "normalized.pt", weights_only=True) for rank in (0, 1)]
    for alone, *both in zip(whole, *parts, strict=True):
        # results and gradients of images are parts, those of parameters are summed, statistics are the same
        y, dx, dweight, dbias, *statistics = alone
        for i, expected in enumerate((y, dx)):
            torch.testing.assert_close(torch.cat([p[i] for p in both]), expected, rtol=1e-4, atol=1e-5)
        for i, expected in ((2, dweight), (3, dbias)):
            torch.testing.assert_close(both[0][i] + both[1][i], expected, rtol=1e-4, atol=1e-4)
        for i, expected in enumerate(statistics, 4):
            assert torch.equal(both[0][i], both[1][i])
            torch.testing.assert_close(both[0][i], expected, rtol=1e-5, atol=1e-6)


def test_a_training_that_was_stopped_ends_with_the_same_bits(two: Path) -> None:
    states = {
        (where, rank): torch.load(two / f"{where}-{rank}.pt", weights_only=True)
        for where in ("stopped", "whole")
        for rank in (0, 1)
    }
    expected = states["whole", 0]
    for found in states.values():
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    logs = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in read_log(two / where / "log.jsonl")]
        for where in ("stopped", "whole")
    ]
    assert logs[0] == logs[1]
    assert {r["kind"] for r in logs[0]} == {"step", "epoch"}


def test_a_batch_with_too_few_images_is_left_out(two: Path) -> None:
    (said, loss), (silence, same) = (read(two / f"left-out-{rank}.json") for rank in (0, 1))
    assert said == ["  batches that have no image for one of 2 processes are left out"]
    assert silence == []
    assert loss == same


def test_what_processes_tell_each_other(two: Path) -> None:
    first, second = (read(two / f"messages-{rank}.json") for rank in (0, 1))
    assert first == second
    assert first["shared"] == {
        "a": ["torch.bfloat16", [[0.0] * 3] * 2],
        "b": ["torch.bool", True],
        "c": ["torch.float32", []],
    }
    assert first["texts"] == ["é", "éééé"]
    assert (first["first"], first["nothing"], first["sums"], first["each"]) == ("of 0", "", [3.0, 1.0], [7, 8])
    assert first["state"] == float(sum(p.detach().double().sum() for p in network().parameters()))
    alone = evaluate(network().eval(), blobs_or(digits(33, "keep")), quiet=True)
    assert {k: first["measured"][k] for k in ("top1", "top5", "n")} == {
        "top1": alone.top1, "top5": alone.top5, "n": alone.n,
    }  # fmt: skip
    assert first["measured"]["loss"] == pytest.approx(alone.loss, rel=1e-12)


def test_processes_fail_together(two: Path) -> None:
    first, second = (read(two / f"failures-{rank}.json") for rank in (0, 1))
    assert first[0] == "QatError: no place; make some"
    assert second[0] == "ProcessError: process 0 failed; see what it said"
    assert first[1] == "ProcessError: images of another process hold nan or inf; see what it said"
    assert second[1] == "DataError: images of epoch 1, step 2 hold nan or inf; check the data"
    assert first[2] == second[2]
    assert "a batch of 1 images (data.batch_size, of all processes together) leaves some of 2 processes" in first[2]


def test_a_process_that_ends_is_noticed(two: Path) -> None:
    expected = "ProcessError: another process ended, or does not answer; see what it said"
    assert (two / "ended.txt").read_text() == expected


# -- the command line

MODEL = """
import os
from torch import nn
from qat.errors import DataError

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(216, 10),
        )
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == 30 and os.environ.get("RANK") == os.environ.get("FAILING"):
            raise DataError("images/0815.png cannot be read", "replace it")
        return self.net(x)

def build():
    return Model()
"""
RECIPE = """
version: 1
name: failing
threads: 1
model: {factory: "failing_model:build"}
data: {name: digits, batch_size: 25, limit: {train: 640, test: 100}, validation: 40}
stages:
  - train: {phase: float, epochs: 2, checkpoint: {every_steps: 4}, log_every: 4}
"""
SHORT = (
    "stages.0.train.epochs=2", "stages.2.train.epochs=1", "stages.2.train.freeze_ranges_after=0.5",
    "stages.2.train.freeze_bn_after=0.5", "expect.top1=0.5",
)  # fmt: skip


def qat_run(folder: Path, count: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m"]
    if count > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*start, "qat", "run", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.mark.heavy
def test_a_recipe_is_run_by_two_processes(tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes" / "digits.yaml")
    folders = {1: tmp_path / "run1", 2: tmp_path / "run2"}
    for count, folder in folders.items():
        done = qat_run(tmp_path, count, recipe, *SHORT, "--out", folder.name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("contract: ") == 1, "only one process speaks"
    files = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in folders.values()]
    assert files[0] == files[1]
    runs = [read(f / "metrics.json") for f in folders.values()]
    assert [run["details"]["processes"] for run in runs] == [1, 2]
    assert [run["status"] for run in runs] == ["done", "done"]
    for alone, both in zip(*(read_log(f / "metrics.jsonl") for f in folders.values()), strict=True):
        assert (alone["kind"], alone["step"]) == (both["kind"], both["step"])
        assert both["loss"] == pytest.approx(alone["loss"], rel=1e-4 if alone["label"] == "float" else 1e-2)
    alone, both = (qat.Encodings.load(f / "encodings.json") for f in folders.values())
    assert list(alone) == list(both)
    for name, encoding in alone.items():
        assert (both[name].provenance, both[name].samples) == (encoding.provenance, encoding.samples), name


@pytest.mark.heavy
def test_a_failing_process_ends_the_run_which_can_be_resumed_by_as_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing_model.py").write_text(MODEL)
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert qat_run(tmp_path, 2, "r.yaml", "--out", "whole").returncode == 0
    failed = qat_run(tmp_path, 2, "r.yaml", "--out", "part", FAILING="1")
    assert failed.returncode != 0
    assert "qat: error (process 1 of 2): images/0815.png cannot be read; replace it" in failed.stderr
    assert "defect of qat" not in failed.stderr
    before = sorted((tmp_path / "part" / "checkpoints").rglob("epoch*"))
    assert before
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["run", "r.yaml", "--out", "part", "--resume"]) == 2
    assert "was written by 2 processes and now there are 1" in capsys.readouterr().err
    assert sorted((tmp_path / "part" / "checkpoints").rglob("epoch*")) == before
    done = qat_run(tmp_path, 2, "r.yaml", "--out", "part", "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming at epoch 2" in done.stdout
    for name in ("checkpoints/0-train-float.safetensors", "checkpoints/0-train-float-best.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "part" / name).read_bytes(), name
    # and what is wrong from the start leaves nothing behind
    few = qat_run(tmp_path, 2, "r.yaml", "--out", "few", "data.batch_size=1")
    assert "leaves some of 2 processes without any" in few.stderr
    assert not (tmp_path / "few").exists()


# -- without other processes


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_shares_make_up_the_whole(n: int, batch_size: int, size: int, drop_last: bool) -> None:
    x = torch.arange(n, dtype=torch.float32)

    def batches(epoch: int) -> Any:
        for start in range(0, n - n % batch_size if drop_last else n, batch_size):
            yield x[start : start + batch_size] + epoch, x[start : start + batch_size].long()

    split = Split("train", n, batch_size, batches, drop_last=drop_last)
    whole = list(split.batches(3))
    by_image = [list(split.sharded(Share(r, size)).remaining(3, 0)) for r in range(size)]
    for number, (values, labels) in enumerate(whole):
        parts = [batches_of_one[number] for batches_of_one in by_image]
        assert torch.equal(torch.cat([p[0] for p in parts]), values)
        assert torch.equal(torch.cat([p[1] for p in parts]), labels)
        lengths = [len(p[1]) for p in parts]
        assert max(lengths) - min(lengths) <= 1
    by_batch = [split.sharded(Share(r, size, "batch")) for r in range(size)]
    assert [len(list(part)) for part in by_batch] == [part.own_steps for part in by_batch]
    together = sorted(float(v) for part in by_batch for values, _ in part.remaining(3, 0) for v in values)
    assert together == sorted(float(v) for values, _ in whole for v in values)
    for count in (1, batch_size + 1, n):
        seen = sorted(float(v) for part in by_batch for values in part.images(count) for v in values)
        assert seen == sorted(float(v) for values in split.images(count) for v in values)


def test_shares_of_images_are_made_without_the_others(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    from qat.train.data import AugmentSpec, DataSpec, load_data

    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(7):
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"train/{name}/{i}.png")
    augment = AugmentSpec(flip=True, crop_padding=2, random_area=(0.3, 1.0))
    spec = DataSpec("image_folder", tmp_path, batch_size=4, augment=augment, last_batch="keep", skip_bad=True)
    folder = load_data(spec).train
    assert folder is not None
    for split in (folder, digits(33, "keep")):
        whole = list(split.batches(2))
        parts = [list(split.sharded(Share(r, 3)).remaining(2, 1)) for r in range(3)]
        for number, (x, y) in enumerate(whole[1:]):
            given = [part[number] for part in parts if len(part[number][1])]
            assert torch.equal(torch.cat([g[0] for g in given]), x)
            assert torch.equal(torch.cat([g[1] for g in given]), y)
        for rank in range(2):
            mine = list(split.sharded(Share(rank, 2, "batch")))
            assert all(torch.equal(a[0], b[0]) for a, b in zip(mine, list(split)[rank::2], strict=True))
    # a process all of whose images cannot be read goes on in step with the others
    for path in folder_files(tmp_path):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="no readable image"):
        list(folder.sharded(Share(0, 2)).remaining(2, 0))
    assert [len(y) for _, y in folder.sharded(Share(0, 2)).remaining(2, 1)] == [0, 0, 0]


def folder_files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.png"))


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


def test_the_place_is_that_of_torchrun() -> None:
    assert processes.place_by_environment(TORCHRUN) == processes.Place(1, 4, 0)
    # a batch system may set these for purposes of its own
    alone = {"WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert processes.place_by_environment(alone) == processes.Place()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "has LOCAL_RANK but not RANK; start several processes with torchrun, or unset LOCAL_RANK"),
        ({"MASTER_ADDR": None, "LOCAL_RANK": None}, "has RANK but not LOCAL_RANK, MASTER_ADDR;"),
        ({"WORLD_SIZE": "many"}, "the variable WORLD_SIZE is 'many'"),
        ({"RANK": "4"}, "the variable RANK is 4 and WORLD_SIZE is 4"),
    ],
)
def test_half_an_environment_is_refused(change: dict[str, str | None], message: str) -> None:
    environment = {k: v for k, v in {**TORCHRUN, **change}.items() if v is not None}
    with pytest.raises(ProcessError, match=message):
        processes.place_by_environment(environment)


def test_processes_that_cannot_be_reached_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import timedelta

    for name, value in {**TORCHRUN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    patience = timedelta(seconds=1)
    with (
        pytest.raises(ProcessError, match=r"process 1 of 4 cannot reach the others at 127\.0\.0\.1:\d+"),
        processes.joined(CPU, patience),
    ):
        pass


def test_what_a_single_process_does_is_not_changed() -> None:
    with processes.joined(CPU):
        assert processes.size() == 1
        assert processes.text_of_first(lambda: "x") == "x"
        assert processes.text_of_each("y") == ["y"]
        assert processes.summed([1, 2.5]) == [1, 2.5]
    with pytest.raises(RuntimeError, match="gloo is not the cause"), processes.joined(CPU):
        raise RuntimeError("gloo is not the cause")
    parallel.check_batch_size(1, 1)
    part = parallel.part_of_batch(5)
    assert (part.own, part.whole, part.smallest, part.weight) == (5, 5, 5, 1.0)


def test_gpus_are_given_by_the_rank_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from qat.errors import RecipeError
    from qat.recipe.load import parse_recipe
    from qat.recipe.stages import choose_device

    def recipe(device: str) -> Any:
        return parse_recipe(
            {"version": 1, "name": "r", "device": device, "model": {"factory": "m:f"}, "data": {"name": "digits"}}
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(recipe("auto")) == torch.device("cuda")
    for name, value in {**TORCHRUN, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert choose_device(recipe("cuda")) == torch.device("cuda", 1)
    assert choose_device(recipe("cpu")) == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RecipeError, match="this machine has 2 GPUs and process 2 of it has none; start at most 2"):
        choose_device(recipe("auto"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="torch finds no GPU"):
        choose_device(recipe("cuda"))
