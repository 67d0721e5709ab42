"""Operators whose slopes, factors and offsets are codes: what Hexagon wants of PReLU and layer norms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.encoding import Encoding
from qat.errors import ExportError
from qat.integer.weights import quantize_parameters

pytestmark = pytest.mark.filterwarnings("ignore:calibrated on")
X = torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(0))


class Functional(nn.Module):
    """A layer norm without factor."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-1, 1, 12))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (12,), None, self.shift)


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(2 * self.layer(x) + 1)


def norm(**options: Any) -> nn.LayerNorm:
    layer = nn.LayerNorm(12, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.5 * torch.randn(12, generator=torch.Generator().manual_seed(1))
    return layer


def prelu(count: int) -> nn.PReLU:
    layer = nn.PReLU(count)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-0.3, 0.6, count))
    return layer


CASES: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": norm,
    "layer_norm without bias": lambda: norm(bias=False),
    "layer_norm without parameters": lambda: norm(elementwise_affine=False),
    "layer_norm without factor": Functional,
    "layer_norm twice": lambda: Twice(norm()),
    "prelu of channels": lambda: prelu(6),
    "prelu of one slope": lambda: prelu(1),
    "prelu twice": lambda: Twice(prelu(6)),
}


def prepared(model: nn.Module, target: str, dtype: str = "uint8") -> qat.PreparedModel:
    qmodel = qat.prepare(model.eval(), X, target=qat.load_target(*target.split("+")),
                         scheme={"activations": {"dtype": dtype, "observer": "minmax"}})  # fmt: skip
    qat.calibrate(qmodel, [X], progress=False)
    return qmodel


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16"])
@pytest.mark.parametrize("name", CASES)
def test_simulation_is_what_onnx_runtime_computes(name: str, dtype: str, tmp_path: Path) -> None:
    if dtype == "uint16" and "prelu" in name:
        pytest.skip("Hexagon has no 16-bit PReLU")
    qmodel = prepared(CASES[name](), "hexagon-v73", dtype)
    result = qat.export_onnx(qmodel, tmp_path / "m.onnx", verify="layers")
    assert result.verification is not None
    assert result.verification.worst.max_difference <= 1
    program = qat.convert(qmodel).program
    constants = {c.encoding.dtype for c in program.constants.values() if c.encoding is not None}
    eight = "int8" if dtype == "int8" else "uint8"
    assert constants <= {eight, "int32", dtype}
    assert not any(c.encoding is None for c in program.constants.values())
    # no float reaches the operator from the file either
    model = onnx.load(str(tmp_path / "m.onnx"))
    floats = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    read = {i for n in model.graph.node if n.op_type in ("PRelu", "LayerNormalization") for i in n.input}
    assert not floats & read


@pytest.mark.parametrize("name", CASES)
def test_the_native_runner_is_the_reference(name: str) -> None:
    imodel = qat.convert(prepared(CASES[name](), "hexagon-v73"))
    (output,) = imodel.program.outputs
    with torch.no_grad():
        assert torch.equal(imodel(X), imodel.run((X,))[output])


def test_codes_are_near_the_floats() -> None:
    layer = norm()
    program = qat.convert(prepared(layer, "hexagon-v73")).program
    weight, bias = program.constants["weight"], program.constants["bias"]
    assert weight.encoding is not None
    assert bias.encoding is not None
    assert (weight.encoding.dtype, bias.encoding.dtype) == ("uint8", "int32")
    x_scale = next(program.encoding_of(op.inputs[0]) for op in program.ops if op.kind == "layer_norm")
    assert x_scale is not None
    assert bias.encoding.scale[0] == pytest.approx(x_scale.scale[0] * weight.encoding.scale[0])
    assert (weight.floats() - layer.weight).abs().max() <= 0.51 * weight.encoding.scale[0]
    assert (bias.floats() - layer.bias).abs().max() <= 0.51 * bias.encoding.scale[0]


def test_other_targets_keep_floats() -> None:
    program = qat.convert(prepared(norm(), "arm-cpu")).program
    assert program.constants["weight"].encoding is None
    assert "quantized_parameters" in qat.plan(norm(), X, target=qat.load_target("hexagon-v73")).to_json()["constraints"]


def test_tflite_has_slopes_of_its_own() -> None:
    qmodel = prepared(prelu(6), "hexagon-v73+apu", "int8")
    tflite, onnx_ = qat.convert(qmodel, "tflite"), qat.convert(qmodel, "onnx")
    with torch.no_grad():
        step = max(e.scale[0] for e in qmodel.encodings().values())
        assert (tflite(X) - onnx_(X)).abs().max() <= 2 * step


def test_a_parameter_that_is_not_finite() -> None:
    x = Encoding("uint8", (0.1,), (128,), 0, 255)
    with pytest.raises(ExportError, match=r"norm: norm\.bias is not finite; check the parameter"):
        quantize_parameters("norm", ("norm.weight", "norm.bias"), (torch.ones(3), torch.tensor([1.0, torch.nan, 0])), x)
