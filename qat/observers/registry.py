"""Observers by name: making them, and checking their names and options."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from qat.errors import SchemeError
from qat.observers.base import Observer
from qat.observers.histogram import HistogramObserver
from qat.observers.minmax import MinMaxObserver
from qat.observers.moving_average import MovingAverageObserver
from qat.observers.percentile import PercentileObserver
from qat.scheme import Granularity, ObserverSpec

#: every observer by the name that a scheme or recipe gives
OBSERVERS: Mapping[str, type[Observer]] = MappingProxyType(
    {
        "minmax": MinMaxObserver,
        "moving_average": MovingAverageObserver,
        "percentile": PercentileObserver,
        "histogram": HistogramObserver,
    }
)


def check_observer(spec: ObserverSpec) -> type[Observer]:
    """Return the class of an observer after checking its name and options.

    Raises:
        SchemeError: There is no such observer or option (the nearest legal one is named), or a value is not
            legal.
    """
    found = OBSERVERS.get(spec.name)
    if found is None:
        raise SchemeError(f"unknown observer {spec.name!r}", _nearest(spec.name, OBSERVERS))
    for key, value in spec.options.items():
        option = found.OPTIONS.get(key)
        if option is None:
            raise SchemeError(f"observer {spec.name} has no option {key!r}", _nearest(key, found.OPTIONS))
        if not option.is_legal(value):
            raise SchemeError(
                f"option {key} of observer {spec.name} is {value!r}",
                f"give {option.describe()} ({option.about})",
            )
    return found


def make_observer(spec: ObserverSpec, granularity: Granularity, channels: int | None, name: str) -> Observer:
    """Make an observer.

    Args:
        spec: Its registered name and its options.
        granularity: Which elements share a range.
        channels: Number of channels, or of groups (`qat.observers.channel_count`); None for per-tensor.
        name: Name of the tensor, for messages.

    Raises:
        SchemeError: The name, an option or the number of channels is not legal.
    """
    return check_observer(spec)(granularity, channels, name, **spec.options)


def _nearest(word: str, legal: Iterable[str]) -> str:
    names = list(legal)
    if not names:
        return "leave the options out"
    near = difflib.get_close_matches(str(word), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names)}"
