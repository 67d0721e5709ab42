"""A segment of a program becomes a plan for the native runner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from qat.integer.native import moves, pointwise, products, spatial
from qat.integer.native.builder import Builder, Value
from qat.integer.native.fusion import Step, steps_of
from qat.integer.native.order import Order, channels_last, groups_of, logical
from qat.integer.native.planfile import PlanFile
from qat.integer.native.segments import Segment
from qat.integer.native.support import shape_of
from qat.integer.program import Op, Program

Writer = Callable[[Builder, Step], None]


@dataclass(frozen=True)
class SegmentPlan:
    """The plan of a segment, and how its inputs and outputs lie.

    Attributes:
        plan: The plan.
        inputs: What each input of the segment is, in the order of the plan's inputs.
        outputs: What each output of the segment is; several may be one output of the plan.
    """

    plan: PlanFile
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def lower_segment(
    program: Program,
    segment: Segment,
    constants: Mapping[str, Tensor],
    *,
    single: bool,
    fuse: bool = True,
    physical: bool = False,
) -> SegmentPlan:
    """Write the plan of a segment.

    Args:
        program: The program.
        segment: Operators of it that the runner has.
        constants: The values of the program's constants.
        single: For a batch size of 1; only `depends_on_batch` segments differ.
        fuse: Make operators part of the ones before them where that changes no bit.
        physical: Inputs of codes lie as their first reader wants them, and not in logical order.
    """
    builder = Builder(program, constants, wanted_orders(program, segment.ops), single)
    inputs = tuple(
        builder.define(
            name,
            builder.want(name)
            if physical and program.encoding_of(name) is not None
            else logical(len(program.tensors[name].shape)),
        )
        for name in segment.inputs
    )
    for step in steps_of(program, segment.ops, segment.outputs, fuse):
        _WRITERS[step.op.kind](builder, step)
    outputs = tuple(builder.output(name) for name in segment.outputs)
    plan = builder.finish([v.tensor for v in inputs], list(dict.fromkeys(v.tensor for v in outputs)))
    return SegmentPlan(plan, inputs, outputs)


def depends_on_batch(program: Program, ops: Sequence[Op]) -> bool:
    """Whether an addition takes its operands in another order for one sample (see `adds_right_first`)."""
    return any(
        op.kind == "add"
        and all(math.prod(size for size in shape_of(program, name) if size > 0) == 1 for name in op.inputs)
        for op in ops
    )


def wanted_orders(program: Program, ops: Sequence[Op]) -> dict[str, Order]:
    """The physical order in which the first reader of each tensor that has a wish reads it."""
    wanted: dict[str, Order] = {}
    for op in reversed(ops):
        for name in op.inputs:
            if name in program.tensors:
                order = _wish(program, op, len(program.tensors[name].shape), wanted)
                if order is not None:
                    wanted[name] = order
    return wanted


def _wish(program: Program, op: Op, rank: int, wanted: Mapping[str, Order]) -> Order | None:
    if op.kind in ("conv", "conv_transpose", "max_pool", "avg_pool", "resize"):
        return channels_last(rank)
    if op.kind in ("linear", "matmul", "layer_norm"):
        return logical(rank)
    after = wanted.get(op.outputs[0])
    if after is None:
        return None
    if op.kind == "transpose":
        return tuple(op.attrs["perm"][d] % rank for d in after)
    if op.kind == "reshape":
        groups = groups_of(program.tensors[op.inputs[0]].shape, program.tensors[op.outputs[0]].shape)
        sequence = sorted(groups, key=lambda g: min((after.index(d) for d in g.after), default=0))
        return tuple(d for g in sequence for d in g.before)
    return after if len(after) == rank else None


_WRITERS: Mapping[str, Writer] = MappingProxyType(
    {
        "quantize": pointwise.quantize,
        "dequantize": pointwise.dequantize,
        "requantize": pointwise.requantize,
        "rescale": pointwise.rescale,
        "conv": products.layer,
        "conv_transpose": products.layer,
        "linear": products.layer,
        "matmul": products.matmul,
        **dict.fromkeys(("add", "sub", "mul", "div"), pointwise.arithmetic),
        "clamp": pointwise.table,
        "table": pointwise.table,
        "prelu": pointwise.prelu,
        "softmax": pointwise.softmax,
        "layer_norm": pointwise.layer_norm,
        "max_pool": spatial.pool,
        "avg_pool": spatial.pool,
        "mean": spatial.mean,
        "resize": spatial.resize,
        "pad": moves.pad,
        "concat": moves.concat,
        "reshape": moves.reshape,
        "transpose": moves.transpose,
        "slice": moves.slice_,
        "expand": moves.expand,
        "identity": moves.identity,
    }
)
