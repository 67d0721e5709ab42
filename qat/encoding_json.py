"""The JSON form of encodings: its schema, and its strict reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from qat.errors import EncodingError
from qat.scheme import Granularity

_SCHEMA_FILE = "encodings.schema.json"
_REQUIRED = ("dtype", "scale", "zero_point", "qmin", "qmax", "symmetric", "granularity", "provenance")
_OPTIONAL = ("axis", "group_size", "min", "max", "method", "samples")


def encodings_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of `Encodings.to_json`.

    What a schema cannot say, `Encodings.from_json` checks: as many zero points, minima and maxima as scales, codes
    and zero points in order, minima not above maxima.
    """
    schema: dict[str, Any] = json.loads(resources.files("qat").joinpath(_SCHEMA_FILE).read_text(encoding="utf-8"))
    return schema


def encoding_fields(data: object) -> dict[str, Any]:
    """Return the arguments of `Encoding` that the JSON object of an encoding stands for.

    Nothing is converted that is not the same in JSON: 3.0 is the integer 3, but "8" and true are no numbers.

    Raises:
        EncodingError: It is no object, or a key is missing, unknown, or of the wrong type.
        SchemeError: The granularity cannot be.
    """
    if not isinstance(data, Mapping):
        raise EncodingError("not an object", "see the JSON schema")
    for key in data:
        if key not in (*_REQUIRED, *_OPTIONAL):
            raise EncodingError(f"unknown key {key!r}", "remove it")
    for key in _REQUIRED:
        if key not in data:
            raise EncodingError(f"the key {key!r} is missing", "add it")
    kind = _typed(data, "granularity", str, "a string")
    given = {"axis", "group_size"} & set(data)
    wanted = {"per_tensor": set(), "per_channel": {"axis"}, "per_group": {"axis", "group_size"}}.get(kind)
    if wanted is not None and given != wanted:
        raise EncodingError(
            f"granularity {kind} with {', '.join(sorted(given)) or 'neither axis nor group_size'}",
            f"give {' and '.join(sorted(wanted)) or 'neither axis nor group_size'}",
        )
    return {
        "dtype": _typed(data, "dtype", str, "a string"),
        "scale": _numbers(data, "scale"),
        "zero_point": tuple(_integer(data["zero_point"], i, "zero_point") for i in _indices(data, "zero_point")),
        "qmin": _integer(data, "qmin"),
        "qmax": _integer(data, "qmax"),
        "symmetric": _typed(data, "symmetric", bool, "true or false"),
        "granularity": Granularity(
            kind,
            _integer(data, "axis") if "axis" in data else 0,
            _integer(data, "group_size") if "group_size" in data else None,
        ),
        "min": _numbers(data, "min") if "min" in data else None,
        "max": _numbers(data, "max") if "max" in data else None,
        "provenance": _typed(data, "provenance", str, "a string"),
        "method": _typed(data, "method", str, "a string") if "method" in data else "",
        "samples": _integer(data, "samples") if "samples" in data else 0,
    }


def _typed(data: Mapping[str, Any], key: str, kind: type, wanted: str) -> Any:
    if not isinstance(data[key], kind):
        raise EncodingError(f"{key} is not {wanted}", "see the JSON schema")
    return data[key]


def _indices(data: Mapping[str, Any], key: str) -> range:
    return range(len(_typed(data, key, list, "an array")))


def _integer(data: Any, key: str | int, name: str = "") -> int:
    # JSON has one kind of number: 3.0 is the integer 3
    value = data[key]
    if not (_is_integer(value) or (isinstance(value, float) and value.is_integer())):
        raise EncodingError(f"{name or key} is not an integer", "see the JSON schema")
    return int(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(data: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values: list[Any] = _typed(data, key, list, "an array")
    if not all(_is_integer(v) or isinstance(v, float) for v in values):
        raise EncodingError(f"{key} holds something that is no number", "see the JSON schema")
    try:
        return tuple(float(v) for v in values)
    except OverflowError:
        raise EncodingError(f"{key} holds a number that is too large", "see the JSON schema") from None
