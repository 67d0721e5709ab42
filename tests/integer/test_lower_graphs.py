"""What a graph can look like: reuse, batch norms, several inputs and outputs, islands, float layers, constants."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whole_networks import Fn, conv, flat, prepared, take

import qat
from qat.errors import ExportError, StateError
from qat.integer.lower import lower

# reuse --------------------------------------------------------------------------------------------------------------


def test_a_module_called_twice_has_one_weight_and_a_bias_for_each_input_scale() -> None:
    model = Fn(lambda m, x: m.last(m.c(F.relu(m.c(x) * 3))), c=conv(), last=conv())
    whole = take(model, torch.randn(3, 4, 6, 6))
    constants = whole.program.constants
    assert torch.equal(constants["c.weight"].value, constants["c.weight#c#2"].value)
    assert constants["c.bias"].encoding.scale != constants["c.bias#c#2"].encoding.scale


@pytest.mark.parametrize("norms", [("n", "n"), ("n", "m")], ids=["same", "different"])
def test_a_module_called_twice_with_batch_norms(norms: tuple[str, str]) -> None:
    first, second = norms
    model = Fn(
        lambda m, x: getattr(m, second)(m.c(F.relu(getattr(m, first)(m.c(x))))),
        c=conv(),
        n=nn.BatchNorm2d(4),
        m=nn.BatchNorm2d(4),
    )
    take(model, torch.randn(3, 4, 6, 6))


def test_weights_shared_by_two_modules() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    take(model, torch.randn(5, 8))


# batch norms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_batch_norms_that_no_layer_precedes(dims: int) -> None:
    layer = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d][dims]
    norm = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dims]
    kernel = (1,) if dims else ()
    x = torch.randn(5, 4, *(5, 4, 3)[:dims])
    blocks = [norm(4), layer(4, 4, *kernel), nn.ReLU(), norm(4, affine=False), nn.ReLU(), layer(4, 4, *kernel)]
    whole = take(nn.Sequential(*blocks), x)
    assert "batch_norm" not in whole.kinds()
    assert "conv" in whole.kinds()


def test_a_batch_norm_over_tokens_is_none_over_features() -> None:
    """Behind a linear layer on three dimensions the channels are dimension 1, even where the counts agree."""
    take(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(5)), torch.randn(4, 5, 8))
    take(nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)), torch.randn(4, 5, 8))
    take(Fn(lambda m, x: m.n(m.a(x).transpose(1, 2)), a=nn.Linear(8, 6), n=nn.BatchNorm1d(6)), torch.randn(4, 5, 8))


# inputs and outputs -------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.a, self.b, self.form = conv(), conv(), form

    def forward(self, x: Tensor, y: Tensor) -> Any:
        u = self.a(x)
        w = F.relu(u + self.b(y))
        return {
            "tuple": lambda: (w, u),
            "dict": lambda: {"w": w, "nested": [u, None, 3], "x": x},
            "twice": lambda: (w, w, u),
            "views": lambda: (w.flatten(1), w, w.flatten(1) * 2),
            "inputs": lambda: (x, y, w),
        }[self.form]()


@pytest.mark.parametrize("form", ["tuple", "dict", "twice", "views", "inputs"])
def test_several_inputs_and_outputs(form: str) -> None:
    x, y = torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6)
    whole = take(Two(form), x, y)
    result, wanted = whole.imodel(x, y), whole.model(x, y)
    assert torch.utils._pytree.tree_structure(result) == torch.utils._pytree.tree_structure(wanted)
    if form == "dict":
        assert result["nested"][1:] == [None, 3]
        # read by a convolution as codes, returned as it came
        assert torch.equal(result["x"], x)
    if form == "inputs":
        assert torch.equal(result[0], x)
    if form == "twice":
        assert torch.equal(result[0], result[1])
    named = whole.imodel(y=y, x=x)
    assert all(torch.equal(a, b) for a, b in zip(flat(named), flat(result), strict=True))


def test_the_program_names_its_tensors_as_the_user_does() -> None:
    program = take(Two("tuple"), torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6)).program
    assert [program.tensors[name].public_name for name in program.inputs] == ["x", "y"]
    assert [program.tensors[name].public_name for name in program.outputs] == ["relu", "a"]
    assert {"a.weight", "a.bias", "b.weight", "b.bias"} == set(program.constants)


# float islands and layers kept float --------------------------------------------------------------------------------


class CumulativeSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x * self.scale, 1)


ISLANDS = {
    "between": lambda m, x: m.b(m.i(m.a(x))),
    "first": lambda m, x: m.b(m.i(x)),
    "last": lambda m, x: m.i(m.a(x)),
    "two": lambda m, x: m.i(m.i(m.a(x))) + m.a(x),
    "beside": lambda m, x: (m.b(m.a(x)), m.i(m.a(x)), m.i(x)),
}


@pytest.mark.parametrize("forward", list(ISLANDS.values()), ids=list(ISLANDS))
def test_float_islands(forward: Any) -> None:
    model = Fn(forward, a=conv(), b=conv(), i=CumulativeSum())
    floats = {"island", "rescale", "mul"}
    qmodel = prepared(model, torch.randn(3, 4, 6, 6))
    program = lower(qmodel)
    kinds = {op.kind for op in program.ops}
    assert "island" in kinds
    found = {op.kind for op in program.ops if program.tensors[op.outputs[0]].encoding is None} - {"dequantize"}
    assert found <= floats
    # a float output has no codes: it is compared in 255ths of its largest value
    take(model, torch.randn(3, 4, 6, 6), floats=found, bound=0.01 if forward is not ISLANDS["between"] else 0)


def test_an_island_with_two_results_and_sizes() -> None:
    def forward(m: Fn, x: Tensor) -> Tensor:
        values, _ = torch.max(m.a(x), 1, keepdim=True)
        return m.b(values.expand(x.shape[0], 4, -1, -1))

    take(Fn(forward, a=conv(), b=conv()), torch.randn(3, 4, 6, 6), floats={"island"})


def test_an_island_that_onnx_cannot_express_is_named(tmp_path: Any) -> None:
    class Choosing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    qmodel = prepared(
        Fn(lambda m, x: m.b(m.choose(m.a(x))), a=conv(), b=conv(), choose=Choosing()), torch.randn(3, 4, 6, 6)
    )
    assert qat.convert(qmodel)(torch.randn(2, 4, 6, 6)).shape == (2, 4, 6, 6)
    with pytest.raises(ExportError, match="float island 'choose' cannot be exported to ONNX"):
        qat.export_onnx(qmodel, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def layered() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            first=conv(),
            norm=nn.BatchNorm2d(4),
            act=nn.Hardswish(),
            second=conv(),
            relu=nn.ReLU(),
            alone=nn.BatchNorm2d(4),
        )
    )


@pytest.mark.parametrize(
    ("pattern", "floats"),
    [("first", {"conv"}), ("act", {"table"}), ("second", {"conv", "clamp"}), ("alone", {"mul", "add"})],
    ids=["first", "act", "second", "alone"],
)
def test_layers_that_a_rule_keeps_float(pattern: str, floats: set[str]) -> None:
    whole = take(
        layered(), torch.randn(3, 4, 6, 6), scheme={"layers": {pattern: "float"}}, floats=floats,
        bound=0.01 if pattern == "alone" else 0,
    )  # fmt: skip
    if pattern == "first":
        # batch norm is folded in float too
        assert whole.program.constants["first.weight"].value.dtype == torch.float32
        assert "batch_norm" not in whole.kinds()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(8, 8), (5, 8)),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (5, 8)),
        (lambda: nn.Linear(8, 8), (3, 4, 8)),
        (lambda: nn.Conv1d(4, 4, 3, padding=1), (3, 4, 8)),
        (lambda: nn.Sequential(nn.ConvTranspose1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)), (3, 4, 8)),
        (lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), (3, 4, 8)),
    ],
    ids=["linear", "linear_relu", "tokens", "conv", "transpose", "island"],
)
def test_the_runtime_keeps_float_layers_float(layer: Any, shape: tuple[int, ...]) -> None:
    """ONNX Runtime would quantize their weights: a difference of some codes would show it."""
    model = nn.Sequential(OrderedDict(before=nn.Linear(8, 8), kept=layer(), after=nn.Linear(8, 8)))
    x = torch.randn(shape)
    qmodel = prepared(model, x, scheme={"layers": {"kept*": "float"}})
    program = lower(qmodel)
    floats = {op.kind for op in program.ops if program.tensors[op.outputs[0]].encoding is None} - {"dequantize"}
    assert floats & {"linear", "conv", "conv_transpose", "island"}
    take(model, x, scheme={"layers": {"kept*": "float"}}, floats=floats)


# constants ----------------------------------------------------------------------------------------------------------


def test_what_depends_on_parameters_only_is_folded() -> None:
    def forward(m: Fn, x: Tensor) -> Tensor:
        weighted = m.a(x + (m.position * 2).relu()) @ torch.softmax(m.w, 1)
        return weighted + F.pad(m.g.exp()[:4], (2, 2)).cumsum(0)

    position, w, g = (nn.Parameter(torch.randn(s)) for s in ((1, 5, 8), (8, 8), (8,)))
    whole = take(Fn(forward, a=nn.Linear(8, 8), position=position, w=w, g=g), torch.randn(3, 5, 8))
    assert whole.kinds() == ["quantize", "add", "linear", "matmul", "add", "dequantize"]


def test_a_folded_constant_is_what_the_operators_compute() -> None:
    model = Fn(lambda m, x: m.a(x) + m.p.exp().cumsum(0).flip(0), a=nn.Linear(6, 6), p=nn.Parameter(torch.randn(6)))
    program = take(model, torch.randn(4, 6)).program
    (name,) = [n for n in program.constants if n not in ("a.weight", "a.bias")]
    constant = program.constants[name]
    assert constant.encoding is not None
    expected = model.p.detach().exp().cumsum(0).flip(0)
    error = (constant.encoding.dequantize(constant.value) - expected).abs().max()
    assert float(error) <= constant.encoding.scale[0] / 2 * 1.001


def test_dropout_and_identity_vanish() -> None:
    model = nn.Sequential(conv(), nn.Dropout(), nn.ReLU(), nn.Identity(), nn.Dropout2d(), conv(), nn.Identity())
    assert take(model, torch.randn(3, 4, 6, 6)).kinds() == ["quantize", "conv", "clamp", "conv", "dequantize"]


# wrong order --------------------------------------------------------------------------------------------------------


def test_a_model_that_was_not_calibrated_is_refused_by_name() -> None:
    qmodel = qat.prepare(nn.Sequential(conv()), torch.randn(3, 4, 6, 6), target=qat.load_target("onnxruntime-cpu"))
    with pytest.raises(StateError, match="input"):
        qat.convert(qmodel)
