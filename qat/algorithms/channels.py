"""Which channels of which tensors may be scaled together without changing what a model computes.

A positive factor of a channel passes through everything that is positively homogeneous: ReLU, leaky ReLU, pooling, zero
padding, interpolation, additions (of both operands), concatenations and movements. It is given where an affine operator
writes the channel (the rows of a weight and the bias, or gamma and beta of a norm) and taken back where weighted
operators read it (the columns of their weights). `channel_groups` finds the sets of channels that such a factor
connects. Channels that anything else reads or writes are *pinned*: their factor is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qat.graph.operators import ParamRef
from qat.graph.opgraph import GraphOp, OpGraph
from qat.graph.prepared import PreparedModel
from qat.graph.subgraph import cut, node_values

_WEIGHTED = frozenset({"conv", "conv_transpose", "linear"})
_MOVING = frozenset({"reshape", "transpose", "slice", "expand", "identity", "chain", "concat", "stack", "roll", "pad"})
#: kinds that keep every channel where it is
_KEEPING = frozenset({"max_pool", "avg_pool", "resize", "rescale"})
_HOMOGENEOUS_TABLES = frozenset({"leaky_relu", "relu"})
_GATES = frozenset({"sigmoid", "hardsigmoid", "softmax"})


@dataclass(frozen=True)
class Channels:
    """The channels of one tensor.

    Attributes:
        axis: Their dimension.
        ids: Number of each channel in the whole model, int64, (C,).
    """

    axis: int
    ids: Tensor


@dataclass(frozen=True)
class Affine:
    """An operator that writes a tensor whose channels may be scaled by scaling its parameters.

    Attributes:
        op: The operator.
        parameters: Its parameters that are divided by the factor: of a norm gamma and beta, else weight and bias.
        ids: Channels of its output, int64, (C,).
    """

    op: GraphOp
    parameters: tuple[ParamRef, ...]
    ids: Tensor


@dataclass(frozen=True)
class Reader:
    """A weighted operator whose weight takes the factors of its input back.

    Attributes:
        op: The operator.
        ids: Channels of its input, int64, (C,).
    """

    op: GraphOp
    ids: Tensor


@dataclass(frozen=True)
class ChannelGroups:
    """All channels of a model and what connects them.

    Attributes:
        tensors: Channels by tensor name; a tensor that is not there has no channels that could be scaled.
        groups: Group of each channel, int64, (ids,); 0 for the pinned ones, others from 1 without gaps.
        count: Number of groups, the pinned one included.
        writers: Operators that write groups.
        readers: Operators that read groups.
    """

    tensors: Mapping[str, Channels]
    groups: Tensor
    count: int
    writers: tuple[Affine, ...]
    readers: tuple[Reader, ...]


def channel_groups(qmodel: PreparedModel) -> ChannelGroups:
    """Find what may be scaled together in a prepared model.

    Args:
        qmodel: The model; its weights are not looked at.
    """
    finder = _Finder(qmodel)
    for op in qmodel.opgraph.ops.values():
        finder.visit(op)
    return finder.result()


def group_indices(op: GraphOp, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return which input and which output channel each element of the first two dimensions of a weight belongs to.

    Args:
        op: A convolution, transposed convolution or linear operator.
        shape: Of its weight.

    Returns:
        Input and output channels, int64, both (shape[0], shape[1]).
    """
    first, second = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None, :]
    groups = int(op.attrs.get("groups", 1))
    group = first // (shape[0] // groups)
    if op.kind == "conv_transpose":
        return (first + 0 * second, group * shape[1] + second)
    return (group * shape[1] + second, first + 0 * second)


class _Finder:
    def __init__(self, qmodel: PreparedModel) -> None:
        self.qmodel = qmodel
        self.graph: OpGraph = qmodel.opgraph
        self.values = node_values(qmodel)
        # the nodes that compute, not those that quantize
        self.nodes = {node.name: node for node in qmodel.graph.nodes}
        self.tensors: dict[str, Channels] = {}
        self.parent: list[int] = [0]
        self.writers: list[Affine] = []
        self.readers: list[Reader] = []
        self.batch = qmodel.plan.batch_size or 1
        uses: dict[str, int] = {}
        for op in self.graph.ops.values():
            for item in op.inputs:
                if isinstance(item, ParamRef):
                    uses[item.key] = uses.get(item.key, 0) + 1
        self.shared = {key for key, count in uses.items() if count > 1} | set(self.graph.parameters)

    # -- union of channels; channel 0 stands for all that are pinned

    def find(self, channel: int) -> int:
        root = channel
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[channel] != root:
            self.parent[channel], channel = root, self.parent[channel]
        return root

    def unite(self, a: Tensor, b: Tensor) -> None:
        for left, right in zip(a.tolist(), b.tolist(), strict=True):
            first, second = sorted((self.find(left), self.find(right)))
            self.parent[second] = first

    def pin(self, *names: str) -> None:
        for name in names:
            if name in self.tensors:
                ids = self.tensors[name].ids
                self.unite(torch.zeros_like(ids), ids)

    def fresh(self, count: int) -> Tensor:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    # -- operators

    def visit(self, op: GraphOp) -> None:
        if op.kind in _WEIGHTED:
            self.weighted(op)
        elif op.kind in ("batch_norm", "layer_norm"):
            self.norm(op)
        elif op.kind in ("add", "sub"):
            self.addition(op)
        elif op.kind == "mul":
            self.product(op)
        elif self.keeps(op):
            source = self.tensors.get(op.tensors[0])
            if source is not None:
                self.tensors[op.name] = source
        elif op.kind in _MOVING:
            self.movement(op)
        elif op.kind == "mean":
            source = self.tensors.get(op.tensors[0])
            axes = [a % len(self.graph.shapes[op.tensors[0]]) for a in op.attrs["axes"]]
            if source is not None and source.axis not in axes:
                self.movement(op)
            else:
                self.pin(*op.tensors)
        else:
            self.pin(*op.tensors)

    def keeps(self, op: GraphOp) -> bool:
        if op.kind == "clamp":
            return op.attrs["low"] == 0.0 and op.attrs["high"] is None
        if op.kind == "table":
            return op.attrs["function"] in _HOMOGENEOUS_TABLES
        if op.kind == "prelu":
            return True
        return op.kind in _KEEPING

    def weighted(self, op: GraphOp) -> None:
        source, weight = op.tensors[0] if op.tensors else None, op.weight
        rank = len(op.shape or ())
        if weight is None or op.shape is None or weight.key in self.shared:
            self.pin(*op.tensors)
            return
        wanted = rank - 1 if op.kind == "linear" else 1
        if source in self.tensors:
            channels = self.tensors[source]
            if channels.axis == wanted:
                self.readers.append(Reader(op, channels.ids))
            else:
                self.pin(source)
        self.pin(*op.tensors[1:])
        bias = op.inputs[2] if len(op.inputs) > 2 else None
        if bias is not None and (not isinstance(bias, ParamRef) or bias.key in self.shared):
            return
        self.write(op, wanted, tuple(p for p in (weight, bias) if isinstance(p, ParamRef)))

    def norm(self, op: GraphOp) -> None:
        self.pin(*op.tensors)
        parameters = op.inputs[1:3]
        if op.shape is None or not all(isinstance(p, ParamRef) and p.key not in self.shared for p in parameters):
            return
        if op.kind == "layer_norm" and op.attrs.get("axes_count", 1) != 1:
            return
        axis = len(op.shape) - 1 if op.kind == "layer_norm" else 1
        self.write(op, axis, tuple(p for p in parameters if isinstance(p, ParamRef)))

    def write(self, op: GraphOp, axis: int, parameters: tuple[ParamRef, ...]) -> None:
        assert op.shape is not None
        ids = self.fresh(op.shape[axis])
        self.tensors[op.name] = Channels(axis, ids)
        self.writers.append(Affine(op, parameters, ids))

    def addition(self, op: GraphOp) -> None:
        sources = [self.tensors.get(name) for name in op.tensors]
        alike = len(op.inputs) == len(op.tensors) and len({self.graph.shapes.get(name) for name in op.tensors}) == 1
        first = sources[0] if sources else None
        if not alike or first is None or any(s is None or s.axis != first.axis for s in sources):
            self.pin(*op.tensors)
            return
        for other in sources[1:]:
            assert other is not None
            self.unite(first.ids, other.ids)
        self.tensors[op.name] = first

    def product(self, op: GraphOp) -> None:
        """A gate, of a known range, scales nothing; what it is multiplied with keeps its factors."""
        gates = [name for name in op.tensors if self.is_gate(name)]
        others = [name for name in op.tensors if name not in gates]
        if len(gates) != 1 or len(others) != 1 or others[0] not in self.tensors:
            self.pin(*op.tensors)
            return
        if self.graph.shapes.get(others[0]) == op.shape:
            self.tensors[op.name] = self.tensors[others[0]]
        else:
            self.pin(*op.tensors)

    def is_gate(self, name: str) -> bool:
        op = self.graph.ops.get(name)
        return op is not None and (op.attrs.get("function") in _GATES or op.kind in _GATES)

    def movement(self, op: GraphOp) -> None:
        """Send the numbers of the channels through the operator and see where they come out."""
        known = [name for name in op.tensors if name in self.tensors]
        if not known or (op.kind == "pad" and op.attrs.get("mode") == "constant" and op.attrs.get("value", 0.0) != 0.0):
            self.pin(*op.tensors)
            return
        found = self.moved(op, known)
        if found is None:
            self.pin(*op.tensors)
            return
        axis, ids = found
        # a channel that is all zero has no number: it takes any factor
        zero = ids == 0
        ids = ids.clone()
        ids[zero] = self.fresh(int(zero.sum()))
        self.tensors[op.name] = Channels(axis, ids)

    def moved(self, op: GraphOp, known: list[str]) -> tuple[int, Tensor] | None:
        function, names = cut(self.qmodel, self.node_of(op), self.values)
        arguments = []
        for name in names:
            shape = tuple(self.batch * -size if size < 0 else size for size in self.graph.shapes[name])
            value = torch.zeros(shape)
            if name in self.tensors:
                channels = self.tensors[name]
                view = [-1 if d == channels.axis else 1 for d in range(len(shape))]
                value = value + channels.ids.to(torch.float32).reshape(view)
            elif name in op.tensors:
                # of channels without numbers, which no factor may reach
                value -= 1.0
            arguments.append(value)
        with torch.no_grad():
            result = function(*arguments)
        if not isinstance(result, Tensor):
            return None
        result = result.round()
        hint = self.tensors[known[0]].axis
        candidates = [d for d in (hint, 1, result.dim() - 1, *range(result.dim())) if d < result.dim()]
        for axis in sorted(dict.fromkeys(candidates), key=lambda d: result.shape[d] == 1):
            rows = result.movedim(axis, 0).flatten(1)
            if bool((rows == rows[:, :1]).all()):
                ids = rows[:, 0].to(torch.int64)
                return (axis, ids) if bool((ids >= 0).all()) else None
        return None

    def node_of(self, op: GraphOp) -> fx.Node:
        found: fx.Node = self.nodes[op.node]
        return found

    # -- the result

    def result(self) -> ChannelGroups:
        self.pin(*self.graph.outputs)
        roots = torch.tensor([self.find(channel) for channel in range(len(self.parent))])
        # a group that no weight reads, or none writes, has nothing to take or give its factors
        for ends in (self.writers, self.readers):
            touched = torch.zeros(len(roots), dtype=torch.bool)
            for end in ends:
                touched[roots[end.ids]] = True
            roots = torch.where(touched[roots], roots, 0)
        _, groups = torch.unique(torch.cat([torch.zeros(1, dtype=roots.dtype), roots]), return_inverse=True)
        groups = groups[1:]
        return ChannelGroups(self.tensors, groups, int(groups.max()) + 1, tuple(self.writers), tuple(self.readers))
