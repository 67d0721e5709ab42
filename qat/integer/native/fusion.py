"""Which operators of a segment become part of the one before: clamps, tables, and additions to what a layer gives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from qat.integer.kernels import table
from qat.integer.native.planfile import Grid
from qat.integer.native.support import grid_of
from qat.integer.operators import qparams
from qat.integer.program import Op, Program

_LAYERS = frozenset({"conv", "conv_transpose", "linear"})
#: what ends in a clamp to the range of its result, so that a clamp behind it is a narrower range
_CLAMPING = frozenset({"add", "sub", "mul", "div", "matmul", "avg_pool", "mean", "layer_norm", "prelu"})


@dataclass(frozen=True)
class Step:
    """One operator of the runner.

    Attributes:
        op: The operator of the program.
        own_clamp: A clamp of its result.
        add: Addition of another tensor to that, of a layer only.
        table: Or a function of that, of a layer only.
        clamp: A clamp of the sum.
        output: Name of the tensor that remains.
    """

    op: Op
    own_clamp: Op | None = None
    add: Op | None = None
    table: Op | None = None
    clamp: Op | None = None

    @property
    def output(self) -> str:
        """Name of the tensor that remains."""
        last = self.clamp or self.table or self.add or self.own_clamp or self.op
        return last.outputs[0]


def steps_of(program: Program, ops: Sequence[Op], keep: Collection[str] = (), fuse: bool = True) -> list[Step]:
    """Fuse the operators of a segment where the result is the same to the bit.

    Args:
        program: The program.
        ops: Operators of one segment, in order.
        keep: Tensors that must remain, as they are read elsewhere.
        fuse: False keeps every operator.

    Returns:
        Steps in an order in which every input is written before it is read.
    """
    if not fuse:
        return [Step(op) for op in ops]
    finder = _Fusions(program, ops, keep)
    steps: dict[str, Step] = {}
    # layers choose first, and from the end: of two that are added, the later one adds
    layers = [op for op in reversed(ops) if op.kind in _LAYERS]
    for op in (*layers, *(op for op in ops if op.kind not in _LAYERS)):
        if op.outputs[0] not in finder.taken:
            step = finder.step(op)
            steps[step.output] = step
    return [steps[op.outputs[0]] for op in ops if op.outputs[0] in steps]


def clamp_bounds(program: Program, op: Op) -> tuple[int, int] | None:
    """Codes between which a `clamp` leaves a tensor as it is, or None where it does more than that."""
    x, y = program.encoding_of(op.inputs[0]), program.encoding_of(op.outputs[0])
    if x is None or y is None or op.kind != "clamp" or not x.same_grid(y) or (x.qmin, x.qmax) != (y.qmin, y.qmax):
        return None
    low, high = op.attrs["low"], op.attrs["high"]
    clip = table.clip(-math.inf if low is None else low, math.inf if high is None else high)
    found = table.lookup_table(clip, qparams(x), qparams(y))
    first, last = int(found[0]), int(found[-1])
    codes = torch.arange(x.qmin, x.qmax + 1, dtype=torch.int32)
    plain = torch.equal(found, codes.clamp(first, last))
    return (first, last) if plain and first <= x.zero_point[0] <= last else None


class _Fusions:
    def __init__(self, program: Program, ops: Sequence[Op], keep: Collection[str]) -> None:
        self.program = program
        reads = Counter(name for op in program.ops for name in op.inputs)
        single = {name for name, count in reads.items() if count == 1} - set(keep) - set(program.outputs)
        #: the only reader of a tensor, in this segment
        self.reader = {name: op for op in ops for name in op.inputs if name in single}
        #: outputs of operators that are part of another
        self.taken: set[str] = set()

    def step(self, op: Op) -> Step:
        if op.kind not in _LAYERS | _CLAMPING:
            return Step(op)
        clamp = self._clamp(op.outputs[0])
        if op.kind in _CLAMPING:
            return Step(op, own_clamp=clamp)
        result = op.outputs[0] if clamp is None else clamp.outputs[0]
        reader = self.reader.get(result)
        if reader is None or reader.outputs[0] in self.taken:
            return Step(op, own_clamp=clamp)
        if reader.kind == "add" and op.kind != "conv_transpose" and self._addable(reader, result):
            self.taken.add(reader.outputs[0])
            return Step(op, own_clamp=clamp, add=reader, clamp=self._clamp(reader.outputs[0]))
        if reader.kind in ("table", "clamp") and self._bytes(reader.inputs[0]) and self._bytes(reader.outputs[0]):
            self.taken.add(reader.outputs[0])
            return Step(op, own_clamp=clamp, table=reader)
        return Step(op, own_clamp=clamp)

    def _clamp(self, name: str) -> Op | None:
        reader = self.reader.get(name)
        if reader is None or reader.outputs[0] in self.taken or clamp_bounds(self.program, reader) is None:
            return None
        self.taken.add(reader.outputs[0])
        return reader

    def _grid(self, name: str) -> Grid | None:
        encoding = self.program.encoding_of(name)
        return None if encoding is None or not encoding.per_tensor else grid_of(encoding)

    def _bytes(self, name: str) -> bool:
        grid = self._grid(name)
        return grid is not None and not grid.wide

    def _addable(self, add: Op, result: str) -> bool:
        other = add.inputs[1] if add.inputs[0] == result else add.inputs[0]
        tensors = self.program.tensors
        if other == result or other not in tensors or tensors[other].shape != tensors[result].shape:
            return False
        return all(self._bytes(name) for name in (result, other, add.outputs[0]))
