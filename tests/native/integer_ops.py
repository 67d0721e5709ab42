"""Calls the integer operators of csrc/kernels/integer, compiled apart from the extension, which hides them."""

from __future__ import annotations

import ctypes
import os
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from qat.integer.kernels.qparams import QParams

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "kernels" / "integer"
NAMES = ["copy", "elementwise", "layout", "loops", "lookup", "normalize", "pool", "quantize", "resize", "table"]
DTYPES = {"u8": torch.uint8, "s8": torch.int8, "u16": torch.uint16, "s16": torch.int16}
NUMBERS = {torch.uint8: 1, torch.int8: 2, torch.uint16: 3, torch.int16: 4, torch.int32: 5, torch.float32: 6}


class _Grid(ctypes.Structure):
    _fields_ = [
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
        ("qmin", ctypes.c_int32),
        ("qmax", ctypes.c_int32),
        ("wide", ctypes.c_bool),
    ]


class _View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_uint8),
        ("rank", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 8),
        ("grid", _Grid),
    ]


@dataclass(frozen=True)
class Codes:
    """A dense tensor in its type, with its grid."""

    data: Tensor
    grid: QParams | None = None

    def view(self) -> _View:
        q = self.grid or QParams(1.0, 0, 0, 255)
        sizes = (ctypes.c_int64 * 8)(*self.data.shape)
        grid = _Grid(q.scale, q.zero_point, q.qmin, q.qmax, q.wide)
        return _View(self.data.data_ptr(), NUMBERS[self.data.dtype], self.data.dim(), sizes, grid)


def codes_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers as contiguous codes of a type; uint16 lacks the conversion from int32 in places."""
    if dtype == torch.uint16:
        return values.to(torch.int32).to(torch.int16).contiguous().view(torch.uint16)
    return values.to(dtype).contiguous()


def _runnable() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability() if platform.machine() in {"x86_64", "AMD64"} else ""
    return [
        "portable",
        *(["avx2"] if capability in {"AVX2", "AVX512"} else []),
        *(["avx512"] if capability == "AVX512" else []),
    ]


ISAS = _runnable()
Run = Callable[..., None]


def compiled(folder: Path) -> Run:
    """Compile the operators and return a function that calls one; skips without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    with mock.patch("setuptools.setup"), mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        build = runpy.run_path(str(ROOT / "setup.py"))
    sources = [path for path in KERNELS.glob("*.cpp") if path.stem.split("_")[0] in NAMES]
    sources.append(Path(__file__).with_name("integer_ops_entry.cpp"))

    def compile_one(source: Path) -> Path:
        options = build["KERNEL_OPTIONS"].get(source.stem, []) if len(ISAS) > 1 else []
        target = folder / f"{source.stem}.o"
        extra = os.environ.get("QAT_NATIVE_CXXFLAGS", "").split()
        command = [
            compiler,
            *build["COMMON"],
            "-Werror",
            "-fPIC",
            *options,
            *extra,
            f"-I{KERNELS}",
            "-c",
            source,
            "-o",
            target,
        ]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "operators.so"
    extra = os.environ.get("QAT_NATIVE_LDFLAGS", "").split()
    subprocess.run([compiler, "-shared", *objects, *extra, "-o", library], check=True)
    entry = ctypes.CDLL(str(library)).run_operator
    entry.argtypes = [
        ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p,
        ctypes.c_float, ctypes.c_void_p,
    ]  # fmt: skip

    def run(
        name: str,
        isa: str,
        tensors: Sequence[Codes],
        ints: Sequence[int] = (),
        number: float = 0.0,
        arrays: Sequence[Tensor | None] = (),
        split: bool = False,
    ) -> None:
        views = (_View * len(tensors))(*(t.view() for t in tensors))
        pointers = (ctypes.c_void_p * max(len(arrays), 1))(*(None if a is None else a.data_ptr() for a in arrays))
        values = (ctypes.c_int64 * max(len(ints), 1))(*ints)
        assert entry(name.encode(), isa.encode(), split, views, len(tensors), values, number, pointers) == 0

    return run
