"""Finds and loads the compiled library, once, when it is first asked for.

Nothing is compiled here, and nothing is loaded by an import. Where the library is absent, does not load, or was built
from other sources, there is a reason, and everybody computes in PyTorch.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

#: The `interface_version` of csrc/torch/ops.cpp that the Python code of this package calls.
_INTERFACE = 10

_active = False
_cuda = False


@dataclass(frozen=True)
class Status:
    """Which path computes, and why.

    Attributes:
        active: The native operators `torch.ops.qat.*` are loaded.
        reason: Why, in one line.
        isa: Instruction set of the kernels: "avx512", "avx2" or "portable"; empty when not active.
        path: The library's file, where there is one.
        cuda: The library has the kernels of the GPU too; they need a CUDA build of torch and nvcc at installation.
    """

    active: bool
    reason: str
    isa: str = ""
    path: Path | None = None
    cuda: bool = False

    def runs_on(self, device: torch.device) -> bool:
        """Tell whether the operators take tensors of a device."""
        return self.active and (device.type == "cpu" or (device.type == "cuda" and self.cuda))

    def __str__(self) -> str:
        """One line for `qat env`."""
        if not self.active:
            return f"not used: {self.reason}"
        return f"{self.isa} ({self.path}), {'with' if self.cuda else 'without'} CUDA kernels"


@functools.cache
def status() -> Status:
    """Return which path is in use; the first call loads the library.

    `QAT_NO_NATIVE=1` in the environment keeps the library out, and `QAT_NATIVE_ISA` chooses an instruction set lower
    than the best one; both are read at the first call.
    """
    if os.environ.get("QAT_NO_NATIVE", "0") not in {"", "0"}:
        return Status(False, "QAT_NO_NATIVE is set")
    return load(Path(__file__).with_name("_C.abi3.so"))


def runs_on(device: torch.device) -> bool:
    """Tell whether the operators take tensors of a device; to compiled code, whether they did before it was compiled.

    `torch.compile` looks into no cached function, and reads variables.
    """
    if not torch.compiler.is_compiling():
        return status().runs_on(device)
    return _active and (device.type == "cpu" or (device.type == "cuda" and _cuda))


def load(path: Path) -> Status:
    """Load a library and register the Python side of its operators; never raises.

    A process can load only one; a second call in the same process must name the same file.
    """
    global _active, _cuda
    if not path.is_file():
        return Status(False, "the extension was not built (no compiler at installation, or the build failed)")
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        interface = int(torch.ops.qat._interface())
        if interface != _INTERFACE:
            return Status(
                False, f"{path.name} was built from other sources (interface {interface}, not {_INTERFACE})", path=path
            )
        isa = str(torch.ops.qat._isa())
    # dlopen, the stable ABI and torch.library all have errors of their own
    except Exception as error:  # noqa: BLE001
        return Status(False, f"{path.name} does not load: {' '.join(str(error).split())[:200]}", path=path)
    from qat.native import (
        int8,
        learned,
        norm,
        norm_learned,
        norm_statistics,
        observers,
        operators,
        oscillation,
        ranges,
        tanh,
    )  # fmt: skip

    for part in (operators, observers, ranges, norm, norm_learned, learned, norm_statistics, tanh, oscillation, int8):
        part.register()
    cuda = hasattr(torch.ops.qat, "int8_gemm")
    _active, _cuda = True, cuda
    return Status(True, f"built, and this processor runs {isa}", isa, path, cuda=cuda)
