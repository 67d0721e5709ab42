"""What changes with time: the learning rate, the phase of the quantizers, and whether batch norms stand still.

All are functions of the step alone, so that a training that is resumed anywhere goes on as it would have.
"""

from __future__ import annotations

import math
from typing import Literal

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
