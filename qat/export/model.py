"""`export_onnx`: from a prepared model to a verified ONNX file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from qat.errors import ExportError, StateError
from qat.export.io_mode import Border, IoMode
from qat.export.multipliers import refuse_multipliers
from qat.export.verify import ExportResult, Level, export_program
from qat.graph.batches import model_inputs
from qat.graph.prepared import PreparedModel
from qat.integer.model import IntegerModel, convert
from qat.integer.program import Program


def execute(imodel: IntegerModel) -> Any:
    """Return the executor of an integer model, as verification wants it."""

    def run(program: Program, inputs: tuple[Tensor, ...], names: set[str]) -> Mapping[str, Tensor]:
        return imodel.run(inputs, names)

    return run


def export_onnx(
    qmodel: PreparedModel,
    path: str | os.PathLike[str],
    *,
    samples: Iterable[Any] | None = None,
    verify: Level | Literal[False] = "outputs",
    bound: float = 1.0,
    unequal_share: float | None = 0.01,
    dynamic_batch: bool | None = None,
    batch_size: int = 1,
    opset: int = 21,
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
    io: IoMode | Border = "float",
) -> ExportResult:
    """Write a calibrated or trained model as ONNX (QDQ), execute it in ONNX Runtime and compare it code by code.

    Args:
        qmodel: The model.
        path: The file to write; it appears under this name only when everything held.
        samples: Batches to execute, as for `calibrate`; None for the samples that calibration has kept.
        verify: `outputs`, `layers` (every quantized tensor is compared), or False.
        bound: Largest difference in codes that an output may have.
        unequal_share: Share of an output's codes that may differ at all, or None.
        dynamic_batch: Leave the batch size open, unless the model's code works for one size only (`Plan.batch_size`);
            None to do so where the target allows it.
        batch_size: Batch size where it is not open.
        opset: Version of the standard operators.
        name: Name of the graph.
        metadata: Further entries of the model's metadata.
        io: `float` (the file quantizes and dequantizes), `codes` (it takes and gives codes), or an `IoMode`, which says
            it of inputs and outputs apart.

    Raises:
        StateError: The model was not calibrated, or there are no samples to verify on.
        ExportError: It cannot be expressed, an accumulator may overflow, or a multiplier is larger than the target
            allows (the layer is named); the batch size shall be open and the target wants static shapes; an input or
            output that shall be codes has none.
        VerificationError: The runtime's result differs by more than the bounds.
        OutputError: The file cannot be written.
    """
    imodel = convert(qmodel).to(torch.device("cpu"))
    # the program keeps the constants as they were made, which is where the model is
    constants = {name: replace(c, value=c.value.cpu()) for name, c in imodel.program.constants.items()}
    constraints = qmodel.plan.constraints
    if dynamic_batch and not constraints.dynamic_batch:
        raise ExportError(f"{qmodel.plan.target} wants static shapes", "leave dynamic_batch out, and choose batch_size")
    refuse_multipliers(imodel.program, qmodel.plan)
    dynamic_batch = constraints.dynamic_batch if dynamic_batch is None else dynamic_batch
    if qmodel.plan.batch_size is not None:
        dynamic_batch, batch_size = False, qmodel.plan.batch_size
    if batch_size < 1:
        raise ExportError(f"batch size {batch_size} is not positive", "use at least 1")
    batches: list[tuple[Tensor, ...]] = []
    if verify:
        given = [qmodel.samples] if samples is None and qmodel.samples else samples
        if given is None:
            raise StateError("there are no samples to verify the export on", "give samples, or calibrate first")
        batches = [tuple(x.cpu() for x in model_inputs(qmodel, batch)) for batch in given]
        if not dynamic_batch:
            batches = [part for batch in batches for part in split(qmodel, batch, batch_size)]
    return export_program(
        replace(imodel.program, constants=constants),
        path,
        batches,
        execute(imodel),
        bound=bound,
        unequal_share=unequal_share,
        verify=verify,
        dynamic_batch=dynamic_batch,
        batch_size=batch_size,
        opset=opset,
        name=name or "model",
        metadata=metadata,
        io=io,
    )


def split(qmodel: PreparedModel, batch: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    """Cut a batch into batches of a fixed size, the last one filled up with samples from the beginning."""
    rows = [qmodel.opgraph.shapes[name][:1] for name in qmodel.opgraph.inputs]
    # rows that one sample takes of each input; 0 for an input that has no batch
    each = [-row[0] if row and row[0] < 0 else 0 for row in rows]
    if not any(each):
        return [batch]
    count = max(len(x) // k for x, k in zip(batch, each, strict=True) if k)
    parts = []
    for start in range(0, count, size):
        picked = torch.arange(start, start + size) % count
        parts.append(
            tuple(
                x.reshape(-1, k, *x.shape[1:])[picked].flatten(0, 1) if k else x
                for x, k in zip(batch, each, strict=True)
            )
        )
    return parts
