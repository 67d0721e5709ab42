"""Schemes, integer types and granularities: what can be said, and what cannot."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numerics_reference as reference
import pytest
from hypothesis import given

from qat.errors import SchemeError
from qat.scheme import INT_TYPES, Granularity, ObserverSpec, QuantizerSpec, Scheme, int_type


@pytest.mark.parametrize(
    ("name", "qmin", "qmax"),
    [
        ("int4", -8, 7),
        ("uint4", 0, 15),
        ("int8", -128, 127),
        ("uint8", 0, 255),
        ("int16", -32768, 32767),
        ("uint16", 0, 65535),
        ("int32", -2147483648, 2147483647),
    ],
)
def test_integer_types(name: str, qmin: int, qmax: int) -> None:
    kind = int_type(name)
    assert (kind.name, kind.qmin, kind.qmax) == (name, qmin, qmax)
    assert Scheme(dtype=name).code_range == (qmin, qmax)
    assert set(INT_TYPES) == {"int4", "uint4", "int8", "uint8", "int16", "uint16", "int32"}


@pytest.mark.parametrize("name", ["int7", "", None, ["int8"]])
def test_unknown_integer_types(name: Any) -> None:
    with pytest.raises(SchemeError, match=r"unknown integer type .*; choose one of int4, uint4, int8"):
        int_type(name)
    with pytest.raises(SchemeError, match="unknown integer type"):
        Scheme(dtype=name)


@pytest.mark.parametrize(("dtype", "middle"), [("int8", 0), ("uint8", 128), ("uint16", 32768), ("uint4", 8)])
def test_the_middle_of_the_type(dtype: str, middle: int) -> None:
    assert Scheme(dtype=dtype, symmetric=True).symmetric_zero_point == middle


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qmin": -129}, r"range \[-129, 127\] is empty or outside int8; choose qmin < qmax within \[-128, 127\]"),
        ({"qmax": 128}, "outside int8"),
        ({"qmin": 5, "qmax": 5}, "is empty or outside"),
        ({"qmin": 1}, r"does not hold the symmetric zero point 0; widen the range or choose an affine scheme"),
        ({"qmax": -1}, "does not hold the symmetric zero point"),
        ({"qmin": -7.0}, "qmin -7.0 is not an integer"),
        ({"qmax": True}, "qmax True is not an integer"),
        ({"qmax": "7"}, "qmax '7' is not an integer"),
        ({"symmetric": "no"}, "symmetric is 'no'; write true or false"),
        ({"power_of_two": 1}, "power_of_two is 1; write true or false"),
    ],
)
def test_schemes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Scheme(dtype="int8", symmetric=True).with_(**changes)


@pytest.mark.parametrize(
    "changes", [{"qmin": 0}, {"qmax": 0}, {"qmin": -120, "qmax": 120}, {"qmin": 1, "symmetric": False}]
)
def test_narrower_ranges_that_can_be(changes: dict[str, Any]) -> None:
    scheme = Scheme(dtype="int8", symmetric=True).with_(**changes)
    assert scheme.code_range == (changes.get("qmin", -128), changes.get("qmax", 127))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("per_row",), "unknown granularity 'per_row'; choose per_tensor, per_channel or per_group"),
        (("per_group",), "granularity per_group with group size None; give a size for per_group and only for it"),
        (("per_channel", 0, 8), "granularity per_channel with group size 8"),
        (("per_group", 1, 0), "group size 0 is not positive"),
        (("per_group", 1, 2.5), "group size 2.5 is not an integer"),
        (("per_channel", "0"), "axis '0' is not an integer"),
        (("per_channel", True), "axis True is not an integer"),
        (("per_channel", None), "axis None is not an integer"),
    ],
)
def test_granularities_that_cannot_be(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Granularity(*arguments)


def test_a_per_tensor_granularity_has_no_axis() -> None:
    assert Granularity("per_tensor", 3) == Granularity()
    assert Granularity("per_channel", 1) != Granularity("per_channel", 0)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(), "uint8 affine per_tensor minmax"),
        (Scheme("int8", symmetric=True, granularity=Granularity("per_channel", 0), qmin=-127),
         "int8 sym per_channel(0) minmax [-127, 127]"),
        (Scheme("int4", granularity=Granularity("per_group", 1, 32), observer=ObserverSpec("mse"), power_of_two=True),
         "int4 affine per_group(1, 32) mse po2"),
        (Scheme(quantizer=QuantizerSpec("lsq")), "uint8 affine per_tensor minmax lsq"),
    ],
)  # fmt: skip
def test_description(scheme: Scheme, words: str) -> None:
    assert scheme.describe() == words


@given(reference.schemes())
def test_schemes_are_values(scheme: Scheme) -> None:
    scheme = scheme.with_(observer=ObserverSpec("histogram", {"bins": 2048, "edges": [1, 2]}))
    for copied in (copy.deepcopy(scheme), pickle.loads(pickle.dumps(scheme)), scheme.with_()):
        assert copied == scheme
        assert hash(copied) == hash(scheme)
    assert scheme != scheme.with_(observer=ObserverSpec("histogram", {"bins": 1024, "edges": [1, 2]}))
    assert scheme != scheme.with_(power_of_two=not scheme.power_of_two)


def test_observer_options_cannot_be_changed() -> None:
    options = {"bins": 16}
    spec = ObserverSpec("histogram", options)
    options["bins"] = 32
    assert spec.options["bins"] == 16
    with pytest.raises(TypeError):
        spec.options["bins"] = 8  # type: ignore[index]
