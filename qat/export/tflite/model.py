"""`export_tflite`: from a prepared model to a verified `.tflite` file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from qat.errors import ExportError, StateError
from qat.export.difference import Level
from qat.export.io_mode import Border, IoMode
from qat.export.model import execute, split
from qat.export.multipliers import refuse_multipliers
from qat.export.tflite.verify import TfliteResult, export_tflite_program
from qat.graph.batches import model_inputs
from qat.graph.prepared import PreparedModel
from qat.integer.model import convert


def export_tflite(
    qmodel: PreparedModel,
    path: str | os.PathLike[str],
    *,
    samples: Iterable[Any] | None = None,
    io: IoMode | Border = "float",
    verify: Level | Literal[False] = "outputs",
    bound: float = 0.0,
    unequal_share: float | None = 0.0,
    batch_size: int = 1,
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> TfliteResult:
    """Write a calibrated or trained model as int8 TFLite, execute it in LiteRT and compare it code by code.

    The simulation is `convert(qmodel, numerics="tflite")`, which LiteRT's reference kernels equal in every code. Needs
    `pip install 'qat[litert]'`.

    Args:
        qmodel: The model.
        path: The file to write; it appears under this name only when everything held.
        samples: Batches to execute, as for `calibrate`; None for the samples that calibration has kept.
        io: `float` (the file quantizes and dequantizes), `codes` (it takes and gives int8 codes), or an `IoMode`, which
            says it of inputs and outputs apart.
        verify: `outputs`, `layers` (every quantized tensor is compared), or False.
        bound: Largest difference in codes that an output may have with the reference kernels.
        unequal_share: Share of an output's codes that may differ at all, or None.
        batch_size: Batch size of the file; ignored where the model's code works for one size only.
        name: Name of the subgraph.
        metadata: Further entries of the model's metadata.

    Raises:
        StateError: The model was not calibrated, or there are no samples to verify on.
        ExportError: A tensor or an operator has no int8 form in TFLite (named), an accumulator may overflow, a
            multiplier is larger than the target allows, or ai-edge-litert is not installed.
        VerificationError: The runtime's result differs by more than the bounds.
        OutputError: The file cannot be written.
    """
    imodel = convert(qmodel, "tflite").to(torch.device("cpu"))
    refuse_multipliers(imodel.program, qmodel.plan)
    constants = {key: replace(c, value=c.value.cpu()) for key, c in imodel.program.constants.items()}
    if qmodel.plan.batch_size is not None:
        batch_size = qmodel.plan.batch_size
    if batch_size < 1:
        raise ExportError(f"batch size {batch_size} is not positive", "use at least 1")
    parts: list[tuple[Tensor, ...]] = []
    if verify:
        given = [qmodel.samples] if samples is None and qmodel.samples else samples
        if given is None:
            raise StateError("there are no samples to verify the export on", "give samples, or calibrate first")
        batches = [tuple(x.cpu() for x in model_inputs(qmodel, batch)) for batch in given]
        parts = [part for batch in batches for part in split(qmodel, batch, batch_size)]
    return export_tflite_program(
        replace(imodel.program, constants=constants),
        path,
        parts,
        execute(imodel),
        io=io,
        bound=bound,
        unequal_share=unequal_share,
        verify=verify,
        batch_size=batch_size,
        name=name or "model",
        metadata=metadata,
    )
