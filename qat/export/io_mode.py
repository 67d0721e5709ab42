"""The four ways to feed an exported model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: whether a border of an artifact is float, or the codes themselves
Border = Literal["float", "codes"]


@dataclass(frozen=True)
class IoMode:
    """Float or codes in, float or codes out.

    Attributes:
        inputs: What an application gives.
        outputs: What it gets.
    """

    inputs: Border = "float"
    outputs: Border = "float"
