"""Training that is stopped anywhere goes on to the same bits; what damaged or foreign checkpoints get."""

from __future__ import annotations

import random
import shutil
from collections import namedtuple
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training_cases import blobs, same_state, small

import qat
from qat.errors import CheckpointError, OutputError, TrainError
from qat.graph.prepared import PreparedModel
from qat.train.data import AugmentSpec, DataSpec, Split, load_data
from qat.train.hooks import Hook
from qat.train.log import TrainingLog, read_log
from qat.train.rng import random_state, set_random_state
from qat.train.settings import (
    CheckpointSettings,
    DistillSettings,
    GuardSettings,
    OptimizerSettings,
    TrainSettings,
)
from qat.train.store import TrainingCheckpoints
from qat.train.trainer import fit


class Stop(Exception):
    """Stands in for a process that ends."""


class Counting(Hook):
    """Keeps state, and draws from every generator."""

    name = "counting"

    def __init__(self, stop_after: int | None = None) -> None:
        self.steps, self.sum, self.stop_after = 0, torch.zeros(3), stop_after

    def loss(self, model: nn.Module) -> Tensor:
        noise = torch.rand(()).item() + random.random() + np.random.rand()  # noqa: NPY002
        first = next(p for p in model.parameters() if p.requires_grad)
        return 1e-3 * noise * first.square().sum()

    def step_end(self, model: nn.Module) -> None:
        self.steps += 1
        self.sum += torch.rand(3)
        if self.steps == self.stop_after:
            raise Stop

    def metrics(self) -> Mapping[str, float]:
        return {"steps": self.steps, "sum": float(self.sum.sum())}

    def state_dict(self) -> Mapping[str, Tensor]:
        return {"steps": torch.tensor(self.steps), "sum": self.sum}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.steps, self.sum = int(tensors["steps"]), tensors["sum"].clone()


def prepared() -> PreparedModel:
    x = blobs(16)
    model = small()
    model.insert(3, nn.Dropout(0.2))
    qmodel = qat.prepare(model.train(), next(iter(x))[0], target=qat.load_target("onnxruntime-cpu"))
    with pytest.warns(UserWarning, match="samples only"):
        qat.calibrate(qmodel, [next(iter(x))[0]])
    return qmodel


EVERY_TWO = CheckpointSettings(every_steps=2, keep=2)
ALL = TrainSettings(
    epochs=4,
    optimizer=OptimizerSettings("adamw", lr=0.02, weight_decay=0.01),
    accumulate=2,
    clip_norm=1.0,
    quantize_after=0.5,
    freeze_ranges_after=2,
    freeze_bn_after=3,
    ema=0.9,
    patience=2,
    distill=DistillSettings(features=("0",)),
    checkpoint=EVERY_TWO,
)


def train(
    model: nn.Module, folder: Path, settings: TrainSettings, hook: Counting, said: list[str] | None = None
) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    store = TrainingCheckpoints(folder / "c", settings.checkpoint.keep)
    say = (lambda line: None) if said is None else said.append
    log = TrainingLog(folder / "log.jsonl", every=2)
    folder.mkdir(exist_ok=True)
    fit(
        model, blobs(), settings, teacher=small(), hooks=[hook], validation=blobs(24, name="validation"), store=store,
        log=log, say=say, quiet=True,
    )  # fmt: skip


def lines(folder: Path) -> list[object]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_log(folder / "log.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedModel, Path, Counting]:
    model, folder, hook = prepared(), tmp_path_factory.mktemp("whole"), Counting()
    train(model, folder, ALL, hook)
    return model, folder, hook


@pytest.mark.parametrize("stops", [(1,), (2,), (4,), (6, 7), (9, 11), (3, 4, 5, 8)])
def test_a_stopped_training_ends_as_one_that_was_not(
    whole: tuple[PreparedModel, Path, Counting], tmp_path: Path, stops: tuple[int, ...]
) -> None:
    for stop in stops:
        with pytest.raises(Stop):
            train(prepared(), tmp_path, ALL, Counting(stop))
    model, hook = prepared(), Counting()
    said: list[str] = []
    train(model, tmp_path, ALL, hook, said)
    assert same_state(model, whole[0])
    assert model.encodings() == whole[0].encodings()
    assert (hook.steps, hook.sum.tolist()) == (whole[2].steps, whole[2].sum.tolist())
    assert lines(tmp_path) == lines(whole[1])
    # one step of the optimizer is two batches, and checkpoints are two batches apart
    assert any("resuming at epoch" in line for line in said) == (stops[-1] > 1)


@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_a_training_that_went_back_is_resumed_with_its_lower_rate(tmp_path: Path, stop: int) -> None:
    settings = TrainSettings(
        epochs=3,
        optimizer=OptimizerSettings(lr=1e4, momentum=0.9),
        guard=GuardSettings(retries=9, factor=0.2),
        checkpoint=CheckpointSettings(every_steps=1),
    )

    def run(folder: Path, hook: Counting) -> tuple[nn.Module, list[str]]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 3))
        said: list[str] = []
        train(model, folder, settings, hook, said)
        return model, said

    expected, said = run(tmp_path / "whole", Counting())
    assert any("of the learning rate (2 of 9)" in line for line in said)
    with pytest.raises(Stop):
        run(tmp_path / "stopped", Counting(stop))
    model, _ = run(tmp_path / "stopped", Counting())
    assert same_state(model, expected)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    assert any(r["kind"] == "return" for r in read_log(tmp_path / "whole" / "log.jsonl"))


def test_the_log_tells_steps_epochs_and_what_hooks_count(whole: tuple[PreparedModel, Path, Counting]) -> None:
    records = read_log(whole[1] / "log.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert [r["step"] for r in steps] == list(range(2, 2 * len(steps) + 1, 2))
    assert [r["counting.steps"] for r in steps] == list(range(1, len(steps) + 1))
    assert [r["epoch"] for r in epochs] == list(range(1, len(epochs) + 1))
    assert all(0 <= r["validation_top1"] <= 1 and r["validation_loss"] > 0 for r in epochs)
    assert all(r["gradient_norm"] > 0 and r["lr"] > 0 for r in steps)
    # the mean of a window and of an epoch agree
    first = [r["loss"] for r in steps if r["epoch"] == 1]
    assert sum(first) / len(first) == pytest.approx(epochs[0]["loss"])


def test_the_newest_checkpoints_and_the_best_are_kept(whole: tuple[PreparedModel, Path, Counting]) -> None:
    names = sorted(p.name for p in (whole[1] / "c").iterdir())
    assert len([n for n in names if n.startswith("epoch")]) == 2
    assert 1 <= len([n for n in names if n.startswith("best")]) <= 3


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    whole: tuple[PreparedModel, Path, Counting], tmp_path: Path, how: str
) -> None:
    with pytest.raises(Stop):
        train(prepared(), tmp_path, ALL, Counting(8))
    newest = max((tmp_path / "c").glob("epoch*"))
    raw = bytearray(newest.read_bytes())
    if how == "cut":
        raw = raw[:-10]
    else:
        raw[-5] ^= 4
    newest.write_bytes(raw)
    said: list[str] = []
    model = prepared()
    train(model, tmp_path, ALL, Counting(), said)
    assert newest.name in said[0]
    assert "cannot be used" in said[0]
    assert "going on from the one before" in said[0]
    assert any(line.startswith("  resuming at epoch 3, step 1") for line in said)
    assert same_state(model, whole[0])
    assert lines(tmp_path) == lines(whole[1])


def test_without_a_whole_checkpoint_training_begins_anew(
    whole: tuple[PreparedModel, Path, Counting], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        train(prepared(), tmp_path, ALL, Counting(8))
    for path in (tmp_path / "c").iterdir():
        path.write_bytes(b"")
    said: list[str] = []
    model = prepared()
    train(model, tmp_path, ALL, Counting(), said)
    assert len([line for line in said if "cannot be used" in line]) == 2
    assert not any("resuming" in line for line in said)
    assert same_state(model, whole[0])


def test_batches_that_are_skipped_are_not_made() -> None:
    made: list[tuple[int, int]] = []
    split = load_data(DataSpec("digits", batch_size=64, limit={"train": 640})).train
    assert split is not None
    assert split.batches_from is not None

    def batches_from(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        made.append((epoch, first))
        yield from split.batches_from(epoch, first)  # type: ignore[misc]

    watched = Split("train", split.n, 64, split.batches, drop_last=split.drop_last, batches_from=batches_from)
    assert len(list(watched.remaining(3, 7))) == 3
    assert made == [(3, 7)]
    plain = Split("train", split.n, 64, split.batches, drop_last=split.drop_last)
    for a, b in zip(plain.remaining(3, 7), watched.remaining(3, 7), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_later_batches_are_the_same_however_they_are_come_by(tmp_path: Path, workers: int) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(9):
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / f"train/{name}/{i}.png")
    augment = AugmentSpec(flip=True, crop_padding=2, random_area=(0.3, 1.0))
    spec = DataSpec("image_folder", tmp_path, batch_size=4, augment=augment, workers=workers, last_batch="keep")
    for split in (
        load_data(spec).train,
        load_data(DataSpec("digits", batch_size=300, augment=AugmentSpec(True, 2))).train,
    ):
        assert split is not None
        every = list(split.batches(2))
        assert len(every) == split.steps
        for first in range(1, split.steps):
            later = list(split.remaining(2, first))
            assert len(later) == split.steps - first
            assert all(torch.equal(a[0], b[0]) for a, b in zip(later, every[first:], strict=True))
            assert all(torch.equal(a[1], b[1]) for a, b in zip(later, every[first:], strict=True))


def test_another_number_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stop):
        train(prepared(), tmp_path, ALL, Counting(4))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    store = TrainingCheckpoints(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"was written by 1 processes and now there are 2, .* as many processes"):
        store.latest(lambda line: None)


@pytest.mark.parametrize("what", ["torch", "threads"])
def test_another_torch_or_number_of_threads_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with pytest.raises(Stop):
        train(prepared(), tmp_path, ALL, Counting(4))
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.warns(UserWarning, match=rf"was written with {what}.*there is 99.*may end with other bits"):
        assert TrainingCheckpoints(tmp_path / "c").latest(lambda line: None) is not None


def test_a_disk_that_is_too_small_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 9, 1000))
    hook = Counting()
    with pytest.raises(OutputError, match=r"checkpoints of this training need \d+\.\d MiB in .*c and 0\.0 MiB"):
        train(prepared(), tmp_path, ALL, hook)
    assert hook.steps == 0


def test_a_checkpoint_of_another_model_or_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(prepared(), tmp_path, ALL, Counting(4))
    other = small(5)
    with pytest.raises(CheckpointError, match="the checkpoint is of another model"):
        train(other, tmp_path, TrainSettings(epochs=4), Counting())


def test_a_log_that_does_not_belong_to_the_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(prepared(), tmp_path, ALL, Counting(8))
    path = tmp_path / "log.jsonl"
    text = path.read_text()
    path.write_text("")
    with pytest.raises(CheckpointError, match=r"log\.jsonl has 0 whole lines and the checkpoint speaks of \d+"):
        train(prepared(), tmp_path, ALL, Counting())
    path.write_text(text + "no record\n")
    with pytest.raises(CheckpointError, match=r"line \d+ of .*log\.jsonl is no record"):
        train(prepared(), tmp_path, ALL, Counting())


def test_hooks_of_one_name_are_refused() -> None:
    with pytest.raises(TrainError, match="two hooks of the training are called 'counting'"):
        fit(small(), blobs(), TrainSettings(), hooks=[Counting(), Counting()])


def test_random_numbers_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [torch.rand(()).item(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]  # noqa: NPY002

    draw()
    tensors, values = random_state()
    first = draw()
    draw()
    set_random_state(tensors, values)
    assert draw() == first
    with pytest.raises(CheckpointError, match="state of the random numbers is malformed"):
        set_random_state({"torch": tensors["torch"]}, values)
    with pytest.raises(CheckpointError, match="state of the random numbers is malformed"):
        set_random_state({**tensors, "torch": torch.zeros(3, dtype=torch.uint8)}, values)
