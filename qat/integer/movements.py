"""Writing data movements into a draft: chains of them, rolls, stacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qat.encoding import Encoding
from qat.graph.opgraph import GraphOp
from qat.graph.prepared import rescaled
from qat.integer.draft import Draft
from qat.integer.shapes import step_shape


def open_batch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape as an argument of `reshape`: -1 for the dimension that counts samples."""
    return tuple(-1 if size < 0 else size for size in shape)


def emit_chain(draft: Draft, op: GraphOp, source: str, result: str) -> None:
    """Write an operator of kind `chain`: each step an operator of its own."""
    steps = list(op.attrs["steps"])
    for number, (kind, attrs) in enumerate(steps):
        last = number == len(steps) - 1
        target = result
        if not last:
            held = draft.held(source)
            step_encoding = held if held is None or kind != "rescale" else rescaled(held, attrs["factor"], "rescale")
            shape = step_shape(kind, attrs, draft.tensors[source].shape)
            target = draft.new(f"{op.name}:{number}", shape, step_encoding)
        emit_movement(draft, op.name if last else target, kind, attrs, source, target)
        source = target


def emit_movement(draft: Draft, name: str, kind: str, attrs: Mapping[str, Any], source: str, target: str) -> None:
    """Write one movement; a roll is slices and concatenations."""
    if kind != "roll":
        draft.emit(kind, name, (source,), target, attrs)
        return
    shape, held = draft.tensors[source].shape, draft.held(source)
    pairs = [(s, a) for s, a in zip(attrs["shifts"], attrs["axes"], strict=True) if s % shape[a]]
    for number, (shift, axis) in enumerate(pairs):
        cut_at = shape[axis] - shift % shape[axis]
        halves = []
        for label, start, end in (("tail", cut_at, shape[axis]), ("head", 0, cut_at)):
            half_shape = tuple(end - start if d == axis else s for d, s in enumerate(shape))
            half = draft.new(f"{name}:{label}{number}", half_shape, held)
            draft.emit(
                "slice", half, (source,), half, {"axes": (axis,), "starts": (start,), "ends": (end,), "steps": (1,)}
            )
            halves.append(half)
        last = number == len(pairs) - 1
        joined = target if last else draft.new(f"{name}:rolled{number}", shape, held)
        draft.emit("concat", name if last else joined, tuple(halves), joined, {"axis": axis})
        source = joined
    if not pairs:
        draft.emit("reshape", name, (source,), target, {"shape": open_batch(shape)})


def emit_stack(draft: Draft, op: GraphOp, result: str, encoding: Encoding | None) -> None:
    """Write a stack as a concatenation, on one grid or (`encoding` None) of floats."""
    axis = op.attrs["axis"]
    columns = []
    for number, tensor in enumerate(op.tensors):
        source = draft.codes(tensor) if encoding is not None else draft.floats(tensor)
        if encoding is not None:
            source = draft.requantized(source, encoding)
        shape = list(draft.tensors[source].shape)
        shape.insert(axis, 1)
        column = draft.new(f"{op.name}:column{number}", tuple(shape), draft.held(source))
        draft.emit("reshape", column, (source,), column, {"shape": open_batch(tuple(shape))})
        columns.append(column)
    draft.emit("concat", op.name, tuple(columns), result, {"axis": axis})
