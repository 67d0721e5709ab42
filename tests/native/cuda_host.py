"""The CUDA sources as plain C++: the logic that compiles as such, and whole kernels under an emulation."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
KERNEL = re.compile(r"\b\w+(?:<[^<>;]*>)?\s*$")


def compiled(source: str, folder: Path) -> ctypes.CDLL:
    """Compile a source file of this folder, without contraction, and load it; skip without a compiler."""
    return _library([HERE / source], folder / "host.so", [])


def emulated(source: str, kernels: Sequence[str], folder: Path) -> ctypes.CDLL:
    """Compile an entry with these .cu files of csrc/cuda, run by `cuda_emulator`, and load the library."""
    for name in ("cuda", "kernels"):
        (folder / name).mkdir()
        for path in (CSRC / name).glob("*.*"):
            if path.suffix in {".h", ".cuh"} or path.name in kernels:
                text = path.read_text(encoding="utf-8")
                target = path.with_suffix(".cpp").name if path.suffix == ".cu" else path.name
                (folder / name / target).write_text(plain(text), encoding="utf-8")
    shutil.copy(HERE / source, folder / source)
    sources = [folder / source, HERE / "cuda_emulator" / "emulator.cpp", *sorted((folder / "cuda").glob("*.cpp"))]
    options = ["-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-sign-compare", f"-I{HERE / 'cuda_emulator'}"]
    return _library(sources, folder / "emulated.so", options)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of the elements; null for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def plain(text: str) -> str:
    """Return CUDA C++ as C++: launches become calls of the emulator, dynamic shared memory a pointer."""
    text = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = static_cast<\1*>(emulator::shared_memory());", text
    )
    while "<<<" in text:
        before, _, rest = text.partition("<<<")
        shape, _, rest = rest.partition(">>>")
        kernel = KERNEL.search(before)
        assert kernel is not None, before[-80:]
        rest = rest.lstrip()
        end = _closing(rest)
        call = f"emulator::launch({shape}, [&] {{ {kernel.group().strip()}{rest[:end]}; }})"
        text = before[: kernel.start()] + call + rest[end:]
    return text


def _closing(text: str) -> int:
    """Return the place behind the bracket that closes the first one."""
    depth = 0
    for at, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return at + 1
    raise AssertionError(text[:80])


def _library(sources: Sequence[Path], library: Path, options: Sequence[str]) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    common = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *common, *options, *map(str, sources), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
