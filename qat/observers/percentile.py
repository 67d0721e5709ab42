"""The range that holds a given share of the elements."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from qat.observers.binning import BinnedObserver
from qat.observers.linear import signed
from qat.observers.options import Option
from qat.scheme import Scheme


class PercentileObserver(BinnedObserver):
    """Two-sided percentile: `percentile` % of the elements are below the upper bound, as many above the lower.

    Within a bin the elements are taken as evenly spread between its edges, or the exact minimum and maximum
    where these are nearer, so 100 gives exactly the minimum and maximum, and any other a bound that is off by
    less than a bin (2**-mantissa_bits of its value) from the sorted elements.

    Memory and merging: as `BinnedObserver`.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {
            "percentile": Option(float, 99.99, 50.0, 100.0, low_open=True, about="percent of the elements"),
            **BinnedObserver.OPTIONS,
        }
    )
    about: ClassVar[str] = "holds a share of the elements on either side"
    source: ClassVar[str] = "usual"

    def _range_of_counts(
        self,
        negative: Tensor,
        positive: Tensor,
        edges: Tensor,
        low: Tensor,
        high: Tensor,
        scheme: Scheme,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        counts, by_value = signed(negative, positive, edges)
        share = self.options["percentile"] / 100.0
        upper = value_at(counts, by_value, low, high, share)
        # the mirror image, so both sides round alike
        lower = -value_at(counts.flip(-1), -by_value.flip(0), -high, -low, share)
        return torch.minimum(lower, upper), torch.maximum(lower, upper)


def value_at(counts: Tensor, edges: Tensor, low: Tensor, high: Tensor, share: float) -> Tensor:
    """Return the value below which `share` of the elements lie.

    Args:
        counts: Elements by bin, (C, B), int64.
        edges: Edges of the bins, (B + 1,), float64, growing.
        low: Smallest element, (C,), float64.
        high: Largest element, (C,), float64.
        share: In (0, 1].

    Returns:
        float64, (C,), within [low, high].
    """
    below = counts.cumsum(-1)
    rank = below[:, -1:].to(torch.float64) * share
    index = torch.searchsorted(below.to(torch.float64), rank).clamp_(max=counts.shape[-1] - 1)
    inside = counts.gather(-1, index).to(torch.float64)
    before = below.gather(-1, index).to(torch.float64) - inside
    left = torch.clamp(edges[index], low[:, None], high[:, None])
    right = torch.clamp(edges[index + 1], low[:, None], high[:, None])
    fraction = torch.clamp((rank - before) / inside.clamp(min=1.0), 0.0, 1.0)
    value = torch.where(fraction == 1.0, right, left + (right - left) * fraction)
    return torch.clamp(value[:, 0], low, high)
