"""The CUDA sources compile, for every architecture, without spilled registers, and the result loads without a GPU."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
#: Single layers for tests, and the search of clip ranges; the products of the GPU.
CPU_ONLY = [
    "qat::_int8_conv",
    "qat::_int8_matmul",
    "qat::add_observe",
    "qat::clip_ranges",
    "qat::norm_observe",
    "qat::oscillation_step",
]
CUDA_ONLY = ["qat::int8_conv2d", "qat::int8_gemm"]


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    """What setup.py knows of nvcc."""
    with mock.patch("setuptools.setup"):
        facts = runpy.run_path(str(ROOT / "setup.py"))
    if facts["find_nvcc"]() is None:
        pytest.skip("there is no nvcc on PATH or in CUDA_HOME")
    return facts


@pytest.mark.heavy
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_compile_and_spill_no_register(build: dict[str, Any], source: str, tmp_path: Path) -> None:
    path = ROOT / "csrc" / "cuda" / source
    command = [build["find_nvcc"](), *build["NVCC"], *build["gencode"](), "-Xptxas=-v", "-c", path, "-o", "kernels.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) >= len(build["CUDA_ARCHITECTURES"])
    assert set(spills) == {("0", "0", "0")}


@pytest.mark.heavy
def test_the_library_loads_beside_a_torch_without_cuda(build: dict[str, Any], tmp_path: Path) -> None:
    home = build["nvcc_home"]()
    objects = []
    for path in sorted((ROOT / "csrc" / "torch").glob("cuda*.cpp")):
        include = [*cpp_extension.include_paths(), str(home / "include")]
        folders = [word for folder in include for word in ("-isystem", folder)]
        options = [*build["COMMON"], "-O0", "-Werror", f"-DTORCH_TARGET_VERSION={build['STABLE_ABI']}"]
        objects.append(str(tmp_path / f"{path.stem}.o"))
        subprocess.run(["g++", *options, "-fPIC", *folders, "-c", path, "-o", objects[-1]], check=True)
    for source in SOURCES:
        objects.append(str(tmp_path / f"{source}.o"))
        # PTX alone, which is quick
        code = f"-gencode=arch=compute_{build['CUDA_ARCHITECTURES'][-1]},code=compute_{build['CUDA_ARCHITECTURES'][-1]}"
        path = ROOT / "csrc" / "cuda" / source
        subprocess.run([build["find_nvcc"](), *build["NVCC"], code, "-c", path, "-o", objects[-1]], check=True)
    library = tmp_path / "cuda.so"
    folders = [f"-L{folder}" for folder in [*cpp_extension.library_paths(), str(home / "lib64")]]
    libraries = ["-ltorch", "-ltorch_cpu", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    subprocess.run(["g++", "-shared", *objects, *folders, *libraries, "-Wl,--no-undefined", "-o", library], check=True)
    # in a process of its own: schemas stay registered
    script = (
        "import sys, torch\n"
        "from torch._C import _dispatch_has_kernel_for_dispatch_key as has\n"
        "from qat import native\n"
        "native.status()\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "schemas = [str(schema) for schema in torch._C._jit_get_all_schemas()]\n"
        "names = [schema.split('(')[0] for schema in schemas if schema.startswith('qat::')]\n"
        "kernels = {key: {name for name in names if has(name, key)} for key in ('CPU', 'CUDA')}\n"
        "print(sorted(kernels['CPU'] - kernels['CUDA']), sorted(kernels['CUDA'] - kernels['CPU']))\n"
        "from qat.native import int8\n"
        "from torch._subclasses import FakeTensorMode\n"
        "torch.library.register_fake('qat::int8_conv2d', int8._fake_conv2d)\n"
        "with FakeTensorMode():\n"
        "    x = torch.empty(2, 9, 7, 4, dtype=torch.uint8)\n"
        "    w = torch.empty(5, 3, 2, 4, dtype=torch.int8)\n"
        "    y = torch.ops.qat.int8_conv2d(x, w, None, torch.empty(5), 0, 0, 0, 255, False, [2, 1], [1, 0, 1, 2])\n"
        "print(tuple(y.shape), y.dtype)\n"
    )
    command = [sys.executable, "-c", script, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    wanted = tuple(
        torch.nn.functional.conv2d(torch.empty(2, 4, 9 + 2, 7 + 2), torch.empty(5, 4, 3, 2), stride=(2, 1)).shape
    )
    shape = (wanted[0], *wanted[2:], wanted[1])
    assert done.stdout.splitlines() == [f"{CPU_ONLY} {CUDA_ONLY}", f"{shape} torch.uint8"], done.stderr
