"""Canonical operators of a traced graph: what is computed, independent of how the user wrote it.

The kinds and their attributes are listed in `docs/architecture.md`. A call that has none is an `island`: it
is computed in float, and `attrs["cause"]` says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from qat.graph.recognize import (
    activation,
    convolution,
    elementwise,
    indexing,
    linear,
    normalization,
    pooling,
    resize,
    shape,
)
from qat.graph.recognize.base import Site, describe, first_value, get_attribute, holds_tensors
from qat.graph.recognize.types import (
    MOVING,
    NotCanonical,
    Operand,
    Operator,
    ParamRef,
    Recognizer,
    ScalarConst,
)

if TYPE_CHECKING:
    from qat.graph.trace import Traced

__all__ = ["Operand", "Operator", "ParamRef", "ScalarConst", "recognize"]

_MODULES: Mapping[type[nn.Module], Recognizer] = {
    **convolution.MODULES,
    **linear.MODULES,
    **normalization.MODULES,
    **activation.MODULES,
    **pooling.MODULES,
    **resize.MODULES,
    **shape.MODULES,
}
_FUNCTIONS: Mapping[Callable[..., Any], Recognizer] = {
    **convolution.FUNCTIONS,
    **linear.FUNCTIONS,
    **normalization.FUNCTIONS,
    **activation.FUNCTIONS,
    **elementwise.FUNCTIONS,
    **pooling.FUNCTIONS,
    **resize.FUNCTIONS,
    **shape.FUNCTIONS,
    **indexing.FUNCTIONS,
}
_METHODS: Mapping[str, Recognizer] = {
    **linear.METHODS,
    **activation.METHODS,
    **elementwise.METHODS,
    **pooling.METHODS,
    **shape.METHODS,
    **indexing.METHODS,
}
#: torch accepts numpy's names for some arguments; `input` is a builtin
_ARGUMENT_NAMES: Mapping[str, str] = {"input": "x", "self": "x", "axis": "dim", "keepdims": "keepdim"}
_COMPUTED = frozenset({"call_module", "call_function", "call_method"})
_ARITHMETIC = frozenset({"add", "sub", "mul", "div"})


def recognize(traced: Traced) -> dict[fx.Node, Operator]:
    """Map every call that gives a tensor (and every split) to its canonical operator.

    Arithmetic on sizes has no operator, and neither has an island's tuple: the items that are taken from it are the
    islands. An item that is taken from a `split` is a `slice` of the tensor that was split, so the `split` itself need
    not be executed. A call without a kind that reads parameters alone is a `constant`.

    Args:
        traced: The traced model; its calls write nothing in place.
    """
    root = traced.root
    keys = {id(value): key for key, value in root.named_buffers()}
    keys |= {id(value): key for key, value in root.named_parameters()}
    causes = {island.path: island.cause for island in traced.islands}
    static_batch = 1 if traced.static_batch is None else traced.batches[0]
    found: dict[fx.Node, Operator] = {}
    constants: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op not in _COMPUTED or not holds_tensors(node):
            continue
        op = _recognize_node(Site(node, root, keys, found, static_batch), causes)
        if isinstance(first_value(node), Tensor) and _is_constant(node, op, constants):
            constants.add(node)
            if op.kind == "island":
                op = Operator("constant", op.inputs)
        found[node] = op
    return {node: op for node, op in found.items() if op.kind == "split" or isinstance(first_value(node), Tensor)}


def _recognize_node(site: Site, causes: Mapping[str, str]) -> Operator:
    node = site.node
    if node.op == "call_module" and str(node.target) in causes:
        return _island(site, causes[str(node.target)])
    try:
        recognizer, leading = _lookup(site)
        arguments = _bind(recognizer, (site, *leading), node)
        op = recognizer(*arguments.args, **arguments.kwargs)
        _check_float(site, op)
    except NotCanonical as cause:
        return _island(site, str(cause))
    return op


def _lookup(site: Site) -> tuple[Recognizer, tuple[nn.Module, ...]]:
    """The recognizer of a call, and the module that it takes first."""
    node = site.node
    if node.op == "call_module":
        module = get_attribute(site.root, str(node.target))
        return _module_recognizer(module), (module,)
    if node.op == "call_method":
        recognizer = _METHODS.get(str(node.target))
    else:
        assert callable(node.target)
        recognizer = _FUNCTIONS.get(node.target)
    if recognizer is None:
        raise NotCanonical(f"no integer kind for {describe(node)}")
    return recognizer, ()


def _module_recognizer(module: nn.Module) -> Recognizer:
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks:
        raise NotCanonical(f"its {kind.__name__} has forward hooks")
    if kind.__name__ in shape.MODULES_BY_NAME:
        return shape.MODULES_BY_NAME[kind.__name__]
    forward = inspect.getattr_static(kind, "forward")
    for base in kind.__mro__:
        # a subclass is its base as long as it computes the same
        if base in _MODULES and inspect.getattr_static(base, "forward") is forward:
            return _MODULES[base]
    package = "nn" if getattr(nn, kind.__name__, None) is kind else kind.__module__
    raise NotCanonical(f"no integer kind for {package}.{kind.__qualname__}")


def _bind(recognizer: Recognizer, leading: tuple[Any, ...], node: fx.Node) -> inspect.BoundArguments:
    kwargs = {_ARGUMENT_NAMES.get(name, name): value for name, value in node.kwargs.items()}
    try:
        return inspect.signature(recognizer).bind(*leading, *node.args, **kwargs)
    except TypeError as error:
        raise NotCanonical(f"unusual arguments of {describe(node)} ({error})") from None


def _island(site: Site, cause: str) -> Operator:
    inputs = tuple(site.tensor(leaf) for leaf in _tensor_leaves(site.node))
    return Operator("island", inputs, {"cause": cause})


def _tensor_leaves(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that a node reads, through sizes and tuples too, each once."""
    seen: set[fx.Node] = set()
    waiting = list(reversed(node.all_input_nodes))
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if source.op == "get_attr" or isinstance(first_value(source), Tensor):
            yield source
        else:
            waiting.extend(reversed(source.all_input_nodes))


# --- what makes a call something other than it seems


def _check_float(site: Site, op: Operator) -> None:
    """Refuse arithmetic on integers and booleans, and with infinities, which have no codes."""
    if op.kind in MOVING:
        return
    operands = [site.value_of(i) if isinstance(i, ParamRef) else i for i in op.inputs]
    for operand in (*operands, site.node):
        value = first_value(operand) if isinstance(operand, fx.Node) else operand
        if isinstance(value, Tensor) and not value.is_floating_point():
            raise NotCanonical(f"it computes with {str(value.dtype).removeprefix('torch.')} values")
        is_constant = op.kind in _ARITHMETIC and not isinstance(operand, fx.Node)
        if is_constant and isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise NotCanonical("its constant operand holds inf or nan; mask with a large number such as -100")


def _is_constant(node: fx.Node, op: Operator, constants: set[fx.Node]) -> bool:
    """Whether the operator's result is the same for every input of the model and every run."""
    tensors = [i for i in op.inputs if isinstance(i, fx.Node | ParamRef)]
    of_parameters = bool(tensors) and all(isinstance(i, ParamRef) or i in constants for i in tensors)
    return of_parameters and min(node.meta["shape"], default=0) >= 0 and not _is_random(node)


def _is_random(node: fx.Node) -> bool:
    """Whether the ATen operator that bears the name of the called function or method draws random numbers."""
    if node.op == "call_module":
        return False
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    overloads = packet.overloads() if packet is not None else ()
    return any(torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags for overload in overloads)
