"""A whole program as one plan file, for devices: no PyTorch is there to compute what the runner lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from qat.errors import ExportError
from qat.integer.native.builder import Value
from qat.integer.native.lowering import depends_on_batch, lower_segment
from qat.integer.native.planfile import PlanFile
from qat.integer.native.segments import Segment, reasons
from qat.integer.profiles import arithmetic_of
from qat.integer.program import FLOAT_SUFFIX, Op, Program

#: operators that an error names; the others are counted
_NAMED = 5


@dataclass(frozen=True)
class WholePlan:
    """A program as one plan.

    Attributes:
        plan: The plan.
        inputs: Where each input of the program is, in order: its floats, or its codes.
        outputs: The same of its outputs; several may be one tensor of the plan.
        batch: The batch size that the plan is for, or None for any.
    """

    plan: PlanFile
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    batch: int | None


def lower_whole(
    program: Program,
    constants: Mapping[str, Tensor],
    *,
    code_inputs: bool = False,
    code_outputs: bool = False,
    batch: int | None = None,
) -> WholePlan:
    """Write a program as one plan.

    Float borders are in the user's order of dimensions; codes lie as the operators read and write them, images channels
    last.

    Args:
        program: The program, of the numerics profile `onnx`.
        constants: The values of its constants.
        code_inputs: The plan takes codes: the quantization of its inputs is left to the caller.
        code_outputs: The plan gives codes.
        batch: Batch size; None leaves it open where nothing depends on it, and is 1 elsewhere.

    Raises:
        ExportError: The runner lacks operators, which are named, or the profile; or codes are asked of a tensor that
            has none.
    """
    lacking = arithmetic_of(program.numerics).native
    if lacking:
        raise ExportError(f"a plan is of the numerics profile 'onnx', not {program.numerics!r}: {lacking}")
    _check_operators(program)
    ops, inputs, outputs = list(program.ops), list(program.inputs), list(program.outputs)
    if code_inputs:
        ops, inputs = _with_code_inputs(program, ops)
    if code_outputs:
        ops, outputs = _with_code_outputs(program, ops)
    segment = Segment(True, tuple(ops), tuple(inputs), tuple(dict.fromkeys(outputs)))
    # the operands of an addition are taken in another order for one sample, so that one file cannot serve all
    fixed = 1 if batch is None and depends_on_batch(program, ops) else batch
    lowered = lower_segment(program, segment, constants, single=fixed == 1, physical=True)
    found = dict(zip(segment.outputs, lowered.outputs, strict=True))
    whole = _named(WholePlan(lowered.plan, lowered.inputs, tuple(found[name] for name in outputs), fixed))
    return whole if fixed is None else _with_batch(whole, fixed)


def _check_operators(program: Program) -> None:
    lacking = reasons(program)
    found = [f"{op.name} ({lacking[op.outputs[0]]})" for op in program.ops if op.outputs[0] in lacking]
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise ExportError(
            f"the runner lacks {len(found)} operators: {', '.join(found[:_NAMED])}{more}",
            "use the ONNX file, or quantize these layers as the target arm-cpu allows",
        )
    for name in program.outputs:
        if name in program.constants:
            raise ExportError(f"the output {name!r} is a constant, which a plan cannot give", "leave it to the caller")


def _with_code_inputs(program: Program, ops: list[Op]) -> tuple[list[Op], list[str]]:
    """The operators without the quantization of the inputs, and the tensors of codes that are given instead."""
    inputs = []
    for entry in program.inputs:
        readers = [op for op in ops if entry in op.inputs]
        encodings = [program.encoding_of(op.outputs[0]) for op in readers]
        first = encodings[0] if encodings else None
        plain = all(op.kind == "quantize" for op in readers) and entry not in program.outputs
        if not plain or first is None or not all(other and first.same_grid(other) for other in encodings):
            public = program.tensors[entry].public_name
            raise ExportError(f"{public!r} is read as float, or on several grids", "give floats there")
        given = readers[0].outputs[0]
        same = {op.outputs[0]: given for op in readers}
        ops = [
            replace(op, inputs=tuple(same.get(name, name) for name in op.inputs))
            for op in ops
            if op.outputs[0] not in same
        ]
        inputs.append(given)
    return ops, inputs


def _with_code_outputs(program: Program, ops: list[Op]) -> tuple[list[Op], list[str]]:
    """The operators without the dequantization of the outputs, and the tensors of codes that are given instead."""
    source = {op.outputs[0]: op for op in ops}
    outputs = []
    for name in program.outputs:
        last = source.get(name)
        if last is None or last.kind != "dequantize":
            public = program.tensors[name].public_name
            raise ExportError(f"{public!r} is not quantized and has no codes", "take floats there")
        outputs.append(last.inputs[0])
        if not any(name in op.inputs for op in program.ops):
            ops = [op for op in ops if op is not last]
    return ops, outputs


def _named(whole: WholePlan) -> WholePlan:
    """The plan with the user's names for its borders, also where they are floats: the codes inside get another."""
    plan = whole.plan
    taken = {tensor.name for tensor in plan.tensors} | {constant.name for constant in plan.constants}
    names: dict[str, str] = {}
    for value in (*whole.inputs, *whole.outputs):
        public = value.tensor.removesuffix(FLOAT_SUFFIX)
        if public == value.tensor or value.tensor in names:
            continue
        if public in taken:
            names[public] = f"{public}:codes"
            while names[public] in taken:
                names[public] += "'"
            taken.add(names[public])
        names[value.tensor] = public

    def of(name: str) -> str:
        return names.get(name, name)

    def renamed(values: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(replace(value, tensor=of(value.tensor)) for value in values)

    plan = PlanFile(
        tuple(replace(tensor, name=of(tensor.name)) for tensor in plan.tensors),
        tuple(replace(constant, name=of(constant.name)) for constant in plan.constants),
        tuple(replace(op, inputs=tuple(map(of, op.inputs)), output=of(op.output)) for op in plan.ops),
        tuple(map(of, plan.inputs)),
        tuple(map(of, plan.outputs)),
    )
    return WholePlan(plan, renamed(whole.inputs), renamed(whole.outputs), whole.batch)


def _with_batch(whole: WholePlan, batch: int) -> WholePlan:
    """The plan with sizes for one batch size."""

    def sized(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(-size * batch if size < 0 else size for size in sizes)

    def placed(values: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(replace(value, shape=sized(value.shape)) for value in values)

    tensors = tuple(replace(tensor, sizes=sized(tensor.sizes)) for tensor in whole.plan.tensors)
    plan = replace(whole.plan, tensors=tensors)
    return WholePlan(plan, placed(whole.inputs), placed(whole.outputs), batch)
