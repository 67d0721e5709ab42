"""The runs of operators that the native runner takes over, and what stays in PyTorch between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qat.integer.native.support import why_not
from qat.integer.program import Op, Program


@dataclass(frozen=True)
class Segment:
    """Operators that run one after the other in the same place.

    Attributes:
        native: They run in the native runner, else in PyTorch.
        ops: In order.
        inputs: Tensors that they read and others wrote, in the order in which they are read.
        outputs: Tensors that they write and others read.
    """

    native: bool
    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def reasons(program: Program) -> dict[str, str]:
    """Why an operator runs in PyTorch, by its name, for those that do."""
    found = {op.outputs[0]: why_not(program, op) for op in program.ops}
    return {name: reason for name, reason in found.items() if reason}


def split(
    program: Program, in_pytorch: Collection[str] | Mapping[str, str], keep: Collection[str] = ()
) -> list[Segment]:
    """Split a program into as few segments as taking turns gives, in an order in which they can run.

    Args:
        program: The program.
        in_pytorch: First outputs of the operators that stay in PyTorch.
        keep: Further tensors that segments have to give.
    """
    runs = _runs(program, in_pytorch)
    made = [{name for op in run for name in op.outputs} for run in runs]
    segments = []
    for number, run in enumerate(runs):
        read = dict.fromkeys(name for op in run for name in op.inputs if name in program.tensors)
        elsewhere = {name for i, other in enumerate(runs) if i != number for op in other for name in op.inputs}
        needed = elsewhere | set(program.outputs) | set(keep)
        segments.append(
            Segment(
                native=run[0].outputs[0] not in in_pytorch,
                ops=tuple(run),
                inputs=tuple(name for name in read if name not in made[number]),
                outputs=tuple(name for op in run for name in op.outputs if name in needed),
            )
        )
    return segments


def _runs(program: Program, in_pytorch: Collection[str] | Mapping[str, str]) -> list[list[Op]]:
    """Take all operators of one place that can run, then all of the other, until none is left."""
    left = list(program.ops)
    known = {*program.inputs, *program.constants, ""}
    runs: list[list[Op]] = []
    native, stuck = True, 0
    while left and stuck < 2:
        run, rest = [], []
        for op in left:
            if (op.outputs[0] not in in_pytorch) == native and all(name in known for name in op.inputs):
                run.append(op)
                known.update(op.outputs)
            else:
                rest.append(op)
        stuck = 0 if run else stuck + 1
        if run:
            runs.append(run)
        left, native = rest, not native
    assert not left, left[0].name
    return runs
