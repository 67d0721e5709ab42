"""The errors that `qat` raises on purpose.

Every message is one line that names the tensor, file or key, says the cause, and says what to do about it. The command
line prints that line and exits with 2 (wrong usage or bad input) or 1 (a check did not hold); everything else that
escapes is a defect of `qat`.
"""

from __future__ import annotations


class QatError(Exception):
    """Base of all deliberate errors.

    Args:
        message: What is wrong and with which tensor, file or key.
        mend: What the user can do about it; appended to the message.
    """

    #: exit status of the command line when this error ends it
    exit_status = 2

    def __init__(self, message: str, mend: str | None = None) -> None:
        self.mend = mend
        super().__init__(message if mend is None else f"{message}; {mend}")


class SchemeError(QatError):
    """A scheme, dtype or granularity that cannot exist."""


class EncodingError(QatError):
    """An encoding, or a table of them, that is malformed, missing or contradictory."""


class TargetError(QatError):
    """An unknown target, a malformed target file, or something that the target forbids."""


class TraceError(QatError):
    """A model that cannot be traced at all."""


class PlanError(QatError):
    """A model with nothing to quantize, or a plan that contradicts the model."""


class StateError(QatError):
    """A step taken in the wrong order, such as `convert` before `calibrate`."""


class DataError(QatError):
    """Calibration or training data that is missing, unreadable, empty, of the wrong shape, or not finite."""


class CheckpointError(QatError):
    """A checkpoint that is truncated, malicious, or of another model."""


class RecipeError(QatError):
    """A recipe with an unknown key, a wrong type or a contradiction."""


class ProcessError(QatError):
    """Processes that cannot work together, or one that ended before the others."""


class OutputError(QatError):
    """An output that cannot be written."""


class ExportError(QatError):
    """A model that cannot be expressed, or not safely, in the export format."""


class PackageError(QatError):
    """A package that is incomplete, tampered with, or not one of ours."""


class CheckFailedError(QatError):
    """A check that ran and did not hold."""

    exit_status = 1


class VerificationError(CheckFailedError):
    """An exported artifact whose execution differs from the simulation by more than the stated bound."""


class ExpectationError(CheckFailedError):
    """A recipe's contract (`expect`) that the run did not meet."""


class TrainError(CheckFailedError):
    """A training run that went wrong, such as a loss that is not finite."""


class QuantizationWarning(UserWarning):
    """Something that is quantized as asked but probably not as meant, such as a tensor that is all zero."""
