"""Observers by name: making them, and checking their names and options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from qat.errors import SchemeError
from qat.observers.admm import ADMMObserver
from qat.observers.aliases import ALIASES, Alias
from qat.observers.auto import AutoObserver
from qat.observers.base import Observer
from qat.observers.divergence import KLObserver
from qat.observers.hfmg import HFMGObserver
from qat.observers.histogram import HistogramObserver
from qat.observers.ifmr import IFMRObserver
from qat.observers.losses import LpObserver, SQNRObserver
from qat.observers.minmax import MinMaxObserver
from qat.observers.moving_average import MovingAverageObserver
from qat.observers.options import Option, nearest
from qat.observers.percentile import PercentileObserver
from qat.observers.refine import RefineObserver
from qat.observers.samples import MaceObserver
from qat.observers.weight_rules import ARQObserver, FixedPointObserver
from qat.scheme import Granularity, ObserverSpec

#: every observer by the name that a scheme or recipe gives
OBSERVERS: Mapping[str, type[Observer]] = MappingProxyType(
    {
        "minmax": MinMaxObserver,
        "moving_average": MovingAverageObserver,
        "percentile": PercentileObserver,
        "histogram": HistogramObserver,
        "mace": MaceObserver,
        "kl": KLObserver,
        "admm": ADMMObserver,
        "ifmr": IFMRObserver,
        "hfmg": HFMGObserver,
        "lp": LpObserver,
        "sqnr": SQNRObserver,
        "mle": RefineObserver,
        "arq": ARQObserver,
        "dynamic_fixed_point": FixedPointObserver,
        "auto": AutoObserver,
    }
)


def resolve_observer(spec: ObserverSpec) -> ObserverSpec:
    """Return an observer under its registered name and its own options' names, all checked.

    Args:
        spec: Its name here or in another system (`ALIASES`), with options named as here or there.

    Raises:
        SchemeError: There is no such observer or option (the nearest legal one is named), an option is given under two
            names, a value is not legal, or options contradict each other.
    """
    alias = ALIASES.get(spec.name) or Alias(spec.name)
    kind = OBSERVERS.get(alias.observer)
    if kind is None:
        raise SchemeError(f"unknown observer {spec.name!r}", nearest(spec.name, OBSERVERS, ALIASES))
    found: dict[str, Any] = {}
    for key, value in _single_options(spec, alias):
        own = alias.renames.get(key) or alias.powers.get(key) or key
        option = kind.OPTIONS.get(own)
        if option is None:
            raise SchemeError(
                f"observer {spec.name} has no option {key!r}",
                nearest(key, kind.OPTIONS, [*alias.renames, *alias.powers, *alias.pairs]),
            )
        if own in found:
            raise SchemeError(f"option {own} of observer {spec.name} is given twice", f"leave out {key}")
        found[own] = _checked(spec.name, key, value, option, power=key in alias.powers)
    options = {**alias.values, **found}
    kind.check_options({key: option.default for key, option in kind.OPTIONS.items()} | options)
    return ObserverSpec(alias.observer, options)


def check_observer(spec: ObserverSpec) -> type[Observer]:
    """Return the class of an observer after checking its name and options.

    Raises:
        SchemeError: As `resolve_observer`.
    """
    return OBSERVERS[resolve_observer(spec).name]


def make_observer(spec: ObserverSpec, granularity: Granularity, channels: int | None, name: str) -> Observer:
    """Make an observer.

    Args:
        spec: Its registered name, or another system's, and its options.
        granularity: Which elements share a range.
        channels: Number of channels, or of groups (`qat.observers.channel_count`); None for per-tensor.
        name: Name of the tensor, for messages.

    Raises:
        SchemeError: The name, an option or the number of channels is not legal.
    """
    resolved = resolve_observer(spec)
    return OBSERVERS[resolved.name](granularity, channels, name, **resolved.options)


def _single_options(spec: ObserverSpec, alias: Alias) -> Iterable[tuple[str, object]]:
    """Yield the options with one value each."""
    for key, value in spec.options.items():
        if key not in alias.pairs:
            yield key, value
        elif isinstance(value, (list, tuple)) and len(value) == len(alias.pairs[key]):
            yield from zip(alias.pairs[key], value, strict=True)
        else:
            raise SchemeError(f"option {key} of observer {spec.name} is {value!r}", "give two numbers, such as [a, b]")


def _checked(observer: str, key: str, value: object, option: Option, *, power: bool) -> object:
    is_exponent = power and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 64
    meant = 1 << value if is_exponent and isinstance(value, int) else value
    if (power and not is_exponent) or not option.is_legal(meant):
        legal = f"N for which 2**N is {option.describe()}" if power else option.describe()
        raise SchemeError(f"option {key} of observer {observer} is {value!r}", f"give {legal} ({option.about})")
    return meant
