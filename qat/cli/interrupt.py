"""Ctrl-C that is never lost: an interrupt that a callback swallowed is raised again at the next line of output."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noted_interrupts() -> Iterator[Callable[[], None]]:
    """Note SIGINT besides raising KeyboardInterrupt for it.

    Python raises it wherever the main thread happens to be. Where that is a callback out of C code that drops
    exceptions (a destructor, a conversion of arguments), it is gone, and a long run would go on.

    Yields:
        A function that raises KeyboardInterrupt if a SIGINT came; to be called now and then.
    """
    came: list[int] = []

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    # only the main thread may have handlers
    if threading.current_thread() is not threading.main_thread():
        yield check
        return

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
