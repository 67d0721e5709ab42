"""The clip range with the least squared quantization error over the observed distribution."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from qat import native
from qat.observers.binning import BinnedObserver
from qat.observers.clipping import least_error_range
from qat.observers.options import Option
from qat.scheme import Scheme


class HistogramObserver(BinnedObserver):
    """Range with the least mean squared difference between a value and its quantized value.

    The quantizer is the scheme's own; `qat.observers.density` says how the error is computed and
    `qat.observers.clipping` how ranges are searched. Elements are taken as evenly spread inside their bin. The exact
    minimum and maximum are used unless clipping is expected to lower the error by one percent, or by half the width of
    a bin where that is more (3 % by channel): below that, how the elements really lie in their bins decides.

    `negative_weight` is for a tensor that only a leaky ReLU reads: with the square of its slope, the error that is
    minimised is the one after the leaky ReLU. That is exact, since quantization never changes the sign of a value.

    Memory and merging: as `BinnedObserver`.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {
            **BinnedObserver.OPTIONS,
            "negative_weight": Option(float, 1.0, 0.0, 1.0, about="weight of the squared errors of negative elements"),
        }
    )
    about: ClassVar[str] = "least squared quantization error"
    source: ClassVar[str] = "usual; the default of activations"
    minimises_error: ClassVar[bool] = True

    def _range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        if self.counts.device.type != "cpu" or not native.status().active:
            return super()._range(scheme)
        low, high, seen = self.min_val.reshape(-1), self.max_val.reshape(-1), self.min_val <= self.max_val
        low, high = (torch.where(seen.reshape(-1), bound, 0.0).to(torch.float64) for bound in (low, high))
        rule = native.GridRule(
            *scheme.code_range, None, scheme.symmetric, scheme.symmetric_zero_point, scheme.power_of_two
        )
        counts = self.counts.reshape(len(low), -1)
        low, high = native.clip_ranges(
            counts, low, high, self.mantissa_bits, rule, self._margin, self.options["negative_weight"]
        )
        return low.reshape(self.min_val.shape), high.reshape(self.min_val.shape)

    @property
    def _margin(self) -> float:
        return float(max(0.01, 2.0 ** -(self.mantissa_bits + 1)))

    def _range_of_counts(
        self, negative: Tensor, positive: Tensor, edges: Tensor, low: Tensor, high: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        weighted = negative.to(torch.float64) * self.options["negative_weight"]
        return least_error_range(weighted, positive, edges, low, high, scheme, self._margin)
