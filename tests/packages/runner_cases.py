"""A small network as a plan, its samples in every I/O mode, and qat_run built for tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat import numerics
from qat.export.contract import TensorContract
from qat.integer.model import IntegerModel
from qat.native import loading
from qat.packages.artifact import Artifact
from qat.packages.executor import Sample
from qat.packages.runner import write_plan
from qat.packages.sources import sources_folder


class Net(nn.Module):
    """Convolutions of every family, an addition, a table, and two outputs: scores and an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(image))
        x = self.point(F.hardswish(self.depthwise(x))) + x
        return self.head(x.mean((2, 3))), F.relu6(x)


def converted(model: nn.Module, *inputs: Tensor, numerics: str = "onnx") -> IntegerModel:
    """Prepare, calibrate and convert."""
    qmodel = qat.prepare(model.eval(), inputs, target=qat.load_target("arm-cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [inputs], progress=False)
    return qat.convert(qmodel, numerics)


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 17, 14, generator=torch.Generator().manual_seed(seed))


def laid(contract: TensorContract, x: Tensor) -> np.ndarray[Any, Any]:
    """A float tensor as an artifact takes or gives it."""
    x = x.detach().permute(contract.order).contiguous()
    if contract.dtype == "float32":
        return x.numpy()
    assert contract.scale is not None
    scale, zero = torch.tensor([contract.scale]), torch.tensor([contract.zero_point])
    codes = numerics.quantize(x, scale, zero, contract.qmin, contract.qmax, rounding="half_even")
    return codes.numpy().astype(contract.dtype)


def samples_of(artifact: Artifact, imodel: IntegerModel, *batches: Tensor) -> tuple[list[Sample], list[Sample]]:
    """Inputs, and the outputs that PyTorch's kernels have for them."""
    given, expected = [], []
    for batch in batches:
        found = imodel.run((batch,))
        given.append({artifact.inputs[0].name: laid(artifact.inputs[0], batch)})
        pairs = zip(artifact.outputs, imodel.program.outputs, strict=True)
        expected.append({contract.name: laid(contract, found[name]) for contract, name in pairs})
    return given, expected


def same(found: Sequence[Sample], expected: Sequence[Sample]) -> None:
    """Every element of every output is equal, and of the same type and sizes."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            assert one[name].dtype == other[name].dtype
            assert one[name].shape == other[name].shape
            assert np.array_equal(one[name], other[name])


@dataclass(frozen=True)
class Program:
    """qat_run.

    Attributes:
        path: The program.
        emulator: What runs it, with its options.
    """

    path: Path
    emulator: tuple[str, ...] = ()

    def __call__(self, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        library = Path(torch.__file__).parent / "lib"
        environment = {**os.environ, "LD_LIBRARY_PATH": str(library)}
        return subprocess.run(
            [*self.emulator, self.path, *words], cwd=cwd, env=environment, check=False, capture_output=True, text=True
        )


def linked_program(folder: Path) -> Program:
    """Compile the runner's own sources, and link the native extension, which has the C API: seconds, not a minute."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler; scripts/setup --system installs it")
    library = loading.status().path
    assert library is not None
    sources = sorted(sources_folder().glob("runner/*.cpp"))
    program = folder / "qat_run"
    flags = [
        "-std=c++17",
        "-O0",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wl,--allow-shlib-undefined",
        f"-Wl,-rpath,{library.parent}",
    ]
    subprocess.run([compiler, *flags, *sources, library, "-o", program], check=True)
    return Program(program)


def refused(program: Program, folder: Path, *words: str, cause: str, status: int = 2) -> None:
    """One line on standard error that says the cause and the mend, and the exit status."""
    done = program(*words, cwd=folder)
    assert done.returncode == status, (done.returncode, done.stderr)
    assert done.stderr.startswith("qat_run: ")
    assert done.stderr.count("\n") == 1
    assert cause in done.stderr
    assert "; " in done.stderr


def check_usage(program: Program, imodel: IntegerModel, folder: Path, every: int = 1) -> None:
    """What is wrong on the command line is said; `every` so many cases."""
    artifact = write_plan(imodel, folder)
    name = artifact.inputs[0].name
    np.save(folder / "x.npy", images(1).numpy())
    cases: list[tuple[list[str], str]] = [
        ([], "no plan is given"),
        (["model.qatplan"], "no --input is given"),
        (["model.qatplan", "x.npy"], "x.npy: is a second plan"),
        (["model.qatplan", "--inputs", "x.npy"], "--inputs: is no option"),
        (["model.qatplan", "--input"], "--input: has no value"),
        (["model.qatplan", "--info=yes"], "--info: takes no value"),
        (["model.qatplan", "--threads", "0"], "--threads 0: is no number from 1 to 1024"),
        (["model.qatplan", "--repeat", "many"], "--repeat many: is no number"),
        (["model.qatplan", "--input-type", "int"], "--input-type int: is unknown; give float or codes"),
        (["model.qatplan", "--unchecked-isa"], "names no instruction set"),
        (["model.qatplan", "--input", "x.npy", "--input", "x.npy"], "the plan has only 1"),
        (["model.qatplan", "--input", f"{name}=x.npy", "--input", f"{name}=x.npy"], f"second one for tensor '{name}'"),
        (["model.qatplan", "--input", "x.npy", "--isa", "mmx"], "isa 'mmx': the library has no such instruction set"),
        (["model.qatplan", "--input", "none.npy"], "none.npy: cannot be read (No such file"),
        (["model.qatplan", "--input", "."], ".: cannot be read (Is a directory)"),
        (["none.qatplan", "--info"], "none.qatplan: cannot be read"),
    ]
    for words, cause in cases[::every]:
        refused(program, folder, *words, cause=cause)
    refused(
        program,
        folder,
        *("model.qatplan", "--input", "x.npy", "--output", "no/y.npy"),
        cause="no/y.npy: cannot be written",
        status=1,
    )


def check_arrays(program: Program, imodel: IntegerModel, folder: Path, every: int = 1) -> None:
    """What is wrong with an array is said; `every` so many cases."""
    artifact = write_plan(imodel, folder)
    x = images(2).numpy()
    name = artifact.inputs[0].name
    np.save(folder / "good.npy", x)
    good = (folder / "good.npy").read_bytes()
    header = good.index(b"\n") + 1
    files: dict[str, tuple[bytes | np.ndarray[Any, Any], str]] = {
        "shape": (x[:, :2], "has the sizes 2x2x17x14, expected batchx3x17x14; reshape it"),
        "rank": (x[0], "has the sizes 3x17x14"),
        "scalar": (x[0, 0, 0, 0], "has the sizes a scalar"),
        "empty": (x[:0], "has the sizes 0x3x17x14"),
        "double": (x.astype(np.float64), "type f8, expected f4; convert it"),
        "codes": (x.astype(np.uint8), "or give --input-type float or codes"),
        "big": (x.astype(">f4"), "has type >f4; save it little endian"),
        "fortran": (np.asfortranarray(x), "is in Fortran order"),
        "short": (good[:-5], f"bytes of elements, expected {x.nbytes}"),
        "long": (good + b"1", f"has {x.nbytes + 1} bytes of elements"),
        "cut": (good[:40], "ends too early"),
        "prefix": (good[:9], "ends too early"),
        "version": (good[:6] + b"\x09" + good[7:], "is .npy version 9"),
        "header": (good.replace(b"'shape'", b"'shaqe'"), "its .npy header is damaged"),
        "sizes": (good.replace(b"(2, 3", b"(2; 3"), "its .npy header is damaged"),
        "huge": (good.replace(b"(2, 3, 17, 14), }", b"(9999999999999,)}"), "its .npy header is damaged"),
        "text": (b"1 2 3", "is no .npy file"),
        "nothing": (b"", "is no .npy file"),
        "only_header": (good[:header], "has 0 bytes of elements"),
    }
    for label, (content, cause) in list(files.items())[::every]:
        path = folder / f"{label}.npy"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content)
        refused(program, folder, "model.qatplan", "--input", path.name, cause=cause)
    refused(program, folder, "model.qatplan", "--input", "shape.npy", cause=f"for tensor '{name}'")
    (folder / "x.raw").write_bytes(x.tobytes()[:-4])
    refused(program, folder, "model.qatplan", "--input", "x.raw", cause="bytes of elements, expected")
