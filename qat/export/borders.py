"""ONNX models that take or give codes instead of floats.

The exporter writes float borders. Here the QuantizeLinear behind an input and the DequantizeLinear before an output are
taken away, so that the graph between them, and what runtimes make of it, stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from qat.export.contract import TensorContract, contract, input_encoding, output_encoding
from qat.export.emitters.types import ONNX_TYPES
from qat.export.io_mode import IoMode
from qat.integer.program import Program


def contracts(
    program: Program, model: onnx.ModelProto, io: IoMode
) -> tuple[tuple[TensorContract, ...], tuple[TensorContract, ...]]:
    """Return the contracts of the inputs and outputs that a model has in an I/O mode.

    Args:
        program: What the model was written from.
        model: The model, with float or other borders.
        io: The mode.

    Raises:
        ExportError: A tensor that shall be codes has none; it is named.
    """
    graph = model.graph
    inputs = tuple(
        contract(value.name, value.name, input_encoding(program, entry), *_sizes(value), codes=io.inputs == "codes")
        for entry, value in zip(program.inputs, graph.input, strict=True)
    )
    outputs = tuple(
        contract(
            value.name,
            program.tensors[entry].public_name,
            output_encoding(program, entry),
            *_sizes(value),
            codes=io.outputs == "codes",
        )
        for entry, value in zip(program.outputs, graph.output, strict=True)
    )
    return inputs, outputs


def _sizes(value: onnx.ValueInfoProto) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes, -k for `k*batch`, and the order of the dimensions, which is the user's."""
    sizes = []
    for dimension in value.type.tensor_type.shape.dim:
        if dimension.HasField("dim_value"):
            sizes.append(dimension.dim_value)
        else:
            sizes.append(-1 if dimension.dim_param == "batch" else -int(dimension.dim_param.split("*")[0]))
    return tuple(sizes), tuple(range(len(sizes)))


def with_borders(program: Program, model: onnx.ModelProto, io: IoMode) -> onnx.ModelProto:
    """Return a model in an I/O mode; names stay, only the types of the borders become those of the codes.

    Args:
        program: What the model was written from.
        model: The model with float borders.
        io: The mode.

    Raises:
        ExportError: A tensor that shall be codes has none; it is named.
    """
    found = onnx.ModelProto()
    found.CopyFrom(model)
    inputs, outputs = contracts(program, model, io)
    if io.inputs == "codes":
        codes = {f"{op.outputs[0]}/codes" for op in program.ops if op.kind == "quantize"}
        for given in inputs:
            _take_codes(found.graph, given, codes)
    if io.outputs == "codes":
        for given in outputs:
            _give_codes(found.graph, given)
    onnx.checker.check_model(found, full_check=True)
    return found


def _take_codes(graph: onnx.GraphProto, given: TensorContract, codes: set[str]) -> None:
    """Let an input be the codes that are made of it, here or behind a clip to a narrower range."""
    doomed: list[onnx.NodeProto] = []
    ends: list[str] = []
    reached = [given.name]
    for node in graph.node:
        if node.input and node.input[0] in reached:
            doomed.append(node)
            (ends if node.output[0] in codes else reached).append(node.output[0])
    _remove(graph, doomed)
    for name in ends:
        _rename_inputs(graph, name, given.name)
    _retype(graph.input, given)


def _give_codes(graph: onnx.GraphProto, given: TensorContract) -> None:
    """Let an output be what was dequantized into it."""
    last = next(node for node in graph.node if given.name in node.output)
    if last.op_type == "Identity":
        # an output that is returned twice, or that is another's value
        source = next(node for node in graph.node if last.input[0] in node.output)
        last.input[0] = source.input[0] if source.op_type == "DequantizeLinear" else last.input[0]
    elif last.op_type == "DequantizeLinear":
        codes, inner = last.input[0], f"{given.name}/dequantized"
        if any(given.name in node.input for node in graph.node):
            _rename_inputs(graph, given.name, inner)
            last.output[0] = inner
        else:
            _remove(graph, [last])
        _rename(graph, codes, given.name)
    _retype(graph.output, given)


def _rename_inputs(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    _rename_inputs(graph, old, new)
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == old:
                node.output[index] = new
    _forget(graph, {old})


def _remove(graph: onnx.GraphProto, doomed: list[onnx.NodeProto]) -> None:
    gone = {name for node in doomed for name in node.output}
    for node in doomed:
        graph.node.remove(node)
    _forget(graph, gone)


def _forget(graph: onnx.GraphProto, names: set[str]) -> None:
    for value in [value for value in graph.value_info if value.name in names]:
        graph.value_info.remove(value)


def _retype(values: Iterable[onnx.ValueInfoProto], given: TensorContract) -> None:
    for value in values:
        if value.name == given.name:
            value.type.tensor_type.elem_type = ONNX_TYPES[given.dtype]
