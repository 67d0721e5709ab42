"""The JSON of encodings: exact round trip, schema, and damage that reader and schema refuse alike."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from encoding_examples import CHANNELS, GROUPS, UINT8, tables
from hypothesis import given, settings

from qat.encoding_json import encodings_schema
from qat.encodings import Encodings
from qat.errors import EncodingError, OutputError

VALIDATOR = jsonschema.Draft202012Validator(encodings_schema())


@given(tables)
@settings(max_examples=80)
def test_json_keeps_every_bit(table: Encodings) -> None:
    document = json.loads(json.dumps(table.to_json(), allow_nan=False))
    VALIDATOR.validate(document)
    again = Encodings.from_json(document)
    assert again == table
    assert list(again) == list(table)
    assert again.meta == table.meta
    assert again.to_json() == table.to_json()


def test_save_and_load(tmp_path: Path) -> None:
    table = Encodings({"ä\u2028.weight": CHANNELS, "b": UINT8, "c": GROUPS}, {"model": "ö"})
    path = tmp_path / "run" / "encodings.json"
    table.save(path)
    assert Encodings.load(path) == table
    assert Encodings.load(str(path)).meta == table.meta
    first = path.read_bytes()
    table.save(str(path))
    assert path.read_bytes() == first
    VALIDATOR.validate(json.loads(first))


def test_the_file_is_what_the_documentation_says() -> None:
    assert Encodings({"conv.weight": CHANNELS}, {"model": "m"}).to_json() == {
        "schema": "qat-encodings",
        "version": 1,
        "meta": {"model": "m"},
        "encodings": {
            "conv.weight": {
                "dtype": "int8", "scale": [0.5, 0.25], "zero_point": [0, 0], "qmin": -127, "qmax": 127,
                "symmetric": True, "granularity": "per_channel", "axis": 0, "min": [-1.0, -2.0], "max": [63.5, 1.0],
                "provenance": "qat", "method": "lsq", "samples": 64,
            },
        },
    }  # fmt: skip


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(encodings_schema())
    assert encodings_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


Damage = Callable[[dict[str, Any]], object]


def entry_of(document: dict[str, Any], name: str = "a") -> dict[str, Any]:
    found: dict[str, Any] = document["encodings"][name]
    return found


def put(key: str, value: Any, name: str = "a") -> Damage:
    return lambda document: entry_of(document, name).update({key: value})


def drop(key: str, name: str = "a") -> Damage:
    return lambda document: entry_of(document, name).pop(key)


def top(key: str, value: Any) -> Damage:
    return lambda document: document.update({key: value})


#: what both the schema and the reader refuse, with the reader's words
DAMAGE: list[tuple[Damage, str]] = [
    (top("schema", "aimet"), "is not a table of encodings; it must say"),
    (lambda d: d.pop("schema"), "is not a table of encodings"),
    (top("version", 2), "has version 2 of the schema; this qat reads version 1"),
    (top("version", True), "has version True of the schema"),
    (lambda d: d.pop("version"), "has version None of the schema"),
    (top("extra", 1), "has the unknown key 'extra'; remove it"),
    (lambda d: d.pop("encodings"), "'encodings' is missing or is not an object"),
    (top("encodings", []), "'encodings' is missing or is not an object"),
    (top("meta", "text"), "'meta' is missing or is not an object"),
    (top("meta", {"epochs": 3}), "meta entry 'epochs' of a table of encodings is not a string"),
    (lambda d: d["encodings"].update(a=[]), "encoding of 'a': not an object"),
    *[
        (drop(key), f"encoding of 'a': the key '{key}' is missing; add it")
        for key in ("dtype", "scale", "zero_point", "qmin", "qmax", "symmetric", "granularity", "provenance")
    ],
    (put("offset", [1]), "encoding of 'a': unknown key 'offset'; remove it"),
    (put("dtype", "int7"), "encoding of 'a': unknown integer type 'int7'"),
    (put("dtype", 8), "encoding of 'a': dtype is not a string"),
    (put("scale", 0.5), "encoding of 'a': scale is not an array"),
    (put("scale", "05"), "scale is not an array"),
    (put("scale", []), "0 scales and 1 zero points"),
    (put("scale", ["0.5"]), "scale holds something that is no number"),
    (put("scale", [True]), "scale holds something that is no number"),
    (put("scale", [None]), "scale holds something that is no number"),
    (put("scale", [0.0]), "a scale is not positive"),
    (put("scale", [-0.5]), "a scale is not positive"),
    (put("scale", [2.0**-150]), "a scale is not positive and finite in float32"),
    (put("scale", [2.0**128]), "a scale is not positive and finite in float32"),
    (put("scale", [10**400]), "scale holds a number that is too large"),
    (put("zero_point", 3), "zero_point is not an array"),
    (put("zero_point", []), "1 scales and 0 zero points"),
    (put("zero_point", [3.5]), "zero_point is not an integer"),
    (put("zero_point", [True]), "zero_point is not an integer"),
    (put("zero_point", ["3"]), "zero_point is not an integer"),
    (put("zero_point", [256]), "the zero point 256 is outside"),
    (put("zero_point", [-1]), "the zero point -1 is outside"),
    (put("qmin", -1), r"integer range \[-1, 255\] is empty or outside uint8"),
    (put("qmax", 256), "outside uint8"),
    (put("qmin", "0"), "qmin is not an integer"),
    (put("qmin", None), "qmin is not an integer"),
    (put("qmax", 254.5), "qmax is not an integer"),
    (put("symmetric", "false"), "symmetric is not true or false"),
    (put("symmetric", 0), "symmetric is not true or false"),
    (put("symmetric", True), "a symmetric uint8 encoding has a zero point other than 128"),
    (put("granularity", "per_row"), "unknown granularity 'per_row'"),
    (put("granularity", ["per_tensor"]), "granularity is not a string"),
    (put("granularity", "per_channel"), "per_channel with neither axis nor group_size; give axis"),
    (put("axis", 0), "granularity per_tensor with axis; give neither axis nor group_size"),
    (put("group_size", 4), "granularity per_tensor with group_size"),
    (put("axis", "0", "c"), "encoding of 'c': axis is not an integer"),
    (put("group_size", 4, "c"), "granularity per_channel with axis, group_size; give axis"),
    (put("group_size", 0, "g"), "encoding of 'g': group size 0 is not positive"),
    (put("group_size", 2.5, "g"), "group_size is not an integer"),
    (drop("group_size", "g"), "granularity per_group with axis; give axis and group_size"),
    (drop("axis", "g"), "granularity per_group with group_size; give axis and group_size"),
    (put("zero_point", [0, -9], "g"), "the zero point -9 is outside"),
    (put("granularity", "per_tensor", "c"), "granularity per_tensor with axis"),
    (drop("min", "c"), "only one of min and max is given"),
    (drop("max", "c"), "only one of min and max is given"),
    (put("min", None, "c"), "min is not an array"),
    (put("min", ["-1", "-2"], "c"), "min holds something that is no number"),
    (put("min", [-1.0, -math.inf], "c"), "inverted or not finite"),
    (put("provenance", "guess"), "unknown provenance 'guess'"),
    (put("provenance", None), "provenance is not a string"),
    (put("method", 3), "method is not a string"),
    (put("samples", -1), "the number of samples is -1"),
    (put("samples", 1.5), "samples is not an integer"),
    (put("samples", "1"), "samples is not an integer"),
]


def document() -> dict[str, Any]:
    return json.loads(json.dumps(Encodings({"a": UINT8, "c": CHANNELS, "g": GROUPS}).to_json()))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[re.sub(r"\W+", " ", m)[:60] for _, m in DAMAGE])
def test_damage_is_refused_by_reader_and_schema(damage: Damage, message: str) -> None:
    damaged = document()
    assert VALIDATOR.is_valid(damaged)
    damage(damaged)
    assert not VALIDATOR.is_valid(damaged)
    with pytest.raises(EncodingError, match=f"^table.json.*{message}") as caught:
        Encodings.from_json(damaged, "table.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("zero_point", [0], "c"), "2 scales and 1 zero points"),
        (put("scale", [0.5, 1.0, 2.0], "g"), "3 scales and 2 zero points"),
        (put("min", [-1.0], "c"), "1 minima and 2 maxima for 2 scales"),
        (put("min", [64.0, -2.0], "c"), r"the observed range \[64.0, 63.5\] is inverted"),
        (put("qmin", 255), r"integer range \[255, 255\] is empty"),
        (put("qmin", 4), "the zero point 3 is outside the integer range"),
    ],
)
def test_damage_that_a_schema_cannot_see(damage: Damage, message: str) -> None:
    damaged = document()
    damage(damaged)
    assert VALIDATOR.is_valid(damaged)
    with pytest.raises(EncodingError, match=message):
        Encodings.from_json(damaged)


@pytest.mark.parametrize(
    "same", [put("zero_point", [3.0]), put("qmax", 255.0), put("scale", [0.5]), lambda d: d.pop("meta")]
)
def test_what_json_has_two_spellings_for(same: Damage) -> None:
    respelled = document()
    same(respelled)
    assert VALIDATOR.is_valid(respelled)
    assert Encodings.from_json(respelled) == Encodings({"a": UINT8, "c": CHANNELS, "g": GROUPS})


@pytest.mark.parametrize("data", [None, [], "qat-encodings", 3, {}])
def test_something_else_altogether(data: object) -> None:
    assert not VALIDATOR.is_valid(data)
    with pytest.raises(EncodingError, match=r"^x is not a table of encodings"):
        Encodings.from_json(data, "x")


def test_loading_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    with pytest.raises(
        EncodingError, match=r"cannot read .*e\.json \(No such file or directory\); give an existing file"
    ):
        Encodings.load(path)
    path.write_text('{"schema": "qat-encodings", "vers')
    with pytest.raises(EncodingError, match=r"e\.json is not JSON .*; give a file written by Encodings\.save"):
        Encodings.load(path)
    text = json.dumps(document())
    path.write_text(text.replace('"scale": [0.5]', '"scale": [NaN]'))
    with pytest.raises(EncodingError, match=r"e\.json is not JSON \(NaN is no JSON number\)"):
        Encodings.load(path)
    path.write_text(text.replace('"scale": [0.5]', '"scale": [1e999]'))
    with pytest.raises(EncodingError, match=r"e\.json: encoding of 'a': a scale is not positive and finite"):
        Encodings.load(path)
    path.write_text(text.replace('"c": {', '"a": {'))
    with pytest.raises(EncodingError, match=r"e\.json is not JSON \(key 'a' occurs twice\)"):
        Encodings.load(path)


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.json"
    Encodings({"a": UINT8}).save(path)
    before = path.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Encodings({"b": CHANNELS}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match=r"cannot write .*e\.json/below"):
        Encodings().save(path / "below")
