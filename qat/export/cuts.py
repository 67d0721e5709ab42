"""An exported model cut into its operators.

That needs nothing but the file, so a package can be verified long after the model that it came from is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import helper

from qat.errors import ExportError

#: operators that only move codes; alone they are no integer graph for some compilers, and cannot be wrong
_MOVES = frozenset({
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
})  # fmt: skip
_QDQ = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Layer:
    """One operator of a model, from the codes that it reads to the codes that it gives.

    Attributes:
        codes: Name of the codes that it gives.
        model: The operator alone, a model.
        given: Names of the model's inputs by the names of the codes (or, of a float input, the tensor) that they are.
    """

    codes: str
    model: onnx.ModelProto
    given: dict[str, str]


def cut_layers(model: onnx.ModelProto) -> list[Layer]:
    """Cut a QDQ model of static shapes at every quantized tensor; operators that only move codes are left out.

    Executed in another runtime on the codes that the reference has there, the pieces tell how far each single operator
    is off, with no difference carried along.

    Raises:
        ExportError: A quantized tensor has no static shape.
    """
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = inferred.graph
    inputs = {value.name: value for value in graph.input}
    types = {value.name: value.type for value in (*graph.value_info, *graph.output, *graph.input)}
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    quantized = [node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    given = {name: f"{name}:given" for name in quantized}
    producers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            node.input[0] = given.get(node.input[0], node.input[0])
        producers.update(dict.fromkeys(node.output, node))
    layers = []
    for name in quantized:
        nodes = _behind(name, producers)
        if all(node.op_type in _QDQ or node.op_type in _MOVES for node in nodes):
            continue
        reached = {source for node in nodes for source in node.input}
        aliases = {origin: alias for origin, alias in given.items() if alias in reached}
        fed = [_value(alias, types.get(origin), origin) for origin, alias in aliases.items()]
        fed += [value for origin, value in inputs.items() if origin in reached]
        made = helper.make_model(
            helper.make_graph(
                nodes, name, fed, [_value(name, types.get(name), name)],
                [tensor for key, tensor in initializers.items() if key in reached],
            ),
            opset_imports=list(inferred.opset_import),
            ir_version=inferred.ir_version,
            producer_name="qat",
        )  # fmt: skip
        layers.append(Layer(name, made, aliases | {origin: origin for origin in inputs if origin in reached}))
    return layers


def _behind(name: str, producers: dict[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that a value depends on, in order."""
    found: dict[str, onnx.NodeProto] = {}

    def visit(value: str) -> None:
        node = producers.get(value)
        if node is not None and node.output[0] not in found:
            for source in node.input:
                visit(source)
            found[node.output[0]] = node

    visit(name)
    return list(found.values())


def _value(name: str, kind: onnx.TypeProto | None, where: str) -> onnx.ValueInfoProto:
    dimensions = [] if kind is None else list(kind.tensor_type.shape.dim)
    if kind is None or any(not d.HasField("dim_value") for d in dimensions):
        raise ExportError(f"the tensor {where!r} has no static shape", "export with dynamic_batch=False")
    return helper.make_tensor_value_info(name, kind.tensor_type.elem_type, [d.dim_value for d in dimensions])
