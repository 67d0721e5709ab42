"""Refining any range for the least squared error: what we put behind ACUITY's `--MLE`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from qat.observers.binning import BinnedObserver
from qat.observers.density import Counts, density_of, scheme_errors
from qat.observers.linear import signed
from qat.observers.options import Option
from qat.observers.percentile import value_at
from qat.scheme import Scheme

#: first change of a bound, relative to it, and how often it is halved
_FIRST, _HALVINGS = 0.25, 8
#: most turns at one step
_TURNS = 12
_SHARE, _MEANS = 0.9999, 4.0


class RefineObserver(BinnedObserver):
    """Starts from a range and moves its ends, one at a time, while that lowers the squared error of the tensor.

    Ours. ACUITY has a switch `--MLE` (minimise layer error) that minimises per-layer errors by adjusting quantization
    parameters and can be combined with every algorithm; how is not published. This does: from `start`, which is
    `minmax`, `percentile` (99.99) or `mean` (four times the mean magnitude on both sides), one end (for symmetric
    schemes both together) is made longer or shorter by a quarter, then an eighth, down to 0.2 %: each time the change
    by which the integrated squared error (`qat.observers.density`) with the scheme's own quantizer falls most.
    It finds the nearest minimum, where `mse` looks everywhere: use it to keep the character of a range and still not
    pay more than needed. `refine_range` does the same for any range.

    Memory and merging: as `BinnedObserver`.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {
            "start": Option(str, "percentile", about="range to start from", choices=("minmax", "percentile", "mean")),
            **BinnedObserver.OPTIONS,
        }
    )
    about: ClassVar[str] = "coordinate search of the least squared error from a given range"
    source: ClassVar[str] = "qat's own, for ACUITY `--MLE`"

    def _range_of_counts(
        self, negative: Tensor, positive: Tensor, edges: Tensor, low: Tensor, high: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        start_low, start_high = low, high
        counts, by_value = signed(negative, positive, edges)
        if self.options["start"] == "percentile":
            start_high = value_at(counts, by_value, low, high, _SHARE)
            start_low = -value_at(counts.flip(-1), -by_value.flip(0), -high, -low, _SHARE)
        elif self.options["start"] == "mean":
            middle = (edges[:-1] + edges[1:]) / 2
            both = (negative + positive).to(torch.float64)
            mean = (both * middle).sum(-1) / both.sum(-1).clamp(min=1.0)
            start_low, start_high = torch.maximum(low, -_MEANS * mean), torch.minimum(high, _MEANS * mean)
        elements = Counts(negative.to(torch.float64), positive.to(torch.float64), edges, low, high)
        return refine_range(elements, start_low, start_high, scheme)


def refine_range(elements: Counts, low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return a range near a given one with less squared error, or the given one.

    Args:
        elements: Counts by bins, C channels.
        low: Lower bounds to start from, (C,), float64.
        high: Upper bounds, likewise.
        scheme: What the range is for.

    Returns:
        Lower and upper bounds, (C,), float64, within the elements' extremes widened to zero.
    """
    elements = elements.trimmed()
    floor, ceiling = torch.clamp(elements.low, max=0.0), torch.clamp(elements.high, min=0.0)
    low, high = low.clamp(floor, ceiling), high.clamp(floor, ceiling)
    span = torch.clamp(high, min=0.0) - torch.clamp(low, max=0.0)
    steps = scheme.code_range[1] - scheme.code_range[0]
    density = density_of(elements, torch.where(span > 0, span, 1.0) / (8 * steps))

    best = scheme_errors(density, low[:, None], high[:, None], scheme)[:, 0]
    for halving in range(_HALVINGS):
        longer = 1.0 + _FIRST / (1 << halving)
        # what either end is multiplied with, one candidate a column
        one, both = (longer, 1.0, 1.0 / longer, 1.0), (1.0, longer, 1.0, 1.0 / longer)
        factors_low, factors_high = (one[::2], one[::2]) if scheme.symmetric else (one, both)
        for _ in range(_TURNS):
            lows, highs = (
                (end[:, None] * torch.tensor(factors, dtype=torch.float64)).clamp(floor[:, None], ceiling[:, None])
                for end, factors in ((low, factors_low), (high, factors_high))
            )
            costs, index = scheme_errors(density, lows, highs, scheme).min(-1, keepdim=True)
            better = costs[:, 0] < best
            if not bool(better.any()):
                break
            low = torch.where(better, lows.gather(-1, index)[:, 0], low)
            high = torch.where(better, highs.gather(-1, index)[:, 0], high)
            best = torch.where(better, costs[:, 0], best)
    return low, high
