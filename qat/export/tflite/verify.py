"""Verification of a `.tflite` file: LiteRT executes it, and its codes are compared with the simulation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qat.encoding import Encoding
from qat.errors import DataError, ExportError, VerificationError
from qat.export.contract import TensorContract
from qat.export.difference import Level, Tally, Verification, codes_of
from qat.export.io_mode import Border, IoMode
from qat.export.overflow import OverflowReport, prove_no_overflow
from qat.export.tflite.context import Value
from qat.export.tflite.runtime import Kernels, Runtime, version
from qat.export.tflite.writer import TfliteModel, program_to_tflite
from qat.export.verify import Executor, as_inputs
from qat.files import atomic_path
from qat.integer.kernels.qparams import QParams
from qat.integer.operators import qparams
from qat.integer.program import Program
from qat.integer.tflite import arithmetic
from qat.integer.tflite.products import multiplier


@dataclass(frozen=True)
class TfliteResult:
    """A written and verified `.tflite` file.

    Attributes:
        path: The file.
        verification: The comparison of LiteRT's reference kernels with the simulation, or None where none was asked
            for.
        default: The same for the kernels that an application gets by default (XNNPACK), which round otherwise; a
            record, not a condition.
        overflow: Proof that no accumulator overflows.
        inputs: Inputs of the file: names, sizes, layouts, types, encodings.
        outputs: Its outputs.
        operators: TFLite operators that the file uses.
        sha256: Checksum of the file, hexadecimal.
    """

    path: Path
    verification: Verification | None
    default: Verification | None
    overflow: OverflowReport
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]
    operators: tuple[str, ...]
    sha256: str

    def __str__(self) -> str:
        if self.verification is None or self.default is None:
            return f"{self.path} (not executed)"
        worst, other = self.verification.worst, self.default.worst
        return (
            f"{self.path} verified in {self.verification.runtime} on {self.verification.samples} samples: largest "
            f"difference {worst.max_difference:g} codes, {100 * worst.unequal_share:.4g} % unequal ({worst.name}); "
            f"{self.default.options[0]}: {other.max_difference:g} codes, {100 * other.unequal_share:.4g} % unequal"
        )


def verify_tflite(
    model: TfliteModel,
    program: Program,
    samples: Iterable[Any],
    executor: Executor,
    *,
    level: Level = "outputs",
    kernels: Kernels = "reference",
    content: bytes | None = None,
) -> Verification:
    """Execute a model in LiteRT and compare it with the simulation, code by code.

    Args:
        model: The written model.
        program: What it was written from.
        samples: Batches of the model's batch size: a tensor, or a tuple of tensors in the order of `program.inputs`.
        executor: Computes the simulation, see `qat.export.verify.verify_onnx`.
        level: `outputs`, or `layers` to compare every quantized tensor too.
        kernels: Which of LiteRT's kernels; `layers` needs `reference`, since others fuse tensors away.
        content: The bytes to execute, `model.content` if None.

    Raises:
        DataError: There is no sample, or one does not fit the model's inputs.
        VerificationError: A tensor has another shape in the runtime.
        ExportError: LiteRT is not installed or refuses the model, or an option has no such value.
    """
    if level not in ("outputs", "layers"):
        raise ExportError(f"unknown verification level {level!r}", "use outputs or layers")
    if level == "layers" and kernels != "reference":
        raise ExportError(f"the {kernels} kernels do not keep every tensor", 'compare layers with kernels="reference"')
    batches = [as_inputs(program, sample) for sample in samples]
    if not batches:
        raise DataError("no samples to verify with", "give at least one batch")
    runtime = Runtime(content or model.content, kernels, keep=level == "layers")
    sources = {op.outputs[0]: op.inputs[0] for op in program.ops if op.kind == "dequantize"}
    wanted = [sources[name] for name in program.outputs]
    tallies = [
        Tally(contract.name, program.encoding_of(source))
        for contract, source in zip(model.outputs, wanted, strict=True)
    ]
    inner = [name for name in model.values if name not in wanted and program.tensors[name].encoding is not None]
    layers = {name: Tally(name, program.encoding_of(name)) for name in inner} if level == "layers" else {}
    for batch in batches:
        results = runtime.run([_feed(contract, x) for contract, x in zip(model.inputs, batch, strict=True)])
        simulated = executor(program, batch, {*wanted, *layers})
        for tally, contract, source, array in zip(tallies, model.outputs, wanted, results, strict=True):
            tally.add(_codes(contract, program.tensors[source].encoding, array), simulated[source].detach().cpu())
        for name, tally in layers.items():
            held = runtime.tensor(model.values[name].tensor)
            tally.add(_logical(model.values[name], held), simulated[name].detach().cpu())
    return Verification(
        version(),
        level,
        sum(int(batch[0].shape[0]) if batch and batch[0].dim() else 1 for batch in batches),
        tuple(tally.result() for tally in (*tallies, *layers.values())),
        (f"kernels={kernels}",),
    )


def _feed(given: TensorContract, x: Tensor) -> npt.NDArray[Any]:
    laid = x.permute(given.order)
    if tuple(laid.shape) != given.shape:
        raise DataError(
            f"input {given.name!r} is {tuple(x.shape)}, in the file's layout {tuple(laid.shape)}, and the file "
            f"takes {given.shape}",
            "give samples of the exported batch size",
        )
    if given.dtype == "int8":
        assert given.scale is not None
        laid = arithmetic.quantize(laid, QParams(given.scale, given.zero_point, given.qmin, given.qmax)).to(torch.int8)
    array: npt.NDArray[Any] = laid.contiguous().numpy()
    return array


def _codes(given: TensorContract, encoding: Encoding | None, array: npt.NDArray[Any]) -> Tensor:
    """Codes of an output in the user's order of dimensions."""
    value = torch.from_numpy(np.ascontiguousarray(array))
    codes = codes_of(value, encoding) if given.dtype == "float32" else value.to(torch.int64)
    return _ordered(codes, given.order)


def _logical(value: Value, array: npt.NDArray[Any]) -> Tensor:
    """Codes of an inner tensor in the program's order of dimensions."""
    codes = _ordered(torch.from_numpy(np.array(array, dtype=np.int32)), value.order)
    if value.features is None:
        return codes
    plain = torch.empty_like(codes)
    plain[..., torch.tensor(value.features)] = codes
    return plain


def _ordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    return codes.permute([order.index(d) for d in range(len(order))]) if order else codes


def prove_no_shift_overflow(program: Program, report: OverflowReport) -> None:
    """Prove that no accumulator leaves 32 bits when an operator with a multiplier of 1 or more shifts it left.

    Raises:
        ExportError: One may; the layer is named.
    """
    bounds = {layer.name: layer.bound for layer in report.layers}
    for op in program.ops:
        # the fully connected kernel has no shifts
        if op.kind not in ("conv", "conv_transpose", "matmul") or op.name not in bounds:
            continue
        x, y, other = (program.encoding_of(name) for name in (op.inputs[0], op.outputs[0], op.inputs[1]))
        assert other is not None
        # of a matrix product too: float32 or float64 makes no difference to the power of two that is enough
        shift = int(multiplier(qparams(x), other.scale_tensor, qparams(y)).shift.max())
        if shift > 0 and bounds[op.name] << shift > arithmetic.INT32_MAX:
            raise ExportError(
                f"layer {op.name!r}: its accumulator may reach {bounds[op.name]}, which TFLite shifts left by {shift} "
                "bits, beyond 32",
                "give its result a wider range, or its weights a narrower one",
            )


def export_tflite_program(
    program: Program,
    path: str | os.PathLike[str],
    samples: Iterable[Any],
    executor: Executor,
    *,
    io: IoMode | Border = "float",
    bound: float = 0.0,
    unequal_share: float | None = 0.0,
    verify: Level | Literal[False] = "outputs",
    batch_size: int = 1,
    name: str = "model",
    metadata: Mapping[str, str] | None = None,
) -> TfliteResult:
    """Write a program as a `.tflite` file, execute it in LiteRT and compare; a difference leaves no file.

    Args:
        program: The converted network, of the `tflite` profile.
        path: The file to write.
        samples: Batches to execute, see `verify_tflite`; not read where `verify` is False.
        executor: Computes the simulation, see `verify_tflite`.
        io: Whether the file takes and gives floats or codes.
        bound: Largest difference in codes that an output may have with the reference kernels.
        unequal_share: Share of the codes of an output that may differ at all, or None.
        verify: `outputs`, `layers`, or False to skip the execution.
        batch_size: Batch size of the file; samples must have it.
        name: Name of the subgraph.
        metadata: Further entries of the model's metadata.

    Raises:
        ExportError: The program cannot be expressed, an accumulator may overflow, or LiteRT is not installed.
        VerificationError: An output differs by more than the bounds; the message names it and the numbers.
        OutputError: The file cannot be written.
    """
    final = Path(path)
    overflow = prove_no_overflow(program)
    prove_no_shift_overflow(program, overflow)
    model = program_to_tflite(program, io=io, batch_size=batch_size, name=name, metadata=metadata)
    verification = default = None
    with atomic_path(final) as temporary:
        temporary.write_bytes(model.content)
        if verify:
            # what is executed is the file as a reader will find it
            content, batches = temporary.read_bytes(), list(samples)
            verification = verify_tflite(model, program, batches, executor, level=verify, content=content)
            _require(verification, len(program.outputs), bound, unequal_share, final)
            default = verify_tflite(model, program, batches, executor, kernels="default", content=content)
    return TfliteResult(
        final,
        verification,
        default,
        overflow,
        model.inputs,
        model.outputs,
        model.operators,
        hashlib.sha256(model.content).hexdigest(),
    )


def _require(verification: Verification, outputs: int, bound: float, unequal_share: float | None, final: Path) -> None:
    failed = replace(verification, tensors=verification.tensors[:outputs]).failures(bound, unequal_share)
    if failed:
        worst = failed[0]
        raise VerificationError(
            f"output {worst.name!r} of {final} differs from the simulation in {verification.runtime}'s reference "
            f"kernels by up to {worst.max_difference:g} codes, "
            f"{100 * worst.unequal_share:.4g} % of {worst.count} unequal",
            'find the layer with verify="layers" and a larger bound, and report the model',
        )
