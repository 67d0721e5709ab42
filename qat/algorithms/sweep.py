"""`sweep`: one pass over a prepared model and all data, node by node, in float and quantized side by side.

Algorithms that go through the layers in order need, at each, what the float model and the model quantized so far feed
it. Running the model up to every layer costs a pass a layer; here every node is computed once for all batches in either
path, a value is kept until its last reader, and the algorithm is called at the layers on the way.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.algorithms.restore import restored
from qat.algorithms.units import Unit
from qat.algorithms.walk import Visit, Walk, float_reference
from qat.errors import DataError, QuantizationWarning, StateError
from qat.graph.batches import first_samples, join_samples, model_inputs, sample_count
from qat.graph.prepared import PreparedModel
from qat.quantizers import QUANTIZE

__all__ = ["DEFAULT_MEMORY", "Visit", "gather", "sweep"]

#: bytes that the activations of all samples may take
DEFAULT_MEMORY = 2 << 30


def sweep(
    qmodel: PreparedModel,
    batches: Sequence[tuple[Tensor, ...]],
    units: Sequence[Unit],
    visit: Callable[[Visit], None],
    *,
    float_model: nn.Module | None = None,
    progress: bool | None = None,
    title: str = "sweep",
) -> None:
    """Compute a calibrated model on all batches, in float and fake-quantized, and call `visit` at each unit.

    The model runs in evaluation mode and without gradients (`visit` may enable them). The float path has the parameters
    that the model has at the start, or those of `float_model`. The quantized path goes on from each unit with whatever
    parameters `visit` leaves. Phases and training modes are afterwards what they were; where something fails, so are
    parameters, buffers and ranges.

    Args:
        qmodel: The model.
        batches: From `gather`.
        units: Which pieces to visit, each node in at most one of them (see `layer_units`).
        visit: The algorithm.
        float_model: The model that `qmodel` was made of, where rounding or bias correction has changed `qmodel` since.
        progress: Show a progress bar, by unit; None for only on a terminal.
        title: What the bar says.

    Raises:
        StateError: The model was not calibrated, or a node belongs to two units.
        CheckpointError: `float_model` is another model.
    """
    qmodel.encodings()  # says which tensor has no range
    disable = None if progress is None else not progress
    bar = tqdm(total=len(units), desc=title, unit="unit", leave=False, disable=disable)
    with restored(qmodel), torch.no_grad(), bar:
        reference = float_reference(qmodel, float_model)
        qmodel.eval()
        qmodel.set_phase(QUANTIZE)
        walk = Walk(qmodel, reference, units)

        def visited(found: Visit) -> None:
            bar.set_postfix_str(found.unit.name)
            visit(found)
            bar.update()

        walk.run(batches, visited)


def gather(
    qmodel: PreparedModel,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
    memory: int = DEFAULT_MEMORY,
    batch_size: int = 32,
) -> tuple[tuple[Tensor, ...], ...]:
    """Take the samples that a sweep will keep in memory, and split them into batches of one size.

    Args:
        qmodel: The model.
        batches: As for `calibrate`.
        samples: Take at most as many; None for all.
        memory: Bytes for the activations of a sweep that are alive at the same time, measured on the first sample. What
            an algorithm computes with at one layer comes on top. Where the samples need more, fewer are taken, with a
            warning.
        batch_size: Samples a batch. A model of fixed batch size keeps its own.

    Raises:
        DataError: No batch, one that does not fit, or not even one sample fits the memory.
        StateError: The model was not calibrated, or an option is out of range.
    """
    for what, value in (("samples", samples), ("memory", memory), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise StateError(f"{what} is {value}", "give a positive number")
    qmodel.encodings()
    kept: list[tuple[Tensor, ...]] = []
    seen = given = size = 0
    limit = samples or sys.maxsize
    for batch in batches:
        inputs = model_inputs(qmodel, batch)
        count = sample_count(qmodel, inputs)
        if not count:
            continue
        if not size:
            size = _bytes_of_a_sample(qmodel, first_samples(qmodel, inputs, 1))
            limit = min(limit, memory // size)
        given += count
        inputs = first_samples(qmodel, inputs, limit - seen)
        # a batch of fixed size stays whole
        if 0 < sample_count(qmodel, inputs) <= limit - seen:
            kept.append(tuple(x.detach() for x in inputs))
            seen += sample_count(qmodel, inputs)
        if given > limit or given >= (samples or sys.maxsize):
            break
    if not given:
        raise DataError("no calibration data", "give at least one batch")
    if not seen:
        raise DataError(f"one sample needs {_mib(size)} and the limit is {_mib(memory)}", "raise memory")
    if seen < (given if samples is None else min(samples, given)):
        warnings.warn(
            f"{seen} samples are used and {given} or more were given: a sample needs {_mib(size)} and memory is "
            f"limited to {_mib(memory)}; raise memory to use more",
            QuantizationWarning,
            stacklevel=3,
        )
    return _split(qmodel, kept, batch_size)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _split(qmodel: PreparedModel, kept: list[tuple[Tensor, ...]], batch_size: int) -> tuple[tuple[Tensor, ...], ...]:
    if qmodel.plan.batch_size is not None:
        return tuple(kept)
    joined = join_samples(qmodel, kept)
    total = sample_count(qmodel, joined)
    pieces = [joined]
    if total > batch_size:
        shapes = [qmodel.opgraph.shapes[name] for name in qmodel.opgraph.inputs]
        pieces = [
            tuple(
                x[at * -shape[0] : (at + batch_size) * -shape[0]] if shape and shape[0] < 0 else x
                for x, shape in zip(joined, shapes, strict=True)
            )
            for at in range(0, total, batch_size)
        ]
    return tuple(pieces)


def _bytes_of_a_sample(qmodel: PreparedModel, inputs: tuple[Tensor, ...]) -> int:
    """Measure the activations of one sample that are alive at the same time, both paths together."""
    with restored(qmodel), torch.no_grad():
        reference = float_reference(qmodel, None)
        qmodel.eval()
        qmodel.set_phase(QUANTIZE)
        walk = Walk(qmodel, reference, ())
        # clones: of a slice the memory of the whole would be counted
        walk.run((tuple(x.clone() for x in inputs),), None)
    count = sample_count(qmodel, inputs)
    return max(1, -(-walk.peak // max(count, 1)))
