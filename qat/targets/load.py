"""Reading target files.

Schema of a target file, version 1 (YAML):

    schema: 1
    name, title, version, numerics (onnx|tflite), dynamic_batch (bool)
    activations, weights: {dtype, symmetric, granularity, qmin, qmax, observer}
        observer: a name, or {name: ..., <option>: ...}; minmax where it is left out
    dtypes: {<set name>: [[activation dtype, weight dtype], ...], ...}     named sets of legal dtype tuples
    operators: {<kind>: {dtypes: <set name>, granularity: [...], output: own|inherit|tie|fixed, fixed: [low, high]}}
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml

from qat.errors import SchemeError, TargetError
from qat.scheme import Granularity, GranularityKind, ObserverSpec, Scheme, int_type
from qat.targets.target import KINDS, OperatorRule, OutputRule, Target

SCHEMA_VERSION = 1
_SEE = "see the schema in qat.targets.load"
_KEYS = {
    "schema",
    "name",
    "title",
    "version",
    "numerics",
    "dynamic_batch",
    "activations",
    "weights",
    "dtypes",
    "operators",
}
_RULE_KEYS = {"dtypes", "granularity", "output", "fixed"}
_SCHEME_KEYS = {"dtype", "symmetric", "granularity", "qmin", "qmax", "observer"}


def target_names() -> tuple[str, ...]:
    """Names of the targets that come with `qat`, sorted."""
    return tuple(
        sorted(
            entry.name.removesuffix(".yaml").replace("_", "-")
            for entry in resources.files("qat.targets").iterdir()
            if entry.name.endswith(".yaml")
        )
    )


def load_target(*names: str) -> Target:
    """Load a target by name or file path; the intersection where several are given.

    Raises:
        TargetError: No such target, a malformed file, or targets that contradict each other.
    """
    if not names:
        raise TargetError("no target was named", f"choose from {', '.join(target_names())}")
    return reduce(lambda a, b: a.intersect(b), (_load_one(name) for name in dict.fromkeys(names)))


def _load_one(name: str) -> Target:
    if name.endswith((".yaml", ".yml")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise TargetError(f"cannot read target file {name} ({error.strerror})", "give an existing file") from None
        except UnicodeDecodeError:
            raise TargetError(f"{name} is not text in UTF-8", "give a target file") from None
        return parse_target(text, name)
    if name not in target_names():
        near = difflib.get_close_matches(name, target_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(target_names())}"
        raise TargetError(f"unknown target {name!r}", hint)
    entry = resources.files("qat.targets").joinpath(name.replace("-", "_") + ".yaml")
    return parse_target(entry.read_text(encoding="utf-8"), entry.name)


def parse_target(text: str, source: str) -> Target:
    """Read the text of a target file.

    Raises:
        TargetError: It is not YAML, has unknown or missing keys, or a value that is not legal; `source` is named.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TargetError(f"{source} is not YAML ({' '.join(str(error).split())})", "correct it") from None
    if not isinstance(data, dict) or "schema" not in data:
        raise TargetError(f"{source} is not a target file", _SEE)
    if data["schema"] != SCHEMA_VERSION or isinstance(data["schema"], bool):
        raise TargetError(f"{source} has schema {data['schema']!r}", f"this qat reads schema {SCHEMA_VERSION}")
    _known(data, _KEYS, source)
    missing = sorted(_KEYS - set(data))
    if missing:
        raise TargetError(f"{source} lacks the key {missing[0]!r}", "add it")
    for key in ("name", "title", "version"):
        if not isinstance(data[key], str) or not data[key]:
            raise TargetError(f"{source}: {key} is {data[key]!r}", "write a text, in quotes where it is a number")
    if data["numerics"] not in ("onnx", "tflite"):
        raise TargetError(f"{source}: numerics {data['numerics']!r}", "choose onnx or tflite")
    if not isinstance(data["dynamic_batch"], bool):
        raise TargetError(f"{source}: dynamic_batch is {data['dynamic_batch']!r}", "write true or false")
    dtypes = _mapping(data["dtypes"], f"{source}: dtypes")
    sets = {str(name): _dtype_set(pairs, f"{source}: dtypes.{name}") for name, pairs in dtypes.items()}
    operators = _mapping(data["operators"], f"{source}: operators")
    _known(operators, KINDS, f"{source}: operators")
    return Target(
        name=data["name"],
        title=data["title"],
        version=data["version"],
        numerics=data["numerics"],
        dynamic_batch=data["dynamic_batch"],
        activations=_scheme(data["activations"], f"{source}: activations"),
        weights=_scheme(data["weights"], f"{source}: weights"),
        operators={kind: _rule(rule, sets, f"{source}: operators.{kind}") for kind, rule in operators.items()},
    )


def _mapping(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise TargetError(f"{where} is not a mapping", _SEE)
    return data


def _known(data: Mapping[str, Any], keys: Collection[str], where: str) -> None:
    for key in data:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            raise TargetError(
                f"{where} has the unknown key {key!r}", f"did you mean {near[0]!r}?" if near else "remove it"
            )


def _dtype_set(pairs: Any, where: str) -> frozenset[tuple[str, str]]:
    if not isinstance(pairs, list) or any(not isinstance(p, list) or not 1 <= len(p) <= 2 for p in pairs):
        raise TargetError(f"{where} is not a list of [activation, weight]", _SEE)
    for pair in pairs:
        for dtype in pair:
            try:
                int_type(dtype)
            except SchemeError as error:
                raise TargetError(f"{where}: {error}") from None
    return frozenset((p[0], p[1] if len(p) == 2 else "") for p in pairs)


def _scheme(data: Any, where: str) -> Scheme:
    data = _mapping(data, where)
    _known(data, _SCHEME_KEYS, where)
    if "dtype" not in data:
        raise TargetError(f"{where} lacks the key 'dtype'", "add it")
    try:
        return Scheme(
            dtype=data["dtype"],
            symmetric=data.get("symmetric", False),
            granularity=Granularity(data.get("granularity", "per_tensor")),
            qmin=data.get("qmin"),
            qmax=data.get("qmax"),
            observer=_observer(data.get("observer", "minmax"), f"{where}.observer"),
        )
    except SchemeError as error:
        raise TargetError(f"{where}: {error}") from None


def _observer(data: Any, where: str) -> ObserverSpec:
    options = {"name": data} if isinstance(data, str) else _mapping(data, where)
    if not isinstance(options.get("name"), str):
        raise TargetError(f"{where} is {data!r}", "write a name, or {name: ..., option: ...}")
    return ObserverSpec(options["name"], {key: value for key, value in options.items() if key != "name"})


def _rule(data: Any, sets: Mapping[str, frozenset[tuple[str, str]]], where: str) -> OperatorRule:
    data = _mapping(data, where)
    _known(data, _RULE_KEYS, where)
    dtypes = data.get("dtypes")
    if not isinstance(dtypes, str) or dtypes not in sets:
        raise TargetError(f"{where} names the dtype set {dtypes!r}", f"use one of {', '.join(sets)}")
    output, fixed = data.get("output", "own"), data.get("fixed")
    if output not in get_args(OutputRule) or (output == "fixed") != (fixed is not None):
        raise TargetError(
            f"{where}: output {output!r} with fixed {fixed!r}",
            f"output is one of {', '.join(get_args(OutputRule))}; fixed needs a range, and only it",
        )
    granularity = data.get("granularity", ["per_tensor"])
    legal = get_args(GranularityKind)
    if not isinstance(granularity, list) or not granularity or any(g not in legal for g in granularity):
        raise TargetError(f"{where}: granularity is {granularity!r}", f"write a list of {', '.join(legal)}")
    return OperatorRule(
        dtypes=sets[dtypes],
        granularity=frozenset(granularity),
        output=output,
        fixed=None if fixed is None else _range(fixed, where),
    )


def _range(data: Any, where: str) -> tuple[float, float]:
    numbers = isinstance(data, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in data)
    if not numbers or len(data) != 2 or not (math.isfinite(data[0]) and math.isfinite(data[1]) and data[0] < data[1]):
        raise TargetError(f"{where}: fixed is {data!r}", "write [low, high], two finite numbers with low < high")
    return float(data[0]), float(data[1])
