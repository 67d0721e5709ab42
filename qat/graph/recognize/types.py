"""The canonical operators as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx

#: kinds that move values and compute nothing, so that they suit every dtype
MOVING = frozenset({"reshape", "transpose", "slice", "expand", "identity", "chain", "split", "concat", "stack"})


class NotCanonical(Exception):  # noqa: N818 - no error: the call stays float, and this says why
    """A call that no canonical kind describes; the message is the cause, in one line."""


@dataclass(frozen=True)
class ParamRef:
    """A parameter or buffer as an operand.

    Attributes:
        key: Its `state_dict` key; the weight of a layer that shares it has the first of its keys.
        module: Path of the module through which this operator reads it, "" for the model itself.
        attribute: Its name in that module.
    """

    key: str
    module: str
    attribute: str


@dataclass(frozen=True)
class ScalarConst:
    """A Python number as an operand."""

    value: float


Operand: TypeAlias = "fx.Node | ParamRef | ScalarConst | None"
Step: TypeAlias = "tuple[str, Mapping[str, Any]]"


@dataclass(frozen=True)
class Operator:
    """What a node of the traced graph computes, independent of how the user wrote it.

    Attributes:
        kind: Canonical kind.
        inputs: Operands in the order of the kind; None for an optional one that is absent.
        attrs: Attributes of the kind; together with the inputs they say everything that inference needs.
        macs: Multiply-accumulates for one sample.
        training_only: An identity in inference that acts in training, such as dropout.
    """

    kind: str
    inputs: tuple[Operand, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    macs: int = 0
    training_only: bool = False


Recognizer: TypeAlias = Callable[..., Operator]
