"""What changes with time: the learning rate, the phase of the quantizers, and whether batch norms stand still.

All are functions of the step alone, so that a training that is resumed anywhere goes on as it would have.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.train.settings import ScheduleSettings, TrainSettings


def rate_factor(settings: ScheduleSettings, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return what the learning rate is multiplied with at `step` (from 0)."""
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.name == "cosine":
        whole = max(1, epochs * steps_per_epoch - warmup)
        part = min(1.0, (step - warmup) / whole)
        return settings.final + (1.0 - settings.final) * 0.5 * (1.0 + math.cos(math.pi * part))
    if settings.name == "step":
        return float(settings.gamma ** (step // (settings.step_epochs * steps_per_epoch)))
    return 1.0


def _reached(epochs: float | None, step: int, steps_per_epoch: int) -> bool:
    return epochs is not None and step >= round(epochs * steps_per_epoch)


def phase_at(settings: TrainSettings, step: int, steps_per_epoch: int) -> Literal["follow", "track", "quantize"]:
    """Return the phase of a prepared model at `step` (from 0 over all epochs).

    `follow`: ranges follow, values stay float; `track`: fake quantization with ranges that follow; `quantize`: with
    ranges that stand still.
    """
    if not _reached(settings.quantize_after, step, steps_per_epoch):
        return "follow"
    return "quantize" if _reached(settings.freeze_ranges_after, step, steps_per_epoch) else "track"


def norms_frozen_at(settings: TrainSettings, step: int, steps_per_epoch: int) -> bool:
    """Tell whether the statistics of batch norms stand still at `step`."""
    return _reached(settings.freeze_bn_after, step, steps_per_epoch)


@runtime_checkable
class Prepared(Protocol):
    """What training needs of a model that was prepared for quantization."""

    def set_phase(self, phase: str) -> Any:
        """Switch to `follow` (float, ranges follow the data), `track` (they do too) or `quantize` (they do not)."""

    def freeze_batch_norm(self) -> Any:
        """Let batch norm statistics stand still."""


class Timetable:
    """Brings the phases and batch norms of a model to where the schedule has them.

    Args:
        model: The model; one that is not `Prepared` is left as it is.
        settings: With the times.
        steps: Batches in an epoch.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings, steps: int) -> None:
        self._model, self._settings, self._steps = model, settings, steps
        self.forget()

    def forget(self) -> None:
        """The model has another state now."""
        self._phase: str | None = None
        self._norms_frozen = False

    @property
    def begun(self) -> bool:
        """Whether the model was brought to a phase."""
        return self._phase is not None

    def enter(self, step: int) -> bool:
        """Bring the model to where it is at a step, counted over all epochs; tell whether that changed anything."""
        if not isinstance(self._model, Prepared):
            return False
        phase = phase_at(self._settings, step, self._steps)
        freezes = not self._norms_frozen and norms_frozen_at(self._settings, step, self._steps)
        changes = phase != self._phase
        if changes:
            self._model.set_phase(phase)
            self._phase = phase
        if freezes:
            self._model.freeze_batch_norm()
            self._norms_frozen = True
        return changes or freezes

    def trains_norms(self) -> bool:
        """Tell whether batch norms use the statistics of the batch."""
        return any(isinstance(module, _BatchNorm) and module.training for module in self._model.modules())
