"""What a target forbids: who forbids it, and the nearest thing that is legal."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import qat
from qat.errors import ExportError
from qat.graph.plan import Plan
from qat.scheme import Granularity, Scheme
from qat.targets import OperatorRule, Refusal, Target, Use, target_names
from qat.targets.load import parse_target
from qat.targets.target import rules

X = torch.randn(2, 4, 8, 8)
ACTIVATION, WEIGHT = Scheme("uint8"), Scheme("int8", symmetric=True, granularity=Granularity("per_channel"))


def toy(name: str = "toy", **changes: Any) -> Target:
    data: dict[str, Any] = {
        "schema": 2, "name": name, "title": "A toy", "version": "1", "numerics": "onnx", "dynamic_batch": True,
        "activations": {"dtype": "uint8"},
        "weights": {"dtype": "int8", "symmetric": True, "granularity": "per_channel", "qmin": -127},
        "dtypes": {
            "weighted": [["uint8", "int8"], ["uint16", "int8"], ["uint8", "int4"]],
            "plain": [["uint8"], ["uint16"]],
        },
        "operators": {
            "conv": {"dtypes": "weighted", "granularity": ["per_tensor", "per_channel"]},
            "linear": {"dtypes": "weighted", "granularity": ["per_tensor"]},
            "add": {"dtypes": "plain"},
        },
    }  # fmt: skip
    operators = {**data["operators"], **changes.pop("operators", {})}
    return parse_target(yaml.safe_dump({**data, **changes, "operators": operators}), f"{name}.yaml")


def refused(target: Target, use: Use) -> Refusal:
    found = target.refusal(use)
    assert found is not None
    return found


def use(kind: str, activation: str = "uint8", weight: str | None = None, **more: Any) -> Use:
    scheme = None if weight is None else Scheme(weight, symmetric=True, granularity=Granularity("per_channel"))
    return Use(kind, Scheme(activation), scheme, **more)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (use("conv", weight="int8"), None),
        (use("mul"), "toy has no integer mul"),
        (use("add", "int8"), "toy has no int8 add; nearest: uint8"),
        (use("add", "int16"), "toy has no int16 add; nearest: uint16"),
        (use("conv", "int8", "int8"), "toy has no int8/int8 conv; nearest: uint8/int8"),
        (use("conv", "uint16", "uint8"), "toy has no uint16/uint8 conv; nearest: uint16/int8"),
        (use("conv", "uint16", "int4"), "toy has no uint16/int4 conv; nearest: uint16/int8"),
        (use("conv", "uint8", "uint4"), "toy has no uint8/uint4 conv; nearest: uint8/int4"),
        (use("linear", "uint8", "int8"), "toy has no per_channel weights for linear; nearest: uint8/int8 per_tensor"),
    ],
)
def test_the_nearest_legal_configuration(asked: Use, reason: str | None) -> None:
    found = toy().refusal(asked)
    assert (None if found is None else found.reason) == reason
    if found is not None and found.nearest:
        # it is legal
        activation, _, rest = found.nearest.partition("/")
        weight, _, granularity = rest.partition(" ")
        scheme = Scheme(weight, symmetric=True, granularity=Granularity("per_tensor")) if weight else None
        assert granularity in ("", "per_tensor")
        assert toy().refusal(Use(asked.kind, Scheme(activation), scheme)) is None


@pytest.mark.parametrize(
    "names", [*((name,) for name in target_names()), ("arm-cpu", "hexagon-v73", "apu"), ("litert", "nnapi")]
)
def test_what_is_called_nearest_is_legal(names: tuple[str, ...]) -> None:
    target = qat.load_target(*names)
    types = ("uint8", "int8", "uint16", "int16", "uint4", "int4")
    offered = 0
    for (kind, function, rule), activation, weight in itertools.product(rules(target), types, types):
        weighted = any(w for _, w in rule.dtypes)
        if not rule.dtypes or (not weighted and weight != types[0]):
            continue
        asked = use(kind, activation, weight if weighted else None, function=function, mode=_mode(rule))
        found = target.refusal(asked)
        if found is None:
            continue
        offered += 1
        pair, _, more = found.nearest.partition(" ")
        legal_activation, _, legal_weight = pair.partition("/")
        granularity = Granularity(more.split()[0]) if more.startswith("per_") else Granularity("per_channel")
        scheme = Scheme(legal_weight, symmetric=True, granularity=granularity) if legal_weight else None
        better = Use(kind, Scheme(legal_activation, symmetric=True), scheme, function=function, mode=_mode(rule))
        assert target.refusal(better) is None, (kind, found.reason)
    assert offered


def _mode(rule: OperatorRule) -> str:
    return min(rule.modes) if rule.modes else ""


def test_conditions() -> None:
    target = toy(mixed_dtypes=False, symmetric=["weights"], operators={
        "conv": {"dtypes": "weighted", "granularity": ["per_channel"], "limits": {"dilation": 1, "groups": 2}},
        "resize": {"dtypes": "plain", "modes": ["nearest"]},
        "matmul": {"dtypes": "plain", "symmetric": ["activations"]},
        "table": {"dtypes": "plain", "functions": {"exp": {}, "silu": {"instead": "x * sigmoid(x)"}}},
        "prelu": {"instead": "leaky_relu"},
    })  # fmt: skip

    def reason(asked: Use) -> str:
        return refused(target, asked).reason

    assert reason(use("conv", weight="int8", traits={"dilation": 2})) == "toy has no conv with dilation 2 (at most 1)"
    assert target.refusal(use("conv", weight="int8", traits={"dilation": 1, "groups": 2, "rank": 9})) is None
    assert reason(use("resize", mode="linear")) == "toy has no linear resize"
    assert reason(use("table", function="erf")) == "toy has no integer erf"
    assert reason(use("table", function="silu")) == "toy has no integer silu; nearest: x * sigmoid(x)"
    assert reason(use("prelu")) == "toy has no integer prelu; nearest: leaky_relu"
    assert target.refusal(use("table", function="exp")) is None
    mixed = use("conv", weight="int8", operands=frozenset({"uint16"}))
    assert reason(mixed) == "toy has no conv that reads uint16 and writes uint8; nearest: uint8/int8 read and written"
    assert target.refusal(use("conv", weight="int8", operands=frozenset({"uint8"}))) is None
    skewed = Use("conv", ACTIVATION, WEIGHT.with_(symmetric=False))
    assert reason(skewed) == "toy has no asymmetric weights for conv; nearest: uint8/int8 with symmetric weights"
    # unsigned types are not asked to be symmetric
    assert target.refusal(use("matmul")) is None


def test_several_targets_are_named() -> None:
    other = toy("other", operators={"add": {"dtypes": "weighted"}, "conv": {"dtypes": "plain"}}, floats="none")
    third = toy("third")
    met = toy().intersect(other).intersect(third)
    assert [part.name for part in met.singles] == ["toy", "other", "third"]
    found = refused(met, use("mul"))
    assert found.targets == ("toy", "other", "third")
    assert found.reason == "toy, other and third have no integer mul"
    assert found.stranded == ()
    found = refused(met, use("conv", "uint8", "int8"))
    # what is legal on one of them is not legal on all
    assert (found.targets, found.nearest) == (("other",), "")
    multiplying = toy("five", operators={"mul": {"dtypes": "plain"}}, floats="none")
    found = refused(toy().intersect(multiplying), use("mul"))
    assert (found.targets, found.stranded) == (("toy",), ("five",))
    assert found.reason == "toy has no integer mul, and five has no floats"
    mixed = toy().intersect(toy("four", dtypes={"weighted": [["uint16", "int8"]], "plain": [["uint16"]]}))
    assert refused(mixed, use("add", "int8")).reason == "toy and four have no int8 add; nearest: uint16"
    assert refused(mixed, use("add")).reason == "four has no uint8 add; nearest: uint16"


# -- in plans


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 4, 3), nn.GELU(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.norm(self.conv(x)))
        return self.head((x / (x.abs() + 1)).mean((2, 3)))


def plan(model: nn.Module, *targets: str, **scheme: Any) -> Plan:
    return qat.plan(model, X, target=qat.load_target(*targets), scheme=scheme)


def test_the_forecast_of_a_plan() -> None:
    # without a multiplication there is no other way to write SiLU
    whole = qat.load_target("hexagon-v73")
    hexagon = replace(whole, operators={kind: rule for kind, rule in whole.operators.items() if kind != "mul"})
    target = qat.load_target("arm-cpu").intersect(hexagon).intersect(qat.load_target("apu"))
    made = qat.plan(Net(), X, target=target)
    forecast = {e.name: made.forecast(e) for e in made if made.forecast(e)}
    assert forecast["conv"] == forecast["norm"] == forecast["head"] == "integer"
    silu, div = made["silu"], made["truediv"]
    assert silu.refusal is not None
    assert div.refusal is not None
    assert silu.refusal.targets == ("hexagon-v73",)
    assert silu.refusal.nearest == "x * sigmoid(x), two operators"
    assert div.refusal.targets == ("arm-cpu", "apu")
    assert made.forecast(div) == "refused"
    assert silu.refusal.stranded == ("apu",)
    assert made.forecast(silu) == "refused"
    assert silu.reason == (
        "hexagon-v73 has no integer silu, and apu has no floats; nearest: x * sigmoid(x), two operators"
    )
    alone = qat.plan(Net(), X, target=hexagon)
    assert alone.forecast(alone["silu"]) == "float island"
    assert "float: silu (table): hexagon-v73 has no integer silu; nearest: x * sigmoid(x)" in alone.summary()
    assert "refused: truediv (div): arm-cpu and apu have no integer div" in made.summary()
    data = {t["name"]: t for t in made.to_json()["tensors"]}
    assert data["silu"]["forecast"] == "refused"
    assert data["silu"]["refused_by"] == ["hexagon-v73"]
    assert data["silu"]["nearest"] == "x * sigmoid(x), two operators"
    assert (data["truediv"]["forecast"], data["conv"]["forecast"], data["x"]["forecast"]) == (
        "refused",
        "integer",
        None,
    )
    assert made.to_json()["constraints"]["dynamic_batch"] is False


def test_types_that_a_layer_may_not_have() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    made = plan(model, "hexagon-v73", layers={"1": {"weights": {"dtype": "uint8"}}}, activations={"dtype": "uint16"})
    assert made["1"].reason.startswith("hexagon-v73 has no uint16/uint8 conv; nearest: uint16/int8")
    assert made["0"].computed


def test_ranges_that_the_target_fixes() -> None:
    made = plan(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sigmoid()), "hexagon-v73", activations={"dtype": "uint16"})
    assert made["1"].fixed == (0.0, 65535 / 65536)
    made = plan(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sigmoid()), "hexagon-v73")
    assert made["1"].fixed is None
    made = plan(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()), "apu", activations={"dtype": "int8", "symmetric": True})
    assert made["1"].fixed == (-1.0, 127 / 128)
    assert made["1"].scheme is not None
    assert not made["1"].scheme.symmetric


def test_one_scale_where_the_target_has_no_other() -> None:
    made = plan(nn.Sequential(nn.Conv2d(4, 4, 8), nn.Flatten(), nn.Linear(4, 3)), "nnapi")
    weight = made["2.weight"]
    assert weight.scheme is not None
    assert weight.scheme.granularity.kind == "per_tensor"
    assert weight.reason == "one scale: nnapi has no other for linear"
    # that is no choice of the user's: a recipe that asks for per_channel gets the same
    assert made["2"].computed
    assert made["0.weight"].scheme is not None
    assert made["0.weight"].scheme.granularity.kind == "per_channel"


def test_limits_and_modes_in_plans() -> None:
    class Resized(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.interpolate(x + 1, scale_factor=2)

    assert plan(Resized(), "mace-cpu")["interpolate"].reason == "mace-cpu has no nearest resize"
    assert plan(Resized(), "mace-dsp")["interpolate"].computed
    up = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 3, groups=4))
    assert plan(up, "apu")["1"].reason == "apu has no conv_transpose with groups 4 (at most 1)"
    deep = nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(2, dilation=2))
    assert plan(deep, "apu")["1"].reason == "apu has no max_pool with dilation 2 (at most 1)"
    # a clamp that is not fused
    clamped = nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(2), nn.ReLU6())
    assert plan(clamped, "apu")["2"].reason == "apu has no relu6 clamp"
    assert plan(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU6()), "apu")["1"].computed


def test_a_rescale_is_a_multiplication_on_hexagon() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 1) * 0.5

    made = plan(Scaled(), "hexagon-v73")
    assert (made["mul"].kind, made["mul"].decision) == ("mul", "integer")
    assert plan(Scaled(), "arm-cpu")["mul"].kind == "rescale"


# -- at export


def ready(model: nn.Module, target: Target) -> Any:
    qmodel = qat.prepare(model.eval(), X, target=target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [X])
    return qmodel


def test_static_shapes(tmp_path: Path) -> None:
    import onnx

    qmodel = ready(nn.Sequential(nn.Conv2d(4, 4, 3)), qat.load_target("hexagon-v73"))
    with pytest.raises(ExportError, match="hexagon-v73 wants static shapes; leave dynamic_batch out"):
        qat.export_onnx(qmodel, tmp_path / "m.onnx", dynamic_batch=True)
    assert not (tmp_path / "m.onnx").exists()
    qat.export_onnx(qmodel, tmp_path / "m.onnx")
    sizes = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in sizes] == [1, 4, 8, 8]
    qmodel = ready(nn.Sequential(nn.Conv2d(4, 4, 3)), qat.load_target("arm-cpu"))
    qat.export_onnx(qmodel, tmp_path / "open.onnx")
    assert onnx.load(tmp_path / "open.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_multipliers(tmp_path: Path) -> None:
    bound = {"conv": {"dtypes": "weighted", "granularity": ["per_channel"], "multiplier_below": 1e-6}}
    qmodel = ready(nn.Sequential(nn.Conv2d(4, 4, 3)), toy(operators=bound))
    with pytest.raises(ExportError, match=r"'0' requantizes by .*, and toy has only multipliers below 1e-06; widen"):
        qat.export_onnx(qmodel, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
    bound["conv"]["multiplier_below"] = 1e6
    qat.export_onnx(ready(nn.Sequential(nn.Conv2d(4, 4, 3)), toy(operators=bound)), tmp_path / "m.onnx")


def test_one_scale_of_a_weight_is_one_of_its_bias() -> None:
    scheme = {"weights": {"granularity": "per_tensor"}}
    qmodel = qat.prepare(nn.Sequential(nn.Conv2d(4, 4, 3)), X, target=qat.load_target("hexagon-v73"), scheme=scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [X])
    constants = qat.convert(qmodel).program.constants
    assert constants["0.weight"].encoding is not None
    assert constants["0.bias"].encoding is not None
    assert constants["0.weight"].encoding.per_tensor
    assert constants["0.bias"].encoding.per_tensor
