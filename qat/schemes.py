"""`Schemes`: which scheme each tensor of a model gets."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from qat.errors import SchemeError
from qat.scheme import Granularity, ObserverSpec, QuantizerSpec, Scheme, int_type

#: the axis of a granularity is no key: it follows from the operator
_SCHEME_KEYS = {f.name for f in fields(Scheme)} | {"group_size"}
#: MNN's names of the symmetric integer range: v stands for qmin = -v, qmax = v
CLAMP_KEYS = ("feature_clamp_value", "weight_clamp_value")


@dataclass(frozen=True)
class LayerRule:
    """What the layers whose name matches `pattern` get instead of the default.

    Attributes:
        pattern: Shell-style pattern on the tensor name; `features.3.*` also matches `features.3` itself. The name
            without its call site (`#2`) is matched too.
        activations: Changes to the activation scheme, by key.
        weights: Changes to the weight scheme, by key.
        float_: The layer stays float.
    """

    pattern: str
    activations: Mapping[str, Any] | None = None
    weights: Mapping[str, Any] | None = None
    float_: bool = False

    def matches(self, name: str) -> bool:
        """Whether the rule applies to the tensor `name`."""
        base = name.split("#", 1)[0]
        patterns = {self.pattern, self.pattern.removesuffix(".*")}
        return any(fnmatch.fnmatchcase(n, p) for n in (name, base) for p in patterns)


@dataclass(frozen=True)
class Schemes:
    """Default schemes and exceptions by layer.

    Attributes:
        activations: Of every activation, unless a layer rule says otherwise.
        weights: Of every weight, unless a layer rule says otherwise.
        layers: Exceptions; the later one wins.
    """

    activations: Scheme
    weights: Scheme
    layers: tuple[LayerRule, ...] = ()

    def is_float(self, name: str) -> bool:
        """Whether the operator that produces `name` is to stay float."""
        decision = False
        for rule in self.layers:
            if rule.matches(name):
                decision = rule.float_
        return decision

    def activation(self, *names: str) -> Scheme:
        """Scheme of an activation; `names` are the tensors that are computed together (conv, its norm, its clamp)."""
        scheme = self.activations
        for rule in self.layers:
            if rule.activations and any(rule.matches(name) for name in names):
                scheme = change_scheme(scheme, rule.activations, f"scheme.layers.{rule.pattern}.activations")
        return scheme

    def weight(self, name: str) -> Scheme:
        """Scheme of the weight of the operator that produces `name`; the axis is set by the operator."""
        scheme = self.weights
        for rule in self.layers:
            if rule.weights and rule.matches(name):
                scheme = change_scheme(scheme, rule.weights, f"scheme.layers.{rule.pattern}.weights")
        return scheme


def make_schemes(given: Schemes | Mapping[str, Any] | None, activations: Scheme, weights: Scheme) -> Schemes:
    """Make the schemes of a model from what the user gave and the target's defaults.

    Args:
        given: `Schemes`, or a mapping with the keys `activations`, `weights` (changes to the defaults) and `layers`
            (pattern -> `float` or changes), or None.
        activations: Default scheme of activations.
        weights: Default scheme of weights.

    Raises:
        SchemeError: An unknown key or an impossible value; its path is named.
    """
    if isinstance(given, Schemes):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise SchemeError(f"scheme is {given!r}", "write a mapping with activations, weights and layers")
    given = given or {}
    _known(given, {"activations", "weights", "layers"}, "scheme")
    layers = given.get("layers") or {}
    if not isinstance(layers, Mapping):
        raise SchemeError("scheme.layers is not a mapping", "write pattern: float, or pattern: {weights: {...}}")
    schemes = Schemes(
        activations=change_scheme(activations, given.get("activations"), "scheme.activations"),
        weights=change_scheme(weights, given.get("weights"), "scheme.weights"),
        layers=tuple(_layer_rule(str(pattern), rule) for pattern, rule in layers.items()),
    )
    for rule in schemes.layers:
        # what is wrong is told even where no tensor has such a name
        change_scheme(schemes.activations, rule.activations, f"scheme.layers.{rule.pattern}.activations")
        change_scheme(schemes.weights, rule.weights, f"scheme.layers.{rule.pattern}.weights")
    return schemes


def _layer_rule(pattern: str, rule: object) -> LayerRule:
    where = f"scheme.layers.{pattern}"
    if rule == "float":
        return LayerRule(pattern, float_=True)
    if not isinstance(rule, Mapping):
        raise SchemeError(f"{where} is {rule!r}", "write float, or {activations: {...}, weights: {...}}")
    _known(rule, {"activations", "weights"}, where)
    return LayerRule(pattern, rule.get("activations"), rule.get("weights"))


def change_scheme(base: Scheme, changes: Mapping[str, Any] | None, where: str) -> Scheme:
    """Return `base` with some keys changed, as they are written in a recipe; None changes nothing.

    A new dtype drops the base's narrower integer range, except that symmetric signed weights stay symmetric
    (`[-7, 7]` for int4, `[-127, 127]` for int8) where the base was so.

    Raises:
        SchemeError: An unknown key or an impossible value; `where` is named.
    """
    if changes is None:
        return base
    if not isinstance(changes, Mapping):
        raise SchemeError(f"{where} is {changes!r}", "write a mapping such as {dtype: int8}")
    _known(changes, _SCHEME_KEYS | set(CLAMP_KEYS), where)
    changes = _without_clamp(changes, where)
    values = {f.name: getattr(base, f.name) for f in fields(Scheme)}
    values.update({k: v for k, v in changes.items() if k not in ("granularity", "group_size", "observer", "quantizer")})
    values["observer"] = _spec(ObserverSpec, changes.get("observer", base.observer), f"{where}.observer")
    values["quantizer"] = _spec(QuantizerSpec, changes.get("quantizer", base.quantizer), f"{where}.quantizer")
    try:
        if "dtype" in changes and changes["dtype"] != base.dtype:
            mirrored = base.symmetric and base.qmin is not None and base.qmin == -(base.int_type.qmax)
            new = int_type(changes["dtype"])
            for key in ("qmin", "qmax"):
                values[key] = changes.get(key)
            if mirrored and new.signed and values["qmin"] is None:
                values["qmin"] = -new.qmax
        values["granularity"] = _granularity(base.granularity, changes)
        return Scheme(**values)
    except SchemeError as error:
        raise SchemeError(f"{where}: {error}") from None


def _without_clamp(changes: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Replace MNN's clamp value by the integer range that it stands for."""
    given = [key for key in CLAMP_KEYS if key in changes]
    if not given:
        return changes
    clamp = changes[given[0]]
    if not isinstance(clamp, int) or isinstance(clamp, bool) or clamp < 1:
        raise SchemeError(f"{where}.{given[0]} is {clamp!r}", "give a positive integer, such as 127")
    for key in (*given[1:], "qmin", "qmax"):
        if key in changes:
            raise SchemeError(f"{where} has both {given[0]} and {key}", "leave one of them out")
    rest = {key: value for key, value in changes.items() if key != given[0]}
    return {**rest, "qmin": -clamp, "qmax": clamp}


def _granularity(base: Granularity, changes: Mapping[str, Any]) -> Granularity:
    given = changes.get("granularity", base)
    if isinstance(given, Granularity) and "group_size" not in changes:
        return given
    kind = given.kind if isinstance(given, Granularity) else given
    kept = base.size if kind == base.kind else None
    axis = base.axis if kind == base.kind else 0
    return Granularity(kind, axis, changes.get("group_size", kept))


_Spec = TypeVar("_Spec", ObserverSpec, QuantizerSpec)


def _spec(kind: type[_Spec], given: object, where: str) -> _Spec:
    if isinstance(given, kind):
        return given
    if isinstance(given, str):
        return kind(given)
    if isinstance(given, Mapping) and isinstance(given.get("name"), str):
        return kind(given["name"], {k: v for k, v in given.items() if k != "name"})
    raise SchemeError(f"{where} is {given!r}", "write a name, or {name: ..., option: ...}")


def _known(data: Mapping[str, Any], keys: set[str], where: str) -> None:
    for key in data:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            raise SchemeError(
                f"unknown key {where}.{key}",
                f"did you mean {near[0]!r}?" if near else f"legal: {', '.join(sorted(keys))}",
            )
