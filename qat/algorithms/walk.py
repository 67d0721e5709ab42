"""`Walk`: the nodes of a prepared model one after the other, in float and quantized, on all batches at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.algorithms.units import Unit, lookup, varying_nodes
from qat.errors import StateError
from qat.graph.prepared import PreparedModel
from qat.graph.subgraph import call_node
from qat.quantizers import FLOAT


@dataclass(frozen=True)
class Visit:
    """A unit with its data; lists have one entry for each batch.

    Attributes:
        unit: The unit.
        root: The model that is quantized; the algorithm may change the parameters of the unit's layers.
        reference: The float model.
        float_inputs: Values of `unit.inputs` in the float path.
        quantized_inputs: The same in the quantized path, where the layers before have been changed already.
        targets: Output of the unit in the float path.
    """

    unit: Unit
    root: PreparedModel
    reference: PreparedModel
    float_inputs: tuple[tuple[Any, ...], ...]
    quantized_inputs: tuple[tuple[Any, ...], ...]
    targets: tuple[Tensor, ...]

    def outputs(self) -> Iterator[Tensor]:
        """Yield the unit's output in the quantized path, with the parameters as they are now, batch by batch."""
        for inputs in self.quantized_inputs:
            with torch.no_grad():
                yield self.unit.run(self.root, inputs)

    def error(self) -> float:
        """Return the mean squared error of the unit's output in the quantized path."""
        total, count = 0.0, 0
        for have, want in zip(self.outputs(), self.targets, strict=True):
            total += float((have.to(torch.float64) - want.to(torch.float64)).square().sum())
            count += want.numel()
        return total / max(count, 1)


def float_reference(qmodel: PreparedModel, float_model: nn.Module | None) -> PreparedModel:
    """Return a copy of a model in float and evaluation mode, with the parameters of `float_model` where it is given.

    Raises:
        CheckpointError: `float_model` is another model.
    """
    reference = copy.deepcopy(qmodel).eval()
    if float_model is not None:
        reference.load_float_state_dict(float_model.state_dict())
    reference.set_phase(FLOAT)
    return reference


class Walk:
    """The two paths through a graph; values are lists with one entry a batch."""

    def __init__(self, qmodel: PreparedModel, reference: PreparedModel, units: Sequence[Unit]) -> None:
        self.qmodel, self.reference = qmodel, reference
        self.varying = varying_nodes(qmodel.graph)
        self.unit_at: dict[fx.Node, Unit] = {}
        self.inner: set[fx.Node] = set()
        for unit in units:
            if self.inner.intersection(unit.nodes):
                raise StateError(f"the unit {unit.name!r} overlaps another one", "give each node to one unit")
            self.inner.update(unit.nodes)
            self.unit_at[unit.output] = unit
        self.last_read = self._last_reads()
        self.values: dict[bool, dict[fx.Node, list[Any]]] = {False: {}, True: {}}
        #: largest number of bytes that were alive at the same time
        self.peak = 0

    def _reads(self, node: fx.Node) -> Iterable[fx.Node]:
        unit = self.unit_at.get(node)
        return unit.inputs if unit is not None else node.all_input_nodes

    def _skipped(self, node: fx.Node) -> bool:
        """Whether a node has no step of its own: it is constant, or inside of a unit."""
        return node not in self.varying or (node in self.inner and node not in self.unit_at) or node.op == "output"

    def _last_reads(self) -> dict[fx.Node, fx.Node]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.qmodel.graph.nodes:
            if not self._skipped(node):
                last[node] = node
                last.update((argument, node) for argument in self._reads(node) if argument in self.varying)
        return last

    def run(self, batches: Sequence[tuple[Tensor, ...]], visit: Callable[[Visit], None] | None) -> None:
        """Go through the graph once."""
        read_last_at: dict[fx.Node, list[fx.Node]] = {}
        for argument, reader in self.last_read.items():
            read_last_at.setdefault(reader, []).append(argument)
        places = iter(range(len(self.qmodel.opgraph.inputs)))
        for node in self.qmodel.graph.nodes:
            if self._skipped(node):
                continue
            if node.op == "placeholder":
                self._place(node, batches, next(places) if node.meta.get("shape") is not None else None)
            elif node in self.unit_at:
                self._visit(self.unit_at[node], len(batches), visit)
            else:
                for quantized in (False, True):
                    self.values[quantized][node] = self._compute(node, quantized, len(batches))
            if visit is None:
                self.peak = max(self.peak, self._alive())
            for argument in read_last_at.get(node, []):
                for values in self.values.values():
                    values.pop(argument, None)

    def _place(self, node: fx.Node, batches: Sequence[tuple[Tensor, ...]], slot: int | None) -> None:
        if slot is None:
            default = node.args[0] if node.args else None
            given: list[Any] = [default] * len(batches)
        else:
            given = [inputs[slot] for inputs in batches]
        # an operator in place, on a model's input, must not be seen by the other path
        shared = slot is None or all(user.meta.get("quantizes") is not None for user in node.users)
        self.values[False][node] = given if shared else [x.clone() for x in given]
        self.values[True][node] = given if shared else [x.clone() for x in given]

    def _compute(self, node: fx.Node, quantized: bool, count: int) -> list[Any]:
        root = self.qmodel if quantized else self.reference
        values, fixed = self.values[quantized], dict[fx.Node, Any]()
        for argument in node.all_input_nodes:
            if argument not in self.varying:
                fixed[argument] = lookup(root, argument, {})

        def compute(i: int) -> Any:
            return call_node(root, node, lambda a: fixed[a] if a in fixed else values[a][i])

        return [compute(i) for i in range(count)]

    def _visit(self, unit: Unit, count: int, visit: Callable[[Visit], None] | None) -> None:
        pairs = [
            tuple(tuple(values[a][i] for a in unit.inputs) for i in range(count)) for values in self.values.values()
        ]
        targets = [unit.run(self.reference, inputs) for inputs in pairs[0]]
        found = Visit(unit, self.qmodel, self.reference, pairs[0], pairs[1], tuple(targets))
        if visit is not None:
            visit(found)
        self.values[False][unit.output] = targets
        self.values[True][unit.output] = list(found.outputs())

    def _alive(self) -> int:
        sizes: dict[int, int] = {}
        for values in self.values.values():
            for value in (v for entries in values.values() for v in entries):
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, Tensor):
                        storage = tensor.untyped_storage()
                        sizes[storage.data_ptr()] = storage.nbytes()
        return sum(sizes.values())
