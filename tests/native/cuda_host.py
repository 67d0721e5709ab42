"""The logic of csrc/cuda, compiled as plain C++."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from torch import Tensor


def compiled(source: str, folder: Path) -> ctypes.CDLL:
    """Compile a source file of this folder, without contraction, and load it; skip without a compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    library = folder / "host.so"
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, str(Path(__file__).with_name(source)), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of the elements; null for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
