"""Histograms with equal bins, as the methods of other tools define them, from the bins that no data moves.

Those tools look at the data twice: once for the largest value, which fixes the bins, and once to count. The bins of
`qat.observers.binning` exist beforehand, so one pass is enough, and parts of the data merge. What is lost: an element
is known to within its bin of relative width 2**-mantissa_bits, and where that reaches over several equal bins it is
split between them in proportion. With 2048 equal bins up to M and 10 mantissa bits, a bin of floats is at most two
equal bins wide above M / 2, at most one below, a half below M / 4 and so on: an element is never counted more than two
equal bins away from its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_counts(counts: Tensor, edges: Tensor, start: Tensor, stop: Tensor, bins: int) -> Tensor:
    """Count elements in equal bins from `start` to `stop`, which all of them lie within.

    Args:
        counts: Elements by bin, (C, B), float64 or int64.
        edges: Edges of the bins, (B + 1,), float64, growing.
        start: Lower end of the first equal bin, (C,), float64, not above any element.
        stop: Upper end of the last, likewise, not below any element.
        bins: Number of equal bins.

    Returns:
        Elements by equal bin, (C, bins), float64; their sums are those of `counts`, but for rounding.
    """
    total = torch.cat([torch.zeros_like(counts[:, :1]), counts.cumsum(-1)], dim=-1).to(torch.float64)
    at = torch.arange(bins + 1, dtype=torch.float64) / bins
    points = start[:, None] + (stop - start)[:, None] * at
    index = (torch.searchsorted(edges, points, right=True) - 1).clamp_(0, counts.shape[-1] - 1)
    # the elements of the outermost bins lie on this side of the ends
    left = torch.clamp(edges[index], start[:, None], stop[:, None])
    right = torch.clamp(edges[index + 1], start[:, None], stop[:, None])
    share = torch.where(right > left, (points - left) / (right - left).clamp(min=1e-300), 0.0).clamp(0.0, 1.0)
    below = total.gather(-1, index)
    below = below + (total.gather(-1, index + 1) - below) * share
    below[:, 0], below[:, -1] = 0.0, total[:, -1]
    return below.diff(dim=-1).clamp_(min=0.0)


def without_tiny(counts: Tensor, edges: Tensor, largest: float) -> Tensor:
    """Return counts by bins of magnitude, (C, H), float64, without elements of at most `largest`.

    Args:
        counts: Elements by bin, (C, H).
        edges: Edges of the bins, (H + 1,), float64, from 0.
        largest: Largest magnitude to leave out.
    """
    left, right = edges[:-1], edges[1:]
    return counts.to(torch.float64) * ((right - largest) / (right - left)).clamp(0.0, 1.0)


def in_use(negative: Tensor, positive: Tensor, edges: Tensor, least: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts and edges of magnitudes without the bins at either end that no channel uses, or below `least`.

    Args:
        negative: Counts of negative elements by growing magnitude, (C, H).
        positive: Counts of the others, likewise.
        edges: Edges of the bins, (H + 1,), float64.
        least: Bins that lie wholly below this magnitude are left out.
    """
    used = torch.nonzero(((negative > 0) | (positive > 0)).any(0)).flatten()
    if not len(used):
        return negative[:, :1], positive[:, :1], edges[:2]
    first = max(int(used[0]), int(torch.searchsorted(edges, least, right=True)) - 1)
    end = max(int(used[-1]), first) + 1
    return negative[:, first:end], positive[:, first:end], edges[first : end + 1]


def signed(negative: Tensor, positive: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts and edges of both signs in the order of the values: (C, B) and (B + 1,).

    Where the bins do not begin at 0 there is an empty one across it.
    """
    if float(edges[0]) == 0.0:
        return torch.cat([negative.flip(-1), positive], dim=-1), torch.cat([-edges.flip(0), edges[1:]])
    nothing = torch.zeros_like(negative[:, :1])
    return torch.cat([negative.flip(-1), nothing, positive], dim=-1), torch.cat([-edges.flip(0), edges])
