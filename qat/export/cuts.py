"""An exported model in pieces, or without its quantization: graphs that are made of the QDQ file itself.

Both need nothing but the file, so a package can be verified long after the model that it came from is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.scheme import Granularity, int_type

#: element types of codes, by the name of the integer type
_CODES = {
    TensorProto.UINT8: "uint8", TensorProto.INT8: "int8", TensorProto.UINT16: "uint16", TensorProto.INT16: "int16",
    TensorProto.UINT4: "uint4", TensorProto.INT4: "int4", TensorProto.INT32: "int32",
}  # fmt: skip


# -- a model cut at every quantized tensor

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


# -- a model without its quantization


@dataclass(frozen=True)
class FloatTwin:
    """A QDQ model as a float model and a table of encodings.

    Attributes:
        model: Without QuantizeLinear and DequantizeLinear; weights and biases are the floats of their codes, so that
            quantizing them by the table gives these codes again.
        activations: Encodings of its tensors, by name.
        parameters: Encodings of its initializers, by name.
    """

    model: onnx.ModelProto
    activations: dict[str, Encoding]
    parameters: dict[str, Encoding]


def float_twin(model: onnx.ModelProto) -> FloatTwin:
    """Take the quantization out of a QDQ model with float borders.

    Inputs and outputs keep their names, and so do the floats inside that bear the user's names.

    Raises:
        ExportError: A weight has a scale for each group, or a border is codes.
    """
    given, model = model, onnx.ModelProto()
    model.CopyFrom(given)
    initializers = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    outputs = [value.name for value in model.graph.output]
    values = dict(initializers)
    # DequantizeLinear and Cast of initializers are computed here
    activations: dict[str, Encoding] = {}
    parameters: dict[str, Encoding] = {}
    sources: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    types = {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            activations.setdefault(node.input[0], _encoding(node, values, types))
            sources[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear" and node.input[0] in values:
            encoding = _encoding(node, values, types)
            parameters[node.output[0]] = encoding
            values[node.output[0]] = _dequantized(values[node.input[0]], encoding)
        elif node.op_type == "DequantizeLinear":
            if node.input[0] not in sources:
                raise ExportError(f"{node.input[0]!r} is given as codes", "export with float inputs and outputs")
            sources[node.output[0]] = sources[node.input[0]]
        elif node.op_type == "Cast" and node.input[0] in values and node.input[0] in initializers:
            values[node.output[0]] = values[node.input[0]].astype(np.int32)
            types[node.output[0]] = helper.get_node_attr_value(node, "to")
        else:
            kept.append(node)
    # an output that was dequantized is now computed under its own name
    names = {sources[name]: name for name in outputs if name in sources}
    made_outputs = {name for node in kept for name in node.output}
    extra = []
    for source, name in list(names.items()):
        if source not in made_outputs:
            # an input that is returned, or a constant
            del names[source]
            extra.append(helper.make_node("Identity", [source], [name]))
    for node in kept:
        for position, name in enumerate(node.input):
            source = sources.get(name, name)
            node.input[position] = names.get(source, source)
        for position, name in enumerate(node.output):
            node.output[position] = names.get(name, name)
    reached = {name for node in (*kept, *extra) for name in node.input}
    made = helper.make_model(
        helper.make_graph(
            [*kept, *extra],
            model.graph.name,
            list(model.graph.input),
            list(model.graph.output),
            [numpy_helper.from_array(value, name) for name, value in values.items() if name in reached],
        ),
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
        producer_name="qat",
    )
    onnx.checker.check_model(made, full_check=True)
    present = reached | {name for node in (*kept, *extra) for name in node.output}
    return FloatTwin(
        made,
        {names.get(name, name): e for name, e in activations.items() if names.get(name, name) in present},
        {name: e for name, e in parameters.items() if name in reached},
    )


def _encoding(node: onnx.NodeProto, values: dict[str, npt.NDArray[np.generic]], types: dict[str, int]) -> Encoding:
    """The encoding that a QuantizeLinear or DequantizeLinear says."""
    scale = np.atleast_1d(values[node.input[1]])
    code_type = types[node.input[2]] if len(node.input) > 2 else types.get(node.input[0], TensorProto.INT32)
    dtype = _CODES[code_type]
    kind = int_type(dtype)
    if any(attribute.name == "block_size" and attribute.i for attribute in node.attribute):
        raise ExportError(f"{node.output[0]!r} has a scale for each group", "quantize weights per tensor or per channel")
    zero = np.atleast_1d(values[node.input[2]]).astype(np.int64) if len(node.input) > 2 else np.zeros_like(scale)
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    per_tensor = np.ndim(values[node.input[1]]) == 0
    return Encoding(
        dtype,
        tuple(float(s) for s in scale),
        tuple(int(z) for z in zero),
        kind.qmin,
        kind.qmax,
        symmetric=kind.signed and not zero.any(),
        granularity=Granularity() if per_tensor else Granularity("per_channel", axis),
        provenance="imported",
        method="QDQ",
    )


def _dequantized(codes: npt.NDArray[np.generic], encoding: Encoding) -> npt.NDArray[np.float32]:
    import torch

    values: npt.NDArray[np.float32] = encoding.dequantize(torch.from_numpy(codes.astype(np.int64))).numpy()
    return values
