"""`OscillationSettings`: what is done about weights that oscillate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qat.errors import StateError


@dataclass(frozen=True)
class OscillationSettings:
    """What is done about oscillations; the defaults are the authors' for MobileNetV2 at 4 bits.

    Attributes:
        enabled: `auto`: where the model has weights below 8 bits.
        momentum: Weight of a step in the moving averages of codes and of oscillation.
        dampen: Weight of the dampening loss; 0 for none. The authors' is 0.1, in place of freezing.
        dampen_schedule: `cosine`: from 0 to `dampen` over the training; `constant`.
        freeze: Frequency of oscillation above which a weight is frozen, at the start; None to freeze none.
        freeze_final: The same at the end, by a cosine; None for a constant threshold.
    """

    enabled: bool | Literal["auto"] = "auto"
    momentum: float = 0.01
    dampen: float = 0.0
    dampen_schedule: Literal["constant", "cosine"] = "cosine"
    freeze: float | None = 0.1
    freeze_final: float | None = 0.01

    def __post_init__(self) -> None:
        _check(self.enabled in (True, False, "auto"), "enabled", self.enabled, "give true, false or auto")
        _check(0.0 < self.momentum <= 1.0, "momentum", self.momentum, "give a number in (0, 1]")
        _check(0.0 <= self.dampen < math.inf, "dampen", self.dampen, "give 0 or a positive number")
        schedules = ("constant", "cosine")
        _check(self.dampen_schedule in schedules, "dampen_schedule", self.dampen_schedule, "give constant or cosine")
        for name, value in (("freeze", self.freeze), ("freeze_final", self.freeze_final)):
            _check(value is None or 0.0 < value <= 1.0, name, value, "give a frequency in (0, 1], or null")

    @property
    def is_scheduled(self) -> bool:
        """Whether something changes over the training, whose length must then be known."""
        dampens = self.dampen > 0.0 and self.dampen_schedule == "cosine"
        return dampens or (self.freeze is not None and self.freeze_final is not None)


def _check(ok: bool, name: str, value: object, mend: str) -> None:
    if not ok:
        raise StateError(f"oscillation.{name} is {value!r}", mend)
