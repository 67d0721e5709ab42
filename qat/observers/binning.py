"""The fixed histogram of floats that the percentile and the histogram observers share.

A bin is the set of float32 values with the same sign, the same 8 exponent bits and the same `mantissa_bits`
leading mantissa bits: the top bits of the bit pattern. No bin depends on data, so counts of any parts of the
data add up, in int64 and without rounding, to the counts of the whole. A bin is at most 2**-mantissa_bits of
its values wide, and the exact minimum and maximum are kept beside the counts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat import native, numerics
from qat.observers.base import Observer, Reduction
from qat.observers.options import Option
from qat.scheme import Granularity, Scheme

_FLOAT32_MANTISSA = 23
_BINS_AT_ONCE = 1 << 21


class BinnedObserver(Observer):
    """Counts elements by the top bits of their float32 pattern; base of the observers of distributions.

    Memory: 8 bytes a bin, 2**(9 + mantissa_bits) bins: with the default fineness 512 KiB for a tensor, and 64 KiB for
    each channel.
    Mergeable: the result does not depend on batches, their order or their distribution.

    Attributes:
        counts: Elements by bin, int64, shape (bins,) or (C, bins), bins in the order of the bit patterns:
            from 0 up to inf and nan, then the same for the negative numbers. The bins of inf and nan stay 0.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {"mantissa_bits": Option(int, None, 0, 10, about="fineness of the bins; 7, or 4 by channel")}
    )
    #: mantissa bits by tensor and by channel where the option does not say
    fineness: ClassVar[tuple[int, int]] = (7, 4)

    counts: Tensor

    def __init__(self, granularity: Granularity, channels: int | None, name: str, **options: Any) -> None:
        super().__init__(granularity, channels, name, **options)
        if self.options["mantissa_bits"] is None:
            self.options["mantissa_bits"] = self.fineness[channels is not None]
        self.bins = 1 << (9 + self.mantissa_bits)
        shape = (self.bins,) if channels is None else (channels, self.bins)
        self.register_buffer("counts", torch.zeros(shape, dtype=torch.int64))

    @property
    def mantissa_bits(self) -> int:
        """Mantissa bits that tell bins apart."""
        return int(self.options["mantissa_bits"])

    def reductions(self) -> dict[str, Reduction]:
        """Declare the counts as a sum."""
        return {**super().reductions(), "counts": "sum"}

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))
        patterns = x.to(torch.float32).view(torch.int32)
        index = (patterns >> (_FLOAT32_MANTISSA - self.mantissa_bits)).bitwise_and_(self.bins - 1)
        if self.channels is not None:
            first = torch.arange(self.channels, dtype=torch.int64, device=x.device) * self.bins
            index = index + numerics.expand_to(first, x, self.granularity)
        flat = self.counts.view(-1)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            flat += torch.bincount(index.reshape(-1), minlength=flat.numel())
        else:
            # bincount would wait for the device, to learn the size of its result
            one = torch.ones(1, dtype=torch.int64, device=x.device)
            flat.scatter_add_(0, index.reshape(-1).to(torch.int64), one.expand(x.numel()))
        per_sign = self.counts.view(*self.counts.shape[:-1], 2, self.bins // 2)
        per_sign[..., -(1 << self.mantissa_bits) :] = 0

    def statistics(self) -> native.Statistics:
        """Return the counts and the range."""
        return native.Statistics(self.min_val, self.max_val, self.nonfinite, self.counts, self.mantissa_bits)

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """Return the counts of negative and of other elements by growing magnitude, int64, (C or 1, H)."""
        counts = self.counts.cpu().reshape(-1, 2, self.bins // 2)[:, :, : -(1 << self.mantissa_bits)]
        return counts[:, 1], counts[:, 0]

    def _range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        negative, positive = self.magnitudes()
        edges = magnitude_edges(self.mantissa_bits)
        low, high = self.min_val.cpu().reshape(-1), self.max_val.cpu().reshape(-1)
        seen = low <= high
        low, high = (torch.where(seen, bound, 0.0).to(torch.float64) for bound in (low, high))
        step = max(1, _BINS_AT_ONCE // self.bins)
        chunks = [slice(at, at + step) for at in range(0, len(low), step)]
        parts = [self._range_of_counts(negative[c], positive[c], edges, low[c], high[c], scheme) for c in chunks]
        lows, highs = zip(*parts, strict=True)
        return torch.cat(lows).reshape(self.min_val.shape), torch.cat(highs).reshape(self.min_val.shape)

    @abstractmethod
    def _range_of_counts(
        self, negative: Tensor, positive: Tensor, edges: Tensor, low: Tensor, high: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        """Choose the range of some channels; on the CPU.

        Args:
            negative: Counts of negative elements by growing magnitude, (C, H), int64.
            positive: Counts of the others, likewise.
            edges: Edges of the bins of magnitude, (H + 1,), float64.
            low: Smallest elements, (C,), float64; 0 for a channel without any.
            high: Largest elements, likewise.
            scheme: What the range is for.

        Returns:
            Lower and upper bounds, (C,), float64, within [low, high].
        """


def magnitude_edges(mantissa_bits: int) -> Tensor:
    """Return the edges of the H = 255 * 2**mantissa_bits bins of one sign, float64, (H + 1,): 0 to 2**128."""
    shift = _FLOAT32_MANTISSA - mantissa_bits
    patterns = torch.arange(255 << mantissa_bits, dtype=torch.int32) << shift
    edges = patterns.view(torch.float32).to(torch.float64)
    return torch.cat([edges, torch.tensor([2.0**128], dtype=torch.float64)])
