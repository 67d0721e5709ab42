"""MNN's ADMM: the scale by alternating least squares."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from qat import numerics
from qat.observers.binning import BinnedObserver
from qat.observers.least_squares_scale import alternate
from qat.observers.linear import signed
from qat.observers.options import Option
from qat.observers.scales import code_sides, range_of_scale
from qat.scheme import Scheme

#: what the largest magnitude is divided by to start with, in clamp values, and the turns
_ACTIVATION, _ACTIVATION_TURNS = 2.5, 300
_WEIGHT, _WEIGHT_TURNS, _WEIGHT_EPSILON = 1.25, 1000, 1e-9


class ADMMObserver(BinnedObserver):
    """The scale that least squares settle on, as MNN's `ADMM`.

    Activations: s = max|x| / (2.5 clamp), then 300 times q = clip(round(x / s), -clamp, clamp), s = sum q x / sum q^2,
    rounding half away from zero; clamp is the number of codes on a side (127). All elements of a bin are taken at its
    middle. Weights (`qat.observers.weight_range`): from max|w| / (1.25 clamp), 1000 times, by the elements, with 1e-9
    added to the scale in the first formula and to the denominator in the second. A turn that changes nothing is the
    last one. Computed in float64; MNN computes in float32.

    *Affine schemes* (ours): codes and zero point are those of the min-max range, and only the scale is searched, from
    the one of min-max divided by 2.5 or 1.25.

    Memory and merging: as `BinnedObserver`.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {
            "iterations": Option(int, None, 1, 100000, about="most turns; 300, for weights 1000"),
            **BinnedObserver.OPTIONS,
        }
    )
    about: ClassVar[str] = "scale by alternating least squares"
    source: ClassVar[str] = "MNN `ADMM`"
    gives_scale: ClassVar[bool] = True
    looks_at_rows: ClassVar[bool] = True

    def _range_of_counts(
        self, negative: Tensor, positive: Tensor, edges: Tensor, low: Tensor, high: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        counts, by_value = signed(negative, positive, edges)
        used = (counts > 0).any(0)
        left, right = (side[used].expand(len(counts), -1) for side in (by_value[:-1], by_value[1:]))
        left, right = (torch.clamp(side, low[:, None], high[:, None]) for side in (left, right))
        middle = (left + right) / 2
        turns = self.options["iterations"] or _ACTIVATION_TURNS
        return _range(middle, counts[:, used].to(torch.float64), low, high, scheme, _ACTIVATION, turns)

    def range_of_rows(self, rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the range by MNN's formula for weights, as `range`."""
        values = rows.to(torch.float64)
        turns = self.options["iterations"] or _WEIGHT_TURNS
        low, high = values.amin(-1), values.amax(-1)
        return _range(values, None, low, high, scheme, _WEIGHT, turns, _WEIGHT_EPSILON)


def _range(
    values: Tensor,
    weights: Tensor | None,
    low: Tensor,
    high: Tensor,
    scheme: Scheme,
    shrink: float,
    turns: int,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    if scheme.symmetric:
        above, below = code_sides(scheme)
        clamp = min(above, below) or max(above, below)
        extent = torch.maximum(-low, high) if above and below else high if above else -low
        flat = extent <= 0
        start = torch.where(flat, 1.0, extent / (shrink * clamp))
        scale = alternate(values, weights, start, (-float(min(below, clamp)), float(min(above, clamp))), turns, epsilon)
        return range_of_scale(torch.where(flat, 0.0, scale), scheme)
    qmin, qmax = scheme.code_range
    whole, zero_point = numerics.range_to_scale_unchecked(low, high, scheme)
    zero = zero_point.to(torch.float64)
    flat = (low >= 0) & (high <= 0)
    start = whole.to(torch.float64) / shrink
    scale = torch.where(flat, 0.0, alternate(values, weights, start, (qmin - zero, qmax - zero), turns, epsilon))
    return (qmin - zero) * scale, (qmax - zero) * scale
