"""Which scheme each tensor gets, and every key that a user may get wrong."""

from __future__ import annotations

from typing import Any

import pytest

from qat.errors import SchemeError
from qat.scheme import Granularity, ObserverSpec, QuantizerSpec, Scheme
from qat.schemes import LayerRule, Schemes, change_scheme, make_schemes

ACTIVATIONS = Scheme("uint8")
WEIGHTS = Scheme("int8", symmetric=True, granularity=Granularity("per_channel"), qmin=-127)


def make(given: Any) -> Schemes:
    return make_schemes(given, ACTIVATIONS, WEIGHTS)


def test_nothing_given_is_the_default() -> None:
    for given in (None, {}, {"layers": None}, {"activations": None, "weights": {}}):
        assert make(given) == Schemes(ACTIVATIONS, WEIGHTS)
    mine = Schemes(WEIGHTS, WEIGHTS)
    assert make(mine) is mine


def test_changes_by_key() -> None:
    schemes = make(
        {
            "activations": {
                "dtype": "int16",
                "symmetric": True,
                "observer": {"name": "percentile", "percentile": 99.9},
                "quantizer": {"name": "lsq", "drop": 0.5},
            },
            "weights": {"granularity": "per_group", "group_size": 32, "power_of_two": True, "quantizer": "tqt"},
        }
    )
    assert schemes.activations == Scheme(
        "int16",
        symmetric=True,
        observer=ObserverSpec("percentile", {"percentile": 99.9}),
        quantizer=QuantizerSpec("lsq", {"drop": 0.5}),
    )
    assert schemes.weights == WEIGHTS.with_(
        granularity=Granularity("per_group", 0, 32), power_of_two=True, quantizer=QuantizerSpec("tqt")
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": "int4"}, (-7, 7)),
        ({"dtype": "int16"}, (-32767, 32767)),
        ({"dtype": "int8"}, (-127, 127)),
        ({"dtype": "uint8"}, (0, 255)),
        ({"dtype": "int4", "qmin": -8}, (-8, 7)),
        ({"dtype": "int8", "qmax": 120}, (-127, 120)),
        ({"qmax": 120}, (-127, 120)),
        ({"qmin": None}, (-128, 127)),
    ],
)
def test_a_new_dtype_keeps_symmetry_and_drops_the_range(changes: dict[str, Any], expected: tuple[int, int]) -> None:
    assert change_scheme(WEIGHTS, changes, "weights").code_range == expected


def test_granularity_and_group_size() -> None:
    grouped = change_scheme(WEIGHTS, {"granularity": "per_group", "group_size": 8}, "w")
    assert change_scheme(grouped, {"group_size": 16}, "w").granularity == Granularity("per_group", 0, 16)
    assert change_scheme(grouped, {"dtype": "int4"}, "w").granularity.size == 8
    assert change_scheme(grouped, {"granularity": "per_tensor"}, "w").granularity == Granularity()
    assert change_scheme(WEIGHTS, {"granularity": Granularity("per_tensor")}, "w").granularity == Granularity()


def test_layer_rules() -> None:
    schemes = make(
        {
            "layers": {
                "features.*": {"activations": {"dtype": "int8"}},
                "features.3.*": "float",
                "features.3.1": {"weights": {"dtype": "int4"}},
                "head": {"weights": {"observer": "histogram"}},
            }
        }
    )
    assert schemes.activation("features.0").dtype == "int8"
    assert schemes.activation("stem").dtype == "uint8"
    # any tensor of a fusion is named
    assert schemes.activation("stem", "features.0").dtype == "int8"
    assert schemes.is_float("features.3")
    assert schemes.is_float("features.3.0")
    assert schemes.is_float("features.3.0#2")
    assert not schemes.is_float("features.3.1")
    assert not schemes.is_float("features.30")
    assert schemes.weight("features.3.1").dtype == "int4"
    assert schemes.weight("head").observer.name == "histogram"
    assert schemes.weight("head.0") == WEIGHTS


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("a", "a", True),
        ("a", "a#2", True),
        ("a#2", "a#2", True),
        ("a#2", "a", False),
        ("a.*", "a", True),
        ("a.*", "a.b.c", True),
        ("a.*", "ab", False),
        ("*.conv", "x.conv#3", True),
        ("A", "a", False),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    assert LayerRule(pattern).matches(name) is matches


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("int8", "scheme is 'int8'; write a mapping"),
        (["int8"], "scheme is .*; write a mapping"),
        ({"weight": {}}, "unknown key scheme.weight; did you mean 'weights'"),
        ({"zzz": {}}, "unknown key scheme.zzz; legal: activations, layers, weights"),
        ({1: {}}, "unknown key scheme.1"),
        ({"weights": "int4"}, "scheme.weights is 'int4'; write a mapping"),
        ({"weights": False}, "scheme.weights is False"),
        ({"weights": {"dtyp": "int4"}}, "unknown key scheme.weights.dtyp; did you mean 'dtype'"),
        ({"weights": {"axis": 1}}, "unknown key scheme.weights.axis"),
        ({"weights": {"dtype": "int5"}}, "scheme.weights: unknown integer type 'int5'"),
        ({"weights": {"dtype": ["int4"]}}, "scheme.weights: unknown integer type"),
        ({"weights": {"dtype": None}}, "scheme.weights: unknown integer type None"),
        ({"activations": {"symmetric": "yes"}}, "scheme.activations: symmetric is 'yes'; write true or false"),
        ({"activations": {"power_of_two": 1}}, "scheme.activations: power_of_two is 1"),
        ({"activations": {"qmin": 1.5}}, "scheme.activations: qmin 1.5 is not an integer"),
        ({"activations": {"qmax": 256}}, r"scheme.activations: integer range \[0, 256\]"),
        ({"activations": {"qmin": 200, "symmetric": True}}, "does not hold the symmetric zero point"),
        ({"weights": {"granularity": "rows"}}, "scheme.weights: unknown granularity 'rows'"),
        ({"weights": {"granularity": 3}}, "scheme.weights: unknown granularity 3"),
        ({"weights": {"granularity": "per_group"}}, "granularity per_group with group size None; give a size"),
        ({"weights": {"group_size": 8}}, "granularity per_channel with group size 8"),
        ({"weights": {"granularity": "per_group", "group_size": 0}}, "group size 0 is not positive"),
        ({"weights": {"granularity": "per_group", "group_size": "8"}}, "group size '8' is not an integer"),
        ({"weights": {"observer": 3}}, "scheme.weights.observer is 3; write a name"),
        ({"weights": {"observer": {"bins": 3}}}, "scheme.weights.observer is {'bins': 3}"),
        ({"layers": ["a"]}, "scheme.layers is not a mapping"),
        ({"layers": {"a": "int8"}}, "scheme.layers.a is 'int8'; write float, or"),
        ({"layers": {"a": None}}, "scheme.layers.a is None"),
        ({"layers": {"a": {"weigths": {}}}}, "unknown key scheme.layers.a.weigths; did you mean 'weights'"),
        ({"layers": {"a": {"weights": "int4"}}}, "scheme.layers.a.weights is 'int4'; write a mapping"),
        ({"layers": {"a": {"weights": {"bits": 4}}}}, "unknown key scheme.layers.a.weights.bits"),
        ({"layers": {"a": {"activations": {"dtype": "x"}}}}, "scheme.layers.a.activations: unknown integer type 'x'"),
    ],
)
def test_every_bad_key_is_named(given: Any, message: str) -> None:
    with pytest.raises(SchemeError, match=message) as caught:
        make(given)
    assert "\n" not in str(caught.value)
