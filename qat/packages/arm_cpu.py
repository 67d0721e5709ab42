"""The package for ARM CPUs: the model for ONNX Runtime, for LiteRT, and for `qat_run` with its sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qat.errors import ExportError, StateError
from qat.export.io_mode import IoMode
from qat.packages.arm64 import arm64_executors
from qat.packages.artifact import Artifact
from qat.packages.executor import Executor
from qat.packages.files import TFLITE, write_onnx, write_tflite
from qat.packages.runner import PLAN, runner_executors, write_plan
from qat.packages.runtimes import LITERT, ONNXRUNTIME, XNNPACK
from qat.packages.source import Source
from qat.packages.sources import PROGRAM, copy_program, copy_sources


def write(source: Source, folder: Path, io: IoMode) -> tuple[tuple[Artifact, ...], Mapping[str, str]]:
    """Write the artifacts.

    A model without an int8 form in TFLite goes without `model.tflite`, one with parts that need PyTorch without
    `model.qatplan`; where there is no cross-compiler, the runner's sources come without the program.

    Raises:
        ExportError: The model cannot be expressed in ONNX.
    """
    artifacts = [write_onnx(source, folder, io)]
    omitted = {}
    try:
        artifacts.append(write_tflite(source, folder, io))
    except ExportError as error:
        omitted[TFLITE] = str(error)
    try:
        artifacts.append(write_plan(source.simulation("onnx"), folder, io))
        copy_sources(folder)
        copy_program(folder)
    except ExportError as error:
        omitted[PLAN] = str(error)
    except StateError as error:
        omitted[PROGRAM] = str(error)
    return tuple(artifacts), omitted


def executors(targets: Sequence[str]) -> tuple[Executor, ...]:
    """Return what executes the artifacts."""
    return (ONNXRUNTIME, LITERT, XNNPACK, *runner_executors(), *arm64_executors())
