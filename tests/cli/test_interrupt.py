"""An interrupt that is swallowed comes back."""

from __future__ import annotations

import signal
import threading

import pytest

from qat.cli.interrupt import noted_interrupts


def test_an_interrupt_is_raised_at_once_and_again_where_it_was_swallowed() -> None:
    before = signal.getsignal(signal.SIGINT)
    with noted_interrupts() as check:
        check()
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            swallowed = True
        assert swallowed
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_have_no_handlers() -> None:
    before, done = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with noted_interrupts() as check:
            check()
            done.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
