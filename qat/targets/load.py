"""Reading target files.

Schema of a target file, version 1 (YAML):

    schema: 1
    name, title, version, numerics (onnx|tflite), dynamic_batch (bool)
    activations: {dtype, symmetric}
    weights: {dtype, symmetric, granularity, qmin, qmax}
    dtypes: {<set name>: [[activation dtype, weight dtype], ...], ...}     named sets of legal dtype tuples
    operators: {<kind>: {dtypes: <set name>, granularity: [...], output: own|inherit|tie|fixed, fixed: [low, high]}}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml

from qat.errors import TargetError
from qat.scheme import Granularity, GranularityKind, Scheme, int_type
from qat.targets.target import OperatorRule, OutputRule, Target

SCHEMA_VERSION = 1
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
_SCHEME_KEYS = {"dtype", "symmetric", "granularity", "qmin", "qmax"}


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
    if not isinstance(data, dict):
        raise TargetError(f"{source} is not a target file", "see the schema in qat.targets.load")
    _known(data, _KEYS, source)
    if data.get("schema") != SCHEMA_VERSION:
        raise TargetError(f"{source} has schema {data.get('schema')!r}", f"this qat reads schema {SCHEMA_VERSION}")
    missing = sorted(_KEYS - set(data))
    if missing:
        raise TargetError(f"{source} lacks the key {missing[0]!r}", "add it")
    if data["numerics"] not in ("onnx", "tflite"):
        raise TargetError(f"{source}: numerics {data['numerics']!r}", "choose onnx or tflite")
    sets = {name: _dtype_set(pairs, f"{source}: dtypes.{name}") for name, pairs in data["dtypes"].items()}
    return Target(
        name=str(data["name"]),
        title=str(data["title"]),
        version=str(data["version"]),
        numerics=data["numerics"],
        dynamic_batch=bool(data["dynamic_batch"]),
        activations=_scheme(data["activations"], f"{source}: activations"),
        weights=_scheme(data["weights"], f"{source}: weights"),
        operators={kind: _rule(rule, sets, f"{source}: operators.{kind}") for kind, rule in data["operators"].items()},
    )


def _known(data: Mapping[str, Any], keys: set[str], where: str) -> None:
    for key in data:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            raise TargetError(
                f"{where} has the unknown key {key!r}", f"did you mean {near[0]!r}?" if near else "remove it"
            )


def _dtype_set(pairs: Any, where: str) -> frozenset[tuple[str, str]]:
    if not isinstance(pairs, list) or any(not isinstance(p, list) or not 1 <= len(p) <= 2 for p in pairs):
        raise TargetError(f"{where} is not a list of [activation, weight]", "see the schema in qat.targets.load")
    for pair in pairs:
        for dtype in pair:
            int_type(dtype)
    return frozenset((p[0], p[1] if len(p) == 2 else "") for p in pairs)


def _scheme(data: Any, where: str) -> Scheme:
    if not isinstance(data, dict):
        raise TargetError(f"{where} is not a mapping", "see the schema in qat.targets.load")
    _known(data, _SCHEME_KEYS, where)
    return Scheme(
        dtype=data["dtype"],
        symmetric=bool(data.get("symmetric", False)),
        granularity=Granularity(data.get("granularity", "per_tensor")),
        qmin=data.get("qmin"),
        qmax=data.get("qmax"),
    )


def _rule(data: Any, sets: Mapping[str, frozenset[tuple[str, str]]], where: str) -> OperatorRule:
    if not isinstance(data, dict):
        raise TargetError(f"{where} is not a mapping", "see the schema in qat.targets.load")
    _known(data, _RULE_KEYS, where)
    dtypes = str(data.get("dtypes"))
    if dtypes not in sets:
        raise TargetError(f"{where} names the unknown dtype set {dtypes!r}", f"use one of {', '.join(sets)}")
    output, fixed = data.get("output", "own"), data.get("fixed")
    if output not in get_args(OutputRule) or (output == "fixed") != (fixed is not None):
        raise TargetError(f"{where}: output {output!r} with fixed {fixed!r}", "fixed needs a range, and only it")
    granularity = data.get("granularity", ["per_tensor"])
    unknown = [g for g in granularity if g not in get_args(GranularityKind)]
    if unknown:
        raise TargetError(f"{where}: unknown granularity {unknown[0]!r}", "see the schema in qat.targets.load")
    return OperatorRule(
        dtypes=sets[dtypes],
        granularity=frozenset(granularity),
        output=output,
        fixed=None if fixed is None else (float(fixed[0]), float(fixed[1])),
    )
