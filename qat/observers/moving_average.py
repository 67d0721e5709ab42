"""The exponential moving average of each batch's minimum and maximum."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from qat import native
from qat.observers.base import Observer
from qat.observers.options import Option
from qat.scheme import Scheme


class MovingAverageObserver(Observer):
    """Moving average of batch minima and maxima: `v += momentum * (batch - v)`, the first batch as it is.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference" (CVPR 2018), section 3.1.

    Memory: 8 bytes a channel. By its nature the result depends on the batch size and the order of batches
    (`order_dependent`), so it is exempt from the promise of the other observers. Merging, also across
    processes, takes the widest of the averages: equal on every rank and independent of the order of merging,
    but not what one process would have got from the same data.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {"momentum": Option(float, 0.01, 0.0, 1.0, low_open=True, about="weight of the newest batch")}
    )
    about: ClassVar[str] = "moving average of the batches' minima and maxima"
    source: ClassVar[str] = "Jacob et al. 2018; MNN `EMA`, ACUITY `moving_average`"
    order_dependent: ClassVar[bool] = True

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:  # noqa: ARG002
        momentum = self.options["momentum"]
        first = self.min_val > self.max_val
        absent = low > high
        for state, batch in ((self.min_val, low), (self.max_val, high)):
            # in float64 the difference of two float32 cannot overflow, and a constant stays exactly itself
            old = state.to(torch.float64)
            moved = (old + momentum * (batch.to(torch.float64) - old)).to(torch.float32)
            state.copy_(torch.where(absent, state, torch.where(first, batch, moved)))

    def statistics(self) -> native.Statistics:
        """Return the range, and the weight of a batch."""
        return native.Statistics(self.min_val, self.max_val, self.nonfinite, momentum=self.options["momentum"])

    def _range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self.min_val.cpu().to(torch.float64), self.max_val.cpu().to(torch.float64)
