"""The clip threshold of least Kullback-Leibler divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from qat.observers.base import Reduction
from qat.observers.binning import BinnedObserver
from qat.observers.fallback import warn_of_fallback
from qat.observers.kl import kl_threshold
from qat.observers.linear import in_use, linear_counts, signed, without_tiny
from qat.observers.options import Option
from qat.scheme import Granularity, Scheme

#: elements up to this magnitude are not counted
_TINY = 1e-6
#: a largest magnitude below this has no threshold
_LEAST = 1e-5

#: counts in equal bins, (C, bins), of magnitudes (True) or of values, from the first to the second bound, each (C,)
_Histogram = Callable[[Tensor, Tensor, bool], Tensor]


class KLObserver(BinnedObserver):
    """Clips where quantizing changes the distribution least, as MNN does.

    On a histogram of `bins` equal bins up to the largest magnitude M, without elements of at most 1e-6 and with 1e-7 in
    every bin beforehand, `qat.observers.kl` finds the number i of bins to keep, of `target_bins` or more. The bound is
    (i + 0.5) M / bins.

    *Symmetric schemes*, and affine ones for tensors of one sign: that bound on the magnitude. `target_bins` is the
    number of codes from zero on: 128 for int8, as in MNN, and 256 for a uint8 tensor that is nowhere negative.

    *Affine schemes, both signs* (ours: MNN has only symmetric ones): the bins go from the smallest to the largest value
    and `target_bins` is the number of all codes. The end that is farther from zero is searched first with the other one
    fixed; then the other one, with what was clipped first counted in the last bin. Neither passes zero.

    `min_area`: where the spatial size of the tensor (all dimensions after the second) is smaller, nothing is searched,
    and all bins but half of the last are kept. MNN does so below 100.

    The equal bins are rebuilt from bins of floats, so the data is seen once (`qat.observers.linear` says how exact that
    is); for a weight the elements are counted exactly. Ranges of tensors with a largest magnitude below 1e-5 (which get
    scale 0 from MNN), with fewer elements than target bins, or with no fewer target bins than bins, are min-max, with a
    warning.

    Memory and merging: as `BinnedObserver`, with 10 mantissa bits: 4 MiB a tensor; with 7
    by channel: 512 KiB a channel.

    Attributes:
        area: The largest spatial size seen, float32, shape ().
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {
            "bins": Option(int, 2048, 64, 65536, about="equal bins up to the largest magnitude"),
            "target_bins": Option(int, None, 2, 32768, about="bins they are merged into; the number of codes"),
            "min_area": Option(int, 0, 0, 1 << 24, about="least spatial size for which a threshold is searched"),
            "mantissa_bits": Option(int, None, 0, 10, about="fineness of the bins of floats; 10, or 7 by channel"),
        }
    )
    looks_at_rows: ClassVar[bool] = True
    about: ClassVar[str] = "least Kullback-Leibler divergence between the clipped and the quantized distribution"
    source: ClassVar[str] = "MNN `KL`; ACUITY `kl_divergence`"
    fineness: ClassVar[tuple[int, int]] = (10, 7)

    area: Tensor

    def __init__(self, granularity: Granularity, channels: int | None, name: str, **options: object) -> None:
        super().__init__(granularity, channels, name, **options)
        self.register_buffer("area", torch.full((), -math.inf))

    def reductions(self) -> dict[str, Reduction]:
        """Declare the area as a maximum."""
        return {**super().reductions(), "area": "max"}

    def count_samples(self, x: Tensor) -> None:
        """Count them, and keep the area: whoever fills the buffers calls this, whatever pass that was."""
        super().count_samples(x)
        self.area.clamp_(min=float(math.prod(x.shape[2:])))

    def _range_of_counts(
        self, negative: Tensor, positive: Tensor, edges: Tensor, low: Tensor, high: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        negative, positive, edges = in_use(negative, positive, edges, _TINY)
        negative, positive = (without_tiny(side, edges, _TINY) for side in (negative, positive))

        def histogram(start: Tensor, stop: Tensor, magnitudes: bool) -> Tensor:
            if magnitudes:
                return linear_counts(negative + positive, edges, start, stop, self.options["bins"])
            return linear_counts(*signed(negative, positive, edges), start, stop, self.options["bins"])

        return self._clip(histogram, (negative + positive).sum(-1), low, high, scheme)

    def range_of_rows(self, rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Return the range by the elements themselves, as `range`."""
        values = rows.cpu().to(torch.float64)
        counted = (values.abs() > _TINY).to(torch.float64)

        def histogram(start: Tensor, stop: Tensor, magnitudes: bool) -> Tensor:
            bins = self.options["bins"]
            return equal_bins(values.abs() if magnitudes else values, counted, start, stop, bins)

        low, high = self._clip(histogram, counted.sum(-1), values.amin(-1), values.amax(-1), scheme)
        return low.to(rows.device), high.to(rows.device)

    def _clip(
        self, histogram: _Histogram, elements: Tensor, low: Tensor, high: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        bins = self.options["bins"]
        ends = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
        largest = torch.maximum(-ends[0], ends[1])
        qmin, qmax = scheme.code_range
        sides = [side for side in (qmax - scheme.symmetric_zero_point, scheme.symmetric_zero_point - qmin) if side > 0]
        codes = min(sides) + 1 if scheme.symmetric else qmax - qmin + 1
        target = self.options["target_bins"] or codes
        wanted = (largest >= _LEAST) & (elements >= target) & torch.tensor(target < bins)
        self._warn(largest, elements, target)
        one_sided = torch.full_like(wanted, scheme.symmetric) | (ends[0] == 0) | (ends[1] == 0)
        search = float(self.area) >= self.options["min_area"]
        lows, highs = low.clone(), high.clone()
        if bool((wanted & one_sided).any()):
            counts = histogram(torch.zeros_like(largest), largest, True)
            for c in torch.nonzero(wanted & one_sided).flatten().tolist():
                kept = kl_threshold(counts[c], target) if search else bins - 1
                bound = (kept + 0.5) * largest[c] / bins
                lows[c], highs[c] = torch.maximum(low[c], -bound), torch.minimum(high[c], bound)
        if search and bool((wanted & ~one_sided).any()):
            counts = histogram(*ends, False)
            for c in torch.nonzero(wanted & ~one_sided).flatten().tolist():
                below, above = two_sided(counts[c], target, float(ends[0][c]), float(ends[1][c]))
                lows[c], highs[c] = max(below, float(low[c])), min(above, float(high[c]))
        return lows, highs

    def _warn(self, largest: Tensor, elements: Tensor, target: int) -> None:
        if target >= self.options["bins"]:
            cause = f"{target} target bins leave nothing to merge {self.options['bins']} bins into"
            warn_of_fallback(self.name, cause, "its range is min-max; give more bins or another observer")
            return
        dead, few = largest < _LEAST, (elements < target) & (largest >= _LEAST)
        for which, cause in (
            (dead, f"its largest magnitude is below {_LEAST:g}"),
            (few, f"it has fewer elements above {_TINY:g} than target bins ({target})"),
        ):
            if bool(which.any()):
                instead = "kl chooses no threshold and its range is min-max"
                warn_of_fallback(self.name, cause, instead, int(which.sum()), len(which))


def equal_bins(values: Tensor, weights: Tensor, start: Tensor, stop: Tensor, bins: int) -> Tensor:
    """Count elements in equal bins, each in `min(floor((x - start) f), bins - 1)`, f = bins / (stop - start).

    Args:
        values: (C, N), float64, from `start` to `stop`.
        weights: What each counts, likewise.
        start: Lower end of the first bin, (C,), float64.
        stop: Upper end of the last, likewise.
        bins: Number of bins.

    Returns:
        (C, bins), float64.
    """
    factor = bins / (stop - start).clamp(min=1e-300)
    index = ((values - start[:, None]) * factor[:, None]).floor().clamp_(0, bins - 1).to(torch.int64)
    return torch.zeros(len(values), bins, dtype=torch.float64).scatter_add_(1, index, weights)


def two_sided(counts: Tensor, target: int, low: float, high: float) -> tuple[float, float]:
    """Return the clip range of a histogram from `low` < 0 to `high` > 0, one end after the other.

    Args:
        counts: Elements by equal bin, (bins,), float64.
        target: Bins they are merged into.
        low: Lower end of the first bin.
        high: Upper end of the last.
    """
    if high < -low:
        above, below = two_sided(counts.flip(0), target, -high, -low)
        return -below, -above
    bins = len(counts)
    width = (high - low) / bins
    zero = -low / width
    kept = kl_threshold(counts, target, first=min(bins - 1, math.ceil(zero) + 1))
    above = low + (kept + 0.5) * width
    rest = counts[:kept].clone()
    rest[-1] += counts[kept:].sum()
    # what the other end keeps reaches from the last bin to beyond zero
    first = max(target, kept - math.floor(zero))
    if first >= kept - 1:
        return low, above
    other = kl_threshold(rest.flip(0), target, first=first)
    return min(0.0, low + (kept - other - 0.5) * width), above
