"""Verification of an ONNX model: ONNX Runtime executes it, and its codes are compared with the simulation."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper
from torch import Tensor

from qat.errors import DataError, ExportError, VerificationError
from qat.export.borders import contracts, with_borders
from qat.export.contract import TensorContract, input_encoding
from qat.export.difference import Level, Tally, Verification, codes_of
from qat.export.emitters.context import FourBitWeights
from qat.export.emitters.types import FLOAT_TYPES, ONNX_TYPES
from qat.export.io_mode import Border, IoMode
from qat.export.onnx import TensorNames, model_bytes, program_to_onnx, quantized_tensors
from qat.export.overflow import OverflowReport, prove_no_overflow
from qat.export.runtime import session, session_entries
from qat.files import atomic_path
from qat.integer.program import Program
from qat.scheme import int_type

__all__ = ["Executor", "ExportResult", "Level", "Verification", "export_program", "session", "verify_onnx"]

#: `(program, inputs, names of the tensors wanted) -> those tensors`: codes where a tensor has an encoding,
#: else floats
Executor = Callable[[Program, tuple[Tensor, ...], set[str]], Mapping[str, Tensor]]

#: codes kept in memory at a time when layers are compared
_CODES_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class ExportResult:
    """A written and verified export.

    Attributes:
        path: The file.
        verification: The comparison with the simulation, or None where none was asked for.
        overflow: Proof that no accumulator overflows.
        opset: Version of the standard operators.
        sha256: Checksum of the file, hexadecimal.
        inputs: Inputs of the file: names, sizes, types, scales and zero points.
        outputs: Its outputs.
    """

    path: Path
    verification: Verification | None
    overflow: OverflowReport
    opset: int
    sha256: str
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]

    def __str__(self) -> str:
        if self.verification is None:
            return f"{self.path} (opset {self.opset}, not executed)"
        worst = self.verification.worst
        return (
            f"{self.path} (opset {self.opset}) verified in {self.verification.runtime} on "
            f"{self.verification.samples} samples: largest difference {worst.max_difference:g} codes, "
            f"{100 * worst.unequal_share:.4g} % unequal ({worst.name})"
        )


def verify_onnx(
    model: onnx.ModelProto | str | os.PathLike[str],
    program: Program,
    samples: Iterable[Any],
    executor: Executor,
    *,
    level: Level = "outputs",
) -> Verification:
    """Execute an exported model in ONNX Runtime and compare it with the simulation, code by code.

    Float outputs are turned back into codes with the output's encoding, which is exact. With
    `level="layers"` the outputs of all QuantizeLinear nodes are compared too; they become outputs of a copy
    of the model, some at a time, which leaves the runtime's fusions as they are.

    Args:
        model: The model, or the path of its file.
        program: What it was exported from.
        samples: Batches: a tensor, or a tuple of tensors in the order of `program.inputs`.
        executor: Computes the simulation: `(program, inputs, names) -> tensors by name`, codes where a
            tensor has an encoding, floats elsewhere.
        level: `outputs` or `layers`.

    Raises:
        DataError: There is no sample, or one does not fit the model's inputs.
        VerificationError: A tensor has another shape in the runtime.
        ExportError: The file is not an ONNX model, or the runtime refuses it.
    """
    if level not in ("outputs", "layers"):
        raise ExportError(f"unknown verification level {level!r}", "use outputs or layers")
    proto = model if isinstance(model, onnx.ModelProto) else _load(Path(model))
    batches = [as_inputs(program, sample) for sample in samples]
    if not batches:
        raise DataError("no samples to verify with", "give at least one batch")
    output_names = [value.name for value in proto.graph.output]
    if len(output_names) != len(program.outputs):
        raise ExportError(
            f"the model has {len(output_names)} outputs and the program {len(program.outputs)}",
            "verify a model against the program that it was exported from",
        )
    tallies = [_compare_outputs(proto, program, batches, executor)]
    if level == "layers":
        compared = {tally.name for tally in tallies[0]}
        entries = [entry for entry in quantized_tensors(program, proto) if entry.tensor not in compared]
        tallies += [
            _compare_layers(proto, program, group, batches, executor) for group in _groups(program, entries, batches)
        ]
    import onnxruntime

    return Verification(
        f"ONNX Runtime {onnxruntime.__version__}",
        level,
        sum(int(batch[0].shape[0]) if batch and batch[0].dim() else 1 for batch in batches),
        tuple(tally.result() for group in tallies for tally in group),
        tuple(f"{key}={value}" for key, value in session_entries().items()),
    )


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    # protobuf's DecodeError is not exported by the onnx package
    except Exception as error:
        raise ExportError(f"cannot read {path} as an ONNX model ({error})", "give a file that export wrote") from error


def as_inputs(program: Program, sample: Any) -> tuple[Tensor, ...]:
    """Return a sample as the tensors of `program.inputs`, on the CPU.

    Raises:
        DataError: It does not fit them; the input is named.
    """
    inputs = (sample,) if isinstance(sample, Tensor) else tuple(sample)
    if len(inputs) != len(program.inputs):
        raise DataError(
            f"a sample has {len(inputs)} tensors where the model takes {len(program.inputs)}",
            "give all inputs",
        )
    for name, x in zip(program.inputs, inputs, strict=True):
        info = program.tensors[name]
        fits = isinstance(x, Tensor) and x.dim() == len(info.shape)
        if not fits or any(d >= 0 and d != n for d, n in zip(info.shape, x.shape, strict=True)):
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"input {info.public_name!r} is {given} where the model takes {info.shape}", "fix the samples"
            )
    return tuple(x.detach().cpu() for x in inputs)


def _run(program: Program, runtime: Any, names: Sequence[str], inputs: tuple[Tensor, ...]) -> list[npt.NDArray[Any]]:
    feeds = {
        value.name: _fed(program, entry, x, value.type).numpy()
        for entry, value, x in zip(program.inputs, runtime.get_inputs(), inputs, strict=True)
    }
    result: list[npt.NDArray[Any]] = runtime.run(list(names), feeds)
    return result


def _fed(program: Program, entry: str, x: Tensor, kind: str) -> Tensor:
    """Return an input as a model takes it, its codes where that is no float."""
    encoding = input_encoding(program, entry)
    if encoding is None or kind == "tensor(float)":
        return x
    return encoding.quantize(x).to(getattr(torch, encoding.dtype))


def _open(model: onnx.ModelProto) -> Any:
    try:
        return session(model_bytes(model))
    # ONNX Runtime's exceptions have no common public base
    except Exception as error:
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(
            f"ONNX Runtime refuses the model ({cause})", "report this model: it is a defect of qat"
        ) from error


def _sources(program: Program) -> dict[str, str]:
    """For each dequantized tensor, the codes that it was dequantized from."""
    return {op.outputs[0]: op.inputs[0] for op in program.ops if op.kind == "dequantize"}


def _compare_outputs(
    proto: onnx.ModelProto, program: Program, batches: list[tuple[Tensor, ...]], executor: Executor
) -> list[Tally]:
    sources = _sources(program)
    wanted = [sources.get(name, name) for name in program.outputs]
    # only a tensor of the program has a simulation; an output that is a constant is compared as the float it
    # is
    tallies = [
        Tally(program.tensors[output].public_name, program.encoding_of(source))
        for output, source in zip(program.outputs, wanted, strict=True)
    ]
    runtime = _open(proto)
    names = [value.name for value in proto.graph.output]
    for batch in batches:
        simulated = executor(program, batch, set(wanted))
        for tally, source, array in zip(tallies, wanted, _run(program, runtime, names, batch), strict=True):
            value = torch.from_numpy(array)
            codes = codes_of(value, tally.encoding) if value.is_floating_point() else value.to(torch.int64)
            tally.add(codes, simulated[source].detach().cpu())
    return tallies


def _groups(
    program: Program, entries: Sequence[TensorNames], batches: list[tuple[Tensor, ...]]
) -> list[list[TensorNames]]:
    """Split the tensors so that the codes of a group fit in memory for the largest batch."""
    largest = max((int(batch[0].shape[0]) if batch and batch[0].dim() else 1 for batch in batches), default=1)
    groups: list[list[TensorNames]] = [[]]
    held = 0
    for entry in entries:
        size = math.prod(-d * largest if d < 0 else d for d in program.tensors[entry.tensor].shape)
        if groups[-1] and held + size > _CODES_AT_ONCE:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += size
    return [group for group in groups if group]


def _compare_layers(
    proto: onnx.ModelProto,
    program: Program,
    group: list[TensorNames],
    batches: list[tuple[Tensor, ...]],
    executor: Executor,
) -> list[Tally]:
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    present = {value.name for value in proto.graph.output}
    names, tallies = [], []
    for entry in group:
        info = program.tensors[entry.tensor]
        assert info.encoding is not None
        four_bits = int_type(info.encoding.dtype).bits < 8
        # NumPy has no 4-bit types: those are compared through their dequantized values
        name = entry.dequantized if four_bits else entry.codes
        if not name:
            continue
        element = FLOAT_TYPES[torch.float32] if four_bits else ONNX_TYPES[info.encoding.dtype]
        if name not in present:
            probe.graph.output.append(helper.make_tensor_value_info(name, element, None))
        names.append(name)
        tallies.append((Tally(entry.tensor, info.encoding), four_bits))
    runtime = _open(probe)
    for batch in batches:
        simulated = executor(program, batch, {tally.name for tally, _ in tallies})
        for (tally, four_bits), array in zip(tallies, _run(program, runtime, names, batch), strict=True):
            value = torch.from_numpy(array.astype(np.float32 if four_bits else np.int32))
            codes = codes_of(value, tally.encoding) if four_bits else value
            tally.add(codes, simulated[tally.name].detach().cpu())
    return [tally for tally, _ in tallies]


def export_program(
    program: Program,
    path: str | os.PathLike[str],
    samples: Iterable[Any],
    executor: Executor,
    *,
    bound: float = 1.0,
    unequal_share: float | None = 0.01,
    verify: Level | Literal[False] = "outputs",
    dynamic_batch: bool = True,
    batch_size: int = 1,
    opset: int = 21,
    name: str = "model",
    metadata: Mapping[str, str] | None = None,
    four_bit_weights: FourBitWeights = "cast",
    io: IoMode | Border = "float",
) -> ExportResult:
    """Write a program as an ONNX file, execute it in ONNX Runtime and compare; a difference leaves no file.

    The bounds hold for the graph outputs; with `verify="layers"` the differences of all tensors are in the
    result, so that a difference can be found where it begins, but one in the middle of the network is no
    failure by itself.

    Args:
        program: The converted network.
        path: The file to write.
        samples: Batches to execute, see `verify_onnx`; not read where `verify` is False.
        executor: Computes the simulation, see `verify_onnx`.
        bound: Largest difference in codes that an output may have; see `TensorDifference.within` for 16 bits.
        unequal_share: Share of the codes of an output that may differ at all (4 codes always may), or None.
        verify: `outputs`, `layers`, or False to skip the execution.
        dynamic_batch: Leave the batch size open.
        batch_size: Batch size where it is not open; samples must have it.
        opset: Version of the standard operators.
        name: Name of the graph.
        metadata: Further entries of the model's metadata.
        four_bit_weights: See `program_to_onnx`.
        io: Whether the file takes and gives floats or codes.

    Raises:
        ExportError: The program cannot be expressed, or an accumulator may overflow; an input or output that shall be
            codes has none.
        VerificationError: An output differs by more than the bounds; the message names it and the numbers.
        OutputError: The file cannot be written.
    """
    final = Path(path)
    overflow = prove_no_overflow(program)
    model = program_to_onnx(
        program,
        opset=opset,
        dynamic_batch=dynamic_batch,
        batch_size=batch_size,
        name=name,
        metadata=metadata,
        four_bit_weights=four_bit_weights,
    )
    mode = IoMode.of(io)
    inputs, outputs = contracts(program, model, mode)
    if mode != IoMode():
        model = with_borders(program, model, mode)
    content = model_bytes(model)
    with atomic_path(final) as temporary:
        temporary.write_bytes(content)
        verification = None
        if verify:
            # what is executed is the file as a reader will find it, not the object that it was written from
            verification = verify_onnx(temporary, program, samples, executor, level=verify)
            _require(verification, len(program.outputs), bound, unequal_share, final)
    return ExportResult(final, verification, overflow, opset, hashlib.sha256(content).hexdigest(), inputs, outputs)


def _require(verification: Verification, outputs: int, bound: float, unequal_share: float | None, final: Path) -> None:
    checked = replace(verification, tensors=verification.tensors[:outputs])
    failed = checked.failures(bound, unequal_share)
    if failed:
        worst = failed[0]
        share = "any" if unequal_share is None else f"{100 * unequal_share:g} %"
        raise VerificationError(
            f"output {worst.name!r} of {final} differs from the simulation in "
            f"{verification.runtime} by up to {worst.max_difference:g} codes, "
            f"{100 * worst.unequal_share:.4g} % of {worst.count} unequal "
            f"(allowed: {bound:g} codes, {share})",
            'find the layer with verify="layers" and a larger bound',
        )
