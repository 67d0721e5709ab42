"""Coarse-to-fine search of a clip range, for any cost of a candidate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_COARSE_1D, _COARSE_2D = 48, 24
_ROUNDS, _BASINS, _FINE = 3, 4, 7

#: cost of candidate ranges: lower and upper bounds, (C, K) each, to costs, (C, K)
Errors = Callable[[Tensor, Tensor], Tensor]


def _ladder(tight: Tensor, widest: Tensor, least: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` bounds from the widest down in equal ratios, (C, count), and that ratio, (C, 1).

    A side that may be given up altogether (`tight` is 0) has 0 as its last bound.
    """
    none = tight <= 0
    bottom = torch.minimum(torch.maximum(tight, least), widest)
    ratio = torch.where(widest > 0, bottom / widest.clamp(min=1e-300), 1.0) ** (1.0 / max(1, count - 1))
    steps = torch.arange(count, dtype=torch.float64)
    bounds = widest[:, None] * ratio[:, None] ** steps
    bounds[:, -1] = torch.where(none, 0.0, bounds[:, -1])
    return bounds, ratio[:, None]


def search_1d(
    errors: Errors, tight: Tensor, widest: Tensor, least: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Search bounds of |x|.

    Args:
        errors: Cost of candidate ranges.
        tight: Tightest bound, (C,), float64; 0 where nothing bounds the search.
        widest: Widest bound, likewise.
        least: Smallest bound that means anything, likewise.
        low: Smallest elements, (C,), float64.
        high: Largest elements, likewise.

    Returns:
        The best low and high, within the elements, and their error, each (C,).
    """
    bounds, ratio = _ladder(tight, widest, least, _COARSE_1D)
    # a symmetric range of zero width quantizes everything to zero: the ladder's end stays above it
    bounds[:, -1] = torch.maximum(bounds[:, -1], least)

    found = errors(-bounds, bounds)
    offsets = torch.linspace(-1.0, 1.0, _FINE, dtype=torch.float64)
    for turn in range(_ROUNDS):
        basins = found.topk(min(_BASINS, found.shape[-1]), largest=False, sorted=True).indices
        shrink = (2.0 / (_FINE - 1)) ** turn
        around = bounds.gather(-1, basins)[:, :, None] * ratio[:, :, None] ** (offsets * shrink)
        fresh = torch.minimum(around.flatten(1), widest[:, None])
        bounds, found = _keep(bounds, found, basins, fresh, errors(-fresh, fresh))
    best = found.argmin(-1, keepdim=True)
    bound = bounds.gather(-1, best)[:, 0]
    return torch.maximum(-bound, low), torch.minimum(bound, high), found.gather(-1, best)[:, 0]


def _keep(bounds: Tensor, found: Tensor, basins: Tensor, fresh: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the basins and the fresh candidates with their errors, which is all that the next turn needs."""
    return (
        torch.cat([bounds.gather(-1, basins), fresh], dim=-1),
        torch.cat([found.gather(-1, basins), errors], dim=-1),
    )


def search_2d(
    errors: Errors,
    ends: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    least: Tensor,
    low: Tensor,
    high: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search both bounds between the `ends` (tightest, widest) of each side; otherwise as `search_1d`."""
    ladders = [
        # a side that no channel has needs no candidates but 0, and the other may have as many as a 1-D search
        _ladder(tight, widest, least, _side_count(widest, other))
        for (tight, widest), other in zip(ends, (ends[1][1], ends[0][1]), strict=True)
    ]
    (lows, ratio_low), (highs, ratio_high) = ladders
    channels = low.shape[0]
    grid_low = lows[:, :, None].expand(-1, -1, highs.shape[-1]).reshape(channels, -1)
    grid_high = highs[:, None, :].expand(-1, lows.shape[-1], -1).reshape(channels, -1)

    found = errors(-grid_low, grid_high)
    one = torch.linspace(-1.0, 1.0, _FINE, dtype=torch.float64)
    none = torch.zeros(1, dtype=torch.float64)
    offsets_low = one if lows.shape[-1] > 1 else none
    offsets_high = one if highs.shape[-1] > 1 else none
    pairs = torch.cartesian_prod(offsets_low, offsets_high)
    for turn in range(_ROUNDS):
        basins = found.topk(min(_BASINS, found.shape[-1]), largest=False, sorted=True).indices
        offsets = pairs * (2.0 / (_FINE - 1)) ** turn
        near_low = grid_low.gather(-1, basins)[:, :, None] * ratio_low[:, :, None] ** offsets[:, 0]
        near_high = grid_high.gather(-1, basins)[:, :, None] * ratio_high[:, :, None] ** offsets[:, 1]
        fresh_low = torch.minimum(near_low.flatten(1), ends[0][1][:, None])
        fresh_high = torch.minimum(near_high.flatten(1), ends[1][1][:, None])
        fresh = errors(-fresh_low, fresh_high)
        grid_low, _ = _keep(grid_low, found, basins, fresh_low, fresh)
        grid_high, found = _keep(grid_high, found, basins, fresh_high, fresh)
    best = found.argmin(-1, keepdim=True)
    bound_low, bound_high = -grid_low.gather(-1, best)[:, 0], grid_high.gather(-1, best)[:, 0]
    # the range is widened to hold zero anyway; it stays within what was observed
    return torch.maximum(bound_low, low), torch.minimum(bound_high, high), found.gather(-1, best)[:, 0]


def _side_count(widest: Tensor, other: Tensor) -> int:
    if not bool((widest > 0).any()):
        return 1
    return _COARSE_1D if not bool((other > 0).any()) else _COARSE_2D
