"""The fused form of a prepared graph: fewer passes over memory, the same results up to the rounding of float32."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations

from qat.quantizers import FakeQuantize
from qat.quantizers.fused import activation_bounds, add_fake_quantize, has_norm_pass, norm_fake_quantize

_FUNCTIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.relu6: "relu6"}
_LAYERS = frozenset({nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear})
_ADDITIONS = frozenset({operator.add, torch.add, "add"})
_ADDITIONS_IN_PLACE = frozenset({operator.iadd, "add_"})


def fuse(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """Return a copy of a prepared graph in which fused calls replace chains of single calls.

    A chain is a batch norm or an addition, an activation that clamps (or none), and the quantizer of the result, where
    each has one reader. The fused calls get the modules themselves, so the state stays where it was.

    Args:
        graph: Of a prepared model.
        root: The model, for its modules.
    """
    fused = fx.Graph()
    made = fused.graph_copy(graph, {}, return_output_node=True)
    # graph_copy leaves the output to its caller
    assert isinstance(made, tuple)
    fused.output(made[0])
    for node in list(fused.nodes):
        if node.op == "call_module" and isinstance(_module(root, node), FakeQuantize):
            _fuse_into(fused, node, root)
    fused.lint()
    return fused


def _fuse_into(graph: fx.Graph, quantizer: fx.Node, root: nn.Module) -> None:
    """Replace the chain that ends in a quantizer's call, if it is one."""
    # what a tied or constant tensor's quantizer is told besides is not for the fused calls
    if len(quantizer.args) != 1 or quantizer.kwargs:
        return
    last = quantizer.args[0]
    if not isinstance(last, fx.Node) or len(last.users) != 1:
        return
    activation, head = _activation(last, root)
    if head is None or len(head.users) != 1:
        activation, head = None, last
    operands = _operands(head, root)
    if operands is None:
        return
    function, inputs, makers = operands
    with graph.inserting_before(quantizer):
        arguments: list[Any] = [i if isinstance(i, fx.Node) else graph.get_attr(i) for i in inputs]
        passed = activation if activation is None or activation in _FUNCTIONS.values() else graph.get_attr(activation)
        arguments += [passed, graph.get_attr(str(quantizer.target))]
        call = graph.call_function(
            function, tuple(arguments), {"makers": tuple(graph.get_attr(path) for path in makers)}
        )
    call.meta = dict(quantizer.meta)
    quantizer.replace_all_uses_with(call)
    graph.erase_node(quantizer)
    for node in dict.fromkeys((last, head)):
        graph.erase_node(node)


def _module(root: nn.Module, node: fx.Node) -> nn.Module:
    return root.get_submodule(str(node.target))


def _activation(node: fx.Node, root: nn.Module) -> tuple[str | None, fx.Node | None]:
    """Return a function's name or a module's path, and what it reads; (None, None) for no activation."""
    if len(node.args) != 1 or not isinstance(node.args[0], fx.Node) or not set(node.kwargs) <= {"inplace"}:
        return None, None
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return _FUNCTIONS[node.target], node.args[0]
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return "relu", node.args[0]
    if node.op == "call_module" and not has_norm_pass(module := _module(root, node)):
        return (str(node.target), node.args[0]) if activation_bounds(module) is not None else (None, None)
    return None, None


def _operands(node: fx.Node, root: nn.Module) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[str, ...]] | None:
    """Return the fused function of a chain's head, what it reads, and who made the first; modules by paths."""
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs and has_norm_pass(_module(root, node)):
        return norm_fake_quantize, (node.args[0], str(node.target)), _makers(node.args[0], root)
    if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
        return None
    x, other = node.args
    if not isinstance(x, fx.Node) or not isinstance(other, fx.Node):
        return None
    # who reads the first operand after it was added to in place reads the sum
    if node.target not in _ADDITIONS and not (node.target in _ADDITIONS_IN_PLACE and len(x.users) == 1):
        return None
    # a sum may overwrite either operand
    first, second = (x, other) if _makers(x, root) or not _makers(other, root) else (other, x)
    return add_fake_quantize, (first, second), _makers(first, root)


def _makers(node: Any, root: nn.Module) -> tuple[str, ...]:
    """Return the modules that make a tensor for one reader, in memory of its own; none for any other tensor."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return ()
    if node.op == "call_function" and node.target is norm_fake_quantize:
        # what it was made from may be this memory, and nobody else reads that
        return tuple(str(n.target) for n in node.args[1:] if isinstance(n, fx.Node))
    if node.op == "call_module" and type_before_parametrizations(_module(root, node)) in _LAYERS:
        return (str(node.target),)
    return ()
