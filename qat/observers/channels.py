"""Which elements of a tensor share a range: how many channels or groups it has, and the extremes of each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qat.scheme import Granularity


def channel_count(shape: Sequence[int], granularity: Granularity) -> int | None:
    """Return how many ranges a tensor of this shape has: None for per-tensor, else channels or groups.

    Groups run along the axis and the last may be shorter; their order is that of `qat.numerics.expand_to`.
    """
    if granularity.kind == "per_tensor":
        return None
    axis = granularity.axis % len(shape)
    if granularity.kind == "per_channel":
        return shape[axis]
    groups = -(-shape[axis] // (granularity.size or 1))
    return math.prod(shape[:axis]) * groups * math.prod(shape[axis + 1 :])


def finite_extrema(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the smallest and the largest finite values, () or (C,), dtype of `x`, and the count of others.

    Args:
        x: A tensor that is not empty, of a float dtype.
        granularity: What shares a range.

    Returns:
        Minima (inf where a channel has no finite value), maxima (-inf there), and the number of elements that
        are nan or inf, int64 of shape (); None if there is none and that is known.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # on the CPU a look at the result costs no synchronisation, and the plain reduction takes 1/50 of the
        # masked one
        low, high = _extrema(x, x, granularity)
        if bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            return low, high, None
    finite = torch.isfinite(x)
    low, high = _extrema(x.masked_fill(~finite, math.inf), x.masked_fill(~finite, -math.inf), granularity)
    return low, high, (~finite).sum()


def _extrema(for_min: Tensor, for_max: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    if granularity.kind == "per_tensor":
        if for_min is for_max:
            low, high = torch.aminmax(for_min)
            return low, high
        return for_min.amin(), for_max.amax()
    if granularity.kind == "per_channel":
        axis = granularity.axis % for_min.dim()
        others = [d for d in range(for_min.dim()) if d != axis]
        # an empty list of dimensions would mean all of them
        return (for_min.amin(others), for_max.amax(others)) if others else (for_min.clone(), for_max.clone())
    return (
        _grouped(for_min, granularity).amin(granularity.axis % for_min.dim() + 1).flatten(),
        _grouped(for_max, granularity).amax(granularity.axis % for_max.dim() + 1).flatten(),
    )


def _grouped(x: Tensor, granularity: Granularity) -> Tensor:
    """Split the group axis into (groups, size); a short last group is filled up with its last element."""
    axis, size = granularity.axis % x.dim(), granularity.size or 1
    missing = -x.shape[axis] % size
    if missing:
        last = x.narrow(axis, x.shape[axis] - 1, 1)
        x = torch.cat([x, last.repeat_interleave(missing, dim=axis)], dim=axis)
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
