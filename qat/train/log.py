"""The log of a training: one JSON line every so many steps and every epoch, and TensorBoard where asked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from qat.errors import CheckpointError, OutputError
from qat.files import atomic_write_text
from qat.train.board import Board
from qat.train.hooks import EpochRecord


@dataclass(frozen=True)
class StepRecord:
    """Where a training is after a step.

    Attributes:
        epoch: Number of the epoch, from 1.
        step: Batches so far, over all epochs.
        loss: Mean loss since the last record.
        top1: Share of training images classified rightly since the last record.
        lr: Learning rate of the step.
        gradient_norm: Norm of the gradient of all parameters, before clipping.
        metrics: Numbers of the hooks, by `hook.number`.
    """

    epoch: int
    step: int
    loss: float
    top1: float
    lr: float
    gradient_norm: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingLog:
    """A file of JSON lines to which the trainings of a run append, each under the number of its stage.

    Every line has `kind` (`step`, `epoch` or `return`), `stage`, `label`, `epoch` and `step`; the other keys of `step`
    and `epoch` are those of `StepRecord` and `EpochRecord`; a `return` says why training went back to a good state.

    Attributes:
        path: The file.
        stage: Number of the stage.
        label: What is trained.
        every: Steps between two lines.
        board: TensorBoard's writer, or None.
    """

    path: Path
    stage: int = 0
    label: str = "train"
    every: int = 50
    board: Board | None = None

    def begin(self, lines: int | None = None, step: int = 0) -> None:
        """Remove what a training that did not come to its end has written after the point where it goes on.

        Args:
            lines: Lines to keep, as `position` said there; None to keep those of earlier stages.
            step: Batches that are done.

        Raises:
            CheckpointError: The file holds something else, or fewer lines.
            OutputError: It cannot be written.
        """
        found = self._lines()
        if lines is None:
            kept = [line for line in found if json.loads(line)["stage"] < self.stage]
        elif lines > len(found):
            raise CheckpointError(
                f"{self.path} has {len(found)} whole lines and the checkpoint speaks of {lines}",
                "put the file back, or start again with --overwrite",
            )
        else:
            kept = found[:lines]
        text = "".join(f"{line}\n" for line in kept)
        if not self.path.exists() or self.path.read_text(encoding="utf-8") != text:
            atomic_write_text(self.path, text)
        if self.board is not None:
            self.board.begin(step)

    def position(self) -> int:
        """Return the number of lines, all of which are on the disk afterwards."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return sum(1 for _ in file)

    def step(self, record: StepRecord, model: nn.Module) -> None:
        """Note a step.

        Raises:
            OutputError: The file cannot be written.
        """
        metrics = dict(record.metrics)
        self._write("step", {**{k: v for k, v in vars(record).items() if k != "metrics"}, **metrics})
        if self.board is not None:
            self.board.step(record, model)

    def epoch(self, record: EpochRecord, step: int) -> None:
        """Note the end of an epoch; `step` is the number of batches so far, over all epochs.

        Raises:
            OutputError: The file cannot be written.
        """
        self._write("epoch", {"step": step, **record.to_json()})
        if self.board is not None:
            self.board.epoch(record, step)

    def went_back(self, cause: str, epoch: int, step: int, rate: float) -> None:
        """Note that training diverged and went back to a good state.

        Args:
            cause: What was seen.
            epoch: Where it goes on, from 1.
            step: Batches that are done there, over all epochs.
            rate: What the learning rate is multiplied with from now on.
        """
        self._write("return", {"epoch": epoch, "step": step, "cause": cause, "rate": rate})

    def close(self) -> None:
        """Finish what TensorBoard reads."""
        if self.board is not None:
            self.board.close()

    def _lines(self) -> list[str]:
        """The whole lines of the file; the last one may be cut off where a process was killed."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {self.path} ({error})", "start again with --overwrite") from None
        lines = text.split("\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                int(json.loads(line)["stage"])
            except (ValueError, KeyError, TypeError):
                raise CheckpointError(
                    f"line {number} of {self.path} is no record of a training", "start again with --overwrite"
                ) from None
        return lines

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        line = json.dumps({"kind": kind, "stage": self.stage, "label": self.label, **values})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path} ({error.strerror})", "free some space") from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log, also of one whose last line is cut off."""
    log = TrainingLog(path)
    return [json.loads(line) for line in log._lines()]
