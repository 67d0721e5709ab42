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
    """qat_run, linked against the native extension, which has the C API: seconds instead of a minute."""

    path: Path

    def __call__(self, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        library = Path(torch.__file__).parent / "lib"
        environment = {**os.environ, "LD_LIBRARY_PATH": str(library)}
        return subprocess.run(
            [self.path, *words], cwd=cwd, env=environment, check=False, capture_output=True, text=True
        )


def linked_program(folder: Path) -> Program:
    """Compile the runner's own sources."""
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
