"""The clip range with the least expected quantization error, from counts in bins.

`qat.observers.density` integrates the error. Candidates are taken coarse to fine between the observed extremes and the
tightest range whose clipped tails alone would cost what min-max costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat import numerics
from qat.observers.density import SQUARED, Counts, Loss, density_of, scheme_errors
from qat.observers.search import search_1d, search_2d
from qat.scheme import Scheme


def least_error_range(
    negative: Tensor,
    positive: Tensor,
    edges: Tensor,
    low: Tensor,
    high: Tensor,
    scheme: Scheme,
    margin: float,
    loss: Loss = SQUARED,
) -> tuple[Tensor, Tensor]:
    """Return the clip range of each channel with the least expected error.

    Args:
        negative: Counts of negative elements by growing magnitude, (C, H), int64, or float64 where they are weighted.
        positive: Counts of the others, likewise.
        edges: Edges of the bins of magnitude, (H + 1,), float64, starting with 0.
        low: Smallest elements, (C,), float64, finite.
        high: Largest elements, (C,), float64, finite.
        scheme: What the range is for; its formula is `qat.numerics.range_to_scale`.
        margin: Share by which a range must be expected to be better than min-max to be chosen.
        loss: What an error costs; squares by default.

    Returns:
        Lower and upper bounds, (C,), float64, within [low, high]; exactly [low, high] where nothing is better
        by `margin`.
    """
    counts = Counts(negative.to(torch.float64), positive.to(torch.float64), edges, low, high).trimmed()
    whole_low, whole_high = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
    scale, _ = numerics.range_to_scale_unchecked(low, high, scheme)
    # the lower the power, the less the tails weigh and the tighter the ranges: those of the powers 1 and 2 are known
    rough = Loss(1.0) if loss.power < SQUARED.power else SQUARED
    density = density_of(counts, scale.to(torch.float64) / 2, rough.power)
    budget = scheme_errors(density, low[:, None], high[:, None], scheme, rough)[:, 0]
    tight_low, tight_high = _tightest(counts, budget, scheme.symmetric, rough)
    levels = _levels(scheme)
    widest = torch.maximum(-whole_low, whole_high)
    # where nothing bounds the search, it ends at a range 2**-8 of the whole
    tight = tight_high if scheme.symmetric else tight_low + tight_high
    narrowest = torch.where(tight > 0, tight, widest * 2.0**-8)
    # a quarter and not half of the smallest step: refinement goes a little beyond the end
    density = density_of(counts, torch.clamp(narrowest / levels, min=numerics.SCALE_FLOOR) / 4, loss.power)

    def errors(lows: Tensor, highs: Tensor) -> Tensor:
        return scheme_errors(density, lows, highs, scheme, loss)

    # a bound below a quarter of a step rounds to zero anyway
    least = narrowest / (4 * levels)
    if scheme.symmetric:
        best_low, best_high, best = search_1d(errors, tight, widest, least, low, high)
    else:
        ends = ((tight_low, -whole_low), (tight_high, whole_high))
        best_low, best_high, best = search_2d(errors, ends, least, low, high)
    whole = errors(low[:, None], high[:, None])[:, 0]
    better = best < (1.0 - margin) * whole
    return torch.where(better, best_low, low), torch.where(better, best_high, high)


def _levels(scheme: Scheme) -> int:
    qmin, qmax = scheme.code_range
    if not scheme.symmetric:
        return qmax - qmin
    middle = scheme.symmetric_zero_point
    return min(side for side in (qmax - middle, middle - qmin) if side > 0)


def _tightest(counts: Counts, budget: Tensor, symmetric: bool, loss: Loss) -> tuple[Tensor, Tensor]:
    """Return for each side the smallest bound, (C,), whose clipped tail costs no more than the budget."""
    if symmetric:
        bound = _tightest_side(counts.negative + counts.positive, counts.edges, budget, loss)
        return bound, bound
    return (
        _tightest_side(counts.negative, counts.edges, budget, loss),
        _tightest_side(counts.positive, counts.edges, budget, loss),
    )


def _tightest_side(counts: Tensor, edges: Tensor, budget: Tensor, loss: Loss) -> Tensor:
    middle = (edges[:-1] + edges[1:]) / 2
    above = counts.flip(-1).cumsum(-1).flip(-1)
    first = (counts * middle).flip(-1).cumsum(-1).flip(-1)
    second = (counts * middle**2).flip(-1).cumsum(-1).flip(-1)
    left = edges[:-1]
    tail = first - left * above if loss.power == 1.0 else second - 2 * left * first + left**2 * above
    # tails shrink outwards: the number of tails beyond the budget is the index of the first within it
    index = (tail > budget[:, None]).sum(-1)
    return edges[index]
