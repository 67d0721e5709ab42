"""Observers that the place of a tensor in the network asks for, where nobody chose another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qat.graph.opgraph import GraphOp, OpGraph
from qat.graph.plan import PlanEntry
from qat.scheme import ObserverSpec

#: operators through which the largest value of the input decides the largest value of the output
_RANKING = frozenset(
    {
        "softmax", "avg_pool", "mean", "max_pool", "resize", "clamp", "concat", "stack", "pad",
        "reshape", "transpose", "slice", "expand", "identity", "rescale", "chain",
    }
)  # fmt: skip
#: with fewer bits the steps of an unclipped range are too wide
_FEW_BITS = 8


def place_ranges(graph: OpGraph, entries: Mapping[str, PlanEntry], default: ObserverSpec) -> dict[str, PlanEntry]:
    """Refine the observers of a plan whose observers are the target's default, if that is the histogram observer.

    Clipping lowers the sum of squared errors over all elements, and pays with the largest ones:

    * The *answers*, at 8 bits and more, have `minmax`: what the model returns, and what it is pooled, moved or
      normalized from. There the largest value is the very one that is asked for: two clipped class scores are a tie.
    * What only a leaky ReLU reads is clipped for the error after it (`negative_weight`).

    A tie group is treated as a whole.

    Args:
        graph: The operator graph.
        entries: Decisions by tensor name, in execution order, tied already.
        default: The target's default observer of activations; entries with another one are left alone.
    """
    if default.name != "histogram":
        return dict(entries)
    answers = {e.quantizer for name in _answers(graph) if (e := entries.get(name)) is not None}
    groups: dict[str, list[str]] = {}
    for e in entries.values():
        if e.quantizer and e.role != "weight":
            groups.setdefault(e.quantizer, []).append(e.name)
    users = graph.users()
    placed = dict(entries)
    for head, names in groups.items():
        scheme = entries[head].scheme
        if scheme is None or scheme.observer != default or entries[head].fixed is not None:
            continue
        if head in answers and scheme.int_type.bits >= _FEW_BITS:
            observer = ObserverSpec("minmax")
        else:
            # what is tied is read from several places: the least that any of them may neglect
            weight = max(_negative_weight(graph, users.get(name, []), name) for name in names)
            if weight == 1.0:
                continue
            observer = ObserverSpec("histogram", {**default.options, "negative_weight": weight})
        for name in names:
            placed[name] = replace(placed[name], scheme=scheme.with_(observer=observer))
    for name, e in placed.items():
        if e.decision == "inherits" and e.source_tensor is not None:
            placed[name] = replace(e, scheme=placed[e.source_tensor].scheme)
    return placed


def _answers(graph: OpGraph) -> set[str]:
    """What the model returns, and the tensors from which that is ranked."""
    found: set[str] = set()
    waiting = list(graph.outputs)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        op = graph.ops.get(name)
        if op is not None and op.kind in _RANKING:
            waiting += op.tensors
    return found


def _negative_weight(graph: OpGraph, users: list[GraphOp], name: str) -> float:
    """The square of the slope if only leaky ReLUs of one slope read the tensor, else 1."""
    slopes = {
        float(op.attrs["params"]["negative_slope"])
        for op in users
        if op.kind == "table" and op.attrs["function"] == "leaky_relu"
    }
    other = any(op.kind != "table" or op.attrs["function"] != "leaky_relu" for op in users)
    if other or len(slopes) != 1 or name in graph.outputs:
        return 1.0
    return min(1.0, slopes.pop() ** 2)
