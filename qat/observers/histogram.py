"""The clip range with the least squared quantization error over the observed distribution."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from qat.observers.binning import BinnedObserver
from qat.observers.clipping import least_squares_range
from qat.scheme import Scheme


class HistogramObserver(BinnedObserver):
    """Range with the least mean squared difference between a value and its quantized value.

    The quantizer is the scheme's own; `qat.observers.clipping` describes the search. Elements are taken as
    evenly spread inside their bin. The exact minimum and maximum are used unless clipping is expected to lower
    the error by one percent, or by half the width of a bin where that is more (3 % by channel): below that, how
    the elements really lie in their bins decides.

    Memory and merging: as `BinnedObserver`.
    """

    minimises_error: ClassVar[bool] = True

    def _range_of_counts(
        self, negative: Tensor, positive: Tensor, edges: Tensor, low: Tensor, high: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        margin = max(0.01, 2.0 ** -(self.mantissa_bits + 1))
        return least_squares_range(negative, positive, edges, low, high, scheme, margin)
