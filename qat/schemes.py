"""`Schemes`: which scheme each tensor of a model gets."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qat.errors import SchemeError
from qat.scheme import Granularity, ObserverSpec, Scheme

_SCHEME_KEYS = {f.name for f in fields(Scheme)} | {"axis", "group_size"}


@dataclass(frozen=True)
class LayerRule:
    """What the layers whose name matches `pattern` get instead of the default.

    Attributes:
        pattern: Shell-style pattern on the tensor name; `features.3.*` also matches `features.3` itself.
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

    def activation(self, name: str) -> Scheme:
        """Scheme of the activation `name`."""
        scheme = self.activations
        for rule in self.layers:
            if rule.activations and rule.matches(name):
                scheme = change_scheme(scheme, rule.activations, f"layers.{rule.pattern}.activations")
        return scheme

    def weight(self, name: str) -> Scheme:
        """Scheme of the weight of the operator that produces `name`; the channel axis is set by the operator."""
        scheme = self.weights
        for rule in self.layers:
            if rule.weights and rule.matches(name):
                scheme = change_scheme(scheme, rule.weights, f"layers.{rule.pattern}.weights")
        return scheme

    def unmatched(self, names: list[str]) -> list[str]:
        """Patterns that match none of `names`."""
        return [rule.pattern for rule in self.layers if not any(rule.matches(name) for name in names)]


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
    given = dict(given or {})
    _known(given, {"activations", "weights", "layers"}, "scheme")
    layers = given.get("layers") or {}
    if not isinstance(layers, Mapping):
        raise SchemeError("scheme.layers is not a mapping", "write pattern: float, or pattern: {weights: {...}}")
    return Schemes(
        activations=change_scheme(activations, given.get("activations") or {}, "scheme.activations"),
        weights=change_scheme(weights, given.get("weights") or {}, "scheme.weights"),
        layers=tuple(_layer_rule(str(pattern), rule) for pattern, rule in layers.items()),
    )


def _layer_rule(pattern: str, rule: object) -> LayerRule:
    where = f"scheme.layers.{pattern}"
    if rule == "float":
        return LayerRule(pattern, float_=True)
    if not isinstance(rule, Mapping):
        raise SchemeError(f"{where} is {rule!r}", "write float, or {activations: {...}, weights: {...}}")
    _known(rule, {"activations", "weights"}, where)
    for part in ("activations", "weights"):
        _known(rule.get(part) or {}, _SCHEME_KEYS, f"{where}.{part}")
    return LayerRule(pattern, rule.get("activations"), rule.get("weights"))


def change_scheme(base: Scheme, changes: Mapping[str, Any], where: str) -> Scheme:
    """Return `base` with some keys changed, as they are written in a recipe.

    A new dtype drops the base's narrower integer range, except that symmetric signed weights stay symmetric
    (`[-7, 7]` for int4, `[-127, 127]` for int8) where the base was so.

    Raises:
        SchemeError: An unknown key or an impossible value; `where` is named.
    """
    if not isinstance(changes, Mapping):
        raise SchemeError(f"{where} is {changes!r}", "write a mapping such as {dtype: int8}")
    _known(changes, _SCHEME_KEYS, where)
    values = {f.name: getattr(base, f.name) for f in fields(Scheme)}
    values.update({k: v for k, v in changes.items() if k not in ("granularity", "axis", "group_size", "observer")})
    if "dtype" in changes and changes["dtype"] != base.dtype:
        mirrored = base.symmetric and base.qmin is not None and base.qmin == -(base.int_type.qmax)
        new = Scheme(dtype=changes["dtype"]).int_type
        for key in ("qmin", "qmax"):
            values[key] = changes.get(key)
        if mirrored and new.signed and values["qmin"] is None:
            values["qmin"] = -new.qmax
    granularity = changes.get("granularity", base.granularity)
    if not isinstance(granularity, Granularity):
        granularity = Granularity(granularity, int(changes.get("axis", 0)), changes.get("group_size"))
    elif "group_size" in changes or "axis" in changes:
        granularity = Granularity(
            granularity.kind, int(changes.get("axis", granularity.axis)), changes.get("group_size", granularity.size)
        )
    values["granularity"] = granularity
    values["observer"] = _observer(changes.get("observer", base.observer), where)
    try:
        return Scheme(**values)
    except SchemeError as error:
        raise SchemeError(f"{where}: {error}") from None
    except TypeError:
        raise SchemeError(f"{where}: a value has the wrong type", "see `qat recipe schema`") from None


def _observer(given: object, where: str) -> ObserverSpec:
    if isinstance(given, ObserverSpec):
        return given
    if isinstance(given, str):
        return ObserverSpec(given)
    if isinstance(given, Mapping) and isinstance(given.get("name"), str):
        return ObserverSpec(given["name"], {k: v for k, v in given.items() if k != "name"})
    raise SchemeError(f"{where}.observer is {given!r}", "write a name, or {name: ..., option: ...}")


def _known(data: Mapping[str, Any], keys: set[str], where: str) -> None:
    for key in data:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            raise SchemeError(
                f"unknown key {where}.{key}",
                f"did you mean {near[0]!r}?" if near else f"legal: {', '.join(sorted(keys))}",
            )
