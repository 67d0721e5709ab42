"""What may take part in training: terms of the loss, work after a step, numbers for the log, state for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch of training came to.

    Attributes:
        epoch: Number of the epoch, from 1.
        loss: Mean loss.
        top1: Share of training images that were classified rightly on the way.
        lr: Learning rate of the last step.
        seconds: Wall time.
        validation_top1: Share of the validation images that are classified rightly; None without such images.
        validation_loss: Mean cross-entropy of the validation images, nats; None without such images.
    """

    epoch: int
    loss: float
    top1: float
    lr: float
    seconds: float
    validation_top1: float | None = None
    validation_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object; what was not measured is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Hook:
    """Something that takes part in the training of a model; every method may be left as it is."""

    #: unique among the hooks of a training; prefixes its state in a checkpoint and its numbers in the log
    name = "hook"

    def epoch_start(self, model: nn.Module, epoch: int) -> None:
        """Before epoch `epoch` (from 0)."""

    def loss(self, model: nn.Module) -> Tensor | None:  # noqa: ARG002 - for those that override it
        """Return a scalar that is added to the loss of a step, or None; called after the forward pass."""
        return None

    def step_end(self, model: nn.Module) -> None:
        """After the optimizer has changed the parameters."""

    def metrics(self) -> Mapping[str, float]:
        """Return numbers for the log, as of now."""
        return {}

    def epoch_end(self, model: nn.Module, record: EpochRecord) -> None:
        """After an epoch."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return what has to survive a checkpoint, as tensors."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            CheckpointError: It is not of this model.
        """
