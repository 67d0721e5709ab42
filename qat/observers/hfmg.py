"""AMCT's HFMG: a histogram whose ends are cut off bit by bit, the candidate with the least squared error."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from qat.observers.binning import BinnedObserver
from qat.observers.linear import in_use, linear_counts, signed
from qat.observers.options import Option
from qat.scheme import Scheme

#: of the elements, at least one: what a step cuts off
_STEP = 100000
#: candidates keep this part of the bins
_NARROWEST = 4
_NUMBERS_AT_ONCE = 1 << 15


class HFMGObserver(BinnedObserver):
    """Shrinks the range from both ends and keeps the best, as AMCT's `hfmg_quantize`.

    On a histogram of `bins` equal bins from the smallest to the largest value, zero put between them: starting from all
    bins, each step cuts max(ceil(n / 100000), 1) more of the n elements off one end, the one where that frees more
    whole bins (the upper one where they free equally many), until a quarter of the bins is left. Every range on the
    way is rated by the squared error of elements that are evenly spread in their bins, for 2**bits levels from end to
    end, and the best is taken; the widest of equally good ones.

    The equal bins are rebuilt from the bins that no data moves (`qat.observers.linear`). AMCT widens its histogram as
    batches come in and redistributes what it holds, so that its result depends on their order and ours does not.
    Symmetric schemes take the larger of both ends' magnitudes, as for any range.

    Memory and merging: as `BinnedObserver`, with 9 mantissa bits: 2 MiB a tensor; 128 KiB a channel.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {
            "bins": Option(int, 4096, 1024, 8192, about="equal bins from end to end: 1024, 2048, 4096 or 8192 in AMCT"),
            "mantissa_bits": Option(int, None, 0, 10, about="fineness of the bins of floats; 9, or 5 by channel"),
        }
    )
    about: ClassVar[str] = "ends cut off step by step, least squared error on the way"
    source: ClassVar[str] = "AMCT `hfmg_quantize`"
    fineness: ClassVar[tuple[int, int]] = (9, 5)

    def _range_of_counts(
        self, negative: Tensor, positive: Tensor, edges: Tensor, low: Tensor, high: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        start, stop = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
        elements = signed(*in_use(negative, positive, edges))
        counts = linear_counts(*elements, start, stop, self.options["bins"])
        levels = scheme.code_range[1] - scheme.code_range[0]
        lows, highs = low.clone(), high.clone()
        width = (stop - start) / self.options["bins"]
        for c in torch.nonzero(stop > start).flatten().tolist():
            path = shrinking(counts[c])
            first, last = path[interval_errors(counts[c], path, levels).argmin()].tolist()
            lows[c] = torch.maximum(low[c], start[c] + first * width[c])
            highs[c] = torch.minimum(high[c], start[c] + last * width[c])
        return lows, highs


def shrinking(counts: Tensor) -> Tensor:
    """Return the ranges on the way from all bins to a quarter of them, as (first, end) bins, int64, (K, 2).

    Args:
        counts: Elements by equal bin, (B,), float64.
    """
    bins = len(counts)
    total = float(counts.sum())
    step = max(math.ceil(total / _STEP), 1)
    turns = torch.arange(1, int(total / step) + 2, dtype=torch.float64) * step
    below = counts.cumsum(0)
    above = counts.flip(0).cumsum(0)
    # bins that hold no more than what so many steps cut off
    lefts = torch.searchsorted(below, turns * (1 + 1e-12), right=True).clamp_(max=bins).tolist()
    rights = torch.searchsorted(above, turns * (1 + 1e-12), right=True).clamp_(max=bins).tolist()
    first = last = a = b = 0
    path = [(0, bins)]
    while a < len(lefts) and b < len(rights):
        left = lefts[a] - first
        if not left:
            # the upper end moves from here on: to the next step that frees a bin
            b = bisect.bisect_right(rights, last, b)
            if b == len(rights):
                break
        if left > rights[b] - last:
            first, a = lefts[a], a + 1
        else:
            last, b = rights[b], b + 1
        if bins - first - last < max(1, bins // _NARROWEST):
            break
        path.append((first, bins - last))
    return torch.tensor(path)


def interval_errors(counts: Tensor, intervals: Tensor, levels: int) -> Tensor:
    """Return the squared error of quantizing to `levels` + 1 evenly spaced values from end to end of each interval.

    Elements are evenly spread in their bins, and those outside go to the nearer end. With more steps than bins, the
    error is the one for as many steps as there are bins: what tells intervals apart then lies outside of them.

    Args:
        counts: Elements by equal bin, (B,), float64.
        intervals: (first, end) bins, int64, (K, 2).
        levels: Number of steps.

    Returns:
        (K,), float64, in units of squared bins.
    """
    left = torch.arange(len(counts), dtype=torch.float64)
    count, mean, square = (
        float(m.sum()) for m in (counts, counts * (left + 0.5), counts * (left * (left + 1) + 1 / 3))
    )
    mass = _Mass(counts)
    low, high = (intervals[:, i].to(torch.float64) for i in (0, 1))
    step = (high - low) / levels
    if levels > len(counts):
        # many steps to a bin, in which elements are evenly spread: the sum over borders becomes an integral
        levels, step = len(counts), (high - low) / len(counts)
    errors = []
    for at in range(0, len(low), max(1, _NUMBERS_AT_ONCE // levels)):
        part = slice(at, at + max(1, _NUMBERS_AT_ONCE // levels))
        borders = low[part, None] + step[part, None] * (torch.arange(levels, dtype=torch.float64) + 0.5)
        errors.append(mass.integral(borders).sum(-1))
    # the sum over cells of the moments about their values, summed by parts: only the integral of the mass is left
    return square - 2 * high * mean + high**2 * count - 2 * step * torch.cat(errors)


class _Mass:
    """The elements below a point, integrated from 0 to it."""

    def __init__(self, counts: Tensor) -> None:
        nothing = torch.zeros(1, dtype=torch.float64)
        self.counts = torch.cat([counts, nothing])
        self.below = torch.cat([nothing, counts.cumsum(0)])
        self.before = torch.cat([nothing, (self.below[:-1] + counts / 2).cumsum(0)])

    def integral(self, points: Tensor) -> Tensor:
        """Return the integral at `points`, in bins, from 0 to the number of bins."""
        index = points.to(torch.int64).reshape(-1)
        share = points.reshape(-1) - index
        inside, below, before = (b.index_select(0, index) for b in (self.counts, self.below, self.before))
        return inside.mul_(share).mul_(0.5).add_(below).mul_(share).add_(before).reshape(points.shape)
