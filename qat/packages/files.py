"""The files that packages of several kinds have in common: the ONNX and the TFLite model."""

from __future__ import annotations

from pathlib import Path

from qat.export.io_mode import IoMode
from qat.export.model import export_onnx
from qat.export.tflite.model import export_tflite
from qat.packages.artifact import Artifact
from qat.packages.source import Source

ONNX, TFLITE = "model.onnx", "model.tflite"


def write_onnx(source: Source, folder: Path, io: IoMode) -> Artifact:
    """Write `model.onnx` (QDQ); its batch size is open where the target allows that.

    Raises:
        ExportError: The model cannot be expressed, or has floats where `io` wants codes.
    """
    result = export_onnx(source.qmodel, folder / ONNX, verify=False, name=source.name, io=io)
    return Artifact(ONNX, "onnx", "onnx", result.inputs, result.outputs)


def write_tflite(source: Source, folder: Path, io: IoMode) -> Artifact:
    """Write `model.tflite`, int8, of batch size 1.

    Raises:
        ExportError: The model has no int8 form in TFLite (the operator is named), or ai-edge-litert is not installed.
    """
    result = export_tflite(source.qmodel, folder / TFLITE, verify=False, name=source.name, io=io)
    return Artifact(TFLITE, "tflite", "tflite", result.inputs, result.outputs)
