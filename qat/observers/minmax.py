"""The smallest and the largest value ever observed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qat import native
from qat.observers.base import Observer
from qat.scheme import Scheme


class MinMaxObserver(Observer):
    """Exact minimum and maximum over everything observed.

    Memory: 8 bytes a channel. Mergeable: the result does not depend on batches, their order or their
    distribution.
    """

    about: ClassVar[str] = "smallest and largest value"
    source: ClassVar[str] = "usual; DNNLibrary, MNN `MAX_ABS`, ACUITY `normal`"

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:  # noqa: ARG002
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))

    def statistics(self) -> native.Statistics:
        """Return the range."""
        return native.Statistics(self.min_val, self.max_val, self.nonfinite)

    def _range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self.min_val.cpu().to(torch.float64), self.max_val.cpu().to(torch.float64)
