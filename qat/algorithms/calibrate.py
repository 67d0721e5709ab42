"""Calibration: ranges of activations from data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from qat.algorithms.auto_ranges import auto_quantizers, choose_ranges
from qat.algorithms.restore import modes_restored
from qat.errors import DataError, StateError
from qat.graph.batches import first_samples, join_samples, model_inputs, sample_count
from qat.graph.finite import refuse_nonfinite
from qat.graph.prepared import PreparedModel
from qat.graph.subgraph import constant_value
from qat.quantizers import FLOAT, OBSERVE, QUANTIZE, FakeQuantize

#: samples that are kept for the verification of exports
_KEPT = 16
#: samples that are kept for the observer `auto` where the batches cannot be had twice
_REPLAYED = 256
#: below this many samples the ranges are hardly representative
_FEW = 50


def calibrate(
    qmodel: PreparedModel,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
    only: Literal["all", "missing"] = "all",
    progress: bool | None = None,
) -> int:
    """Choose the range of every activation (and refresh those of weights) from data; then fake-quantize.

    The model runs in evaluation mode, without gradients, in float. Ranges are the same whatever the batch size, the
    order of the batches and the number of processes the data is split over (except with the `moving_average`
    observer, and but for the rounding of the network's own arithmetic, which may depend on the batch size). Under
    `torch.distributed` the statistics are reduced over all processes at the end, so every process must call this; a
    process may have no batch as long as another has one.

    For tensors with the observer `auto` the batches are gone through a second time (`qat.algorithms.auto_ranges`).
    Where they are an iterator, which can be had only once, the first 256 samples of each process are kept for it.

    Where it fails, or is interrupted, the model has the ranges, phases and modes that it had before.

    Args:
        qmodel: The model; afterwards it is in the phase `quantize`.
        batches: Any iterable: tensors, sequences whose first elements are the inputs, or mappings by input name.
        samples: Stop after this many samples (after the batch that reaches them, where the model's batch size is
            fixed); None for all.
        only: `missing` leaves the ranges that training or an earlier calibration has set.
        progress: Show a progress bar; None for only on a terminal.

    Returns:
        The number of samples seen (by this process).

    Raises:
        DataError: No batch, a batch of another shape or dtype, or nan or inf in a weight or tensor; it is named.
        StateError: Some tensor saw no data; it is named. Or an unknown value of `only`.
    """
    if only not in ("all", "missing"):
        raise StateError(f"cannot calibrate only {only!r}", "choose all or missing")
    if samples is not None and samples < 1:
        raise DataError(f"calibration on {samples} samples", "give a positive number")
    _check_values(qmodel)
    with modes_restored(qmodel):
        qmodel.eval()
        chosen = {
            name: q
            for name, q in qmodel.activation_quantizers().items()
            if q.fixed is None and (only == "all" or not q.ready)
        }
        for quantizer in chosen.values():
            quantizer.observer.reset()
        auto = auto_quantizers(chosen)
        once = isinstance(batches, Iterator)
        replayed: list[tuple[Tensor, ...]] = []
        record = replayed if auto and once else None
        seen, total, kept = _observe_together(qmodel, chosen, batches, samples, progress, record)
        _observe_constants(qmodel, chosen)
        if _distributed():
            for quantizer in chosen.values():
                quantizer.observer.all_reduce()
        _check_observed(qmodel, chosen)
        for quantizer in chosen.values():
            quantizer.finish()
            # the rows that an observer counts are more where it serves several places, or sees windows of images
            quantizer.samples.clamp_(max=total)
        if auto:
            choose_ranges(qmodel, auto, lambda: replayed if once else _inputs(qmodel, batches, samples))
        done: set[int] = set()
        for _, weight_quantizer, weight in qmodel.weight_quantizers():
            if id(weight_quantizer) not in done and (only == "all" or not weight_quantizer.ready):
                weight_quantizer.refresh(weight)
            done.add(id(weight_quantizer))
    qmodel.set_phase(QUANTIZE)
    qmodel.samples = kept
    return seen


def _check_values(qmodel: PreparedModel) -> None:
    values = qmodel.float_state_dict()
    buffers = {name for name, _ in qmodel.named_buffers()}
    refuse_nonfinite(
        ((name, value) for name, value in values.items() if name not in buffers),
        ((name, value) for name, value in values.items() if name in buffers),
    )


def _check_observed(qmodel: PreparedModel, chosen: dict[str, FakeQuantize]) -> None:
    """Refuse values without a range before any range is set.

    Raises:
        StateError: Nothing was observed.
        DataError: nan or inf was observed.
    """
    ties = qmodel.plan.tie_groups()
    for name, quantizer in chosen.items():
        if quantizer.observer.is_empty:
            raise StateError(f"no data reached {name!r}", "calibrate with at least one batch")
        count = int(quantizer.observer.nonfinite)
        if count:
            which = f"one of {', '.join(ties[name])} (they share a range)" if name in ties else f"tensor {name!r}"
            raise DataError(
                f"{which}: {count} of the observed values are nan or inf", "check the data and the weights before it"
            )


def _observe_together(
    qmodel: PreparedModel,
    chosen: dict[str, FakeQuantize],
    batches: Iterable[Any],
    samples: int | None,
    progress: bool | None,
    record: list[tuple[Tensor, ...]] | None,
) -> tuple[int, int, tuple[Tensor, ...]]:
    """Observe the batches; where one process fails all do, for the others would wait for it forever.

    Returns:
        The samples of this process, those of all, and some inputs.
    """
    qmodel.set_phase(FLOAT)
    for quantizer in chosen.values():
        quantizer.set_phase(OBSERVE)
    seen, kept = 0, tuple[Tensor, ...]()
    failure: Exception | None = None
    try:
        seen, kept = _observe(qmodel, batches, samples, progress, record)
    except Exception as error:
        if not _distributed():
            raise
        failure = error
    qmodel.set_phase(FLOAT)
    total, failed = seen, 0
    if _distributed():
        device = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
        counts = torch.tensor([seen, int(failure is not None)], device=device)
        dist.all_reduce(counts)
        total, failed = (int(c) for c in counts)
    if failure is not None:
        raise failure
    if failed:
        raise DataError("calibration failed on another process", "see its message")
    if total == 0:
        raise DataError("no calibration data", "give at least one batch")
    if total < _FEW:
        warnings.warn(f"calibrated on {total} samples only; {_FEW} or more are advisable", stacklevel=3)
    return seen, total, kept


def _inputs(qmodel: PreparedModel, batches: Iterable[Any], samples: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield the inputs of the model, up to so many samples."""
    seen = 0
    for batch in batches:
        inputs = model_inputs(qmodel, batch)
        if samples is not None:
            inputs = first_samples(qmodel, inputs, samples - seen)
        yield inputs
        seen += sample_count(qmodel, inputs)
        if samples is not None and seen >= samples:
            return


def _observe(
    qmodel: PreparedModel,
    batches: Iterable[Any],
    samples: int | None,
    progress: bool | None,
    record: list[tuple[Tensor, ...]] | None,
) -> tuple[int, tuple[Tensor, ...]]:
    seen = remembered = 0
    kept: list[tuple[Tensor, ...]] = []
    bar = tqdm(batches, desc="calibrate", unit="batch", leave=False, disable=None if progress is None else not progress)
    with torch.no_grad():
        for inputs in _inputs(qmodel, bar, samples):
            qmodel(*inputs)
            count = sample_count(qmodel, inputs)
            if record is not None and seen < _REPLAYED and count:
                record.append(tuple(x.clone() for x in first_samples(qmodel, inputs, _REPLAYED - seen)))
            seen += count
            if remembered < _KEPT and count:
                kept.append(tuple(x.cpu().clone() for x in first_samples(qmodel, inputs, _KEPT - remembered)))
                remembered += count
    return seen, join_samples(qmodel, kept)


def _observe_constants(qmodel: PreparedModel, chosen: dict[str, FakeQuantize]) -> None:
    """Show each constant operand to its observer once, on one process: how often data came in must not weigh."""
    if _distributed() and dist.get_rank() != 0:
        return
    constants = qmodel.opgraph.constants()
    for entry in qmodel.plan:
        if entry.decision == "integer" and entry.name in constants and entry.quantizer in chosen:
            chosen[entry.quantizer].observer.observe(constant_value(qmodel, entry.name).float())


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
