"""Ranges whose scale is given, for the methods of other tools that choose a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.scheme import Scheme


def code_sides(scheme: Scheme) -> tuple[int, int]:
    """Return the number of codes above and below a symmetric scheme's zero point: 127 and 128 for int8."""
    qmin, qmax = scheme.code_range
    return qmax - scheme.symmetric_zero_point, scheme.symmetric_zero_point - qmin


def range_of_scale(scale: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return the range that `qat.numerics.range_to_scale` turns into a scale, for a symmetric scheme.

    Args:
        scale: Scales, float64, any shape.
        scheme: A symmetric scheme.
    """
    above, below = code_sides(scheme)
    bound = scale * (min(above, below) or max(above, below))
    # a side without codes has no say in the scale
    return -bound * (below > 0), bound * (above > 0)


def extent_of(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude, of the sides that have codes, and the number of codes on its side.

    This is the rule of AMCT's IFMR and ARQ: 127 where the positive side dominates, else 128 (for int8).

    Args:
        low: Smallest values, float64, any shape.
        high: Largest values, likewise.
        scheme: A symmetric scheme.
    """
    above, below = code_sides(scheme)
    up, down = torch.clamp(high, min=0.0) * (above > 0), torch.clamp(-low, min=0.0) * (below > 0)
    negative = down > up if above and below else torch.full_like(up, not above, dtype=torch.bool)
    codes = torch.where(negative, float(below), float(above)).to(torch.float64)
    return torch.maximum(up, down), codes
