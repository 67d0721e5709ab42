"""The CUDA sources as plain C++: the logic that compiles as such, and whole operators under an emulation."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
#: Tensor cores, which nobody emulates here.
NOT_EMULATED = ("int8_conv", "cuda_int8")
LIBRARIES = ("-ltorch", "-ltorch_cpu")
#: What registrations say of the GPU, and what of the CPU.
DEVICES = {
    "STABLE_TORCH_LIBRARY_IMPL(qat, CUDA, m)": "STABLE_TORCH_LIBRARY_IMPL(qat_emulated, CPU, m)",
    "tensor.is_cuda() && tensor.get_device_index() == device": "tensor.is_cpu() && device <= 0",
    ", guard_(index)": "",
    "  torch::stable::accelerator::DeviceGuard guard_;\n": "",
    'check(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA; install a CUDA build of it");': "",
    "STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &found));": "",
}
_KEPT: list[torch.library.Library] = []
KERNEL = re.compile(r"\b\w+(?:<[^<>;]*>)?\s*$")


def compiled(source: str, folder: Path) -> ctypes.CDLL:
    """Compile a source file of this folder, without contraction, and load it; skip without a compiler."""
    library = folder / "host.so"
    _compile([HERE / source], library, [])
    return ctypes.CDLL(str(library))


def emulated_operators(folder: Path) -> Any:
    """Return `torch.ops.qat_emulated`: the operators of training for the GPU, on CPU tensors.

    Registrations (csrc/torch/cuda_*.cpp) and kernels are the sources themselves but for launches and devices, run by
    `cuda_emulator`.
    """
    for name in ("cuda", "kernels", "torch"):
        (folder / name).mkdir()
        for path in (CSRC / name).glob("*.*"):
            target = path.with_suffix(".cpp").name if path.suffix == ".cu" else path.name
            (folder / name / target).write_text(plain(path.read_text(encoding="utf-8")), encoding="utf-8")
    kernels = [path for path in sorted((folder / "cuda").glob("*.cpp")) if path.stem not in NOT_EMULATED]
    registrations = [path for path in sorted((folder / "torch").glob("cuda*.cpp")) if path.stem not in NOT_EMULATED]
    options = ["-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-sign-compare"]
    options.append(f"-I{HERE / 'cuda_emulator'}")
    options += [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-L{path}" for path in cpp_extension.library_paths())]
    library = folder / "emulated.so"
    _compile([HERE / "cuda_emulator" / "emulator.cpp", *kernels, *registrations], library, options, LIBRARIES)
    definitions = torch.library.Library("qat_emulated", "DEF")
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("qat::") and torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CPU"):
            definitions.define(str(schema).removeprefix("qat::"))
    _KEPT.append(definitions)
    torch.ops.load_library(library)
    return torch.ops.qat_emulated


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of the elements; null for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def plain(text: str) -> str:
    """Return CUDA C++ as C++ for tensors of the CPU: launches become calls of the emulator."""
    for cuda, cpu in DEVICES.items():
        text = text.replace(cuda, cpu)
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


def _compile(sources: Sequence[Path], library: Path, options: Sequence[str], libraries: Sequence[str] = ()) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    common = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    files = list(map(str, sources))
    subprocess.run([compiler, *common, *options, *files, "-o", str(library), *libraries], check=True)
