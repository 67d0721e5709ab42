"""ULQ: both ends of the clip range are learned.

Source: the AMCT toolkit (`ulq_quantize` for activations, `ulq_retrain` for weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from qat.observers.options import Option
from qat.quantizers.method import FLOOR, Method, Start, at_least, range_of_grid


class ULQ(Method):
    """`clip_min` and `clip_max` are parameters; scale and zero point follow from them, with zero inside.

    `scale = (high - low) / (qmax - qmin)`, `zero point = round(qmin - low / scale)`, with `low = min(clip_min, 0)` and
    `high = max(clip_max, 0)`. All roundings are straight through: an end gets the gradient 1 from what it clips, and
    from what lies inside the range that of the rounding error over the number of steps. A symmetric tensor has only
    `clip_max`, its largest magnitude.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "fixed_min": Option(bool, False, about="the lower end stays; of tensors that are not symmetric"),
    }
    name = "ulq"
    about = "both ends of the clip range are learned; the rounding error inside it counts too"
    source = "AMCT"

    @property
    def names(self) -> tuple[str, ...]:
        """`clip_max`, and `clip_min` where the lower end is free."""
        if self.scheme.symmetric or self.options["fixed_min"]:
            return ("clip_max",)
        return "clip_min", "clip_max"

    def values(self, start: Start) -> Sequence[Tensor]:
        """Return the ends of the grid."""
        if self.scheme.symmetric:
            return (start.scale * self.levels,)
        low, high = range_of_grid(start, self.qmin, self.qmax)
        return (high,) if self.options["fixed_min"] else (low, high)

    def grid(self, parameters: Sequence[Tensor], start: Start) -> tuple[Tensor, Tensor]:
        """Return the grid of the range."""
        # by ratios, so that the first grid is the calibrated one to the bit
        if self.scheme.symmetric:
            (first,) = self.values(start)
            return start.scale * (at_least(parameters[0], first * FLOOR) / first), start.zero_point.to(torch.float32)
        first_low, first_high = range_of_grid(start, self.qmin, self.qmax)
        low = first_low if self.options["fixed_min"] else -at_least(-parameters[0], 0.0)
        width, first_width = at_least(parameters[-1], 0.0) - low, first_high - first_low
        scale = start.scale * (at_least(width, first_width * FLOOR) / first_width)
        return scale, self.qmin - low / scale
