"""Spelling operators in the way that a target has them."""

from __future__ import annotations

from dataclasses import replace

from qat.graph.operators import ScalarConst
from qat.graph.opgraph import OpGraph
from qat.targets import Target


def spell_for(graph: OpGraph, target: Target) -> OpGraph:
    """Return the graph with each `rescale` as a multiplication, where the target has that and no `rescale`.

    A `rescale` keeps the codes and reads them with another scale. Hexagon's compiler reads them with the old one.
    """
    if target.rule("rescale") is not None or target.rule("mul") is None:
        return graph
    ops = {
        name: replace(op, kind="mul", inputs=(*op.inputs, ScalarConst(op.attrs["factor"])), attrs={})
        if op.kind == "rescale"
        else op
        for name, op in graph.ops.items()
    }
    return replace(graph, ops=ops)
