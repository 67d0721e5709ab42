"""A converted network as an ONNX model in the QDQ format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata as package_metadata

import onnx
import onnx.checker
from onnx import TensorProto, helper

from qat.errors import ExportError
from qat.export import islands
from qat.export.emitters import border, elementwise, normalization, pooling, products, shape, spatial
from qat.export.emitters.context import Context, Emitter, FourBitWeights
from qat.export.emitters.types import FLOAT_TYPES
from qat.integer.program import Program

#: below 21 QuantizeLinear has no 16-bit and 4-bit types; above 23 no released ONNX Runtime was tried
OPSETS = range(21, 24)


def emitters() -> dict[str, Emitter]:
    """The emitter of each canonical kind."""
    table: dict[str, Emitter] = {}
    for family in (border, products, elementwise, normalization, pooling, spatial, shape, islands):
        table.update(family.EMITTERS)
    return table


def program_to_onnx(
    program: Program,
    *,
    opset: int = 21,
    dynamic_batch: bool = True,
    batch_size: int = 1,
    name: str = "model",
    metadata: Mapping[str, str] | None = None,
    four_bit_weights: FourBitWeights = "cast",
) -> onnx.ModelProto:
    """Express a program in ONNX with QuantizeLinear and DequantizeLinear; equal programs give equal bytes.

    Args:
        program: The converted network.
        opset: Version of the standard operators, 21 to 23.
        dynamic_batch: Leave the batch size open; else it is `batch_size`.
        batch_size: Batch size where it is not open.
        name: Name of the graph.
        metadata: Further entries of the model's `metadata_props`.
        four_bit_weights: 4-bit weights are stored in 4 bits either way. `cast` widens them by a Cast, which runtimes
            fold at loading, so that the layer is an 8-bit integer one (ONNX Runtime on a CPU has no other); `direct`
            gives them to DequantizeLinear as they are, as runtimes with 4-bit kernels want it. Per-group
            weights are always `direct`.

    Returns:
        A model that the ONNX checker accepts. Inputs and outputs are float and bear the user's names; a
        quantized tensor `v` appears as `v`, `v/codes` and `v/dequantized`, a constant as `k/codes` and `k`.

    Raises:
        ExportError: An operator has no ONNX spelling, or the model would be larger than ONNX allows (2 GiB).
    """
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} cannot be exported", f"use {OPSETS.start} to {OPSETS.stop - 1}")
    if four_bit_weights not in ("cast", "direct"):
        raise ExportError(f"unknown spelling {four_bit_weights!r} of 4-bit weights", "use cast or direct")
    if batch_size < 1:
        raise ExportError(f"batch size {batch_size} is not positive", "use at least 1")
    ctx = Context(program, opset, None if dynamic_batch else batch_size, four_bit_weights)
    table = emitters()
    inputs = []
    for entry in program.inputs:
        info = ctx.info(entry)
        ctx.bind(entry, info.public_name)
        if info.dtype not in FLOAT_TYPES:
            raise ExportError(f"input {info.public_name!r} has dtype {info.dtype}", "use float32 inputs")
        inputs.append(helper.make_tensor_value_info(info.public_name, FLOAT_TYPES[info.dtype], ctx.dimensions(entry)))
    for op in program.ops:
        emitter = table.get(op.kind)
        if emitter is None:
            raise ExportError(
                f"operator {op.name!r} of kind {op.kind!r} has no ONNX spelling", "keep it a float island"
            )
        emitter(ctx, op)
    outputs = _outputs(ctx, program, {value.name for value in inputs})
    return _model(ctx, inputs, outputs, name, {"qat.numerics": program.numerics, **(metadata or {})})


def _outputs(ctx: Context, program: Program, taken: set[str]) -> list[onnx.ValueInfoProto]:
    """Outputs under the user's names; a value that is an input or is returned twice is copied."""
    outputs = []
    for entry in program.outputs:
        info, value = ctx.info(entry), ctx.value(entry)
        wanted = info.public_name
        if value != wanted or wanted in taken:
            wanted = ctx.fresh(f"{wanted}/output") if wanted in ctx.written else wanted
            ctx.node("Identity", [value], [wanted], where=wanted)
        taken.add(wanted)
        element = TensorProto.FLOAT if info.encoding is not None else FLOAT_TYPES[info.dtype]
        outputs.append(helper.make_tensor_value_info(wanted, element, ctx.dimensions(entry)))
    return outputs


def _model(
    ctx: Context,
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    name: str,
    properties: Mapping[str, str],
) -> onnx.ModelProto:
    borders = {value.name for value in (*inputs, *outputs)}
    produced = {result for node in ctx.nodes for result in node.output}
    graph = helper.make_graph(
        ctx.nodes,
        name,
        inputs,
        outputs,
        initializer=list(ctx.initializers.values()),
        value_info=[v for key, v in ctx.value_infos.items() if key in produced and key not in borders],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in sorted(ctx.opset_imports.items())]
    model = helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets, ignore_unknown=True),
        producer_name="qat",
        producer_version=qat_version(),
    )
    helper.set_model_props(model, dict(sorted({"qat.version": qat_version(), **properties}.items())))
    try:
        onnx.checker.check_model(model, full_check=True)
    except ValueError as error:  # protobuf cannot serialise more than 2 GiB
        raise ExportError(f"model {name!r} is too large for one ONNX file ({error})", "split the model") from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise ExportError(
            f"model {name!r} is not valid ONNX ({cause})", "report this model: it is a defect of qat"
        ) from error
    return model


def qat_version() -> str:
    """Version of this package, `unknown` where it is not installed."""
    try:
        return package_metadata.version("qat")
    except package_metadata.PackageNotFoundError:
        return "unknown"


def model_bytes(model: onnx.ModelProto) -> bytes:
    """Serialise a model; the same model gives the same bytes.

    Raises:
        ExportError: It is larger than 2 GiB.
    """
    try:
        return bytes(model.SerializeToString(deterministic=True))
    except ValueError as error:
        raise ExportError(f"model {model.graph.name!r} is too large for one ONNX file ({error})", "split it") from error


@dataclass(frozen=True)
class TensorNames:
    """Where one quantized tensor of a program is in its ONNX model.

    Attributes:
        tensor: Name in the program.
        codes: Name of the QuantizeLinear output.
        dequantized: Name of its DequantizeLinear output, or "" where nothing reads it.
    """

    tensor: str
    codes: str
    dequantized: str


def quantized_tensors(program: Program, model: onnx.ModelProto) -> tuple[TensorNames, ...]:
    """The tensors of `program` whose own codes the model computes, in execution order.

    A tensor that shares the codes of another (rescale, redundant clamp, identity) is not listed: it has none
    of its own.
    """
    order = {node.output[0]: index for index, node in enumerate(model.graph.node) if node.op_type == "QuantizeLinear"}
    readers = {
        node.input[0]: node.output[0] for node in reversed(model.graph.node) if node.op_type == "DequantizeLinear"
    }
    found = [
        TensorNames(name, f"{name}/codes", readers.get(f"{name}/codes", ""))
        for name, info in program.tensors.items()
        if info.encoding is not None and f"{name}/codes" in order
    ]
    return tuple(sorted(found, key=lambda entry: order[entry.codes]))
