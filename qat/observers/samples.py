"""MACE's percentiles over samples: of the samples' minima and maxima, not of elements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from qat.errors import DataError
from qat.observers.base import Observer, Reduction, largest_of, smallest_of
from qat.observers.fallback import warn_of_fallback
from qat.observers.options import Option
from qat.scheme import Granularity, Scheme

#: MACE's absolute distance, in the units of the tensor, by which a refined range must stay away from the other end
_MARGIN = 0.1


class MaceObserver(Observer):
    """The percentile over samples of each sample's minimum and maximum, as MACE's `quantize_stat.py`.

    A sample is a row of a batch. low = percentile(minima, p), high = percentile(maxima, 100 - p), linearly interpolated
    as `numpy.percentile`; p = 0 is min-max. With `enhance` and more than one sample, the bounds are then moved inwards
    over the sorted extremes as long as that shortens the range by more than `enhance_ratio` times the share of samples
    that it cuts (`enhanced`, MACE's rule, in which the two ends depend on each other and ranges below 0.1 are left
    alone).

    Where MACE stops because low is not below high (a constant tensor, or a large p), the range is min-max, with a
    warning.

    Memory: 8 bytes a sample that can be kept, up to `capacity`: 32 KiB a tensor or channel. Only the smallest minima
    and the largest maxima are kept, sorted, so batches, their order and their distribution do not matter; asking for a
    percentile that lies beyond what is kept is an error. Along axis 0, and by group, all that is seen at once is one
    sample.

    Attributes:
        lows: Smallest sample minima, ascending, float32, (capacity,) or (C, capacity); then inf.
        highs: Largest sample maxima, descending, likewise; then -inf.
        rows: Samples with a finite value, int64, () or (C,).
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {
            "percentile": Option(float, 0.0, 0.0, 50.0, about="percent of the samples, at either end"),
            "enhance": Option(bool, False, about="cut extremes of few samples"),
            "enhance_ratio": Option(float, 10.0, 0.0, 1e9, low_open=True, about="range saved for each sample cut"),
            "capacity": Option(int, 4096, 2, 1 << 22, about="samples whose extremes are kept"),
        }
    )
    about: ClassVar[str] = "percentile over samples of their minima and maxima"
    source: ClassVar[str] = "MACE `quantize_stat.py`"

    lows: Tensor
    highs: Tensor
    rows: Tensor

    def __init__(self, granularity: Granularity, channels: int | None, name: str, **options: object) -> None:
        super().__init__(granularity, channels, name, **options)
        shape = (*self.min_val.shape, self.options["capacity"])
        self.register_buffer("lows", torch.full(shape, math.inf, dtype=torch.float32))
        self.register_buffer("highs", torch.full(shape, -math.inf, dtype=torch.float32))
        self.register_buffer("rows", torch.zeros(self.min_val.shape, dtype=torch.int64))

    def reductions(self) -> dict[str, Reduction]:
        """Declare the kept extremes and the number of samples."""
        return {**super().reductions(), "lows": "smallest", "highs": "largest", "rows": "sum"}

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))
        lows, highs = self._by_sample(x, low, high)
        self.lows.copy_(smallest_of(self.lows, lows))
        self.highs.copy_(largest_of(self.highs, highs))
        self.rows += (lows <= highs).sum(-1)

    def _by_sample(self, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the finite extremes of each sample, (N,) or (C, N), float32; inf and -inf where there are none."""
        axis = self.granularity.axis % x.dim() if self.channels is not None else None
        if x.dim() == 0 or self.granularity.kind == "per_group" or axis == 0:
            return low[..., None], high[..., None]
        samples = x if axis is None else x.movedim(axis, 0)
        rows = samples.reshape(*samples.shape[: 1 if axis is None else 2], -1)
        finite = torch.isfinite(rows)
        lows = rows.masked_fill(~finite, math.inf).amin(-1)
        highs = rows.masked_fill(~finite, -math.inf).amax(-1)
        return lows.to(torch.float32), highs.to(torch.float32)

    def _range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        capacity = self.options["capacity"]
        lows, highs = (b.cpu().to(torch.float64).reshape(-1, capacity) for b in (self.lows, self.highs))
        least, most = (b.cpu().to(torch.float64).reshape(-1) for b in (self.min_val, self.max_val))
        found_low, found_high = least.clone(), most.clone()
        collapsed = 0
        for c, count in enumerate(self.rows.cpu().reshape(-1).tolist()):
            if not count:
                continue
            low = self._percentile(lows[c], count)
            high = -self._percentile(-highs[c], count)
            if low < high:
                if self.options["enhance"] and count > 1:
                    low, high = self._enhanced(lows[c], highs[c], count, low, high)
                found_low[c], found_high[c] = low, high
            else:
                collapsed += 1
        if collapsed:
            cause = f"the {self.options['percentile']:g} percentile of sample minima is not below that of maxima"
            warn_of_fallback(self.name, cause, "its range is min-max", collapsed, len(found_low))
        return found_low.reshape(self.min_val.shape), found_high.reshape(self.min_val.shape)

    def _percentile(self, ascending: Tensor, count: int) -> float:
        """Return numpy's linear percentile of the `count` samples of which the smallest are given."""
        place = float(self.options["percentile"]) / 100.0 * (count - 1)
        below = math.floor(place)
        above = min(below + 1, count - 1)
        if above >= len(ascending) and not (place == below < len(ascending)):
            raise self._beyond(count, above + 1)
        a, b, share = float(ascending[below]), float(ascending[min(above, len(ascending) - 1)]), place - below
        # numpy's own order of operations, for the same bits
        return b - (b - a) * (1.0 - share) if share >= 0.5 else a + (b - a) * share

    def _enhanced(self, lows: Tensor, highs: Tensor, count: int, low: float, high: float) -> tuple[float, float]:
        kept = min(count, len(lows))
        moved = enhanced(lows[:kept].tolist(), highs[:kept].tolist(), count, low, high, self.options["enhance_ratio"])
        if moved is None:
            raise self._beyond(count, count)
        return moved

    def _beyond(self, count: int, needed: int) -> DataError:
        return DataError(
            f"tensor {self.name!r}: mace needs the extremes of {needed} of {count} samples and keeps those of "
            f"{self.options['capacity']}",
            f"set the observer's option capacity to {needed} or more, or give fewer samples",
        )


def enhanced(
    minima: list[float], maxima: list[float], count: int, low: float, high: float, ratio: float
) -> tuple[float, float] | None:
    """Return MACE's enhanced range; None where more than the given samples would be needed.

    Going inwards over the sorted extremes, a bound moves to the i-th where that takes more than `ratio` times the share
    of the range for each share of the samples, both counted from where the bound last moved to.

    Args:
        minima: Sample minima, ascending, all of them or the smallest.
        maxima: Sample maxima, descending, as many.
        count: Number of samples.
        low: Lower bound to start from, below `high`.
        high: Upper bound.
        ratio: `enhance_ratio`.
    """
    at_low = at_high = 0
    for i in range(count):
        if i >= len(minima):
            return None
        smallest, largest = minima[i], maxima[i]
        if smallest + _MARGIN > high:
            break
        if i > at_low and (smallest - low) / (high - low) / ((i - at_low) / (count - at_low)) > ratio:
            at_low, low = i, smallest
        if low + _MARGIN > largest:
            break
        if i > at_high and (high - largest) / (high - low) / ((i - at_high) / (count - at_high)) > ratio:
            at_high, high = i, largest
    return low, high
