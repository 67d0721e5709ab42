"""Rules of other tools by which the largest magnitude becomes a scale: AMCT's ARQ, ACUITY's dynamic fixed point."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qat.observers.minmax import MinMaxObserver
from qat.observers.scales import code_sides, extent_of, range_of_scale
from qat.scheme import Scheme


class ARQObserver(MinMaxObserver):
    """AMCT's ARQ: scale = max|w| / 127, or / 128 where |min| > max (int8).

    In general the largest magnitude is divided by the number of codes on its side, so where the scheme leaves the code
    -128 out (`qmin=-127`) it is min-max. So it is for affine schemes. Elements of the smaller side that come closer to
    the bound than one part in 128 saturate.

    Memory and merging: as `MinMaxObserver`.
    """

    about: ClassVar[str] = "largest magnitude over the number of codes on its side"
    source: ClassVar[str] = "AMCT `arq_quantize`"
    gives_scale: ClassVar[bool] = True
    constant_is_exact: ClassVar[bool] = False

    def _range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        low, high = super()._range(scheme)
        if not scheme.symmetric:
            return low, high
        extent, codes = extent_of(low, high, scheme)
        return range_of_scale(extent / codes, scheme)


class FixedPointObserver(MinMaxObserver):
    """ACUITY's dynamic fixed point: scale = 2**-fl, fl = bits - 1 - ceil(log2(max(|min|, |max|))).

    At an exact power of two the largest value saturates by one step: the range 1.0 has fl 7 in int8, whose largest code
    is 127 / 128. `Scheme.power_of_two` by itself rounds up so that nothing saturates (2**-6 there); with this observer
    a symmetric scheme has ACUITY's scale, with `power_of_two` or without. Affine schemes get the range of those codes
    that a symmetric scheme would have. A tensor that is all zero has the range (0, 0).

    Source: observed in ACUITY's `.quantize` files; TIM-VX has the arithmetic.

    Memory and merging: as `MinMaxObserver`.
    """

    about: ClassVar[str] = "scale 2^-fl, fl = bits - 1 - ceil(log2(max))"
    source: ClassVar[str] = "ACUITY `dynamic_fixed_point`"
    gives_scale: ClassVar[bool] = True
    constant_is_exact: ClassVar[bool] = False

    def _range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        low, high = super()._range(scheme)
        extent = torch.maximum(-low, high).clamp(min=0.0)
        above, below = code_sides(scheme) if scheme.symmetric else (0, 0)
        mantissa, exponent = torch.frexp(extent)
        # extent = mantissa 2**exponent with mantissa in [0.5, 1): the logarithm is whole where that is 0.5
        ceiling = torch.where(mantissa == 0.5, exponent - 1, exponent).to(torch.float64)
        scale = torch.where(extent > 0, torch.exp2(ceiling - (scheme.int_type.bits - 1)), 0.0)
        if scheme.symmetric and max(above, below):
            return range_of_scale(scale, scheme)
        half = float(1 << (scheme.int_type.bits - 1))
        return -half * scale * (low < 0), (half - 1) * scale * (high > 0)
