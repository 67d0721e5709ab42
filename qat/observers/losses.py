"""Ranges of least error where an error is not simply squared: Lp norms, and saturation that weighs more."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from qat.observers.binning import BinnedObserver
from qat.observers.clipping import least_error_range
from qat.observers.density import Loss
from qat.observers.options import Option
from qat.scheme import Scheme

#: how much better than min-max a range must be expected to be
_MARGIN = 0.01


class LpObserver(BinnedObserver):
    """Range with the least mean of |x - Q(x)|^p.

    The larger p, the more the clipped tails weigh; p = 2 is the `histogram` observer. The quantizer is the scheme's
    own; errors are integrated over the bins (`qat.observers.density`), and ranges searched coarse to fine
    (`qat.observers.clipping`). The exact minimum and maximum are used unless clipping lowers the error by one percent.

    Source: Nahshan et al., "Loss Aware Post-training Quantization" (2019), section 3; p = 2.4 as in BRECQ and QDrop.

    Memory and merging: as `BinnedObserver`, with 6 mantissa bits by tensor: 256 KiB.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {
            "p": Option(float, 2.4, 1.0, 8.0, about="power of the error"),
            "mantissa_bits": Option(int, None, 0, 10, about="fineness of the bins; 6, or 4 by channel"),
        }
    )
    about: ClassVar[str] = "least mean of abs(x - Q(x))^p"
    source: ClassVar[str] = "LAPQ; BRECQ"
    fineness: ClassVar[tuple[int, int]] = (6, 4)

    def _range_of_counts(
        self, negative: Tensor, positive: Tensor, edges: Tensor, low: Tensor, high: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        loss = Loss(power=float(self.options["p"]))
        return least_error_range(negative, positive, edges, low, high, scheme, _MARGIN, loss)


class SQNRObserver(BinnedObserver):
    """Range with the least quantization noise plus `gamma` times saturation noise, as AIMET's "TF-enhanced".

    Noise is the mean of (x - Q(x))^2; it is saturation where x is beyond the value of the largest or the smallest code.
    The quantizer is the scheme's own. AIMET tries a fixed set of steps and zero points on a histogram; here errors are
    integrated over the bins (`qat.observers.density`), and ranges searched coarse to fine (`qat.observers.clipping`).
    The exact minimum and maximum are used unless clipping lowers the noise by one percent.

    Source: AIMET, ModelOptimizations/DlQuantization/src/TfEnhancedEncodingAnalyzer.cpp.

    Memory and merging: as `BinnedObserver`, with 6 mantissa bits by tensor: 256 KiB.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {
            "gamma": Option(float, 3.0, 1.0, 1000.0, about="weight of the saturation noise"),
            "mantissa_bits": Option(int, None, 0, 10, about="fineness of the bins; 6, or 4 by channel"),
        }
    )
    about: ClassVar[str] = "least quantization noise + gamma x saturation noise"
    source: ClassVar[str] = "AIMET `tf_enhanced`"
    fineness: ClassVar[tuple[int, int]] = (6, 4)

    def _range_of_counts(
        self, negative: Tensor, positive: Tensor, edges: Tensor, low: Tensor, high: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        loss = Loss(saturation=float(self.options["gamma"]))
        return least_error_range(negative, positive, edges, low, high, scheme, _MARGIN, loss)
