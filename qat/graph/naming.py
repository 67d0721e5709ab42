"""Names of tensors: after the user's own modules and arguments, never after the tool's order of work.

A tensor is named after the module whose call produced it, a functional call after the module it stands in plus the
operator, a parameter by its `state_dict` key, an input by its argument. Later call sites get `#2`, `#3`, ... An element
of a tuple is `.0`, `.1`, ... of the tuple's name.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx


def assign_names(graph: fx.Graph) -> None:
    """Set `meta["name"]` of every node, unique over the graph.

    Args:
        graph: Nodes have `meta["scope"]` (path of the module in whose forward they stand) and may have `meta["label"]`
            (name within that module, where the target is none of the user's).
    """
    taken: set[str] = set()
    for node in graph.nodes:
        base = _base_name(node)
        name, call_site = base, 2
        while name in taken:
            name = f"{base}#{call_site}"
            call_site += 1
        taken.add(name)
        node.meta["name"] = name


def operator_label(target: Any) -> str:
    """Name of a function or method, without the underscores of operators and in-place forms."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "") or type(target).__name__
    return str(name).strip("_")


def _base_name(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr", "output"):
        return str(node.target)
    label = node.meta.get("label")
    if node.op == "call_module" and label is None:
        return str(node.target)
    if node.target in (operator.getitem, getattr) and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        if source.meta.get("shape") is None:
            return f"{source.meta['name']}.{node.args[1]}"
    label = label or operator_label(node.target)
    scope = node.meta.get("scope", "")
    return f"{scope}.{label}" if scope else label
