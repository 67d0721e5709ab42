"""What of an operator's attributes a target may limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qat.graph.opgraph import GraphOp


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
    """The mode of a `resize` (nearest or linear, whatever the number of dimensions) or `pad`; "" for other kinds."""
    return str(attrs.get("mode", "")) if kind in ("resize", "pad") else ""
