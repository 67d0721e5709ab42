"""The float network of a program, with the encodings that make it the program again: what other tools quantize."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx

from qat.encodings import Encodings
from qat.export.onnx import program_to_onnx
from qat.integer.program import FLOAT_SUFFIX, Constant, Op, Program, TensorInfo

#: operators between codes and floats, or between codes: nothing to a float
_CONVERSIONS = frozenset({"quantize", "dequantize", "requantize"})
#: ONNX operators whose results have their input's encoding in AIMET and Qualcomm's converters, and none of their own
MOVEMENTS = frozenset({
    "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
})  # fmt: skip


@dataclass(frozen=True)
class FloatTwin:
    """A float model and a table of encodings, both by the same names.

    Attributes:
        model: Weights and biases are the floats of their codes, so that quantizing them by the table gives these codes
            again.
        activations: Encodings of its tensors.
        parameters: Encodings of its initializers.
    """

    model: onnx.ModelProto
    activations: Encodings
    parameters: Encodings


def float_twin(program: Program, *, batch_size: int = 1, name: str = "model") -> FloatTwin:
    """Take the quantization out of a program.

    A value that is clamped as part of the operator that computes it has no encoding in the table, the clamped one has.

    Args:
        program: The program.
        batch_size: Batch size of the model.
        name: Name of its graph.

    Raises:
        ExportError: An operator has no ONNX spelling.
    """
    model = program_to_onnx(float_program(program), dynamic_batch=False, batch_size=batch_size, name=name)
    values = {value for node in model.graph.node for value in node.output} | {v.name for v in model.graph.input}
    initializers = {tensor.name for tensor in model.graph.initializer}
    readers: dict[str, list[Op]] = {}
    for op in program.ops:
        for source in op.inputs:
            readers.setdefault(source, []).append(op)
    inner = {
        source
        for source, found in readers.items()
        if [op.kind for op in found] == ["clamp"]
        and source in program.tensors
        and source not in program.outputs
        and _same(program, source, found[0].outputs[0])
    }
    table = {key: t.encoding for key, t in program.tensors.items() if t.encoding and key in values and key not in inner}
    for node in reversed(model.graph.node):
        # a result that takes its shape behind the operator that computes it: that has the encoding
        if node.op_type in MOVEMENTS and node.output[0] in table and node.input[0] not in program.tensors:
            table.setdefault(node.input[0], table[node.output[0]])
    return FloatTwin(
        model,
        Encodings(table),
        Encodings({key: c.encoding for key, c in program.constants.items() if c.encoding and key in initializers}),
    )


def _same(program: Program, first: str, second: str) -> bool:
    a, b = program.encoding_of(first), program.encoding_of(second)
    return a is not None and b is not None and a.same_grid(b)


def float_program(program: Program) -> Program:
    """Return the program in float: no codes, no conversions; constants are the floats of their codes."""
    alias: dict[str, str] = {}

    def name_of(name: str) -> str:
        name = alias.get(name, name)
        return name.removesuffix(FLOAT_SUFFIX) if name.removesuffix(FLOAT_SUFFIX) not in program.constants else name

    ops = []
    clamped: dict[str, str] = {}
    for op in program.ops:
        if op.kind in _CONVERSIONS:
            if name_of(op.outputs[0]) != name_of(op.inputs[0]):
                alias[op.outputs[0]] = name_of(op.inputs[0])
            continue
        inputs, outputs = tuple(map(name_of, op.inputs)), tuple(map(name_of, op.outputs))
        if op.saturates is None:
            ops.append(replace(op, inputs=inputs, outputs=outputs))
            continue
        whole = f"{outputs[0]}:unclamped"
        clamped[whole] = outputs[0]
        ops.append(replace(op, inputs=inputs, outputs=(whole,)))
        ops.append(Op("clamp", outputs[0], (whole,), outputs, op.saturates))
    tensors = {
        name_of(name): TensorInfo(name_of(name), info.shape, None, info.dtype)
        for name, info in program.tensors.items()
        if name not in alias
    }
    tensors |= {whole: replace(tensors[name], name=whole) for whole, name in clamped.items()}
    constants = {name: Constant(name, constant.floats()) for name, constant in program.constants.items()}
    return replace(
        program,
        inputs=tuple(map(name_of, program.inputs)),
        outputs=tuple(map(name_of, program.outputs)),
        ops=tuple(ops),
        tensors=tensors,
        constants=constants,
    )
