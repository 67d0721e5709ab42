"""Calibration: ranges of activations from data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from qat.errors import DataError
from qat.graph.batches import model_inputs
from qat.graph.prepared import PreparedModel
from qat.graph.subgraph import constant_value
from qat.quantizers import FLOAT, OBSERVE, QUANTIZE, FakeQuantize

#: samples that are kept for the verification of exports
_KEPT = 16
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
    observer). Under `torch.distributed` the statistics are reduced over all processes at the end, so every process
    must call this.

    Args:
        qmodel: The model; afterwards it is in the phase `quantize`.
        batches: Any iterable: tensors, sequences whose first elements are the inputs, or mappings by input name.
        samples: Stop after this many samples; None for all.
        only: `missing` leaves the ranges that training or an earlier calibration has set.
        progress: Show a progress bar; None for only on a terminal.

    Returns:
        The number of samples seen (by this process).

    Raises:
        DataError: No batch, a batch of another shape or dtype, or nan or inf in a tensor; it is named.
        StateError: Some tensor saw no data; it is named.
    """
    chosen = {
        name: q
        for name, q in qmodel.activation_quantizers().items()
        if q.fixed is None and (only == "all" or not q.ready)
    }
    for quantizer in chosen.values():
        quantizer.observer.reset()
    was_training = qmodel.training
    qmodel.eval()
    qmodel.set_phase(FLOAT)
    for quantizer in chosen.values():
        quantizer.set_phase(OBSERVE)
    try:
        seen, kept = _observe(qmodel, batches, samples, progress)
    finally:
        qmodel.set_phase(FLOAT)
        qmodel.train(was_training)
    if seen == 0:
        raise DataError("no calibration data", "give at least one batch")
    if seen < _FEW and not _distributed():
        warnings.warn(f"calibrated on {seen} samples only; {_FEW} or more are advisable", stacklevel=2)
    _observe_constants(qmodel, chosen)
    for quantizer in chosen.values():
        if _distributed():
            quantizer.observer.all_reduce()
        quantizer.finish()
    for _, weight_quantizer, weight in qmodel.weight_quantizers():
        if only == "all" or not weight_quantizer.ready:
            weight_quantizer.refresh(weight)
    qmodel.set_phase(QUANTIZE)
    qmodel.samples = kept
    return seen


def _observe(
    qmodel: PreparedModel, batches: Iterable[Any], samples: int | None, progress: bool | None
) -> tuple[int, tuple[Tensor, ...]]:
    seen = 0
    kept: list[tuple[Tensor, ...]] = []
    bar = tqdm(batches, desc="calibrate", unit="batch", leave=False, disable=None if progress is None else not progress)
    with torch.no_grad():
        for batch in bar:
            inputs = model_inputs(qmodel, batch)
            count = int(inputs[0].shape[0]) if inputs and inputs[0].dim() else 1
            if samples is not None and seen + count > samples:
                count = samples - seen
                inputs = tuple(x[:count] for x in inputs)
            qmodel(*inputs)
            missing = _KEPT - sum(len(k[0]) for k in kept)
            if missing > 0:
                kept.append(tuple(x[:missing].detach().cpu().clone() for x in inputs))
            seen += count
            if samples is not None and seen >= samples:
                break
    merged = tuple(torch.cat(parts) for parts in zip(*kept, strict=True)) if kept else ()
    return seen, merged


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
