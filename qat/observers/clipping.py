"""The clip range with the least expected squared quantization error, from counts in bins.

Inside a bin the elements are taken as evenly spread, and their error is integrated, not sampled. A quantizer
with scale s and zero on its grid sends t to k s, with k = clamp(round(t / s), qmin - z, qmax - z), and

    F(t) = k s^3 / 12 + (t - k s)^3 / 3

is a primitive of its squared error (t - k s)^2, clipped tails included: every whole step adds s^3 / 12. A bin
from a to b with n elements hence costs n (F(b) - F(a)) / (b - a), whatever the number of codes, and all bins
of a candidate one scalar product of F at the edges with the jumps of the density.

Candidates are taken coarse to fine between the observed extremes and the tightest range whose clipped tails
alone would cost what min-max costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat import native, numerics
from qat.scheme import Scheme

#: Width of a single element, relative to its value: enough for the difference of two F to keep its digits.
_THINNEST = 2.0**-20
_COARSE_1D, _COARSE_2D = 48, 24
_ROUNDS, _BASINS, _FINE = 3, 4, 7
#: Numbers worked on at once: they stay in the cache, and below 2**15 torch spreads no arithmetic over threads, whose
#: meeting after every operator costs more than it saves (a hundred times more on a busy machine).
_CHUNK = (1 << 15) - 1
#: Added to a float64 below 2**51 and taken off again, it rounds half to even.
_TO_INTEGER = 1.5 * 2.0**52


@dataclass(frozen=True)
class Counts:
    """Elements of C channels by sign and magnitude.

    Attributes:
        negative: Negative elements by growing magnitude, (C, H), float64.
        positive: The others, likewise.
        edges: Edges of the bins of magnitude, (H + 1,), float64, from 0.
        low: Smallest elements, (C,), float64.
        high: Largest elements, (C,), float64.
    """

    negative: Tensor
    positive: Tensor
    edges: Tensor
    low: Tensor
    high: Tensor

    def trimmed(self) -> Counts:
        """Return the same without the bins above the largest magnitude of all channels."""
        used = torch.nonzero((self.negative + self.positive).sum(0))
        count = int(used.max()) + 1 if len(used) else 1
        return Counts(
            self.negative[:, :count],
            self.positive[:, :count],
            self.edges[: count + 1],
            self.low,
            self.high,
        )


@dataclass(frozen=True)
class Density:
    """A piecewise constant density, ready for the scalar product.

    Attributes:
        points: Edges of the bins of both signs, (C, P), float64, growing.
        jumps: Elements per unit left of the point less those right of it, likewise.
        constant: Squared error of the elements that are not in the bins, (C,).
    """

    points: Tensor
    jumps: Tensor
    constant: Tensor


def least_squares_range(
    negative: Tensor, positive: Tensor, edges: Tensor, low: Tensor, high: Tensor, scheme: Scheme, margin: float
) -> tuple[Tensor, Tensor]:
    """Return the clip range of each channel with the least expected squared error.

    Args:
        negative: Counts of negative elements by growing magnitude, (C, H), int64, or float64 where they are weighted.
        positive: Counts of the others, likewise.
        edges: Edges of the bins of magnitude, (H + 1,), float64, starting with 0.
        low: Smallest elements, (C,), float64, finite.
        high: Largest elements, (C,), float64, finite.
        scheme: What the range is for; its formula is `qat.numerics.range_to_scale`.
        margin: Share by which a range must be expected to be better than min-max to be chosen.

    Returns:
        Lower and upper bounds, (C,), float64, within [low, high]; exactly [low, high] where nothing is better
        by `margin`.
    """
    counts = Counts(negative.to(torch.float64), positive.to(torch.float64), edges, low, high).trimmed()
    whole_low, whole_high = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
    scale, _ = numerics.range_to_scale_unchecked(low, high, scheme)
    density = _density(counts, scale.to(torch.float64) / 2)
    budget = _errors(density, low[:, None], high[:, None], scheme)[:, 0]

    tight_low, tight_high = _tightest(counts, budget, scheme.symmetric)
    levels = _levels(scheme)
    widest = torch.maximum(-whole_low, whole_high)
    # where nothing bounds the search, it ends at a range 2**-8 of the whole
    tight = tight_high if scheme.symmetric else tight_low + tight_high
    narrowest = torch.where(tight > 0, tight, widest * 2.0**-8)
    # a quarter and not half of the smallest step: refinement goes a little beyond the end
    density = _density(counts, torch.clamp(narrowest / levels, min=numerics.SCALE_FLOOR) / 4)

    # a bound below a quarter of a step rounds to zero anyway
    least = narrowest / (4 * levels)
    if scheme.symmetric:
        best_low, best_high, best = _search_1d(density, tight, widest, least, low, high, scheme)
    else:
        ends = ((tight_low, -whole_low), (tight_high, whole_high))
        best_low, best_high, best = _search_2d(density, ends, least, low, high, scheme)
    whole = _errors(density, low[:, None], high[:, None], scheme)[:, 0]
    better = best < (1.0 - margin) * whole
    return torch.where(better, best_low, low), torch.where(better, best_high, high)


def _levels(scheme: Scheme) -> int:
    qmin, qmax = scheme.code_range
    if not scheme.symmetric:
        return qmax - qmin
    middle = scheme.symmetric_zero_point
    return min(side for side in (qmax - middle, middle - qmin) if side > 0)


def _tightest(counts: Counts, budget: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return for each side the smallest bound, (C,), whose clipped tail costs no more than the budget."""
    if symmetric:
        bound = _tightest_side(counts.negative + counts.positive, counts.edges, budget)
        return bound, bound
    return (
        _tightest_side(counts.negative, counts.edges, budget),
        _tightest_side(counts.positive, counts.edges, budget),
    )


def _tightest_side(counts: Tensor, edges: Tensor, budget: Tensor) -> Tensor:
    middle = (edges[:-1] + edges[1:]) / 2
    above = counts.flip(-1).cumsum(-1).flip(-1)
    first = (counts * middle).flip(-1).cumsum(-1).flip(-1)
    second = (counts * middle**2).flip(-1).cumsum(-1).flip(-1)
    left = edges[:-1]
    tail = second - 2 * left * first + left**2 * above
    # tails shrink outwards: the number of tails beyond the budget is the index of the first within it
    index = (tail > budget[:, None]).sum(-1)
    return edges[index]


def _density(counts: Counts, resolution: Tensor) -> Density:
    """Return the density of each channel, without the elements smaller than `resolution`, (C,), half a step.

    Those quantize to zero with every candidate, so they cost their squares.
    """
    left, right = counts.edges[:-1], counts.edges[1:]
    second_moments = (left**2 + left * right + right**2) / 3.0
    constant = torch.zeros_like(resolution)
    sides = []
    for side, inner, outer in (
        (counts.negative, -counts.high, -counts.low),
        (counts.positive, counts.low, counts.high),
    ):
        height = side.shape[-1]
        # the outermost bin in use; an empty side must not make the window wide
        top = ((side > 0) * torch.arange(height)).amax(-1)
        bottom = torch.searchsorted(counts.edges, resolution, right=True) - 1
        width = int(torch.clamp(top - torch.minimum(bottom, top) + 1, min=1).max())
        index = top[:, None] + torch.arange(1 - width, 1)
        inside = side.gather(-1, index.clamp(min=0)) * (index >= 0)
        below = torch.arange(height) <= top[:, None] - width
        constant = constant + (side * second_moments * below).sum(-1)
        edges = counts.edges[(top[:, None] + torch.arange(1 - width, 2)).clamp(min=0)]
        # the bins in use end at the smallest and the largest element, and one element is known to be the latter
        edges = torch.maximum(edges, inner[:, None])
        edges[:, -1:] = torch.clamp(outer[:, None], min=edges[:, -2:-1], max=edges[:, -1:])
        last = inside[:, -1:]
        known = torch.where(edges[:, -1:] > edges[:, -2:-1], last.clamp(max=1.0), last)
        elements = torch.cat([inside[:, :-1], last - known, known], dim=-1)
        edges = torch.cat([edges, edges[:, -1:] * (1.0 + _THINNEST)], dim=-1)
        widths = edges.diff(dim=-1)
        sides.append((edges, torch.where(widths > 0, elements / widths.clamp(min=1e-300), 0.0)))
    (edges_neg, dense_neg), (edges_pos, dense_pos) = sides
    points = torch.cat([-edges_neg.flip(-1), edges_pos], dim=-1)
    nothing = torch.zeros_like(points[:, :1])
    dense = torch.cat([nothing, dense_neg.flip(-1), nothing, dense_pos, nothing], dim=-1)
    return Density(points, -dense.diff(dim=-1), constant)


def _errors(density: Density, low: Tensor, high: Tensor, scheme: Scheme) -> Tensor:
    """Return the squared error, summed over elements, of candidates `low` and `high`, (C, K), float64."""
    scale, zero_point = numerics.range_to_scale_unchecked(low, high, scheme)
    s, z = scale.to(torch.float64), zero_point.to(torch.float64)
    qmin, qmax = scheme.code_range
    if native.status().active:
        return native.clip_errors(density.points, density.jumps, s, qmin - z, qmax - z) + density.constant[:, None]
    out = torch.empty_like(s)
    channels, points = density.points.shape
    step = max(1, _CHUNK // (channels * points))
    for at in range(0, s.shape[-1], step):
        part = slice(at, at + step)
        scales, zeros = s[:, part, None], z[:, part, None]
        t = density.points[:, None, :]
        # rounding after the clamp to integers is the same, and keeps the numbers small enough for this way to round;
        # torch.round would wait for all threads at every call
        k = (t / scales).clamp_(qmin - zeros, qmax - zeros).add_(_TO_INTEGER).sub_(_TO_INTEGER)
        r = torch.addcmul(t, k, scales, value=-1.0)
        primitive = (r * r).mul_(r).div_(3.0).add_(k.mul_(scales * scales * scales / 12.0))
        out[:, part] = primitive.mul_(density.jumps[:, None, :]).sum(-1)
    return out + density.constant[:, None]


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


def _search_1d(
    density: Density, tight: Tensor, widest: Tensor, least: Tensor, low: Tensor, high: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor]:
    """Search bounds of |x|; return the best low, high and error, each (C,)."""
    bounds, ratio = _ladder(tight, widest, least, _COARSE_1D)
    # a symmetric range of zero width quantizes everything to zero: the ladder's end stays above it
    bounds[:, -1] = torch.maximum(bounds[:, -1], least)

    def errors(candidates: Tensor) -> Tensor:
        return _errors(density, -candidates, candidates, scheme)

    found = errors(bounds)
    offsets = torch.linspace(-1.0, 1.0, _FINE, dtype=torch.float64)
    for turn in range(_ROUNDS):
        basins = found.topk(min(_BASINS, found.shape[-1]), largest=False, sorted=True).indices
        shrink = (2.0 / (_FINE - 1)) ** turn
        around = bounds.gather(-1, basins)[:, :, None] * ratio[:, :, None] ** (offsets * shrink)
        fresh = torch.minimum(around.flatten(1), widest[:, None])
        bounds, found = _keep(bounds, found, basins, fresh, errors(fresh))
    best = found.argmin(-1, keepdim=True)
    bound = bounds.gather(-1, best)[:, 0]
    return torch.maximum(-bound, low), torch.minimum(bound, high), found.gather(-1, best)[:, 0]


def _keep(bounds: Tensor, found: Tensor, basins: Tensor, fresh: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the basins and the fresh candidates with their errors, which is all that the next turn needs."""
    return (
        torch.cat([bounds.gather(-1, basins), fresh], dim=-1),
        torch.cat([found.gather(-1, basins), errors], dim=-1),
    )


def _search_2d(
    density: Density,
    ends: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    least: Tensor,
    low: Tensor,
    high: Tensor,
    scheme: Scheme,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search both bounds between the `ends` (tightest, widest) of each side; return as `_search_1d`."""
    ladders = [
        # a side that no channel has needs no candidates but 0, and the other may have as many as a 1-D search
        _ladder(tight, widest, least, _side_count(widest, other))
        for (tight, widest), other in zip(ends, (ends[1][1], ends[0][1]), strict=True)
    ]
    (lows, ratio_low), (highs, ratio_high) = ladders
    channels = low.shape[0]
    grid_low = lows[:, :, None].expand(-1, -1, highs.shape[-1]).reshape(channels, -1)
    grid_high = highs[:, None, :].expand(-1, lows.shape[-1], -1).reshape(channels, -1)

    def errors(lows: Tensor, highs: Tensor) -> Tensor:
        return _errors(density, -lows, highs, scheme)

    found = errors(grid_low, grid_high)
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
        fresh = errors(fresh_low, fresh_high)
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
