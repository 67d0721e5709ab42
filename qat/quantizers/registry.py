"""Quantizers by name: making their methods, and checking their names and options."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qat.errors import SchemeError
from qat.observers.options import Option, nearest
from qat.quantizers.dorefa import DoReFa
from qat.quantizers.lsq import LSQ, LSQPlus
from qat.quantizers.method import DROP, Method, Role, Static
from qat.quantizers.pact import PACT
from qat.quantizers.tqt import TQT
from qat.quantizers.ulq import ULQ
from qat.scheme import QuantizerSpec, Scheme

#: every quantizer by the name that a scheme or recipe gives
QUANTIZERS: Mapping[str, type[Method]] = MappingProxyType(
    {kind.name: kind for kind in (Static, LSQ, LSQPlus, PACT, DoReFa, TQT, ULQ)}
)
#: other names: the registered one, and the options that they imply
QUANTIZER_ALIASES: Mapping[str, QuantizerSpec] = MappingProxyType(
    {
        "lsq+": QuantizerSpec("lsq_plus"),
        "qdrop": QuantizerSpec("static", {"drop": 0.5}),
        "ulq_quantize": QuantizerSpec("ulq"),
        "ulq_retrain": QuantizerSpec("ulq"),
    }
)


_A: Mapping[Role, str] = MappingProxyType({"activation": "an activation", "weight": "a weight"})


def quantizer_options(kind: type[Method], role: Role) -> dict[str, Option]:
    """Return the legal options of a quantizer by name."""
    return {**kind.OPTIONS, **({"drop": DROP} if role == "activation" else {})}


def resolve_quantizer(spec: QuantizerSpec, role: Role) -> QuantizerSpec:
    """Return a quantizer under its registered name, with its options, all checked.

    Args:
        spec: Its name, or another one (`QUANTIZER_ALIASES`), with options.
        role: What it is for.

    Raises:
        SchemeError: There is no such quantizer or option (the nearest legal one is named), it is not for this role, or
            a value is not legal.
    """
    alias = QUANTIZER_ALIASES.get(spec.name, QuantizerSpec(spec.name))
    kind = QUANTIZERS.get(alias.name)
    if kind is None:
        raise SchemeError(f"unknown quantizer {spec.name!r}", nearest(spec.name, QUANTIZERS, QUANTIZER_ALIASES))
    if role not in kind.roles:
        able = ", ".join(name for name, other in QUANTIZERS.items() if role in other.roles)
        raise SchemeError(f"quantizer {spec.name} is not for {_A[role]}", f"choose one of {able}")
    options: dict[str, Any] = {**alias.options, **spec.options}
    legal = quantizer_options(kind, role)
    for key, value in options.items():
        option = legal.get(key)
        if option is None:
            raise SchemeError(f"quantizer {spec.name} of {_A[role]} has no option {key!r}", nearest(key, legal))
        if not option.is_legal(value):
            raise SchemeError(
                f"option {key} of quantizer {spec.name} is {value!r}", f"give {option.describe()} ({option.about})"
            )
    return QuantizerSpec(alias.name, options)


def make_method(scheme: Scheme, role: Role) -> Method:
    """Make the method of a quantizer.

    Raises:
        SchemeError: As `resolve_quantizer`, or an initialization, or power-of-two scales, that are not for this scheme.
    """
    spec = resolve_quantizer(scheme.quantizer, role)
    method = QUANTIZERS[spec.name](scheme, role, **spec.options)
    if scheme.power_of_two and method.names and not method.power_of_two:
        raise SchemeError(
            f"quantizer {spec.name} learns any scale, and power_of_two asks for powers of two", "choose tqt or static"
        )
    starts = method.options.get("init", "range")
    if starts != "range" and (role != "weight" or not scheme.symmetric or scheme.granularity.kind == "per_group"):
        raise SchemeError(
            f"init {starts} of quantizer {spec.name} is for symmetric weights, per tensor or per channel",
            "leave it out: the calibrated range is where it starts",
        )
    return method
