"""How far single codes carry the outputs of a network, and the bound that comes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat
from qat.packages import hexagon_runtimes
from qat.packages.files import ONNX
from qat.packages.golden import FOLDER
from qat.packages.hexagon_runtimes import LARGEST_NETWORK_BOUND, NETWORK_BOUND, network_bound
from qat.packages.hexagon_spread import spread

pytestmark = pytest.mark.filterwarnings("ignore:calibrated on")
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Amplifier(nn.Module):
    """Subtracts what nearly equals it: one code is many at the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.relu(self.a(x)) + 3.0) - (torch.relu(self.a(x)) + 2.9)


def write(model: nn.Module, folder: Path, dtype: str = "uint8") -> Path:
    torch.manual_seed(0)
    scheme = {"activations": {"dtype": dtype, "observer": "minmax"}}
    qmodel = qat.prepare(model.eval(), X[:1], target=qat.load_target("hexagon-v73"), scheme=scheme)
    qat.calibrate(qmodel, [x[None] for x in X], progress=False)
    qat.export_onnx(qmodel, folder / ONNX, verify=False)
    return folder / ONNX


SAMPLE = {"input": X[:1].numpy()}


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_one_operator_is_one_code_off(dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = spread(write(nn.Sequential(nn.Conv2d(3, 4, 1)), tmp_path, dtype), SAMPLE)
    # to half a code of 16 bits, which is where the sum is rounded
    assert found == pytest.approx(1.0, abs=2 / 256)


def test_codes_add_up(tmp_path: Path) -> None:
    file = write(Amplifier(), tmp_path)
    assert spread(file, {"x": SAMPLE["input"]}) > 8


def test_it_repeats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.Hardswish())]
    file = write(nn.Sequential(*layers), tmp_path)
    assert 1 <= spread(file, SAMPLE) == spread(file, SAMPLE) < 16


@pytest.mark.parametrize(("measured", "bound"), [
    ((2.0, 3.0), NETWORK_BOUND), ((50.0, 3.0), 50.0), ((3.0, 60.0), 60.0), ((1e6, 0.0), LARGEST_NETWORK_BOUND),
])  # fmt: skip
def test_the_bound_of_a_network(
    measured: tuple[float, ...], bound: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    write(nn.Sequential(nn.Conv2d(3, 4, 1)), tmp_path)
    for number in range(len(measured)):
        folder = tmp_path / FOLDER / ONNX / f"{number:03d}"
        folder.mkdir(parents=True)
        np.save(folder / "input_0.npy", X[number : number + 1].numpy())
    left = dict(enumerate(measured))

    def found(file: Path, sample: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> float:
        np.testing.assert_array_equal(sample["input"], X[len(measured) - len(left)][None].numpy())
        return left.pop(len(measured) - len(left))

    monkeypatch.setattr(hexagon_runtimes, "spread", found)
    assert network_bound(tmp_path) == bound
    assert not left


def test_the_bound_without_samples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write(nn.Sequential(nn.Conv2d(3, 4, 1)), tmp_path)
    assert network_bound(tmp_path) == NETWORK_BOUND
