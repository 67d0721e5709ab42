"""The range of a tensor's elements, by granularity."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.scheme import Granularity


def rows_of(x: Tensor, granularity: Granularity) -> Tensor:
    """Return the elements of a tensor that is not empty, one row a scale, (R, K); per-tensor or per-channel."""
    if granularity.kind == "per_tensor":
        return x.reshape(1, -1)
    return x.movedim(granularity.axis, 0).flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def tensor_range(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Return smallest and largest values, float32: scalars, (C,) per-channel, one a group (flat, row-major).

    A last group that is shorter than the others is filled up with zeros, which no range may exclude anyway. A
    nan makes its bounds nan. The tensor must not be empty.
    """
    if granularity.kind == "per_tensor":
        low, high = torch.aminmax(x)
        return low.to(torch.float32), high.to(torch.float32)
    axis = granularity.axis % x.dim()
    if granularity.kind == "per_channel":
        rows = x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x.unsqueeze(1)
        return rows.amin(1).to(torch.float32), rows.amax(1).to(torch.float32)
    size = granularity.size or 1
    missing = -x.shape[axis] % size
    rows = x.movedim(axis, -1)
    if missing:
        rows = F.pad(rows, (0, missing))
    groups = rows.reshape(*rows.shape[:-1], -1, size)
    low, high = (values.movedim(-1, axis).flatten() for values in (groups.amin(-1), groups.amax(-1)))
    return low.to(torch.float32), high.to(torch.float32)
