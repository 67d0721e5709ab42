"""Elements as a piecewise constant density, and what quantizing them costs.

Inside a bin the elements are taken as evenly spread, and their error is integrated, not sampled. A quantizer
with scale s and zero on its grid sends t to k s, with k = clamp(round(t / s), lowest, highest), and for p = 2

    F(t) = k s^3 / 12 + (t - k s)^3 / 3

is a primitive of its squared error (t - k s)^2, clipped tails included: every whole step adds s^3 / 12. A bin
from a to b with n elements hence costs n (F(b) - F(a)) / (b - a), whatever the number of codes, and all bins
of a candidate one scalar product of F at the edges with the jumps of the density. For another power p of the
error the primitive is 2 k (s / 2)^(p + 1) / (p + 1) + sign(r) |r|^(p + 1) / (p + 1), with r = t - k s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat import numerics
from qat.scheme import Scheme

#: Width of a single element, relative to its value: enough for the difference of two F to keep its digits.
_THINNEST = 2.0**-20
#: Numbers worked on at once: they stay in the cache, and below 2**15 torch spreads no arithmetic over threads, whose
#: meeting after every operator costs more than it saves (a hundred times more on a busy machine).
_CHUNK = (1 << 15) - 1
#: Added to a float64 below 2**51 and taken off again, it rounds half to even.
_TO_INTEGER = 1.5 * 2.0**52
_SQUARE = 2.0


@dataclass(frozen=True)
class Loss:
    """What an error costs.

    Attributes:
        power: The error of an element counts with this power of its magnitude; at least 1.
        saturation: Factor for the squared error of elements beyond the largest or below the smallest code's value;
            other than 1 only with power 2.
    """

    power: float = _SQUARE
    saturation: float = 1.0


SQUARED = Loss()


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


def density_of(counts: Counts, resolution: Tensor, power: float = _SQUARE) -> Density:
    """Return the density of each channel, without the elements smaller than `resolution`, (C,), half a step.

    Those quantize to zero with every candidate, so they cost the `power` of their magnitudes.
    """
    left, right = counts.edges[:-1], counts.edges[1:]
    if power == _SQUARE:
        moments = (left**2 + left * right + right**2) / 3.0
    else:
        moments = (right ** (power + 1.0) - left ** (power + 1.0)) / ((power + 1.0) * (right - left))
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
        constant = constant + (side * moments * below).sum(-1)
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


def scheme_errors(density: Density, low: Tensor, high: Tensor, scheme: Scheme, loss: Loss = SQUARED) -> Tensor:
    """Return the error, summed over elements, of candidate ranges `low` and `high`, (C, K), float64."""
    scale, zero_point = numerics.range_to_scale_unchecked(low, high, scheme)
    zero = zero_point.to(torch.float64)
    qmin, qmax = scheme.code_range
    return grid_errors(density, scale.to(torch.float64), qmin - zero, qmax - zero, loss)


def grid_errors(density: Density, scale: Tensor, lowest: Tensor, highest: Tensor, loss: Loss = SQUARED) -> Tensor:
    """Return the error, summed over elements, of quantizers to `k * scale`, (C, K), float64.

    Args:
        density: The elements.
        scale: Steps, (C, K), float64, positive.
        lowest: Smallest k of each, (C, K), float64, whole.
        highest: Largest k, likewise.
        loss: What an error costs.
    """
    out = torch.empty_like(scale)
    channels, points = density.points.shape
    step = max(1, _CHUNK // (channels * points))
    t = density.points[:, None, :]
    for at in range(0, scale.shape[-1], step):
        part = slice(at, at + step)
        s, least, most = scale[:, part, None], lowest[:, part, None], highest[:, part, None]
        # rounding after the clamp to integers is the same, and keeps the numbers small enough for this way to round;
        # torch.round would wait for all threads at every call
        k = (t / s).clamp_(least, most).add_(_TO_INTEGER).sub_(_TO_INTEGER)
        r = torch.addcmul(t, k, s, value=-1.0)
        if loss.power == _SQUARE:
            primitive = (r * r).mul_(r).div_(3.0).add_(k.mul_(s * s * s / 12.0))
        else:
            q = loss.power + 1.0
            primitive = r.abs().pow_(q).copysign_(r).add_(k.mul_(2.0 * (s / 2.0) ** q)).div_(q)
        if loss.saturation != 1.0:
            beyond = (t - most * s).clamp_(min=0.0) + (t - least * s).clamp_(max=0.0)
            primitive.add_(beyond**3, alpha=(loss.saturation - 1.0) / 3.0)
        out[:, part] = primitive.mul_(density.jumps[:, None, :]).sum(-1)
    return out + density.constant[:, None]
