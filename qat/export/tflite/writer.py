"""A program of the `tflite` profile as the bytes of a `.tflite` file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qat.errors import ExportError
from qat.export.contract import TensorContract, contract
from qat.export.io_mode import Border, IoMode
from qat.export.onnx import qat_version
from qat.export.tflite.context import Context, Emitter, Value, channels_last
from qat.export.tflite.emitters import pointwise, pooling, products, shape
from qat.integer.program import Program


@dataclass(frozen=True)
class TfliteModel:
    """A written model.

    Attributes:
        content: The bytes of the file.
        inputs: Its inputs, in the order of the user's arguments.
        outputs: Its outputs, flattened.
        values: Number and layout of the tensor that holds each quantized tensor of the program.
        operators: Builtin operators used, by name.
    """

    content: bytes
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]
    values: Mapping[str, Value]
    operators: tuple[str, ...]


def emitters() -> dict[str, Emitter]:
    """The emitter of each canonical kind."""
    table: dict[str, Emitter] = {}
    for family in (products, pooling, pointwise, shape):
        table.update(family.EMITTERS)
    return table


def program_to_tflite(
    program: Program,
    *,
    io: IoMode | Border = "float",
    batch_size: int = 1,
    name: str = "model",
    metadata: Mapping[str, str] | None = None,
) -> TfliteModel:
    """Express a program in int8 TFLite; equal programs give equal bytes.

    Tensors of four dimensions are channels-last (N, H, W, C) at the inputs and outputs, others as in the user's model.

    Args:
        program: The converted network, of the `tflite` profile.
        io: Floats, which the file quantizes and dequantizes itself, or int8 codes.
        batch_size: Batch size; TFLite's shapes are fixed.
        name: Name of the subgraph.
        metadata: Further entries of the model's metadata.

    Raises:
        ExportError: The program is of another profile, an operator has no TFLite spelling, an option has no such
            value, ai-edge-litert is not installed, or the file would be larger than 2 GiB.
    """
    if program.numerics != "tflite":
        raise ExportError(
            f"a program of the {program.numerics} profile cannot be a .tflite file", 'convert with numerics="tflite"'
        )
    mode = IoMode.of(io)
    if batch_size < 1:
        raise ExportError(f"batch size {batch_size} is not positive", "use at least 1")
    public = frozenset(program.tensors[entry].public_name for entry in (*program.inputs, *program.outputs))
    ctx = Context(program, batch_size, public)
    inputs = [_input(ctx, entry, mode.inputs) for entry in program.inputs]
    table = emitters()
    for op in program.ops:
        # int8 inputs are quantized already, and a clamp may be the activation of the operator before it
        if op.kind == "dequantize" or op.outputs[0] in ctx.values:
            continue
        if op.kind not in table:
            raise ExportError(f"operator {op.name!r} of kind {op.kind!r} has no TFLite spelling", "report this model")
        table[op.kind](ctx, op)
    sources = {op.outputs[0]: op.inputs[0] for op in program.ops if op.kind == "dequantize"}
    outputs = [_output(ctx, entry, sources[entry], mode.outputs) for entry in program.outputs]
    content = ctx.builder.to_bytes(
        [tensor for tensor, _ in inputs],
        [tensor for tensor, _ in outputs],
        name,
        {"qat.numerics": program.numerics, "qat.version": qat_version(), **(metadata or {})},
    )
    return TfliteModel(
        content,
        tuple(given for _, given in inputs),
        tuple(given for _, given in outputs),
        {key: value for key, value in ctx.values.items() if key in program.tensors},
        ctx.builder.op_types,
    )


def _border_order(rank: int) -> tuple[int, ...]:
    return channels_last(rank) if rank == 4 else tuple(range(rank))


def _input(ctx: Context, entry: str, border: Border) -> tuple[int, TensorContract]:
    """Add an input; codes are the quantized tensor itself."""
    public, sizes = ctx.program.tensors[entry].public_name, ctx.shape(entry)
    order = _border_order(len(sizes))
    shape = tuple(sizes[d] for d in order)
    quantized = [op.outputs[0] for op in ctx.readers.get(entry, [])]
    if not quantized:
        raise ExportError(f"input {public!r} is not read", "remove it from the model")
    encoding = ctx.encoding(quantized[0])
    given = contract(public, public, encoding, shape, order, codes=border == "codes")
    if border == "float":
        tensor = ctx.builder.tensor(public, shape, None, dtype="float32")
        ctx.alias(entry, Value(tensor, order))
        return tensor, given
    tensor = ctx.builder.tensor(public, shape, encoding)
    for name in quantized:
        ctx.alias(name, Value(tensor, order))
    return tensor, given


def _output(ctx: Context, entry: str, source: str, border: Border) -> tuple[int, TensorContract]:
    """Bring an output to the order that it has in the file, and dequantize it there where floats are wanted."""
    public, encoding = ctx.program.tensors[entry].public_name, ctx.encoding(source)
    order = _border_order(len(ctx.shape(source)))
    tensor = ctx.read(source, order)
    shape = ctx.builder.shape(tensor)
    if border == "float":
        result = ctx.builder.tensor(public, shape, None, dtype="float32")
        ctx.builder.operator("DEQUANTIZE", [tensor], [result], "Dequantize")
        return result, contract(public, public, encoding, shape, order, codes=False)
    if ctx.builder.name(tensor) not in ctx.reserved:  # a tensor that is returned twice keeps its first name
        ctx.builder.rename(tensor, public)
    return tensor, contract(ctx.builder.name(tensor), public, encoding, shape, order, codes=True)
