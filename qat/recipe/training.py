"""A training stage of a run: everything that takes part in it, from what the recipe and the folder say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import qat
from qat.errors import DataError
from qat.graph.prepared import PreparedModel
from qat.recipe.convert import train_settings
from qat.recipe.folder import BOARD, CURVES, TRAINING_LOG
from qat.recipe.schema_train import TrainPart
from qat.train import processes
from qat.train.board import Board
from qat.train.curves import draw_curves
from qat.train.data import Data
from qat.train.hooks import EpochRecord, Hook
from qat.train.log import TrainingLog
from qat.train.store import TrainingCheckpoints
from qat.train.trainer import fit

#: within the folder of checkpoints: those of stages that are not finished
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Place:
    """Where a training stage writes.

    Attributes:
        run: Folder of the run.
        checkpoints: Folder of its checkpoints.
        index: Number of the stage.
        label: What is trained, `float` or `QAT`.
    """

    run: Path
    checkpoints: Path
    index: int
    label: str

    def store(self, keep: int) -> TrainingCheckpoints:
        """The checkpoints of this training while it lasts."""
        return TrainingCheckpoints(self.checkpoints / UNFINISHED / f"{self.index}-{self.label.lower()}", keep)


class Tell(Hook):
    """Says after each epoch how it went.

    Args:
        say: Gets the line.
        epochs: Number of epochs.
    """

    name = "tell"

    def __init__(self, say: Callable[[str], None], epochs: int) -> None:
        self._say, self._epochs = say, epochs

    def epoch_end(self, model: nn.Module, record: EpochRecord) -> None:  # noqa: ARG002 - the hook's signature
        """Say it."""
        top1 = record.validation_top1
        validation = "" if top1 is None else f" validation top-1 {100 * top1:.2f} %,"
        self._say(
            f"  epoch {record.epoch}/{self._epochs}: loss {record.loss:.4f}, train top-1 {100 * record.top1:.2f} %,"
            f"{validation} lr {record.lr:.3g}, {record.seconds:.1f} s"
        )


def train(
    model: nn.Module,
    data: Data,
    part: TrainPart,
    *,
    place: Place,
    teacher: nn.Module | None,
    say: Callable[[str], None],
    quiet: bool,
) -> list[EpochRecord]:
    """Train the float or the quantized model in place, going on from the stage's checkpoints where there are any.

    Raises:
        DataError: There are no training images.
        TrainError: Training diverges for all that the guard does.
        CheckpointError: The stage's checkpoints are of another number of processes.
        OutputError: Checkpoints cannot be written, or will not fit on the disk.
    """
    if data.train is None:
        raise DataError("the data has no labelled training images", "give data.train, or leave out the train stage")
    board = Board(place.run / BOARD / f"{place.index}-{place.label.lower()}") if part.tensorboard else None
    hooks: list[Hook] = [Tell(say, part.epochs)]
    store = place.store(part.checkpoint.keep)
    records = fit(
        model,
        data.train,
        train_settings(part),
        teacher=teacher,
        hooks=hooks,
        validation=data.validation,
        store=store,
        log=TrainingLog(place.run / TRAINING_LOG, place.index, place.label, part.log_every, board),
        say=say,
        quiet=quiet,
        description="train" if part.phase == "float" else "QAT",
    )
    if part.reestimate_bn is not None and isinstance(model, PreparedModel):
        images: Any = data.calibration.images(part.reestimate_bn)
        progress = False if quiet else None
        names = qat.reestimate_batch_norm(model, images, samples=part.reestimate_bn, progress=progress)
        say(f"  statistics of {len(names)} batch norms taken anew")
    if not processes.is_first():
        return records
    if part.patience is None:
        # where there is patience, the best one is the one that is kept anyway
        store.keep_best(place.checkpoints / f"{place.index}-train-{place.label.lower()}-best.safetensors")
    draw_curves(place.run / TRAINING_LOG, place.run / CURVES)
    return records
