"""Deliberate errors: one line with cause and mend, and the exit status of the command line."""

from __future__ import annotations

import inspect
import pickle

import pytest

from qat import errors
from qat.errors import CheckFailedError, QatError, QuantizationWarning

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, QatError)]


def test_the_message_ends_with_the_mend() -> None:
    error = QatError("'conv.weight' holds nan", "check the checkpoint")
    assert str(error) == "'conv.weight' holds nan; check the checkpoint"
    assert error.mend == "check the checkpoint"
    assert str(QatError("no mend")) == "no mend"
    assert QatError("no mend").mend is None


@pytest.mark.parametrize("kind", KINDS)
def test_exit_status(kind: type[QatError]) -> None:
    assert kind("message").exit_status == (1 if issubclass(kind, CheckFailedError) else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_pass_between_processes(kind: type[QatError]) -> None:
    error = kind("message", "mend")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.mend == "mend"


def test_the_warning_can_be_filtered_by_itself() -> None:
    assert issubclass(QuantizationWarning, UserWarning)
    assert not issubclass(QuantizationWarning, QatError)
