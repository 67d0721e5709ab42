"""Target files: what is read, what is refused, and what several devices have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import qat
from qat.errors import TargetError
from qat.observers.registry import check_observer
from qat.scheme import Granularity, ObserverSpec, Scheme
from qat.targets.load import parse_target, target_names
from qat.targets.target import KINDS, OperatorRule, Target

GOOD: dict[str, Any] = {
    "schema": 1,
    "name": "toy",
    "title": "A toy",
    "version": "1",
    "numerics": "onnx",
    "dynamic_batch": True,
    "activations": {"dtype": "uint8"},
    "weights": {"dtype": "int8", "symmetric": True, "granularity": "per_channel", "qmin": -127},
    "dtypes": {"weighted": [["uint8", "int8"]], "plain": [["uint8"]]},
    "operators": {
        "conv": {"dtypes": "weighted", "granularity": ["per_tensor", "per_channel"]},
        "softmax": {"dtypes": "plain", "output": "fixed", "fixed": [0, 1]},
        "add": {"dtypes": "plain"},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """A copy of GOOD with one entry replaced, or removed where the value is `...`."""
    data: dict[str, Any] = yaml.safe_load(yaml.safe_dump(GOOD))
    *parents, last = path.split(".")
    place = data
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


def test_a_target_file() -> None:
    toy = parse_target(yaml.safe_dump(GOOD), "toy.yaml")
    assert toy == Target(
        name="toy",
        title="A toy",
        version="1",
        numerics="onnx",
        dynamic_batch=True,
        activations=Scheme("uint8"),
        weights=Scheme("int8", symmetric=True, granularity=Granularity("per_channel"), qmin=-127),
        operators={
            "conv": OperatorRule(frozenset({("uint8", "int8")}), frozenset({"per_tensor", "per_channel"})),
            "softmax": OperatorRule(frozenset({("uint8", "")}), frozenset({"per_tensor"}), "fixed", (0.0, 1.0)),
            "add": OperatorRule(frozenset({("uint8", "")}), frozenset({"per_tensor"})),
        },
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "has schema 2; this qat reads schema 1"),
        ("schema", True, "has schema True"),
        ("schema", ..., "is not a target file"),
        ("name", ..., "lacks the key 'name'"),
        ("name", "", "name is ''"),
        ("version", 1, "version is 1; write a text, in quotes"),
        ("titel", "x", "unknown key 'titel'; did you mean 'title'"),
        ("numerics", "exact", "numerics 'exact'; choose onnx or tflite"),
        ("dynamic_batch", "yes please", "dynamic_batch is 'yes please'"),
        ("activations", "uint8", "activations is not a mapping"),
        ("activations", {}, "activations lacks the key 'dtype'"),
        ("activations.dtype", "uint7", "activations: unknown integer type 'uint7'"),
        ("activations.symmetric", "no", "activations: symmetric is 'no'"),
        ("activations.observer", 3, "activations.observer is not a mapping"),
        ("activations.observer", {"bins": 3}, r"activations.observer is {'bins': 3}; write a name"),
        ("weights.granularity", "per_row", "weights: unknown granularity 'per_row'"),
        ("weights.granularity", "per_group", "weights: granularity per_group with group size None"),
        ("weights.qmin", -129, r"weights: integer range \[-129, 127\]"),
        ("weights.qmin", "low", "weights: qmin 'low' is not an integer"),
        ("weights.gmin", 0, "weights has the unknown key 'gmin'; did you mean 'qmin'"),
        ("dtypes", [], "dtypes is not a mapping"),
        ("dtypes.plain", "uint8", "dtypes.plain is not a list of"),
        ("dtypes.plain", [["uint8", "int8", "int8"]], "dtypes.plain is not a list of"),
        ("dtypes.plain", [["float8"]], "dtypes.plain: unknown integer type 'float8'"),
        ("dtypes.plain", [[["uint8"]]], "dtypes.plain: unknown integer type"),
        ("operators", None, "operators is not a mapping"),
        ("operators.convolution", {"dtypes": "plain"}, "operators has the unknown key 'convolution'"),
        ("operators.conv", "weighted", "operators.conv is not a mapping"),
        ("operators.conv.dtype", "weighted", "operators.conv has the unknown key 'dtype'; did you mean 'dtypes'"),
        ("operators.conv.dtypes", "weigthed", "names the dtype set 'weigthed'; use one of"),
        ("operators.conv.dtypes", ..., "names the dtype set None"),
        ("operators.conv.granularity", "per_tensor", "operators.conv: granularity is 'per_tensor'; write a list"),
        ("operators.conv.granularity", ["per_row"], r"granularity is \['per_row'\]"),
        ("operators.add.output", "mine", "operators.add: output 'mine'"),
        ("operators.add.output", "fixed", "output 'fixed' with fixed None"),
        ("operators.add.fixed", [0, 1], "output 'own' with fixed"),
        ("operators.softmax.fixed", [0], r"operators.softmax: fixed is \[0\]"),
        ("operators.softmax.fixed", [1, 0], "low < high"),
        ("operators.softmax.fixed", [0, float("inf")], "two finite numbers"),
        ("operators.softmax.fixed", ["a", "b"], "two finite numbers"),
    ],
)
def test_a_bad_target_file_is_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        parse_target(yaml.safe_dump(changed(path, value)), "toy.yaml")
    assert str(caught.value).startswith("toy.yaml")
    assert "\n" not in str(caught.value)


def test_the_default_observer_of_a_target() -> None:
    def observer(value: Any) -> ObserverSpec:
        return parse_target(yaml.safe_dump(changed("activations.observer", value)), "toy.yaml").activations.observer

    assert parse_target(yaml.safe_dump(GOOD), "toy.yaml").activations.observer == ObserverSpec("minmax")
    assert observer("histogram") == ObserverSpec("histogram")
    assert observer({"name": "percentile", "percentile": 99.9}) == ObserverSpec("percentile", {"percentile": 99.9})


@pytest.mark.parametrize("text", ["", "- a list", "42", "{unclosed", "a: [1", "\t: x", "!!python/object:os.system {}"])
def test_a_text_that_is_no_target_file(text: str) -> None:
    with pytest.raises(TargetError, match=r"^toy.yaml is not") as caught:
        parse_target(text, "toy.yaml")
    assert "\n" not in str(caught.value)


def test_loading_by_path(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(GOOD), encoding="utf-8")
    assert qat.load_target(str(path)).name == "toy"
    with pytest.raises(TargetError, match=r"cannot read target file .*none.yaml"):
        qat.load_target(str(tmp_path / "none.yaml"))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TargetError, match="not text in UTF-8"):
        qat.load_target(str(path))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(TargetError, match="cannot read target file"):
        qat.load_target(str(tmp_path / "folder.yaml"))


def test_unknown_names() -> None:
    with pytest.raises(TargetError, match=r"unknown target 'arm_cpu'; did you mean arm-cpu\?"):
        qat.load_target("arm_cpu")
    with pytest.raises(TargetError, match="unknown target 'zzz'; choose from arm-cpu, onnxruntime-cpu"):
        qat.load_target("zzz")
    with pytest.raises(TargetError, match="no target was named"):
        qat.load_target()


@pytest.mark.parametrize("name", target_names())
def test_the_targets_that_come_with_qat(name: str) -> None:
    target = qat.load_target(name)
    assert target.name == name
    assert set(target.operators) <= KINDS
    # the defaults are legal wherever there are weights
    assert target.refusal("conv", target.activations.dtype, target.weights) is None
    assert target.refusal("linear", target.activations.dtype, target.weights) is None
    assert target.intersect(target).operators == target.operators
    for scheme in (target.activations, target.weights):
        check_observer(scheme.observer)


def both(a: dict[str, Any], b: dict[str, Any]) -> tuple[Target, Target]:
    return parse_target(yaml.safe_dump(a), "a"), parse_target(yaml.safe_dump(b), "b")


def test_intersection() -> None:
    second = changed("operators.conv.granularity", ["per_tensor"])
    second["name"], second["dynamic_batch"] = "other", False
    second["dtypes"]["weighted"] = [["uint8", "int4"], ["uint8", "int8"]]
    second["operators"]["add"]["output"] = "tie"
    second["operators"]["mul"] = {"dtypes": "plain"}
    del second["operators"]["softmax"]
    toy, other = both(GOOD, second)
    for met in (toy.intersect(other), other.intersect(toy)):
        assert set(met.operators) == {"conv", "add"}
        assert met.operators["conv"].granularity == frozenset({"per_tensor"})
        assert met.operators["conv"].dtypes == frozenset({("uint8", "int8")})
        assert met.operators["add"].output == "tie"
        assert met.dynamic_batch is False
    assert toy.intersect(other).name == "toy+other"


def test_targets_that_contradict_each_other() -> None:
    toy, other = both(GOOD, changed("operators.softmax.fixed", [0, 2]))
    with pytest.raises(TargetError, match=r"softmax: one target prescribes the output range \(0.0, 1.0\)"):
        toy.intersect(other)


def test_loading_several_is_their_intersection() -> None:
    met = qat.load_target("arm-cpu", "onnxruntime-cpu", "arm-cpu")
    assert met.name == "arm-cpu+onnxruntime-cpu"
    assert met.operators["avg_pool"].output == "inherit"
    assert "div" not in met.operators


def test_refusals_name_what_is_legal() -> None:
    toy = parse_target(yaml.safe_dump(GOOD), "toy")
    weights = toy.weights
    assert toy.refusal("conv", "uint8", weights) is None
    assert toy.refusal("mul", "uint8", None) == "toy has no integer mul"
    assert toy.refusal("add", "int8", None) == "toy has no int8 add (legal: uint8)"
    assert toy.refusal("conv", "int8", weights) == "toy has no int8/int8 conv (legal: uint8/int8)"
    grouped = weights.with_(granularity=Granularity("per_group", 1, 4))
    assert toy.refusal("conv", "uint8", grouped) == "toy has no per_group weights for conv"
