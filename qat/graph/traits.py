"""What of an operator's attributes a target may limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qat.graph.opgraph import GraphOp

_CLAMPS: Mapping[tuple[Any, Any], str] = {(0, None): "relu", (0, 6): "relu6", (-1, 1): "relu_n1_to_1"}


def traits(op: GraphOp, kind: str, attrs: Mapping[str, Any]) -> dict[str, int]:
    """The numbers that `qat.targets.rule.LIMITS` bounds, as far as an operator (or a step of a chain) has them."""
    found: dict[str, int] = {}
    if op.shape is not None:
        found["rank"] = len(op.shape)
    if "dilation" in attrs:
        found["dilation"] = max(attrs["dilation"], default=1)
    if "groups" in attrs:
        found["groups"] = int(attrs["groups"])
    window = attrs.get("stride")
    if window is not None:
        found["spatial"] = len(window)
    elif kind == "resize" and op.shape is not None:
        found["spatial"] = len(op.shape) - 2
    return found


def mode_of(kind: str, attrs: Mapping[str, Any]) -> str:
    """The mode of a `resize`, `pad` or `clamp`, as target files name them; "" for other kinds."""
    if kind == "clamp":
        return _CLAMPS.get((attrs.get("low"), attrs.get("high")), "other")
    return str(attrs.get("mode", "")) if kind in ("resize", "pad") else ""
