"""`OpGraph`: a traced model as named canonical operators, without torch.fx.

Planning and lowering read this; only tracing, `prepare` and the evaluation of constants touch torch.fx.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from qat.graph.operators import Operator, ParamRef, ScalarConst

#: kinds whose node is a tuple of tensors; their getitem nodes carry the operator
TUPLE_KINDS = frozenset({"split"})


@dataclass(frozen=True)
class GraphOp:
    """One operator by names.

    Attributes:
        name: Tensor name of its output.
        node: Name of its torch.fx node.
        kind: Canonical kind.
        inputs: Tensor names, parameters, scalars, or None for an absent optional input.
        attrs: Attributes of the kind.
        macs: Multiply-accumulates for one sample.
        shape: Output sizes; -k is k times the batch size.
        source: `file:line` of the user's code.
        training_only: An identity in evaluation that acts in training (dropout).
    """

    name: str
    node: str
    kind: str
    inputs: tuple[str | ParamRef | ScalarConst | None, ...]
    attrs: Mapping[str, Any]
    macs: int
    shape: tuple[int, ...] | None
    source: str
    training_only: bool

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensor inputs, parameters that are read as tensors included."""
        return tuple(i for i in self.inputs if isinstance(i, str))

    @property
    def weight(self) -> ParamRef | None:
        """The weight of a convolution or linear operator."""
        if self.kind in ("conv", "conv_transpose", "linear") and isinstance(self.inputs[1], ParamRef):
            return self.inputs[1]
        return None


@dataclass(frozen=True)
class OpGraph:
    """A model as named operators.

    Attributes:
        inputs: Names of the model's tensor inputs.
        parameters: Names (state_dict keys) of parameters and buffers that operators read as tensors.
        ops: Operators in execution order, by output name.
        outputs: Names of the tensors that the model returns, flattened.
        shapes: Sizes of every value; -k is k times the batch size.
        nodes: torch.fx node name of every value.
    """

    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    ops: Mapping[str, GraphOp]
    outputs: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    nodes: Mapping[str, str]

    def users(self) -> dict[str, list[GraphOp]]:
        """Return the operators that read each value."""
        found: dict[str, list[GraphOp]] = {}
        for op in self.ops.values():
            for name in dict.fromkeys(op.tensors):
                found.setdefault(name, []).append(op)
        return found

    def constants(self) -> frozenset[str]:
        """Values that depend on parameters only."""
        known = set(self.parameters)
        for op in self.ops.values():
            batch_free = op.shape is not None and all(size >= 0 for size in op.shape)
            if op.kind == "constant" or (
                op.tensors and batch_free and op.kind != "island" and all(t in known for t in op.tensors)
            ):
                known.add(op.name)
        return frozenset(known)


def build_opgraph(graph: fx.Graph, operators: Mapping[fx.Node, Operator]) -> OpGraph:
    """Name the operators of a traced graph.

    Args:
        graph: Traced graph; every tensor node has `meta["name"]` and `meta["shape"]`.
        operators: Canonical operator of each node that computes a tensor.
    """
    # parameters that are only weights or biases of operators are not values
    value_of: dict[fx.Node, str] = {}
    inputs, parameters, ops, shapes = [], [], {}, {}
    for node in graph.nodes:
        shape = node.meta.get("shape")
        if node.op == "placeholder":
            if shape is not None:
                inputs.append(node.meta["name"])
                value_of[node] = node.meta["name"]
        elif node.op == "get_attr":
            value_of[node] = node.meta["name"]
        elif node in operators:
            if operators[node].kind in TUPLE_KINDS:
                source = operators[node].inputs[0]
                if isinstance(source, fx.Node):
                    value_of[node] = value_of[source]
                continue
            value_of[node] = node.meta["name"]
            ops[node.meta["name"]] = _graph_op(node, operators[node], value_of)
        if node in value_of and shape is not None:
            shapes[value_of[node]] = shape
    read = {name for op in ops.values() for name in op.tensors}
    by_name: dict[str, str] = {}
    for node, name in value_of.items():
        by_name.setdefault(name, node.name)
        if node.op == "get_attr" and name in read and name not in parameters:
            parameters.append(name)
    return OpGraph(
        inputs=tuple(inputs),
        parameters=tuple(parameters),
        ops=ops,
        outputs=tuple(_outputs(graph, value_of)),
        shapes=shapes,
        nodes=by_name,
    )


def _graph_op(node: fx.Node, op: Operator, value_of: Mapping[fx.Node, str]) -> GraphOp:
    inputs: list[str | ParamRef | ScalarConst | None] = []
    for item in op.inputs:
        if isinstance(item, fx.Node):
            inputs.append(value_of[item])
        elif isinstance(item, ParamRef) and op.kind not in _WEIGHT_SLOTS:
            inputs.append(item.key)
        else:
            inputs.append(item)
    return GraphOp(
        name=node.meta["name"],
        node=node.name,
        kind=op.kind,
        inputs=tuple(inputs),
        attrs=op.attrs,
        macs=op.macs,
        shape=node.meta.get("shape"),
        source=node.meta.get("source") or "",
        training_only=op.training_only,
    )


#: kinds whose parameter inputs belong to the operator and are not tensors of the graph
_WEIGHT_SLOTS = frozenset({"conv", "conv_transpose", "linear", "batch_norm", "layer_norm", "prelu"})


def _outputs(graph: fx.Graph, value_of: Mapping[fx.Node, str]) -> list[str]:
    names: list[str] = []

    def visit(item: Any) -> Any:
        if isinstance(item, fx.Node) and item in value_of and item.meta.get("shape") is not None:
            names.append(value_of[item])
        return item

    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    fx.node.map_arg(output.args[0], visit)
    return names


def is_size_arithmetic(node: fx.Node) -> bool:
    """Whether a node computes sizes and not a tensor."""
    return node.meta.get("shape") is None and node.target is not operator.getitem
