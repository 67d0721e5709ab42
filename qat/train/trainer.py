"""Training of classifiers, float or prepared for quantization, that can be stopped and resumed anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from qat.errors import DataError
from qat.train.data import Split
from qat.train.hooks import EpochRecord, Hook
from qat.train.log import TrainingLog
from qat.train.loop import Loop
from qat.train.objective import Objective
from qat.train.oscillation import OscillationTracker, is_prepared, prepared_model
from qat.train.settings import TrainSettings
from qat.train.store import TrainingCheckpoints


def _silent(line: str) -> None:
    """Say nothing."""


def fit(
    model: nn.Module,
    split: Split,
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    hooks: Sequence[Hook] = (),
    validation: Split | None = None,
    store: TrainingCheckpoints | None = None,
    log: TrainingLog | None = None,
    say: Callable[[str], None] = _silent,
    quiet: bool = False,
    description: str = "train",
) -> list[EpochRecord]:
    """Train a classifier in place; it is left in evaluation mode.

    With a `store` that holds checkpoints of this very training, it goes on from the newest one that is whole, and ends
    with the bits that it would have had without interruption (same machine, torch, number of threads and processes).

    Where `torch.distributed` has a default group, every process calls this, with the same arguments; each trains on its
    part of every batch, and only the first one writes and says anything. Losses, records and decisions are those of all
    (`docs/training.md`, "Several processes").

    Args:
        model: Gives scores (N, classes) for images (N, C, H, W) float32. A model that has `set_phase` and
            `freeze_batch_norm` is trained with ranges that follow the data until `freeze_ranges_after`.
        split: Labelled training images.
        settings: How.
        teacher: The float model, where `settings.distill` is given; not changed.
        hooks: What takes part, in order; after them the losses of quantizers, and where `settings.oscillation` asks for
            it an `OscillationTracker`.
        validation: Labelled images that each epoch is measured on, or None.
        store: Where checkpoints are written to, or None.
        log: What is told about steps and epochs, or None.
        say: Gets lines about what is out of the ordinary.
        quiet: No progress bar.
        description: Text of the progress bar.

    Returns:
        One record an epoch, those before an interruption among them.

    Raises:
        DataError: The split has no labels, the scores do not fit them, or images hold nan or inf. Or its batches have
            fewer images than there are processes.
        TrainError: Training diverges for all that the guard does; epoch and step are named. Or distillation without a
            float model, or hooks of one name.
        CheckpointError: A checkpoint in the store is of another model or number of processes.
        ProcessError: Another process failed.
        OutputError: A checkpoint or the log cannot be written, or will not fit on the disk.
    """
    if not split.labelled or split.steps == 0:
        raise DataError("the train split has no labelled images", "put the images in class folders or give labels")
    objective = Objective(model, settings, teacher)
    hooks = [*hooks, *_quantization_hooks(model, settings, split.steps)]
    with objective.watching():
        loop = Loop(model, split, settings, objective, hooks, validation, store, log, say, quiet, description)
        return loop.run()


class QuantizerLoss(Hook):
    """Adds what quantizers have to say to the loss (`PreparedModel.quantizer_loss`)."""

    name = "quantizers"

    def loss(self, model: nn.Module) -> Tensor | None:
        """Return the term, or None."""
        return prepared_model(model).quantizer_loss()


def _quantization_hooks(model: nn.Module, settings: TrainSettings, steps: int) -> list[Hook]:
    if not is_prepared(model):
        return []
    updates = settings.epochs * -(-steps // settings.accumulate)
    tracker = OscillationTracker.for_model(model, settings.oscillation, total_steps=updates)
    return [QuantizerLoss(), *([] if tracker is None else [tracker])]
