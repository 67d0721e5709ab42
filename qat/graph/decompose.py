"""Functions that a target has no table for, as the functions and the multiplication that it has.

Sigmoid and the product of `silu(x) = x * sigmoid(x)` have codes of their own, so the model that is trained has to compute
both: this rewrites the traced graph, before anything is planned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from qat.graph.operators import Operator
from qat.graph.trace import Traced
from qat.targets import Target

#: `function(x)` is x times these functions, the last one of x
GATES: Mapping[str, tuple[tuple[str, Callable[..., Any]], ...]] = {
    "silu": (("sigmoid", torch.sigmoid),),
    "mish": (("tanh", torch.tanh), ("softplus", F.softplus)),
}


def decompose(
    traced: Traced, operators: Mapping[fx.Node, Operator], target: Target, keep: Callable[[str], bool]
) -> bool:
    """Write SiLU and Mish as products, where the target has no table for them and has all that the product needs.

    The product keeps the name of the activation; a factor `f` is named after it, `NAME.f`.

    Args:
        traced: The traced model, which is changed.
        operators: What its nodes compute.
        target: What the device can do.
        keep: Whether the operator of a name is to stay as it is.

    Returns:
        Whether anything was changed; the operators are to be recognized again then.
    """
    missing = {
        name: gates
        for name, gates in GATES.items()
        if not _has(target, "table", name)
        and all(_has(target, "table", gate) for gate, _ in gates)
        and _has(target, "mul")
    }
    names = {node.meta["name"] for node in traced.graph.nodes}
    changed = False
    for node in list(traced.graph.nodes):
        op = operators.get(node)
        if op is None or op.kind != "table" or op.attrs.get("function") not in missing or keep(node.meta["name"]):
            continue
        x = op.inputs[0]
        if isinstance(x, fx.Node):
            _write_product(traced.graph, node, x, missing[op.attrs["function"]], names)
            changed = True
    if changed:
        traced.graph.lint()
    return changed


def _has(target: Target, kind: str, function: str = "") -> bool:
    rule = target.rule(kind, function)
    return rule is not None and bool(rule.dtypes)


def _write_product(
    graph: fx.Graph, node: fx.Node, x: fx.Node, gates: tuple[tuple[str, Callable[..., Any]], ...], names: set[str]
) -> None:
    base, value = node.meta["name"], x
    with graph.inserting_before(node):
        for label, function in reversed(gates):
            value = graph.call_function(function, (value,))
            value.meta = {**node.meta, "name": _free(f"{base}.{label}", names), "label": label}
        product = graph.call_function(torch.mul, (x, value))
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _free(wanted: str, names: set[str]) -> str:
    name, count = wanted, 2
    while name in names:
        name, count = f"{wanted}#{count}", count + 1
    names.add(name)
    return name
