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
from qat.targets.rule import KINDS, OperatorRule, Use
from qat.targets.target import Target

GOOD: dict[str, Any] = {
    "schema": 2,
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
            "softmax": OperatorRule(
                frozenset({("uint8", "")}), frozenset({"per_tensor"}), "fixed", {"uint8": (0.0, 1.0)}
            ),
            "add": OperatorRule(frozenset({("uint8", "")}), frozenset({"per_tensor"})),
        },
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 1, "has schema 1; this qat reads schema 2"),
        ("schema", 3, "has schema 3"),
        ("schema", True, "has schema True"),
        ("schema", ..., "is not a target file"),
        ("name", ..., "lacks the key 'name'"),
        ("name", "", "name is ''"),
        ("version", 1, "version is 1; write a text, in quotes"),
        ("titel", "x", "unknown key 'titel'; did you mean 'title'"),
        ("numerics", "exact", "numerics 'exact'; choose onnx or tflite"),
        ("dynamic_batch", "yes please", "dynamic_batch is 'yes please'"),
        ("floats", "int8", "floats is 'int8'; choose float32, float16, none"),
        ("layout", "HWC", "layout is 'HWC'; choose NCHW, NHWC"),
        ("mixed_dtypes", 1, "mixed_dtypes is 1; write true or false"),
        ("symmetric", "weights", "symmetric is 'weights'; write a list of activations, weights"),
        ("symmetric", ["bias"], r"symmetric is \['bias'\]"),
        ("sources", "a book", "sources is 'a book'; write a list of texts"),
        ("sources", [3], r"sources is \[3\]"),
        ("extends", ["toy"], r"extends is \['toy'\]; write the name of one target"),
        ("extends", "toi", "extends the unknown target 'toi'; choose from"),
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
        ("operators.softmax.fixed", {"int8": [0, 1]}, "fixed has the unknown key 'int8'; did you mean 'uint8'"),
        ("operators.softmax.fixed", {"uint8": [0]}, r"fixed is \[0\]"),
        ("operators.softmax.fixed", 1, "softmax.fixed is not a mapping"),
        ("operators.conv.limits", {"dilatoin": 1}, "limits has the unknown key 'dilatoin'; did you mean 'dilation'"),
        ("operators.conv.limits", {"groups": 0}, "limits.groups is 0; write a positive whole number"),
        ("operators.conv.limits", 1, "limits is not a mapping"),
        ("operators.conv.symmetric", ["w"], r"conv.symmetric is \['w'\]"),
        ("operators.conv.multiplier_below", 0, "conv.multiplier_below is 0; write a positive number"),
        ("operators.conv.multiplier_below", float("inf"), "multiplier_below is inf"),
        ("operators.conv.modes", ["nearest"], "unknown key 'modes'; only clamp, pad, resize have modes"),
        ("operators.resize", {"dtypes": "plain", "modes": ["cubic"]}, r"modes is \['cubic'\]; write a list of linear"),
        ("operators.add.functions", {}, "unknown key 'functions'; only the rule of table has functions"),
        ("operators.add.instead", "sub", "instead is 'sub'; write a text, and no other key"),
        ("operators.mul", {"instead": ""}, "instead is ''"),
        ("operators.table", {"dtypes": "plain", "functions": ["exp"]}, "table.functions is not a mapping"),
        ("operators.table", {"dtypes": "plain", "functions": {"expp": {}}}, "functions has the unknown key 'expp'"),
        ("operators.table", {"dtypes": "plain", "functions": {"exp": 1}}, "table.functions.exp is not a mapping"),
        ("operators.table", {"dtypes": "plain", "functions": {"exp": {"dtypes": "x"}}}, "names the dtype set 'x'"),
        ("operators.table", {"dtypes": "plain", "functions": {"exp": {"apart": 1}}}, "exp: apart is 1; write true or"),
        ("operators.add.apart", True, "operators.add: apart is True; write true or false, and true of functions only"),
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
    with pytest.raises(TargetError, match="unknown target 'zzz'; choose from apu, arm-cpu"):
        qat.load_target("zzz")
    with pytest.raises(TargetError, match="no target was named"):
        qat.load_target()


@pytest.mark.parametrize("name", target_names())
def test_the_targets_that_come_with_qat(name: str) -> None:
    target = qat.load_target(name)
    assert target.name == name
    assert set(target.operators) <= KINDS
    # the defaults are legal wherever there are weights; a default by channel gives way where there is one scale only
    assert target.refusal(Use("conv", target.activations, target.weights)) is None
    by_tensor = target.operators["linear"].granularity == {"per_tensor"}
    weights = target.weights.with_(granularity=Granularity()) if by_tensor else target.weights
    assert target.refusal(Use("linear", target.activations, weights)) is None
    assert set(target.operators["linear"].granularity) >= {"per_tensor"}
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


def test_what_a_file_extends_is_merged_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(changed("layout", "NHWC")), encoding="utf-8")
    above = tmp_path / "sub" / "above.yaml"
    above.parent.mkdir()
    data = {
        "schema": 2, "extends": "../base.yaml", "name": "above", "title": "T", "version": "2",
        "weights": {"qmin": None}, "operators": {"add": None, "softmax": {"fixed": [0, 2]}, "mul": {"dtypes": "plain"}},
    }  # fmt: skip
    above.write_text(yaml.safe_dump(data), encoding="utf-8")
    target = qat.load_target(str(above))
    assert (target.name, target.version, target.layout) == ("above", "2", "NHWC")
    assert set(target.operators) == {"conv", "softmax", "mul"}
    assert target.operators["softmax"].fixed == {"uint8": (0.0, 2.0)}
    assert target.operators["conv"] == parse_target(yaml.safe_dump(GOOD), "toy").operators["conv"]
    assert target.weights.qmin in (None, -128)

    del data["title"]
    above.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(TargetError, match=r"above.yaml lacks the key 'title'; add it: a target does not take it"):
        qat.load_target(str(above))


def test_files_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    for mine, other in (("a", "b"), ("b", "a")):
        data = {"schema": 2, "extends": f"{other}.yaml", "name": mine, "title": "T", "version": "1"}
        (tmp_path / f"{mine}.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(TargetError, match=r"extends a.yaml, which extends it in turn"):
        qat.load_target(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").unlink()
    with pytest.raises(TargetError, match=r"cannot read target file .*a.yaml"):
        qat.load_target(str(tmp_path / "b.yaml"))


def test_functions_of_the_table_have_rules_of_their_own() -> None:
    data = changed("operators.table", {
        "dtypes": "plain", "limits": {"rank": 4},
        "functions": {"exp": {}, "tanh": {"output": "fixed", "fixed": [-1, 1]}, "silu": {"instead": "two operators"}},
    })  # fmt: skip
    toy = parse_target(yaml.safe_dump(data), "toy")
    assert toy.rule("table", "exp") == OperatorRule(frozenset({("uint8", "")}), limits={"rank": 4})
    tanh = toy.rule("table", "tanh")
    assert tanh is not None
    assert (tanh.output, tanh.fixed, tanh.limits) == ("fixed", {"uint8": (-1.0, 1.0)}, {"rank": 4})
    assert toy.rule("table", "silu") == OperatorRule(frozenset(), instead="two operators")
    assert toy.rule("table", "erf") is None
    free = parse_target(yaml.safe_dump(changed("operators.table", {"dtypes": "plain"})), "free")
    assert free.rule("table", "erf") == OperatorRule(frozenset({("uint8", "")}))
    met = free.intersect(toy)
    assert met.operators["table"].functions is not None
    assert set(met.operators["table"].functions) == {"exp", "tanh", "silu"}
    assert met.rule("table", "tanh") == toy.rule("table", "tanh")


def test_intersection_of_conditions() -> None:
    first, second = changed("floats", "float16"), changed("floats", "none")
    first["mixed_dtypes"], second["layout"] = False, "NHWC"
    first["operators"]["conv"].update(limits={"dilation": 2, "groups": 1}, symmetric=["weights"])
    second["operators"]["conv"].update(limits={"dilation": 1, "rank": 4}, multiplier_below=1)
    first["operators"]["table"] = {"dtypes": "plain", "functions": {"exp": {"apart": True}, "tanh": {}}}
    second["operators"]["table"] = {"dtypes": "plain"}
    first["operators"]["resize"] = {"dtypes": "plain"}
    second["operators"]["resize"] = {"dtypes": "plain", "modes": ["linear"]}
    a, b = both(first, second)
    for met in (a.intersect(b), b.intersect(a)):
        conv = met.operators["conv"]
        assert conv.limits == {"dilation": 1, "groups": 1, "rank": 4}
        assert (conv.symmetric, conv.multiplier_below) == (frozenset({"weights"}), 1.0)
        assert met.operators["resize"].modes == frozenset({"linear"})
        exp, tanh = (met.rule("table", name) for name in ("exp", "tanh"))
        assert exp is not None
        assert tanh is not None
        assert (exp.apart, tanh.apart) == (True, False)
        assert (met.floats, met.mixed_dtypes) == ("none", False)
    assert (a.intersect(b).layout, b.intersect(a).layout) == ("NCHW", "NHWC")


def test_a_prescribed_range_and_the_inputs_contradict_each_other() -> None:
    second = changed("operators.softmax", {"dtypes": "plain", "output": "inherit"})
    toy, other = both(GOOD, second)
    with pytest.raises(TargetError, match="softmax: one target prescribes the output range, another wants that of the"):
        toy.intersect(other)


def test_ranges_of_types_that_are_not_common_do_not_matter() -> None:
    first, second = (changed("dtypes.plain", [["uint8"], [other]]) for other in ("int8", "int16"))
    first["operators"]["softmax"]["fixed"] = {"uint8": [0, 1], "int8": [0, 2]}
    second["operators"]["softmax"]["fixed"] = {"int16": [0, 3]}
    a, b = both(first, second)
    assert a.intersect(b).operators["softmax"].fixed == {"uint8": (0.0, 1.0)}


def test_the_three_devices_have_something_in_common() -> None:
    met = qat.load_target("arm-cpu", "hexagon-v73", "apu")
    assert (met.name, met.numerics, met.dynamic_batch) == ("arm-cpu+hexagon-v73+apu", "onnx", False)
    assert [part.name for part in met.singles] == ["arm-cpu", "hexagon-v73", "apu"]
    assert ("uint8", "int8") in met.operators["conv"].dtypes
    assert met.operators["softmax"].fixed == {"uint8": (0.0, 0.99609375)}
    sigmoid = met.rule("table", "sigmoid")
    assert sigmoid is not None
    assert sigmoid.fixed["uint8"] == (0.0, 0.99609375)


def test_generations_of_hexagon() -> None:
    same = [qat.load_target(f"hexagon-v{v}").operators for v in (73, 75, 79, 81)]
    assert all(operators == same[0] for operators in same)
    old = qat.load_target("hexagon-v68").operators
    assert qat.load_target("hexagon-v69").operators == old
    assert same[0]["conv"].dtypes - old["conv"].dtypes == {("uint16", "int16")}
