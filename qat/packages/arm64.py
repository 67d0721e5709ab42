"""ONNX Runtime and LiteRT for 64-bit ARM under emulation, as executors: in the root that `scripts/arm64_root` makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qat.errors import ExportError
from qat.packages import arm64_child
from qat.packages.artifact import Artifact
from qat.packages.cache import cache_folder
from qat.packages.executor import Executor, Missing, Run, Sample

_EMULATOR = "qemu-aarch64-static"
#: what the root's /proc/cpuinfo describes
_PROCESSOR = "neoverse-n1"
_STAMP = ".qat-arm64-root"
_PYTHON = "usr/bin/python3.11"
#: an image takes a second or two, starting Python with its libraries about ten
_SAMPLES = 2


def arm64_root() -> Path:
    """Return where the root is looked for: `$QAT_ARM64_ROOT`, or `$XDG_CACHE_HOME/qat/arm64-root`."""
    given = os.environ.get("QAT_ARM64_ROOT")
    return Path(given) if given else cache_folder("arm64-root")


def arm64_executors() -> tuple[Executor, ...]:
    """Return ONNX Runtime, and LiteRT's reference and default kernels, for ARM64.

    ONNX Runtime is compared with the profile `onnx-arm64` (docs/onnxruntime.md), and held to one code, as on x86.
    LiteRT's reference kernels must equal the simulation; its default kernels round otherwise and are recorded.
    """
    return (
        Executor(
            name="onnxruntime-arm64",
            accepts=lambda artifact: artifact.format == "onnx",
            runtime=lambda: _described("onnxruntime", "ONNX Runtime"),
            missing=missing_root,
            run=_run("onnxruntime"),
            numerics="onnx-arm64",
            bound=1.0,
            samples=_SAMPLES,
        ),
        Executor(
            name="litert-arm64",
            accepts=lambda artifact: artifact.format == "tflite",
            runtime=lambda: _described("ai-edge-litert", "LiteRT", " reference kernels"),
            missing=missing_root,
            run=_run("BUILTIN_REF"),
            samples=_SAMPLES,
        ),
        Executor(
            name="litert-xnnpack-arm64",
            accepts=lambda artifact: artifact.format == "tflite",
            runtime=lambda: _described("ai-edge-litert", "LiteRT", " default kernels (XNNPACK)"),
            missing=missing_root,
            run=_run("AUTO"),
            samples=_SAMPLES,
            role="record",
        ),
    )


def missing_root() -> Missing | None:
    """Return what is missing for running ARM64's Python, or None."""
    if shutil.which(_EMULATOR) is None:
        mend = "scripts/setup --system, or as root: apt-get install qemu-user-static"
        return Missing(f"{_EMULATOR}, to run ARM programs", mend)
    root = arm64_root()
    if not (root / _STAMP).is_file() or not (root / _PYTHON).is_file():
        return Missing(
            f"ONNX Runtime and LiteRT for ARM64 (no root in {root})", "scripts/arm64_root, in qat's repository"
        )
    return None


def root_version(package: str) -> str:
    """Return the version of a Python package in the root."""
    lines = (arm64_root() / _STAMP).read_text(encoding="utf-8").splitlines()
    versions = dict(line.split("==", 1) for line in lines if "==" in line)
    return versions.get(package, "of unknown version")


def _described(package: str, name: str, kernels: str = "") -> str:
    return f"{name} {root_version(package)}{kernels}, aarch64 ({_EMULATOR} as {_PROCESSOR})"


def run_emulated(script: Path, *arguments: str) -> str:
    """Run a Python script in the root, on the emulated processor, and return what it printed.

    Files that the root lacks are those of this machine, so the script and its data need not be in it.

    Raises:
        ExportError: It failed; its last words are given.
    """
    root = arm64_root().resolve()
    command = [
        *(_EMULATOR, "-cpu", _PROCESSOR, "-L", str(root), str(root / _PYTHON)),
        # not the packages of this machine
        *("-B", "-S", str(script), *arguments),
    ]
    # a home of another Python, and its paths, would be taken for the root's
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LD_"))}
    environment |= {"PYTHONHOME": "/usr", "PYTHONPATH": "/opt/site", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        said = lines[-1][:200] if lines else f"status {done.returncode}"
        raise ExportError(f"on emulated ARM64: {said}", "make the package, or scripts/arm64_root, again")
    return done.stdout


def _run(runtime: str) -> Run:
    def run(file: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
        inputs = [contract.name for contract in artifact.inputs]
        outputs = [contract.name for contract in artifact.outputs]
        with tempfile.TemporaryDirectory(prefix="qat-arm64-") as name:
            folder = Path(name).resolve()
            job = {
                "runtime": runtime,
                "file": str(Path(file).resolve()),
                "inputs": inputs,
                "outputs": outputs,
                "samples": len(samples),
            }
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            for number, sample in enumerate(samples):
                for index, key in enumerate(inputs):
                    array = np.ascontiguousarray(sample[key])
                    np.save(folder / f"i{index}_{number}.npy", array, allow_pickle=False)
            run_emulated(Path(arm64_child.__file__).resolve(), str(folder))
            found = [
                {key: np.load(folder / f"o{i}_{number}.npy", allow_pickle=False) for i, key in enumerate(outputs)}
                for number in range(len(samples))
            ]
        return found, ()

    return run
