"""`Option`: what an observer or a quantizer may be told."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One option of an observer or quantizer: its type, its default and the values that it may have.

    Attributes:
        kind: `float` (an int will do), `int` (a bool never does), `bool` or `str`.
        default: The value when the option is not given; may be None: the observer chooses.
        low: Smallest legal number.
        high: Largest legal number.
        low_open: `low` itself is not legal.
        about: What it does, in a few words.
        choices: The legal words of a `str`.
    """

    kind: type[float] | type[int] | type[bool] | type[str]
    default: float | int | bool | str | None
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    about: str = ""
    choices: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the legal values in words, such as `a number in (50, 100]`."""
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return f"one of {', '.join(self.choices)}"
        noun = "an integer" if self.kind is int else "a number"
        return f"{noun} in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"

    def is_legal(self, value: object) -> bool:
        """Tell whether the option may have this value."""
        if value is None:
            return self.default is None
        if self.kind is str:
            return value in self.choices
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        if not isinstance(value, (int, float) if self.kind is float else int):
            return False
        return (self.low < value if self.low_open else self.low <= value) and value <= self.high


def nearest(word: str, legal: Iterable[str], also: Iterable[str] = ()) -> str:
    """Return how to mend a word that is not legal: the nearest legal one, or all of them.

    Args:
        word: What was given.
        legal: What may be given.
        also: What may be given too, but is named only where it is near.
    """
    names = list(legal)
    if not names:
        return "leave the options out"
    near = difflib.get_close_matches(str(word), [*names, *also], n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names)}"
