"""The native observers: a pass over memory takes a batch into an observer's buffers, and may fake-quantize it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.native.operators import axis_of, fake_extrema, fake_forward, one_device, straight_through
from qat.native.ranges import GridRule


class Statistics(NamedTuple):
    """The buffers of an observer, which a batch changes in place.

    Attributes:
        low: float32, one value or (C,), contiguous: the smallest so far; above `high` before the first.
        high: The largest, likewise.
        nonfinite: int64, one value: elements that were nan or infinite.
        counts: int64, (B,) or (C, B) with B = 2**(9 + mantissa_bits); None for the range alone.
        mantissa_bits: Of the bins.
        momentum: Weight of a batch in a moving average of the range; None to widen it. Not with counts.
    """

    low: Tensor
    high: Tensor
    nonfinite: Tensor
    counts: Tensor | None = None
    mantissa_bits: int = 7
    momentum: float | None = None


def observe(x: Tensor, statistics: Statistics, axis: int | None = None) -> None:
    """Take a batch into the buffers of an observer: `observe_histogram` or `observe_range`."""
    low, high, nonfinite, counts, mantissa_bits, momentum = statistics
    if counts is None:
        observe_range(x, low, high, nonfinite, axis, momentum)
    else:
        observe_histogram(x, counts, low, high, nonfinite, axis, mantissa_bits)


def fake_quantize_observe(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None, statistics: Statistics
) -> Tensor:
    """Return `fake_quantize(x, ...)`, and take `x` as it was into the statistics.

    One pass over memory; two for histograms by channel. The gradient is that of `fake_quantize`.

    Args:
        x: Any shape.
        scale: Of a grid that is given, as in `fake_quantize`.
        zero_point: Likewise.
        qmin: Smallest code.
        qmax: Largest code.
        axis: Dimension of the channels of the grid and of the statistics; None for per-tensor.
        statistics: Buffers that change as `observe` changes them.
    """
    operator = torch.ops.qat.fake_quantize_observe.default
    return straight_through(operator, x, scale, zero_point, qmin, qmax, axis_of(x, axis), *statistics)


def observe_minmax(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest and the largest finite values, and the count of the others.

    Returns:
        Minima and maxima, float32, () or (C,), inf and -inf where there is no finite value, 0.0 for either zero; and
        the number of elements that are nan or infinite, int64, ().
    """
    low, high, nonfinite = torch.ops.qat.observe_minmax(x.detach(), axis_of(x, axis))
    return low, high, nonfinite


def observe_range(
    x: Tensor, low: Tensor, high: Tensor, nonfinite: Tensor, axis: int | None = None, momentum: float | None = None
) -> None:
    """Widen a range by the finite values of `x`, or move it towards theirs, in place.

    Args:
        x: Any shape.
        low: float32, one value or (C,), contiguous: the smallest so far; above `high` before the first.
        high: The largest, likewise.
        nonfinite: int64, one value: elements that were nan or infinite.
        axis: Dimension of the channels; None for per-tensor.
        momentum: Weight of this batch in a moving average, computed in float64; None to widen.
    """
    torch.ops.qat.observe_range(x.detach(), low, high, nonfinite, axis_of(x, axis), momentum)


def observe_histogram(
    x: Tensor,
    counts: Tensor,
    low: Tensor,
    high: Tensor,
    nonfinite: Tensor,
    axis: int | None = None,
    mantissa_bits: int = 7,
) -> None:
    """Count `x` by the upper bits of its float32 patterns, and widen its range, in place.

    The bins are those of `qat.observers.binning`.

    Args:
        x: Any shape.
        counts: int64, (B,) or (C, B) with B = 2**(9 + mantissa_bits); the bins of nan and inf are set to 0.
        low: float32, one value or (C,): the smallest finite element so far.
        high: The largest, likewise.
        nonfinite: int64, one value: elements that were nan or infinite.
        axis: Dimension of the channels; None for per-tensor.
        mantissa_bits: 0 to 10.
    """
    torch.ops.qat.observe_histogram(x.detach(), counts, low, high, nonfinite, axis_of(x, axis), mantissa_bits)


def clip_ranges(
    counts: Tensor,
    low: Tensor,
    high: Tensor,
    mantissa_bits: int,
    rule: GridRule,
    margin: float,
    negative_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the clip range of each channel with the least expected squared error, as `qat.observers.clipping`.

    For tensors of the CPU. The search is the same; its sums are rounded in another order, so where two ranges are
    equally good another one may be chosen.

    Args:
        counts: The histograms, int64, (C, 2**(9 + mantissa_bits)), contiguous.
        low: Smallest elements, (C,), float64, finite.
        high: Largest elements, likewise.
        mantissa_bits: 0 to 10.
        rule: How a range becomes a grid.
        margin: Share by which a range must be expected to be better than min-max to be chosen.
        negative_weight: Weight of the squared errors of negative elements.
    """
    qmin, qmax, _, symmetric, middle, power_of_two = rule
    found: tuple[Tensor, Tensor] = torch.ops.qat.clip_ranges(
        counts, low, high, mantissa_bits, negative_weight, margin, qmin, qmax, symmetric, middle, power_of_two
    )
    return found


def register() -> None:
    """Register fake kernels, once, after the library is loaded."""
    torch.library.register_fake("qat::observe_minmax", fake_extrema)
    torch.library.register_fake("qat::observe_range", _nothing)
    torch.library.register_fake("qat::observe_histogram", _nothing)
    torch.library.register_fake("qat::fake_quantize_observe", _fake_quantize_observe)
    torch.library.register_fake("qat::clip_ranges", _fake_ranges)


def _nothing(*_: object) -> None:
    return None


def _fake_quantize_observe(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int,
    low: Tensor,
    high: Tensor,
    nonfinite: Tensor,
    counts: Tensor | None,
    mantissa_bits: int,
    momentum: float | None,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    one_device(x, low=low, high=high, nonfinite=nonfinite, counts=counts)
    return fake_forward(x, scale, zero_point, qmin, qmax, axis, with_mask)


def _fake_ranges(counts: Tensor, low: Tensor, high: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(low), torch.empty_like(high)
