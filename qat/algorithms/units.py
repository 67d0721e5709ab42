"""`Unit`: a piece of a prepared model's graph that an algorithm looks at as a whole, such as a layer with its clamp."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from qat.graph.fusions import Fusion, find_fusions
from qat.graph.operators import ParamRef
from qat.graph.opgraph import GraphOp
from qat.graph.prepared import PreparedModel
from qat.graph.subgraph import call_node
from qat.quantizers import WeightFakeQuantize

#: how far the unit of a layer reaches: its operator alone, its folded batch norm too, its clamp, the activation
#: function that alone reads the result (with the fake quantizer between), the fake quantizer at the end
Reach = Literal["operator", "norm", "clamp", "activation", "quantizer"]
_REACHES: tuple[Reach, ...] = ("operator", "norm", "clamp", "activation", "quantizer")
#: operators that compute each element for itself
ELEMENTWISE = frozenset({"table", "prelu"})


@dataclass(frozen=True)
class Layer:
    """A call of a convolution or linear operator whose weight is quantized.

    Attributes:
        name: Tensor name of its output.
        op: The operator.
        key: `state_dict` key of the weight in the float model.
        owner: The module that holds the weight.
        attribute: Name of the weight in it.
        quantizer: Fake quantizer of the weight.
        bias: Where the bias is, or None.
        norm: The batch norm that is folded into the weight, or None.
        calls: How many operators use this weight.
    """

    name: str
    op: GraphOp
    key: str
    owner: nn.Module
    attribute: str
    quantizer: WeightFakeQuantize
    bias: ParamRef | None
    norm: nn.Module | None
    calls: int

    @property
    def weight(self) -> nn.Parameter:
        """The float weight that training moves."""
        chain: Any = self.owner.parametrizations[self.attribute]  # type: ignore[index]
        original: nn.Parameter = chain.original
        return original

    def offset(self, root: nn.Module) -> Tensor | None:
        """Return the parameter that is added to each output channel, of the batch norm where there is one, or None."""
        if self.norm is not None:
            return self.norm.bias if isinstance(self.norm.bias, Tensor) else None
        if self.bias is None:
            return None
        found: Tensor = getattr(root.get_submodule(self.bias.module), self.bias.attribute)
        return found

    def gain(self) -> Tensor | None:
        """Return what the batch norm multiplies each output channel with, float64; None without one."""
        norm = self.norm
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
            return None
        root = (norm.running_var.to(torch.float64) + norm.eps).sqrt()
        return (1.0 if norm.weight is None else norm.weight.detach().to(torch.float64)) / root


@dataclass(frozen=True)
class Unit:
    """Nodes of the graph of which only the last is read from outside.

    Attributes:
        name: Tensor name of what the last node computes.
        nodes: In the order of the graph.
        inputs: Nodes outside that they read and that depend on the model's inputs.
        layers: Quantized layers among them.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    layers: tuple[Layer, ...]

    @property
    def output(self) -> fx.Node:
        """The node whose value is read outside."""
        return self.nodes[-1]

    def run(
        self, root: nn.Module, inputs: Iterable[Any], change: Callable[[fx.Node, Any, Any], Any] | None = None
    ) -> Tensor:
        """Compute the unit.

        Args:
            root: The model whose modules and parameters are used.
            inputs: Values of `self.inputs`.
            change: Called with each node, its value, and the value of the first node that it reads; returns the value
                to go on with.
        """
        values = dict(zip(self.inputs, inputs, strict=True))
        for node in self.nodes:
            # the inputs are read again; all other in-place operators have been traced as ordinary ones
            if node.op == "call_module" and getattr(root.get_submodule(str(node.target)), "inplace", False):
                values |= {a: values[a].clone() for a in node.all_input_nodes if a in values}
        return self._run(root, values, change)

    def run_from(
        self, root: nn.Module, first: Tensor, change: Callable[[fx.Node, Any, Any], Any] | None = None
    ) -> Tensor:
        """Compute the rest of the unit from the value of its first node, as `run`."""
        return self._run(root, {self.nodes[0]: first}, change)

    def _run(
        self, root: nn.Module, values: dict[fx.Node, Any], change: Callable[[fx.Node, Any, Any], Any] | None
    ) -> Tensor:
        for node in self.nodes:
            if node in values:
                continue
            value = call_node(root, node, lambda argument: lookup(root, argument, values))
            if change is not None:
                value = change(node, value, values.get(next(iter(node.all_input_nodes), node)))
            values[node] = value
        out: Tensor = values[self.output]
        return out


def lookup(root: nn.Module, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Return the value of a node, computing it where it depends on parameters only."""
    if node in values:
        return values[node]
    return call_node(root, node, lambda argument: lookup(root, argument, values))


def varying_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes that depend on the model's inputs."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def quantized_layers(qmodel: PreparedModel) -> dict[str, Layer]:
    """Return every call of an operator whose weight is quantized, by tensor name, in execution order."""
    fusions = {fusion.ops[0].name: fusion for fusion in find_fusions(qmodel.opgraph).values()}
    calls: dict[str, int] = {}
    for op in qmodel.opgraph.ops.values():
        if op.weight is not None:
            calls[op.weight.key] = calls.get(op.weight.key, 0) + 1
    layers: dict[str, Layer] = {}
    for op in qmodel.opgraph.ops.values():
        ref = op.weight
        if ref is None or qmodel.plan[ref.key].decision != "integer":
            continue
        owner = qmodel.get_submodule(ref.module)
        chain: Any = owner.parametrizations[ref.attribute]  # type: ignore[index]
        quantizer: WeightFakeQuantize = chain[0]
        bias = op.inputs[2] if len(op.inputs) > 2 and isinstance(op.inputs[2], ParamRef) else None
        folds = op.name in fusions and fusions[op.name].batch_norm is not None
        layers[op.name] = Layer(
            op.name, op, ref.key, owner, ref.attribute, quantizer, bias,
            quantizer.batch_norm if folds else None, calls[ref.key],
        )  # fmt: skip
    return layers


def layer_units(qmodel: PreparedModel, reach: Reach = "quantizer") -> tuple[Unit, ...]:
    """Return one unit for each quantized layer, in execution order.

    Args:
        qmodel: The model.
        reach: What follows the operator in its unit. A value that is read elsewhere too ends the unit before that.
    """
    layers = quantized_layers(qmodel)
    varying = varying_nodes(qmodel.graph)
    fusions = {op.name: fusion for fusion in find_fusions(qmodel.opgraph).values() for op in fusion.ops}
    nodes = {node.name: node for node in qmodel.graph.nodes}
    units: list[Unit] = []
    for layer in layers.values():
        node = nodes[qmodel.opgraph.nodes[layer.name]]
        if node in varying:
            chain, name = _chain(qmodel, layer, node, fusions[layer.name], nodes, reach)
            units.append(make_unit(name, chain, (layer,), varying))
    return tuple(units)


def make_unit(name: str, nodes: Iterable[fx.Node], layers: tuple[Layer, ...], varying: frozenset[fx.Node]) -> Unit:
    """Make a unit of nodes in the order of the graph."""
    own = tuple(nodes)
    read = dict.fromkeys(a for node in own for a in node.all_input_nodes if a in varying and a not in own)
    return Unit(name, own, tuple(read), layers)


def _chain(
    qmodel: PreparedModel, layer: Layer, node: fx.Node, fusion: Fusion, nodes: Mapping[str, fx.Node], reach: Reach
) -> tuple[list[fx.Node], str]:
    """Return the nodes of a layer's unit and the tensor that the last one computes."""
    wanted = _REACHES.index(reach)
    chain, name = [node], layer.name
    for least, op in (("norm", fusion.batch_norm), ("clamp", fusion.clamp)):
        if op is not None and wanted >= _REACHES.index(least):
            following = nodes[qmodel.opgraph.nodes[op.name]]
            if list(chain[-1].users) != [following]:
                return chain, name
            chain.append(following)
            name = op.name
    if wanted >= _REACHES.index("activation"):
        quantizer = _quantizer_of(chain[-1])
        reader = _only_reader(quantizer or chain[-1])
        op = next((o for o in qmodel.opgraph.ops.values() if reader is not None and o.node == reader.name), None)
        if reader is not None and op is not None and op.kind in ELEMENTWISE:
            chain += [reader] if quantizer is None else [quantizer, reader]
            name = op.name
    if wanted >= _REACHES.index("quantizer"):
        quantizer = _quantizer_of(chain[-1])
        if quantizer is not None:
            chain.append(quantizer)
            name = str(quantizer.meta["quantizes"])
    return chain, name


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _quantizer_of(node: fx.Node) -> fx.Node | None:
    """Return the fake quantizer that alone reads a node."""
    reader = _only_reader(node)
    return reader if reader is not None and reader.meta.get("quantizes") is not None else None
