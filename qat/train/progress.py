"""Progress bars: shown on a terminal, silent everywhere else and on request."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Progress(Protocol[T_co]):
    """What a loop needs of its progress bar."""

    def __iter__(self) -> Iterator[T_co]: ...

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Show some text behind the bar."""


def progress(
    items: Iterable[T], *, description: str, total: int | None = None, initial: int = 0, quiet: bool = False
) -> Progress[T]:
    """Wrap an iterable in a progress bar on standard error, unless that is not a terminal or `quiet`.

    Args:
        items: What is gone through.
        description: Text before the bar.
        total: How many there are, those that were done before among them.
        initial: How many were done before.
        quiet: No bar.
    """
    hidden = quiet or not sys.stderr.isatty()
    bar: Progress[T] = tqdm(
        items, desc=description, total=total, initial=initial, disable=hidden, leave=False, dynamic_ncols=True
    )
    return bar


def duration(seconds: float) -> str:
    """Return a time as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
