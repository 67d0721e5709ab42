"""Functions that a target has no table for, as the functions and the multiplication that it has.

Sigmoid and the product of `silu(x) = x * sigmoid(x)` have codes of their own, so the model that is trained has to
compute both: this rewrites the traced graph, before anything is planned.

Qualcomm's compiler fuses a convolution with `x * sigmoid(x)` behind it, and computes that wrongly in 16 bits (by half
the range, on every generation). It does not see the pattern where the factor is computed on another shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from qat.graph.operators import Operator
from qat.graph.trace import Traced
from qat.scheme import int_type
from qat.schemes import Schemes
from qat.targets import Target

#: `function(x)` is x times these functions, the last one of x
GATES: Mapping[str, tuple[tuple[str, Callable[..., Any]], ...]] = {
    "silu": (("sigmoid", torch.sigmoid),),
    "mish": (("tanh", torch.tanh), ("softplus", F.softplus)),
}


def decompose(traced: Traced, operators: Mapping[fx.Node, Operator], target: Target, schemes: Schemes) -> bool:
    """Write SiLU and Mish as products, where the target has no table for them and has all that the product needs.

    The product keeps the name of the activation; a factor `f` is named after it, `NAME.f`.

    Args:
        traced: The traced model, which is changed.
        operators: What its nodes compute.
        target: What the device can do.
        schemes: What stays float, and so stays as it is; and the types.

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
        op, name = operators.get(node), node.meta["name"]
        if op is None or op.kind != "table" or op.attrs.get("function") not in missing or schemes.is_float(name):
            continue
        x = op.inputs[0]
        flat = int_type(schemes.activation(name).dtype).bits > 8 and len(node.meta["shape"]) > 2
        if isinstance(x, fx.Node) and not (flat and min(node.meta["shape"][1:]) < 0):
            _write_product(traced.graph, node, x, missing[op.attrs["function"]], names, flat=flat)
            changed = True
    if changed:
        traced.graph.lint()
    return changed


def _has(target: Target, kind: str, function: str = "") -> bool:
    rule = target.rule(kind, function)
    return rule is not None and bool(rule.dtypes)


def _write_product(
    graph: fx.Graph,
    node: fx.Node,
    x: fx.Node,
    gates: tuple[tuple[str, Callable[..., Any]], ...],
    names: set[str],
    *,
    flat: bool,
) -> None:
    """Replace `node` by the product of `x` and its gates; `flat`: the gates are computed on one row a sample."""
    base, value = node.meta["name"], x

    def call(label: str, function: Callable[..., Any], *args: Any, like: Mapping[str, Any]) -> fx.Node:
        made = graph.call_function(function, args)
        made.meta = {**like, "name": _free(f"{base}.{label}", names), "label": label}
        return made

    shape = node.meta["shape"]
    with graph.inserting_before(node):
        like = dict(node.meta)
        if flat:
            like["shape"] = (shape[0], math.prod(shape[1:]))
            like["vals"] = tuple(fake.flatten(1) for fake in node.meta["vals"])
            value = call("flatten", torch.flatten, value, 1, like=like)
        for label, function in reversed(gates):
            value = call(label, function, value, like=like)
        if flat:
            value = call("reshape", torch.reshape, value, (-1, *shape[1:]), like=node.meta)
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
