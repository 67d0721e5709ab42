"""What a plan decides: fusions, ties, inheritance, floats, and the reasons that it gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.errors import DataError, PlanError, SchemeError, StateError, TraceError
from qat.graph.plan import Plan

TARGET = qat.load_target("onnxruntime-cpu")
ARM = qat.load_target("arm-cpu")
IMAGE = torch.zeros(2, 3, 8, 8)


class Calls(nn.Module):
    """A model whose forward is a function of its modules and the inputs."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self._function = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(self, *inputs)


def plan(model: nn.Module, *inputs: Tensor, scheme: Any = None, target: qat.Target = TARGET) -> Plan:
    return qat.plan(model, inputs or IMAGE, target=target, scheme=scheme)


def decisions(made: Plan) -> dict[str, str]:
    return {e.name: e.decision for e in made}


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu": (nn.ReLU, "clamp"),
    "relu6": (nn.ReLU6, "clamp"),
    "hardtanh": (nn.Hardtanh, "clamp"),
    "hardswish": (nn.Hardswish, "table"),
    "hardsigmoid": (nn.Hardsigmoid, "table"),
    "silu": (nn.SiLU, "table"),
    "gelu": (nn.GELU, "table"),
    "leaky_relu": (lambda: nn.LeakyReLU(0.1), "table"),
    "sigmoid": (nn.Sigmoid, "table"),
    "tanh": (nn.Tanh, "table"),
    "prelu": (nn.PReLU, "prelu"),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(3, 4, 3), lambda: nn.BatchNorm2d(4), (2, 3, 8, 8)),
    "linear": (lambda: nn.Linear(5, 4), lambda: nn.BatchNorm1d(4), (2, 5)),
    "conv_transpose": (lambda: nn.ConvTranspose2d(3, 4, 2), lambda: nn.BatchNorm2d(4), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_norm_activation(layer: str, activation: str) -> None:
    make, norm, shape = LAYERS[layer]
    act, kind = ACTIVATIONS[activation]
    made = plan(nn.Sequential(make(), norm(), act()), torch.zeros(shape))
    assert made["0"].decision == "fused"
    assert made["0.weight"].decision == "integer"
    assert made["0.weight"].source_tensor == "1"
    assert "1 folded in" in made["0.weight"].reason
    assert made["2"].kind == kind
    assert made["2"].decision == "integer"
    # a clamp is computed with the layer; every other activation reads codes of its own
    assert made["1"].decision == ("fused" if kind == "clamp" else "integer")
    assert made.integer_share == 1.0
    assert not made.left_float()


@pytest.mark.parametrize("operation", ["add", "mul", "sub"])
def test_arithmetic_with_a_clamp_is_one_operator(operation: str) -> None:
    model = Calls(
        lambda m, x: F.relu(getattr(torch, operation)(m.a(x), m.b(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1)
    )
    made = plan(model)
    assert made[operation].decision == "fused"
    assert made[operation].source_tensor == "relu"
    assert made["relu"].decision == "integer"


def test_a_result_that_is_read_twice_is_not_fused_away() -> None:
    model = Calls(lambda m, x: (y := m.a(x), F.relu(y) + y)[1], a=nn.Conv2d(3, 4, 1))
    assert decisions(plan(model))["a"] == "integer"


def test_a_result_that_the_model_returns_is_not_fused_away() -> None:
    model = Calls(lambda m, x: (y := m.n(m.a(x)), (y, F.relu(y)))[1], a=nn.Conv2d(3, 4, 1), n=nn.BatchNorm2d(4))
    made = plan(model)
    assert made["n"].decision == "integer"
    assert made["relu"].decision == "integer"


# -- ties and inheritance


def test_concat_ties_its_inputs_through_operators_that_move_codes() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.cat([F.max_pool2d(m.a(x), 2).flatten(1), m.b(x).reshape(x.size(0), -1)], 1)

    made = plan(Calls(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1)))
    assert made.tie_groups() == {"a": ("a", "b", "cat")}
    assert made["flatten"].decision == "inherits"
    assert made["b"].quantizer == "a"
    assert "tied to a" in made["cat"].reason


def test_nested_concats_and_an_input_of_the_model_are_one_group() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([x, m.p(m.a(x))], 1)
        return torch.cat([y, m.b(x)], 1)

    model = Calls(forward, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(3, 4, 3, padding=1), p=nn.MaxPool2d(3, 1, 1))
    assert plan(model).tie_groups() == {"inputs_0": ("inputs_0", "a", "cat", "b", "cat#2")}


def test_different_schemes_are_not_tied() -> None:
    model = Calls(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    made = plan(model, scheme={"layers": {"b": {"activations": {"dtype": "int8"}}}})
    assert made.tie_groups() == {"a": ("a", "cat")}
    assert made["b"].quantizer == "b"


def test_a_multiple_has_a_scale_of_its_own_and_is_not_tied() -> None:
    model = Calls(lambda m, x: torch.cat([m.a(x) * 3.0, m.b(x)], 1), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    made = plan(model)
    assert made["mul"].decision == "inherits"
    assert "multiple" in made["mul"].reason
    assert made.tie_groups() == {"cat": ("cat", "b")} or made.tie_groups() == {"b": ("b", "cat")}


def test_the_target_decides_whether_an_average_keeps_its_inputs_range() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2))
    assert plan(model)["1"].decision == "integer"
    assert plan(model, target=ARM)["1"].decision == "inherits"


def test_softmax_has_the_range_of_the_target() -> None:
    made = plan(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), torch.zeros(2, 4))
    assert made["1"].fixed == (0.0, 255 / 256)
    assert "fixed by the target" in made["1"].reason


# -- batch norm


def test_batch_norm_before_the_activation_and_the_convolution() -> None:
    """DenseNet's order: a batch norm that follows a concat is an operator of its own."""
    model = Calls(
        lambda m, x: torch.cat([x, m.c(F.relu(m.n(x)))], 1), n=nn.BatchNorm2d(3), c=nn.Conv2d(3, 4, 3, padding=1)
    )
    made = plan(model)
    assert made["n"].decision == "fused"
    assert made["n"].source_tensor == "relu"
    assert made["relu"].computed
    assert made["c.weight"].source_tensor is None


def test_a_reused_convolution_with_one_batch_norm_is_folded() -> None:
    model = Calls(lambda m, x: m.n(m.c(F.relu(m.n(m.c(x))))), c=nn.Conv2d(3, 3, 3, padding=1), n=nn.BatchNorm2d(3))
    made = plan(model)
    assert [made[k].decision for k in ("c", "n", "relu", "c#2", "n#2")] == [
        "fused", "fused", "integer", "fused", "integer",
    ]  # fmt: skip
    assert "folded in" in made["c.weight"].reason
    assert made["relu"].quantizer != made["n#2"].quantizer


def test_a_reused_convolution_with_two_batch_norms_is_not_folded() -> None:
    model = Calls(
        lambda m, x: m.n2(m.c(m.n1(m.c(x)))),
        c=nn.Conv2d(3, 3, 3, padding=1), n1=nn.BatchNorm2d(3), n2=nn.BatchNorm2d(3),
    )  # fmt: skip
    made = plan(model)
    assert made["c.weight"].source_tensor is None
    assert [made[k].decision for k in ("c", "n1", "c#2", "n2")] == ["integer"] * 4
    assert made.integer_share == 1.0


def test_a_batch_norm_without_running_statistics_stays_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 1))
    made = plan(model)
    assert not made["1"].computed
    assert "statistics of the batch" in made["1"].reason
    assert made["0.weight"].source_tensor is None


def test_sync_batch_norm_and_one_without_affine_parameters_are_folded() -> None:
    for norm in (nn.SyncBatchNorm(4), nn.BatchNorm2d(4, affine=False)):
        assert plan(nn.Sequential(nn.Conv2d(3, 4, 3), norm))["0.weight"].source_tensor == "1"


# -- call sites and weights


def test_functional_calls_and_parameters_of_the_root() -> None:
    model = Calls(
        lambda m, x: F.relu(F.conv2d(x, m.weight, m.bias)),
        weight=nn.Parameter(torch.ones(4, 3, 3, 3)), bias=nn.Parameter(torch.zeros(4)),
    )  # fmt: skip
    made = plan(model)
    assert made["weight"].role == "weight"
    assert made["relu"].decision == "integer"


def test_transposed_convolutions_are_scaled_along_their_output_channels() -> None:
    assert plan(nn.ConvTranspose2d(3, 4, 2))["weight"].scheme == TARGET.weights.with_(
        granularity=qat.Granularity("per_channel", 1)
    )
    grouped = plan(nn.ConvTranspose2d(4, 4, 2, groups=2), torch.zeros(2, 4, 5, 5))["weight"]
    assert grouped.scheme is not None
    assert grouped.scheme.granularity.kind == "per_tensor"
    assert "groups" in grouped.reason


def test_per_group_weights_run_along_the_summed_axis() -> None:
    scheme = {"weights": {"dtype": "int4", "granularity": "per_group", "group_size": 4}}
    made = plan(nn.Linear(8, 4), torch.zeros(2, 8), scheme=scheme)
    assert made["weight"].scheme is not None
    assert made["weight"].scheme.granularity == qat.Granularity("per_group", 1, 4)


def shared() -> nn.Module:
    model = Calls(lambda m, x: m.c(m.b(m.a(x))), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1), c=nn.Conv2d(3, 3, 1))
    model.b.weight = model.a.weight  # type: ignore[union-attr,assignment]
    return model


def test_a_shared_weight_is_integer_or_float_as_a_whole() -> None:
    assert all(plan(shared())[name].computed for name in ("a", "b", "c"))
    made = plan(shared(), scheme={"layers": {"b": "float"}})
    assert not made["a"].computed
    assert made["a"].reason.startswith("shares a.weight with b, which is float")
    assert made["a.weight"].decision == "float"
    assert made["c"].computed


def test_a_shared_weight_cannot_be_quantized_in_two_ways() -> None:
    with pytest.raises(PlanError, match=r"^a\.weight would be int8 .* in a and int4 .* in b; give"):
        plan(shared(), scheme={"layers": {"b": {"weights": {"dtype": "int4"}}}})


def test_dropout_vanishes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.Conv2d(4, 4, 1))
    made = plan(model)
    assert made["1"].decision == "inherits"
    assert made["1"].kind == "identity"


def test_attention_is_integer() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v))

    made = plan(Attention(), torch.zeros(2, 5, 8))
    assert made.integer_share == 1.0
    assert not made.left_float()
    assert {e.kind for e in made if e.computed} >= {"matmul", "softmax", "linear"}


def test_masks_with_infinities_stay_float_up_to_the_softmax() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)
            self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.lin(x)
            return torch.softmax(y @ y.transpose(1, 2) + self.mask, -1) @ y

    made = plan(Causal(), torch.zeros(2, 5, 8))
    assert made["softmax"].reason.startswith("its input add may be infinite")
    assert made["add"].decision == "float"
    assert made["matmul#2"].computed
    assert made["softmax"].decision == "integer"  # for the product that reads it


# -- layer rules


def test_layer_rules() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    made = plan(
        model,
        scheme={
            "layers": {
                "3": "float",
                "0": {"activations": {"dtype": "uint16"}, "weights": {"dtype": "int8", "observer": "histogram"}},
                "[4]*": {"weights": {"dtype": "int4"}},
            }
        },
    )
    # the rule names the convolution, the range is that of the fused result
    assert made["2"].scheme is not None
    assert made["2"].scheme.dtype == "uint16"
    assert made["0.weight"].scheme is not None
    assert made["0.weight"].scheme.observer.name == "histogram"
    assert made["3"].reason.startswith("float by the scheme's layers")
    assert made["4.weight"].scheme is not None
    assert (made["4.weight"].scheme.dtype, made["4.weight"].scheme.qmin) == ("int4", -7)
    assert made.warnings == ()


def test_later_rules_win() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    made = plan(model, scheme={"layers": {"*": "float", "1": {"weights": {"dtype": "int4"}}}})
    assert (made["0"].computed, made["1"].computed) == (False, True)


@pytest.mark.parametrize(
    ("pattern", "rule", "message"),
    [
        ("first", "float", "no tensor"),
        ("0.weigth", "float", "no tensor"),
        ("input", "float", "no operator; to keep an input float"),
        ("1", {"weights": {"dtype": "int4"}}, "no operator with a weight"),
    ],
)
def test_a_rule_without_effect_is_a_warning(pattern: str, rule: Any, message: str) -> None:
    made = plan(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), scheme={"layers": {pattern: rule}})
    assert len(made.warnings) == 1
    assert repr(pattern) in made.warnings[0]
    assert message in made.warnings[0]
    assert made.warnings[0] in str(made)


def test_what_the_target_forbids_is_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    made = plan(model, scheme={"layers": {"1": {"weights": {"dtype": "int16"}}, "2": {"weights": {"dtype": "uint4"}}}})
    assert made["1"].reason == "onnxruntime-cpu has no uint8/int16 conv; nearest: uint8/int8"
    assert "no uint8/uint4 conv" in made["2"].reason
    grouped = {"weights": {"granularity": "per_group", "group_size": 1}}
    made = plan(model, scheme={"layers": {"1": grouped}})
    assert made["1"].reason.startswith("onnxruntime-cpu has no per_group weights for conv")


def test_a_kind_that_the_target_lacks_stays_float() -> None:
    model = Calls(lambda m, x: m.a(x) / (m.b(x) + 2.0), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    assert plan(model, target=ARM)["truediv"].reason.startswith("arm-cpu has no integer div")


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"activations": {"granularity": "per_channel"}}, "quantized per_channel; write per_tensor"),
        ({"activations": {"observer": "minimax"}}, "unknown observer 'minimax'; did you mean 'minmax'"),
        ({"weights": {"quantizer": "lsd"}}, "'0.weight': unknown quantizer 'lsd'; did you mean 'lsq'"),
        (
            {"weights": {"quantizer": "pact"}},
            "'0.weight': quantizer pact is not for a weight; choose one of static, lsq",
        ),
        ({"activations": {"quantizer": {"name": "lsq", "dorp": 0.5}}}, "no option 'dorp'; did you mean 'drop'"),
        ({"weights": {"observer": {"name": "percentile", "percentage": 3}}}, "no option 'percentage'"),
    ],
)
def test_an_impossible_scheme_is_told_by_the_plan(scheme: Any, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        plan(nn.Sequential(nn.Conv2d(3, 4, 1)), scheme=scheme)


# -- float islands, fixed batches


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if y.sum() > 0:  # the line that cannot be traced
            y = y * 2
        return y


def line_of(text: str) -> str:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return f"test_plan.py:{next(i for i, line in enumerate(lines, 1) if text in line)}"


def test_an_island_is_told_with_line_cause_and_cost(tmp_path: Path) -> None:
    made = plan(nn.Sequential(nn.Conv2d(3, 4, 1), Branching(), nn.Conv2d(6, 4, 1)))
    where = line_of("# the line that cannot be " + "traced")
    entry = made["1"]
    assert entry.kind == "island"
    assert entry.source.endswith(where)
    assert "depends on the values" in entry.reason
    assert entry.macs == 8 * 8 * 4 * 6 * 9
    assert made.macs == made.integer_macs + entry.macs
    assert where in str(made)
    assert where in made.summary()
    made.save(tmp_path / "plan.json")
    saved = {t["name"]: t for t in json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["tensors"]}
    assert saved["1"]["source"].endswith(where)
    assert saved["1"]["reason"] == entry.reason
    assert saved["1"]["computed"] == "float"


def test_the_cost_of_an_island_that_fails_on_zeros_is_unknown() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not bool((x != 0).all()):
                raise ValueError("zeros are not welcome")
            return x * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.picky = nn.Conv2d(3, 4, 1), Picky()

        def forward(self, x: Tensor) -> Tensor:
            return self.picky(self.conv(x))

    made = qat.plan(Model(), torch.rand(2, 3, 8, 8), target=TARGET)
    assert "MACs unknown" in made["picky"].reason
    assert made["picky"].macs == 0
    assert "MACs unknown" in made.summary()


def test_measuring_an_island_leaves_the_model_alone() -> None:
    class Counting(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Counting()).train()
    prepared = qat.prepare(model, IMAGE, target=TARGET)
    for each in (model, prepared):
        assert each.get_buffer("1.calls") == 0
        assert all(module.training for module in each.modules())


def test_a_model_for_one_batch_size_is_planned_with_a_warning() -> None:
    model = Calls(lambda m, x: m.a(x) + torch.ones(len(x), 1, 1, 1), a=nn.Conv2d(3, 4, 1))
    made = plan(model)
    assert made.batch_size == 2
    assert len(made.warnings) == 1
    assert made.warnings[0].startswith("the model works for batches of 2 only (")
    assert made.macs == 8 * 8 * 3 * 4
    assert made.to_json()["batch_size"] == 2
    assert plan(nn.Conv2d(3, 4, 1)).batch_size is None


# -- refusals


@pytest.mark.parametrize("model", [nn.GroupNorm(1, 3), nn.Identity()])
def test_nothing_to_quantize(model: nn.Module) -> None:
    with pytest.raises(PlanError, match="nothing to quantize"):
        plan(nn.Sequential(model))


def test_nothing_to_quantize_tells_why() -> None:
    with pytest.raises(PlanError, match=r"nothing to quantize \(0: float by the scheme's layers\)"):
        plan(nn.Sequential(nn.Conv2d(3, 4, 1)), scheme={"layers": {"*": "float"}})


def test_lazily_built_modules_must_have_run() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    with pytest.raises(StateError, match=r"'0\.weight' has no shape yet; run"):
        plan(model)
    model(IMAGE)
    assert plan(model).integer_share == 1.0


def test_a_parametrized_weight_is_refused_unless_it_stays_float() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.Conv2d(4, 4, 1))
    with pytest.raises(PlanError, match="the weight of 0 is parametrized already; remove_parametrizations"):
        plan(model)
    assert not plan(model, scheme={"layers": {"0": "float"}})["0"].computed


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 1)))
    with pytest.raises(TraceError, match=r"the Sequential cannot be copied .* remove_weight_norm"):
        plan(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_var", "1.weight"])
def test_values_that_are_no_numbers_are_named(name: str, value: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.state_dict()[name].view(-1)[0] = value
    for step in (qat.plan, qat.prepare):
        with pytest.raises(DataError, match=f"'{name}' holds nan or inf"):
            step(model, IMAGE, target=TARGET)


# -- output


def test_saving(tmp_path: Path) -> None:
    made = plan(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    made.save(tmp_path / "plan.txt")
    made.save(str(tmp_path / "plan.json"))
    assert (tmp_path / "plan.txt").read_text(encoding="utf-8") == str(made) + "\n"
    data = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert (data["schema"], data["version"], data["target"]) == ("qat-plan", 1, "onnxruntime-cpu")
    assert data["macs"] == data["integer_macs"] == 6 * 6 * 3 * 4 * 9
    assert [t["name"] for t in data["tensors"]] == ["input", "0", "1", "0.weight"]
    assert set(data["tensors"][0]) == {
        "name", "role", "kind", "decision", "scheme", "quantizer", "source_tensor", "fixed", "reason", "macs",
        "source", "computed", "forecast", "refused_by", "nearest",
    }  # fmt: skip


def test_planning_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan(model)
    assert model.training
    assert model[2].inplace
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("net", "given", "observer"),
    [
        (nn.LayerNorm(8), None, "auto"),
        (nn.GELU(), None, "histogram"),
        (nn.LayerNorm(8), {"activations": {"observer": "histogram"}}, "histogram"),
        (nn.LayerNorm(8), {"layers": {"1": {"activations": {"observer": "minmax"}}}}, "minmax"),
    ],
)
def test_the_default_observer_of_networks_with_layer_norms(net: nn.Module, given: Any, observer: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), net, nn.Linear(8, 8))
    plan = qat.plan(model, torch.randn(2, 5, 8), target=TARGET, scheme=given)
    (entry,) = [entry for entry in plan if entry.name == "1"]
    assert entry.scheme is not None
    assert entry.scheme.observer.name == observer
