"""From the data of a target file to a `Target`; every value is checked, and the file and key of a bad one are named."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any, get_args

from qat.errors import SchemeError, TargetError
from qat.scheme import Granularity, GranularityKind, ObserverSpec, Scheme, int_type
from qat.targets.rule import FUNCTIONS, KINDS, LIMITS, PARAMETRIC, OperatorRule, OutputRule, Parameters, Symmetric
from qat.targets.target import Floats, Layout, Target

SEE = "see the schema in qat.targets.load"
_REQUIRED = (
    "schema", "name", "title", "version", "numerics", "dynamic_batch", "activations", "weights", "dtypes", "operators",
)  # fmt: skip
_OPTIONAL = ("extends", "sources", "floats", "layout", "mixed_dtypes", "symmetric")
_RULE_KEYS = {
    "dtypes", "granularity", "output", "fixed", "functions", "limits", "modes", "symmetric", "multiplier_below",
    "parameters", "apart", "instead",
}  # fmt: skip
_SCHEME_KEYS = {"dtype", "symmetric", "granularity", "qmin", "qmax", "observer"}
_WEIGHTED = {"conv", "conv_transpose", "linear"}
#: kinds of which a rule can name modes
_MODES: Mapping[str, frozenset[str]] = {
    "clamp": frozenset({"relu", "relu6", "relu_n1_to_1", "other"}),
    "pad": frozenset({"constant", "reflect", "replicate"}),
    "resize": frozenset({"nearest", "linear"}),
}

DtypeSets = Mapping[str, frozenset[tuple[str, str]]]


def make_target(data: Mapping[str, Any], source: str) -> Target:
    """Make a target of the data of its file.

    Raises:
        TargetError: A key is unknown or missing, or a value is not legal; `source` is named.
    """
    _known(data, (*_REQUIRED, *_OPTIONAL), source)
    missing = sorted(set(_REQUIRED) - set(data))
    if missing:
        raise TargetError(f"{source} lacks the key {missing[0]!r}", "add it")
    for key in ("name", "title", "version"):
        if not isinstance(data[key], str) or not data[key]:
            raise TargetError(f"{source}: {key} is {data[key]!r}", "write a text, in quotes where it is a number")
    if data["numerics"] not in ("onnx", "tflite"):
        raise TargetError(f"{source}: numerics {data['numerics']!r}", "choose onnx or tflite")
    sets = {
        str(name): _dtype_set(pairs, f"{source}: dtypes.{name}")
        for name, pairs in _mapping(data["dtypes"], f"{source}: dtypes").items()
    }
    operators = _mapping(data["operators"], f"{source}: operators")
    _known(operators, KINDS, f"{source}: operators")
    symmetric = _names(data.get("symmetric", []), get_args(Symmetric), f"{source}: symmetric")
    return Target(
        name=data["name"],
        title=data["title"],
        version=data["version"],
        numerics=data["numerics"],
        dynamic_batch=_flag(data, "dynamic_batch", True, source),
        activations=_scheme(data["activations"], f"{source}: activations"),
        weights=_scheme(data["weights"], f"{source}: weights"),
        operators={
            kind: _rule(rule, kind, sets, symmetric, f"{source}: operators.{kind}") for kind, rule in operators.items()
        },
        floats=_choice(data.get("floats", "float32"), get_args(Floats), f"{source}: floats"),
        layout=_choice(data.get("layout", "NCHW"), get_args(Layout), f"{source}: layout"),
        mixed_dtypes=_flag(data, "mixed_dtypes", True, source),
        sources=_texts(data.get("sources", []), f"{source}: sources"),
    )


def _mapping(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise TargetError(f"{where} is not a mapping", SEE)
    return data


def _known(data: Mapping[str, Any], keys: Collection[str], where: str) -> None:
    for key in data:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            raise TargetError(
                f"{where} has the unknown key {key!r}", f"did you mean {near[0]!r}?" if near else "remove it"
            )


def _flag(data: Mapping[str, Any], key: str, default: bool, source: str) -> bool:
    value = data.get(key, default)
    if not isinstance(value, bool):
        raise TargetError(f"{source}: {key} is {value!r}", "write true or false")
    return value


def _choice(value: Any, legal: tuple[str, ...], where: str) -> Any:
    if value not in legal:
        raise TargetError(f"{where} is {value!r}", f"choose {', '.join(legal)}")
    return value


def _names(value: Any, legal: Collection[str], where: str) -> frozenset[Any]:
    if not isinstance(value, list) or any(not isinstance(v, str) or v not in legal for v in value):
        raise TargetError(f"{where} is {value!r}", f"write a list of {', '.join(sorted(legal))}")
    return frozenset(value)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or any(not isinstance(v, str) or not v for v in value):
        raise TargetError(f"{where} is {value!r}", "write a list of texts")
    return tuple(value)


def _positive(value: Any, where: str) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and math.isfinite(value) and value > 0):
        raise TargetError(f"{where} is {value!r}", "write a positive number")
    return None if value is None else float(value)


def _dtype_set(pairs: Any, where: str) -> frozenset[tuple[str, str]]:
    if not isinstance(pairs, list) or any(not isinstance(p, list) or not 1 <= len(p) <= 2 for p in pairs):
        raise TargetError(f"{where} is not a list of [activation, weight]", SEE)
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


def _rule(
    data: Any, kind: str, sets: DtypeSets, symmetric: frozenset[Symmetric], where: str, inner: bool = False
) -> OperatorRule:
    data = _mapping(data, where)
    _known(data, _RULE_KEYS - {"functions"} if inner else _RULE_KEYS, where)
    if "instead" in data:
        if not isinstance(data["instead"], str) or not data["instead"] or set(data) - {"instead"}:
            raise TargetError(f"{where}: instead is {data['instead']!r}", "write a text, and no other key beside it")
        return OperatorRule(dtypes=frozenset(), instead=data["instead"])
    if not isinstance(data.get("dtypes"), str) or data["dtypes"] not in sets:
        raise TargetError(f"{where} names the dtype set {data.get('dtypes')!r}", f"use one of {', '.join(sets)}")
    dtypes = sets[data["dtypes"]]
    output = data.get("output", "own")
    if output not in get_args(OutputRule) or (output == "fixed") != ("fixed" in data):
        raise TargetError(
            f"{where}: output {output!r} with fixed {data.get('fixed')!r}",
            f"output is one of {', '.join(get_args(OutputRule))}; fixed needs a range, and only it",
        )
    granularity = data.get("granularity", ["per_tensor"])
    legal = get_args(GranularityKind)
    if not isinstance(granularity, list) or not granularity or any(g not in legal for g in granularity):
        raise TargetError(f"{where}: granularity is {granularity!r}", f"write a list of {', '.join(legal)}")
    own = _names(data["symmetric"], get_args(Symmetric), f"{where}.symmetric") if "symmetric" in data else symmetric
    return OperatorRule(
        dtypes=dtypes,
        granularity=frozenset(granularity),
        output=output,
        fixed=_fixed(data["fixed"], {a for a, _ in dtypes}, where) if output == "fixed" else {},
        functions=_functions(data, sets, symmetric, kind, where),
        limits=_limits(data.get("limits", {}), where),
        modes=_modes(data, kind, where),
        multiplier_below=_positive(data.get("multiplier_below"), f"{where}.multiplier_below"),
        symmetric=own if kind in _WEIGHTED else own - {"weights"},
        parameters=_parameters(data, kind, where),
        apart=_apart(data, kind, where),
    )


def _apart(data: Mapping[str, Any], kind: str, where: str) -> bool:
    apart = data.get("apart", False)
    if not isinstance(apart, bool) or (apart and kind != "table"):
        raise TargetError(f"{where}: apart is {apart!r}", "write true or false, and true of functions only")
    return apart


def _functions(
    data: Mapping[str, Any], sets: DtypeSets, symmetric: frozenset[Symmetric], kind: str, where: str
) -> Mapping[str, OperatorRule] | None:
    if "functions" not in data:
        return None
    if kind != "table":
        raise TargetError(f"{where} has the unknown key 'functions'", "only the rule of table has functions")
    functions = _mapping(data["functions"], f"{where}.functions")
    _known(functions, FUNCTIONS, f"{where}.functions")
    common = {key: value for key, value in data.items() if key != "functions"}
    made = {}
    for name, own in functions.items():
        place = f"{where}.functions.{name}"
        changes = _mapping(own, place)
        merged = changes if "instead" in changes else {**common, **changes}
        made[name] = _rule(merged, kind, sets, symmetric, place, inner=True)
    return made


def _limits(data: Any, where: str) -> dict[str, int]:
    data = _mapping(data, f"{where}.limits")
    _known(data, LIMITS, f"{where}.limits")
    for key, value in data.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise TargetError(f"{where}.limits.{key} is {value!r}", "write a positive whole number")
    return dict(data)


def _modes(data: Mapping[str, Any], kind: str, where: str) -> frozenset[str] | None:
    if "modes" not in data:
        return None
    if kind not in _MODES:
        raise TargetError(f"{where} has the unknown key 'modes'", f"only {', '.join(sorted(_MODES))} have modes")
    return _names(data["modes"], _MODES[kind], f"{where}.modes")


def _parameters(data: Mapping[str, Any], kind: str, where: str) -> Parameters:
    if "parameters" in data and kind not in PARAMETRIC:
        raise TargetError(f"{where} has the unknown key 'parameters'", f"only {', '.join(sorted(PARAMETRIC))} have it")
    chosen: Parameters = _choice(data.get("parameters", "float"), get_args(Parameters), f"{where}.parameters")
    return chosen


def _fixed(data: Any, activations: Collection[str], where: str) -> dict[str, tuple[float, float]]:
    if isinstance(data, list):
        return dict.fromkeys(sorted(activations), _range(data, where))
    ranges = _mapping(data, f"{where}.fixed")
    _known(ranges, activations, f"{where}.fixed")
    return {dtype: _range(value, where) for dtype, value in ranges.items()}


def _range(data: Any, where: str) -> tuple[float, float]:
    numbers = isinstance(data, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in data)
    if not numbers or len(data) != 2 or not (math.isfinite(data[0]) and math.isfinite(data[1]) and data[0] < data[1]):
        raise TargetError(f"{where}: fixed is {data!r}", "write [low, high], two finite numbers with low < high")
    return float(data[0]), float(data[1])
