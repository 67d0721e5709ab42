"""Every integer type, granularity and range inside networks: equal codes in ONNX Runtime up to 8 bits."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whole_networks import conv, take


def chain() -> nn.Module:
    layers: dict[str, nn.Module] = {
        "c1": conv(4, 8),
        "bn": nn.BatchNorm2d(8),
        "relu": nn.ReLU(),
        "c2": nn.Conv2d(8, 8, 3, stride=2, groups=8),
        "hs": nn.Hardswish(),
        "c3": nn.Conv2d(8, 8, 1),
        "relu6": nn.ReLU6(),
        "pool": nn.AvgPool2d(2),
        "flat": nn.Flatten(),
        "fc": nn.Linear(32, 6),
    }
    return nn.Sequential(OrderedDict(layers))


class Mixture(nn.Module):
    """A little of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv(8, 4)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x) + x)
        z = self.c(torch.cat([y, F.max_pool2d(F.relu6(self.b(y)), 3, 1, 1)], 1)) * y
        z = F.interpolate(F.silu(self.up(z)), size=(8, 8), mode="bilinear")
        z = self.norm(z)
        z = F.pad(torch.softmax(z, -1) @ z, (1, 1, 1, 1), "reflect").mean((2, 3))
        return self.head(z).softmax(-1)


INTEGER: dict[str, dict[str, Any]] = {
    "int8": {"activations": {"dtype": "int8"}},
    "int8_symmetric": {"activations": {"dtype": "int8", "symmetric": True}},
    "uint8_symmetric": {"activations": {"symmetric": True}},
    "int4_weights": {"weights": {"dtype": "int4"}},
    "w4a4": {"activations": {"dtype": "uint4"}, "weights": {"dtype": "int4"}},
    "w4a4_signed": {"activations": {"dtype": "int4"}, "weights": {"dtype": "int4"}},
    "w4a4_narrow": {"activations": {"dtype": "int4", "qmin": -6, "qmax": 6}, "weights": {"dtype": "int4"}},
    "per_tensor": {"weights": {"granularity": "per_tensor"}},
    "affine_weights": {"weights": {"dtype": "uint8", "symmetric": False, "granularity": "per_tensor"}},
    "affine_channels": {"weights": {"dtype": "uint8", "symmetric": False}},
    "clamped_120": {"activations": {"qmin": 8, "qmax": 248}, "weights": {"qmin": -120, "qmax": 120}},
    "narrow_200": {"activations": {"qmin": 0, "qmax": 200}},
    "int8_120": {"activations": {"dtype": "int8", "symmetric": True, "qmin": -120, "qmax": 120}},
    "powers_of_two": {"activations": {"power_of_two": True}, "weights": {"power_of_two": True}},
}
#: the runtime computes these in float32: largest difference in codes of 16 bits, in `chain` and in `Mixture`, where a
#: layer norm of nearly equal values amplifies what comes in
WIDE: dict[str, tuple[dict[str, Any], float, float]] = {
    "uint16": ({"activations": {"dtype": "uint16"}}, 2, 32),
    "int16": ({"activations": {"dtype": "int16"}}, 2, 32),
    "int16_symmetric": ({"activations": {"dtype": "int16", "symmetric": True}}, 2, 32),
    "int16_weights": ({"activations": {"dtype": "int16"}, "weights": {"dtype": "int16"}}, 2, 32),
}
MODELS = {"chain": (chain, 10), "mixture": (Mixture, 8)}


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("name", list(INTEGER))
def test_up_to_eight_bits(name: str, model: str) -> None:
    make, size = MODELS[model]
    scheme = INTEGER[name]
    whole = take(make(), torch.randn(8, 4, size, size), scheme=scheme, error=0.4 if "a4" in name else 0.15)
    want = scheme.get("activations", {}).get("dtype", "uint8")
    assert {t.encoding.dtype for t in whole.program.tensors.values() if t.encoding} == {want}


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("name", list(WIDE))
def test_sixteen_bits_within_the_stated_bound(name: str, model: str) -> None:
    (make, size), (scheme, *bounds) = MODELS[model], WIDE[name]
    bound = bounds[list(MODELS).index(model)]
    whole = take(make(), torch.randn(8, 4, size, size), scheme=scheme, bound=bound, error=0.01, steps=6)
    tensors = whole.verification.tensors
    assert sum(t.unequal for t in tensors) < 0.01 * sum(t.count for t in tensors)
    # export allows 256 codes: the same part of the range as one code of 8 bits
    assert whole.verification.ok(bound / 256)


def test_signed_symmetric_activations_do_not_contain_the_relu() -> None:
    """With the zero point in the middle a ReLU is an operator of its own, and half of the codes are never seen."""
    whole = take(
        nn.Sequential(conv(), nn.ReLU(), conv()), torch.randn(3, 4, 6, 6),
        scheme={"activations": {"dtype": "int8", "symmetric": True}},
    )  # fmt: skip
    assert whole.kinds() == ["quantize", "conv", "clamp", "conv", "dequantize"]
    relu = whole.imodel.run(whole.inputs, {"1"})["1"]
    assert int(relu.min()) == 0


CHANGES = {
    "uint16": ("c2", {"activations": {"dtype": "uint16"}}, 1),
    "int8": ("c3", {"activations": {"dtype": "int8"}}, 0),
    "uint4": ("c2", {"activations": {"dtype": "uint4"}, "weights": {"dtype": "int4"}}, 0),
    "int16": ("pool", {"activations": {"dtype": "int16"}}, 1),
}


@pytest.mark.parametrize("dtype", list(CHANGES))
def test_types_that_change_between_layers(dtype: str) -> None:
    layer, change, bound = CHANGES[dtype]
    whole = take(chain(), torch.randn(8, 4, 10, 10), scheme={"layers": {layer: change}}, bound=bound, error=0.3)
    assert {t.encoding.dtype for t in whole.program.tensors.values() if t.encoding} == {"uint8", dtype}


@pytest.mark.parametrize("size", [8, 5, 32], ids=["eight", "five", "all"])
@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("shape", [(8, 32), (6, 3, 32)], ids=["rows", "tokens"])
def test_one_weight_scale_for_each_group_of_inputs(size: int, dtype: str, shape: tuple[int, ...]) -> None:
    """ONNX Runtime computes these in float from blocked DequantizeLinear."""
    model = nn.Sequential(nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 5, bias=False))
    scheme = {"weights": {"dtype": dtype, "granularity": "per_group", "group_size": size}}
    whole = take(model, torch.randn(shape), scheme=scheme, bound=1, error=0.2)
    encoding = whole.program.constants["0.weight"].encoding
    assert len(encoding.scale) == 12 * -(-32 // size)
    assert all(t.unequal_share < 0.01 for t in whole.verification.tensors)


def test_weights_have_the_storage_of_their_type() -> None:
    stored = {}
    for dtype in ("int4", "int8", "int16"):
        activations = "int16" if dtype == "int16" else "uint8"
        scheme = {"activations": {"dtype": activations}, "weights": {"dtype": dtype}}
        whole = take(nn.Sequential(conv(), nn.ReLU()), torch.randn(3, 4, 6, 6), scheme=scheme, bound=2, error=0.2)
        stored[dtype] = whole.program.constants["0.weight"].value.dtype
        assert whole.program.constants["0.bias"].value.dtype == torch.int32
    assert stored == {"int4": torch.int8, "int8": torch.int8, "int16": torch.int16}
