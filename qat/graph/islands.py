"""What a plan says of float islands: where they are in the user's code, and what they cost."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from qat.graph.hints import map_tensors, substitute
from qat.graph.opgraph import GraphOp, OpGraph
from qat.graph.patching import restored
from qat.graph.recognize.base import get_attribute
from qat.graph.trace import Traced

#: what the reason of an island ends in where running it on zeros failed
UNKNOWN_MACS = "MACs unknown"


def locate_islands(graph: OpGraph, traced: Traced) -> OpGraph:
    """Give each island the line that could not be traced, its multiply-accumulates, and whether it masks with inf.

    The multiply-accumulates are half the floating-point operations that torch counts while the island runs once, in
    evaluation, on zeros of the traced shapes (`torch.utils.flop_counter`: convolutions, matrix products and attention).
    Where the island cannot be run so, its cause says `MACs unknown`.

    Args:
        graph: The operators of `traced`.
        traced: The traced model; its modules are run.
    """
    nodes = {node.name: node for node in traced.graph.nodes}
    sources = {island.path: island.source for island in traced.islands}
    ops: dict[str, GraphOp] = {}
    counted: set[fx.Node] = set()
    for name, op in graph.ops.items():
        if op.kind != "island":
            ops[name] = op
            continue
        call = _call(nodes[op.node])
        source = sources.get(str(call.target), "") if call.op == "call_module" else ""
        # several results of one call: its work is the first one's
        macs = 0 if call in counted else _macs(call, traced)
        counted.add(call)
        cause = str(op.attrs.get("cause", "no integer form"))
        ops[name] = replace(
            op,
            source=source or op.source,
            macs=macs or 0,
            attrs={
                **op.attrs,
                "cause": f"{cause}; {UNKNOWN_MACS}" if macs is None else cause,
                "infinite": _masks(call, traced),
            },
        )
    return replace(graph, ops=ops)


def _call(node: fx.Node) -> fx.Node:
    """The call whose result `node` is, or is a part of."""
    while node.target in (operator.getitem, getattr) and isinstance(node.args[0], fx.Node):
        if node.args[0].meta.get("shape") is not None:
            break
        node = node.args[0]
    return node


def _masks(node: fx.Node, traced: Traced) -> bool:
    """Whether an infinite number or a constant with infinities is an operand, as in attention masks."""
    found = []

    def visit(value: Any) -> Any:
        if isinstance(value, float):
            found.append(math.isinf(value))
        if isinstance(value, fx.Node) and value.op == "get_attr":
            tensor = get_attribute(traced.root, str(value.target))
            found.append(tensor.is_floating_point() and bool(torch.isinf(tensor).any()))
        return value

    fx.node.map_aggregate((node.args, node.kwargs), visit)
    return any(found)


def _macs(node: fx.Node, traced: Traced) -> int | None:
    """Multiply-accumulates of one call for one sample; None where it cannot be run."""

    def value(argument: fx.Node) -> Any:
        if argument.op == "get_attr":
            return get_attribute(traced.root, str(argument.target))
        return map_tensors(argument.meta["vals"][0], _zeros)

    args, kwargs = substitute((node.args, node.kwargs), value)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), counter:
            if node.op == "call_module":
                module = traced.root.get_submodule(str(node.target))
                with restored(module):
                    module.eval()(*args, **kwargs)
            elif node.op == "call_method":
                getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # noqa: BLE001 - whatever a user's forward raises on zeros
        return None
    return counter.get_total_flops() // 2 // traced.batches[0]


def _zeros(fake: Tensor) -> Tensor:
    return torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)
