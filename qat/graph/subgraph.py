"""Cutting pieces of float computation out of a prepared model's torch.fx graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.graph.prepared import PreparedModel


def node_values(prepared: PreparedModel) -> dict[fx.Node, str]:
    """Return the tensor name of each node that computes a named value; a quantizer call has the name it quantizes."""
    by_node_name = {node: name for name, node in prepared.opgraph.nodes.items()}
    values: dict[fx.Node, str] = {}
    for node in prepared.graph.nodes:
        quantized = node.meta.get("quantizes")
        if quantized is not None:
            values[node] = quantized
        elif node.name in by_node_name:
            values[node] = by_node_name[node.name]
    return values


def cut(
    prepared: PreparedModel, node: fx.Node, values: Mapping[fx.Node, str]
) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """Make a float function of one node.

    Args:
        prepared: The model.
        node: The node to compute.
        values: Tensor names by node (see `node_values`).

    Returns:
        The function, a module with its own copy of the weights, and the names of its tensor arguments. Arithmetic on
        sizes that the node needs is computed inside, from these tensors.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    names: list[str] = []

    def copy(source: fx.Node) -> fx.Node:
        if source not in copied:
            if source in values and source is not node and source.op != "get_attr":
                name = values[source]
                # the same value may be read both before and after its quantizer
                placeholder = next(
                    (c for s, c in copied.items() if values.get(s) == name and c.op == "placeholder"), None
                )
                if placeholder is None:
                    placeholder = graph.placeholder(f"x{len(names)}")
                    names.append(name)
                copied[source] = placeholder
            else:
                copied[source] = graph.node_copy(source, copy)
                copied[source].meta = {}
        return copied[source]

    # placeholders come first in a graph: copy the arguments' tensors before what computes on them
    for source in _tensor_leaves(node, values):
        copy(source)
    graph.output(copy(node))
    # its modules are the user's, which may train on
    module = deepcopy(fx.GraphModule(prepared, graph))
    module.eval()
    return module.requires_grad_(False), tuple(names)


def _tensor_leaves(node: fx.Node, values: Mapping[fx.Node, str]) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}

    def visit(source: fx.Node) -> None:
        for argument in source.all_input_nodes:
            if argument in values and argument.op != "get_attr":
                found.setdefault(argument)
            elif argument.op != "get_attr":
                visit(argument)

    visit(node)
    return list(found)


def call_node(root: nn.Module, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """Compute one node of a graph: an attribute, or a call.

    Args:
        root: The module whose attributes and submodules the graph names.
        node: The node.
        value_of: Gives the values of the nodes that it reads.
    """
    if node.op == "get_attr":
        value: Any = root
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    args = fx.node.map_arg(node.args, value_of)
    kwargs = fx.node.map_arg(node.kwargs, value_of)
    if node.op == "call_module":
        return root.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def constant_value(prepared: PreparedModel, name: str) -> Tensor:
    """Compute a tensor that depends on parameters only, float32.

    Args:
        prepared: The model.
        name: Its tensor name.
    """
    nodes = {node.name: node for node in prepared.graph.nodes}
    results: dict[fx.Node, Any] = {}

    def compute(node: fx.Node) -> Any:
        if node not in results:
            quantizes = node.meta.get("quantizes") is not None
            results[node] = compute(node.args[0]) if quantizes else call_node(prepared, node, compute)  # type: ignore[arg-type]
        return results[node]

    with torch.no_grad():
        value = compute(nodes[prepared.opgraph.nodes[name]])
    return value.detach()  # type: ignore[no-any-return]
