"""`sweep`: one pass over a prepared model and all data, node by node, in float and quantized side by side.

Algorithms that go through the layers in order need, at each, what the float model and the model quantized so far feed
it. Running the model up to every layer costs a pass a layer; here every node is computed once for all batches in either
path, a value is kept until its last reader, and the algorithm is called at the layers on the way.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from qat.algorithms.restore import restored
from qat.algorithms.units import Unit, lookup, varying_nodes
from qat.errors import DataError, QuantizationWarning, StateError
from qat.graph.batches import first_samples, join_samples, model_inputs, sample_count
from qat.graph.prepared import PreparedModel
from qat.graph.subgraph import call_node
from qat.quantizers import FLOAT, QUANTIZE

#: bytes that the activations of all samples may take
DEFAULT_MEMORY = 2 << 30


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


def sweep(
    qmodel: PreparedModel,
    batches: Sequence[tuple[Tensor, ...]],
    units: Sequence[Unit],
    visit: Callable[[Visit], None],
    *,
    float_model: nn.Module | None = None,
    progress: bool | None = None,
    title: str = "sweep",
) -> None:
    """Compute a calibrated model on all batches, in float and fake-quantized, and call `visit` at each unit.

    The model runs in evaluation mode and without gradients (`visit` may enable them). The float path has the parameters
    that the model has at the start, or those of `float_model`. The quantized path goes on from each unit with whatever
    parameters `visit` leaves. Phases and training modes are afterwards what they were; where something fails, so are
    parameters, buffers and ranges.

    Args:
        qmodel: The model.
        batches: From `gather`.
        units: Which pieces to visit, each node in at most one of them (see `layer_units`).
        visit: The algorithm.
        float_model: The model that `qmodel` was made of, where rounding or bias correction has changed `qmodel` since.
        progress: Show a progress bar, by unit; None for only on a terminal.
        title: What the bar says.

    Raises:
        StateError: The model was not calibrated, or a node belongs to two units.
        CheckpointError: `float_model` is another model.
    """
    qmodel.encodings()  # says which tensor has no range
    disable = None if progress is None else not progress
    bar = tqdm(total=len(units), desc=title, unit="unit", leave=False, disable=disable)
    with restored(qmodel), torch.no_grad(), bar:
        reference = _reference(qmodel, float_model)
        qmodel.eval()
        qmodel.set_phase(QUANTIZE)
        walk = _Walk(qmodel, reference, units)

        def visited(found: Visit) -> None:
            bar.set_postfix_str(found.unit.name)
            visit(found)
            bar.update()

        walk.run(batches, visited)


def gather(
    qmodel: PreparedModel,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
    memory: int = DEFAULT_MEMORY,
    batch_size: int = 32,
) -> tuple[tuple[Tensor, ...], ...]:
    """Take the samples that a sweep will keep in memory, and split them into batches of one size.

    Args:
        qmodel: The model.
        batches: As for `calibrate`.
        samples: Take at most as many; None for all.
        memory: Bytes for the activations of a sweep that are alive at the same time, measured on the first sample. What
            an algorithm computes with at one layer comes on top. Where the samples need more, fewer are taken, with a
            warning.
        batch_size: Samples a batch. A model of fixed batch size keeps its own.

    Raises:
        DataError: No batch, one that does not fit, or not even one sample fits the memory.
        StateError: The model was not calibrated, or an option is out of range.
    """
    for what, value in (("samples", samples), ("memory", memory), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise StateError(f"{what} is {value}", "give a positive number")
    qmodel.encodings()
    kept: list[tuple[Tensor, ...]] = []
    seen = given = size = 0
    limit = samples or sys.maxsize
    for batch in batches:
        inputs = model_inputs(qmodel, batch)
        count = sample_count(qmodel, inputs)
        if not count:
            continue
        if not size:
            size = _bytes_of_a_sample(qmodel, first_samples(qmodel, inputs, 1))
            limit = min(limit, memory // size)
        given += count
        inputs = first_samples(qmodel, inputs, limit - seen)
        # a batch of fixed size stays whole
        if 0 < sample_count(qmodel, inputs) <= limit - seen:
            kept.append(tuple(x.detach() for x in inputs))
            seen += sample_count(qmodel, inputs)
        if given > limit or given >= (samples or sys.maxsize):
            break
    if not given:
        raise DataError("no calibration data", "give at least one batch")
    if not seen:
        raise DataError(f"one sample needs {_mib(size)} and the limit is {_mib(memory)}", "raise memory")
    if seen < (given if samples is None else min(samples, given)):
        warnings.warn(
            f"{seen} samples are used and {given} or more were given: a sample needs {_mib(size)} and memory is "
            f"limited to {_mib(memory)}; raise memory to use more",
            QuantizationWarning,
            stacklevel=3,
        )
    return _split(qmodel, kept, batch_size)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _split(qmodel: PreparedModel, kept: list[tuple[Tensor, ...]], batch_size: int) -> tuple[tuple[Tensor, ...], ...]:
    if qmodel.plan.batch_size is not None:
        return tuple(kept)
    joined = join_samples(qmodel, kept)
    total = sample_count(qmodel, joined)
    pieces = [joined]
    if total > batch_size:
        shapes = [qmodel.opgraph.shapes[name] for name in qmodel.opgraph.inputs]
        pieces = [
            tuple(
                x[at * -shape[0] : (at + batch_size) * -shape[0]] if shape and shape[0] < 0 else x
                for x, shape in zip(joined, shapes, strict=True)
            )
            for at in range(0, total, batch_size)
        ]
    return tuple(pieces)


def _reference(qmodel: PreparedModel, float_model: nn.Module | None) -> PreparedModel:
    reference = copy.deepcopy(qmodel).eval()
    if float_model is not None:
        reference.load_float_state_dict(float_model.state_dict())
    reference.set_phase(FLOAT)
    return reference


def _bytes_of_a_sample(qmodel: PreparedModel, inputs: tuple[Tensor, ...]) -> int:
    """Measure the activations of one sample that are alive at the same time, both paths together."""
    with restored(qmodel), torch.no_grad():
        reference = _reference(qmodel, None)
        qmodel.eval()
        qmodel.set_phase(QUANTIZE)
        walk = _Walk(qmodel, reference, ())
        # clones: of a slice the memory of the whole would be counted
        walk.run((tuple(x.clone() for x in inputs),), None)
    count = sample_count(qmodel, inputs)
    return max(1, -(-walk.peak // max(count, 1)))


class _Walk:
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
