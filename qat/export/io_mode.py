"""The four ways to feed an exported model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qat.errors import ExportError

#: whether a border of a file is float, or the codes themselves
Border = Literal["float", "codes"]


@dataclass(frozen=True)
class IoMode:
    """Float or codes in, float or codes out.

    Attributes:
        inputs: What an application gives.
        outputs: What it gets.

    Raises:
        ExportError: There is no such border.
    """

    inputs: Border = "float"
    outputs: Border = "float"

    def __post_init__(self) -> None:
        for border in (self.inputs, self.outputs):
            if border not in get_args(Border):
                raise ExportError(f"unknown kind {border!r} of inputs or outputs", "use float or codes")

    @classmethod
    def of(cls, mode: IoMode | Border) -> IoMode:
        """Return a mode; one word stands for both ends."""
        return mode if isinstance(mode, IoMode) else cls(mode, mode)
