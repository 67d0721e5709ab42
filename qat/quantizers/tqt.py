"""TQT: the logarithm of a threshold is learned, and the scale is a power of two.

Source: Jain et al., "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point Inference of Deep Neural
Networks" (2019), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qat import numerics
from qat.quantizers.method import Method, Start, at_least, power_of_two

#: between the thresholds that have one scale; the lower end is open
_BIN = 0.99


class TQT(Method):
    """`log2_threshold` is a parameter; the scale is `2**ceil(log2_threshold)` over the levels.

    The levels are rounded up to a power of two. The rounding up passes the gradient unchanged, so that of the parameter
    is `scale * ln 2` times that of the scale. Of a symmetric tensor the threshold is
    the largest magnitude, of one with a zero point, which stays, the width of its range.
    """

    name = "tqt"
    about = "the logarithm of a threshold is learned; the scale is the power of two above it, over the levels"
    source = "Jain et al., 2019"
    power_of_two = True

    @property
    def names(self) -> tuple[str, ...]:
        """`log2_threshold`."""
        return ("log2_threshold",)

    @property
    def _bits(self) -> int:
        """Logarithm of the levels, rounded up; those of a symmetric grid on its longer side."""
        middle = self.scheme.symmetric_zero_point
        levels = max(self.levels, middle - self.qmin) if self.scheme.symmetric else self.levels
        return (levels - 1).bit_length()

    def values(self, start: Start) -> Sequence[Tensor]:
        """Return the threshold of the range, within those that have the scale of `start`."""
        exponent = torch.frexp(start.scale).exponent.to(torch.float32) - 1.0 + self._bits
        span = torch.maximum(-start.low, start.high) if self.scheme.symmetric else start.high - start.low
        return (torch.minimum(torch.maximum(torch.log2(span), exponent - _BIN), exponent),)

    def refusal(self, start: Start) -> str | None:
        """Refuse scales that are no powers of two."""
        mantissa = torch.frexp(start.scale).mantissa
        return None if bool((mantissa == 0.5).all()) else "a scale is no power of two"

    def grid(self, parameters: Sequence[Tensor], start: Start) -> tuple[Tensor, Tensor]:
        """Return the scale of the threshold, and the zero point of calibration."""
        lowest = math.log2(numerics.SCALE_FLOOR)
        return power_of_two(at_least(parameters[0] - self._bits, lowest)), start.zero_point.to(torch.float32)
