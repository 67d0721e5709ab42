"""HardSwish behind a product on Hexagon: on another shape in the file, the same everywhere, right on the emulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import qat
from qat.export import htp

pytestmark = pytest.mark.filterwarnings("ignore:calibrated on")


class Net(nn.Module):
    """A product, and HardSwish behind it, perhaps with something between them."""

    def __init__(self, product: nn.Module, norm: nn.Module | None = None, plus: float = 0.0) -> None:
        super().__init__()
        self.product, self.norm, self.plus, self.act = product, norm or nn.Identity(), plus, nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.product(x))
        return self.act(y + self.plus if self.plus else y)


CASES = {
    "conv": (Net(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)), (1, 8, 6, 6), [1, 576]),
    "conv to one pixel": (Net(nn.Conv2d(8, 16, 6)), (1, 8, 6, 6), [1, 16, 1]),
    "conv_transpose": (Net(nn.ConvTranspose2d(8, 4, 2, stride=2)), (1, 8, 3, 3), [1, 144]),
    "linear": (Net(nn.Linear(8, 16)), (1, 8), [1, 16, 1]),
    "linear of tokens": (Net(nn.Linear(8, 16)), (1, 5, 8), [1, 80]),
}


def export(name: str, target: str, file: Path) -> tuple[qat.PreparedModel, Tensor]:
    """Calibrated on a quarter of what is then given, so that the product saturates."""
    torch.manual_seed(0)
    model, shape, _ = CASES[name]
    for module in model.modules():
        if module is not model and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.randn(shape)
    scheme = {"activations": {"observer": "minmax"}}
    qmodel = qat.prepare(model.eval(), x, target=qat.load_target(target), scheme=scheme)
    qat.calibrate(qmodel, [x], progress=False)
    # executed in ONNX Runtime: every code is the simulation's
    qat.export_onnx(qmodel, file, samples=[4 * x], bound=0)
    return qmodel, 4 * x


def shape_of(file: Path) -> list[int]:
    """What HardSwish is computed on."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(file)), data_prop=True)
    (node,) = (node for node in model.graph.node if node.op_type == "HardSwish")
    (value,) = (value for value in model.graph.value_info if value.name == node.input[0])
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", CASES)
def test_it_is_on_another_shape(name: str, tmp_path: Path) -> None:
    qmodel, x = export(name, "hexagon-v73", tmp_path / "m.onnx")
    assert shape_of(tmp_path / "m.onnx") == CASES[name][2]
    plain, _ = export(name, "arm-cpu", tmp_path / "plain.onnx")
    assert [node.op_type for node in onnx.load(str(tmp_path / "plain.onnx")).graph.node].count("HardSwish") == 1
    assert qmodel.plan.constraints.apart == ("hardswish",)
    assert plain.plan.constraints.apart == ()
    assert shape_of(tmp_path / "plain.onnx")[1:] == list(qat.convert(plain)(x).shape[1:])


def test_only_behind_a_product(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 6, 6)
    qmodel = qat.prepare(Net(nn.Conv2d(8, 4, 1), plus=0.5).eval(), x, target=qat.load_target("hexagon-v73"))
    qat.calibrate(qmodel, [x], progress=False)
    qat.export_onnx(qmodel, tmp_path / "m.onnx", bound=0)
    assert shape_of(tmp_path / "m.onnx") == [1, 4, 6, 6]


@pytest.mark.heavy
@pytest.mark.skipif(not htp.available(), reason="onnxruntime-qnn is not installed")
@pytest.mark.parametrize("arch", [68, 73, 79])
@pytest.mark.parametrize("name", CASES)
def test_it_saturates_on_the_emulator(name: str, arch: int, tmp_path: Path) -> None:
    qmodel, x = export(name, f"hexagon-v{arch}", tmp_path / "m.onnx")
    with htp.htp_session(tmp_path / "m.onnx", arch) as opened:
        (found,) = opened.session.run(None, {"x": x.numpy()})
    expected = qat.convert(qmodel)(x).detach().numpy()
    step = float(np.abs(expected).max()) / 255
    # three operators, a code each; fused by the compiler, it was up to 46
    assert np.abs(found - expected).max() <= 4 * step
