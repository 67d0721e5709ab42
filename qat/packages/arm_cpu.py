"""The package for ARM CPUs: the model for ONNX Runtime and for LiteRT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qat.errors import ExportError
from qat.export.io_mode import IoMode
from qat.packages.artifact import Artifact
from qat.packages.executor import Executor
from qat.packages.files import TFLITE, write_onnx, write_tflite
from qat.packages.runtimes import LITERT, ONNXRUNTIME, XNNPACK
from qat.packages.source import Source


def write(source: Source, folder: Path, io: IoMode) -> tuple[tuple[Artifact, ...], Mapping[str, str]]:
    """Write the artifacts; a model without an int8 form in TFLite goes without `model.tflite`.

    Raises:
        ExportError: The model cannot be expressed in ONNX.
    """
    artifacts = [write_onnx(source, folder, io)]
    omitted = {}
    try:
        artifacts.append(write_tflite(source, folder, io))
    except ExportError as error:
        omitted[TFLITE] = str(error)
    return tuple(artifacts), omitted


def executors(targets: Sequence[str]) -> tuple[Executor, ...]:
    """Return what executes the artifacts."""
    return (ONNXRUNTIME, LITERT, XNNPACK)
