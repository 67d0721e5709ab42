"""ONNX Runtime and LiteRT on this machine, as executors of packages."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from qat.errors import ExportError
from qat.export.runtime import session
from qat.export.tflite.runtime import Kernels, Runtime, version
from qat.packages.artifact import Artifact
from qat.packages.executor import Executor, Missing, Run, Sample


def _run_onnx(file: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
    names = [contract.name for contract in artifact.outputs]
    try:
        runtime = session(str(file))
        return [dict(zip(names, runtime.run(names, dict(sample)), strict=True)) for sample in samples], ()
    # ONNX Runtime's exceptions have no common public base
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        raise ExportError(f"ONNX Runtime cannot execute {file.name} ({cause})", "make the package again") from error


def _onnx_version() -> str:
    import onnxruntime

    return f"ONNX Runtime {onnxruntime.__version__}, {platform.machine()}"


def _run_tflite(kernels: Kernels) -> Run:
    def run(file: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
        runtime = Runtime(file.read_bytes(), kernels)
        names = [contract.name for contract in artifact.outputs]
        found = [
            dict(zip(names, runtime.run([sample[c.name] for c in artifact.inputs]), strict=True)) for sample in samples
        ]
        return found, ()

    return run


def _no_litert() -> Missing | None:
    return None if find_spec("ai_edge_litert") else Missing("LiteRT (ai-edge-litert)", "pip install 'qat[litert]'")


#: as in `export_onnx`: float32 sums of a few operators end on the other side of a tie, one code, in rare elements
ONNXRUNTIME = Executor(
    name="onnxruntime",
    accepts=lambda artifact: artifact.format == "onnx",
    runtime=_onnx_version,
    missing=lambda: None,
    run=_run_onnx,
    bound=1.0,
)
LITERT = Executor(
    name="litert",
    accepts=lambda artifact: artifact.format == "tflite",
    runtime=lambda: f"{version()} reference kernels, {platform.machine()}",
    missing=_no_litert,
    run=_run_tflite("reference"),
)
#: what an application gets by default rounds once where the reference kernels round twice
XNNPACK = Executor(
    name="litert-xnnpack",
    accepts=lambda artifact: artifact.format == "tflite",
    runtime=lambda: f"{version()} default kernels (XNNPACK), {platform.machine()}",
    missing=_no_litert,
    run=_run_tflite("default"),
    role="record",
)
