"""The range of a tensor that is at hand as a whole, such as a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from qat import numerics
from qat.errors import DataError
from qat.observers.base import Observer
from qat.observers.registry import make_observer
from qat.scheme import PER_TENSOR, Granularity, Scheme

_ROWS_AT_ONCE = 1024
_STATE_AT_ONCE = 64 << 20
_ELEMENTS_AT_ONCE = 1 << 21
_BY_ROW = Granularity("per_channel", axis=0)


def weight_range(weight: Tensor, scheme: Scheme, name: str) -> tuple[Tensor, Tensor]:
    """Return the range that the scheme's observer chooses after seeing the whole tensor once.

    Observers whose method is defined on elements and not on counts (`kl`, `admm`) are given the elements. Where the
    observer minimises the squared error, its bounds are compared with min-max on the elements
    themselves, which the observer only knows by their bins, and min-max is taken for the channels where that
    is better. Channels and groups are observed some at a time, so the counts stay below 64 MiB.

    Args:
        weight: Any shape that has the scheme's axis; not empty.
        scheme: Its granularity, observer and formula are used.
        name: Name of the tensor, for messages.

    Returns:
        Lower and upper bounds, float64, shape () for per-tensor, else (C,) in the order of `numerics.expand_to`.

    Raises:
        DataError: The tensor is empty, lacks the axis, or holds nan or inf.
        SchemeError: The observer or one of its options does not exist.
    """
    granularity = scheme.granularity
    weight = weight.detach()
    if weight.numel() == 0:
        raise DataError(f"tensor {name!r} of shape {tuple(weight.shape)} is empty", "remove the layer or keep it float")
    if granularity.kind == "per_tensor":
        low, high = _range(make_observer(scheme.observer, PER_TENSOR, None, name), weight.reshape(1, -1), scheme)
        return low.reshape(()), high.reshape(())
    if not -weight.dim() <= granularity.axis < weight.dim():
        raise DataError(
            f"tensor {name!r} of shape {tuple(weight.shape)} has no axis {granularity.axis}",
            "choose an axis that exists",
        )
    if granularity.kind == "per_channel":
        count = weight.shape[granularity.axis]
        whole = make_observer(scheme.observer, granularity, count, name)
        if not whole.minimises_error and not whole.looks_at_rows and _state(whole) <= _STATE_AT_ONCE:
            # as it lies in memory: rows would be a copy of a channels_last weight
            return _range(whole, weight, scheme)
        rows = weight.movedim(granularity.axis, 0).reshape(weight.shape[granularity.axis], -1)
        return _range_by_row(rows, scheme, name)
    return _range_by_group(weight, scheme, name)


def _range_by_group(weight: Tensor, scheme: Scheme, name: str) -> tuple[Tensor, Tensor]:
    axis, size = scheme.granularity.axis, scheme.granularity.size or 1
    moved = weight.movedim(axis, -1)
    length = moved.shape[-1]
    whole = length // size * size
    lows, highs = [], []
    # the last, shorter group of each run has rows of its own length
    for piece, width in ((moved[..., :whole], size), (moved[..., whole:], length - whole)):
        if piece.numel():
            low, high = _range_by_row(piece.reshape(-1, width), scheme, name)
            shape = (*moved.shape[:-1], piece.shape[-1] // width)
            lows.append(low.reshape(shape))
            highs.append(high.reshape(shape))
    low, high = (torch.cat(parts, dim=-1).movedim(-1, axis).reshape(-1) for parts in (lows, highs))
    return low, high


def _range_by_row(rows: Tensor, scheme: Scheme, name: str) -> tuple[Tensor, Tensor]:
    one = make_observer(scheme.observer, _BY_ROW, 1, name)
    step = max(1, min(_ROWS_AT_ONCE, _STATE_AT_ONCE // _state(one)))
    lows, highs = [], []
    for at in range(0, len(rows), step):
        part = rows[at : at + step]
        low, high = _range(make_observer(scheme.observer, _BY_ROW, len(part), name), part, scheme)
        lows.append(low)
        highs.append(high)
    return torch.cat(lows), torch.cat(highs)


def _state(observer: Observer) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in observer.buffers())


def _range(observer: Observer, rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return what `observer` says of `rows`, (R, K), each bound of shape (R,)."""
    observer.to(rows.device).observe(rows)
    observer.finite_or_raise()
    chosen = observer.range_of_rows(rows, scheme) if observer.looks_at_rows else observer.range(scheme)
    low, high = (bound.reshape(-1) for bound in chosen)
    if not observer.minimises_error:
        return low, high
    least, most = (bound.reshape(-1).to(torch.float64) for bound in (observer.min_val, observer.max_val))
    weight = float(observer.options["negative_weight"])
    better = _squared_error(rows, low, high, scheme, weight) < _squared_error(rows, least, most, scheme, weight)
    return torch.where(better, low, least), torch.where(better, high, most)


def _squared_error(rows: Tensor, low: Tensor, high: Tensor, scheme: Scheme, negative_weight: float) -> Tensor:
    """Return the squared quantization error of each row, (R,), float64, that of negative elements weighted."""
    scale, zero_point = numerics.range_to_scale(low, high, scheme)
    error = torch.zeros_like(low)
    step = max(1, _ELEMENTS_AT_ONCE // len(rows))
    for at in range(0, rows.shape[1], step):
        part = rows[:, at : at + step].to(torch.float32)
        codes = numerics.quantize(part, scale, zero_point, *scheme.code_range, _BY_ROW)
        restored = numerics.dequantize(codes, scale, zero_point, _BY_ROW)
        squares = (restored.to(torch.float64) - part.to(torch.float64)).square()
        error += torch.where(part < 0, negative_weight * squares, squares).sum(1)
    return error
