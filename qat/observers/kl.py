"""Thresholds of least Kullback-Leibler divergence on a histogram with equal bins.

For a threshold after i bins, the reference P is the first i bins with everything beyond added to the last of them. The
candidate Q merges those i bins into `target` of equal width, a bin on a border split in proportion, and spreads the
mass of each back over the bins in it that hold something. The cost is sum P ln(P / Q), where Q is 0 with 1 for the
term.

Here Q is constant inside a target bin, so its logarithm is taken once for each and not once for each bin, and all sums
over bins are differences of prefix sums: target operations for a threshold instead of i.

Source: MNN, tools/quantization/TensorStatistic.cpp (the method: Migacz, "8-bit Inference with TensorRT", GTC 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: what every bin holds before anything is counted
START = 1e-7
_CANDIDATES_AT_ONCE = 256
_NOTHING = 1e-300


def kl_threshold(counts: Tensor, target: int, start: float = START, first: int | None = None) -> int:
    """Return the number of bins that the best threshold keeps.

    Args:
        counts: Elements by bin, (B,), float64; need not be whole.
        target: Number of bins that the kept ones are merged into; below B.
        start: What every bin holds beforehand; 0 leaves empty bins empty.
        first: Fewest bins to keep, at least `target`, which is the default.

    Returns:
        i in [first, B - 1], the smallest of equally good ones.
    """
    bins = len(counts)
    table = _Prefix(counts.to(torch.float64), start)
    best, threshold = float("inf"), max(target, first or 0)
    for at in range(threshold, bins, _CANDIDATES_AT_ONCE):
        kept = torch.arange(at, min(at + _CANDIDATES_AT_ONCE, bins))
        costs = table.costs(kept, target)
        index = int(costs.argmin())
        if float(costs[index]) < best:
            best, threshold = float(costs[index]), int(kept[index])
    return threshold


class _Prefix:
    """Prefix sums over the bins of a histogram."""

    def __init__(self, counts: Tensor, start: float) -> None:
        self.counts, self.start = counts, start
        self.mass = counts + start
        self.total = float(self.mass.sum())
        self.before = _before(counts)
        self.full = (self.mass > 0).to(torch.float64)
        self.full_before = _before(self.full)
        self.entropy_before = _before(torch.special.xlogy(self.mass, self.mass))

    def costs(self, kept: Tensor, target: int) -> Tensor:
        """Return the divergence for each number of kept bins, (K,)."""
        # borders of the target bins, as whole bins and a share of the next: integer arithmetic keeps them exact
        places = kept[:, None] * torch.arange(target + 1)
        whole = places.div(target, rounding_mode="floor")
        share = places.sub_(whole * target).to(torch.float64).div_(target)
        below, next_one = _take(self.before, whole), _take(self.counts, whole.clamp(max=len(self.counts) - 1))
        wholly = whole.to(torch.float64)
        width = kept[:, None].to(torch.float64) / target
        # what was counted and what was there beforehand apart: the latter must not drown in the rounding of the former
        density = torch.addcmul(below, share, next_one).diff(dim=-1).clamp_(min=0.0).add_(width * self.start)
        if self.start > 0:
            density /= width
        else:
            filled = torch.addcmul(
                _take(self.full_before, whole), share, _take(self.full, whole.clamp(max=len(self.counts) - 1))
            )
            density /= filled.diff(dim=-1).clamp_(min=_NOTHING)
        logs = density.clamp_(min=_NOTHING).log()
        # bins wholly inside a target bin, and those on a border, which have a part of either neighbour
        is_split = share[:, :-1] > 0
        split = torch.where(is_split, next_one[:, :-1] + self.start, 0.0)
        spread = (below + self.start * wholly).diff(dim=-1).sub_(split).clamp_(min=0.0)
        cross = (spread * logs).sum(-1)
        part = share[:, 1:-1]
        mixed = torch.lerp(density[:, 1:], density[:, :-1], part)
        cross += mixed.log_().mul_(split[:, 1:]).sum(-1)

        last = self.mass[kept - 1]
        beyond = self.total - self.before[kept] - self.start * kept
        own = self.entropy_before[kept - 1]
        whole_last = torch.special.xlogy(last + beyond, last + beyond)
        something = last > 0
        divergence = own - cross + torch.where(something, whole_last - beyond * logs[:, -1], 0.0)
        # nothing can be spread back into an empty last bin, which the reference fills with what lies beyond
        return divergence / self.total + torch.where(something | (beyond <= 0), 0.0, 1.0)


def _take(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index.reshape(-1)).reshape(index.shape)


def _before(values: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.float64), values.cumsum(0)])
