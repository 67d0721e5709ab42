"""Proof that no accumulator of a program can overflow, from the actual integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.integer.kernels.accumulate import accumulator_bound
from qat.integer.program import Op, Program
from qat.scheme import int_type


@dataclass(frozen=True)
class LayerBound:
    """The worst accumulator of one operator.

    Attributes:
        name: Name of the operator.
        kind: Its kind.
        bound: Largest magnitude that any accumulator can reach, bias included, whatever the input.
        channel: Output channel that reaches it.
        limit: Largest magnitude that the accumulator holds: 2**31 - 1 for 8-bit activations, 2**63 - 1 for
            wider ones.
    """

    name: str
    kind: str
    bound: int
    channel: int
    limit: int

    @property
    def bits(self) -> int:
        """Bits that a two's complement accumulator needs for the bound."""
        return self.bound.bit_length() + 1


@dataclass(frozen=True)
class OverflowReport:
    """The worst accumulator of every operator that accumulates."""

    layers: tuple[LayerBound, ...]

    @property
    def worst(self) -> LayerBound | None:
        """The layer whose accumulator comes closest to its limit, or None where nothing accumulates."""
        return max(self.layers, key=lambda layer: layer.bound / layer.limit, default=None)

    def __str__(self) -> str:
        rows = [("layer", "kind", "bound", "channel", "bits")]
        rows += [(b.name, b.kind, str(b.bound), str(b.channel), str(b.bits)) for b in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def prove_no_overflow(program: Program) -> OverflowReport:
    """Prove from the integers that every accumulator holds its sum, bias included, for every possible input.

    Returns:
        The worst bound of each operator with integer operands, in execution order.

    Raises:
        ExportError: A channel of a layer may overflow; the message names the layer, the channel and the
            bound.
    """
    layers = []
    for op in program.ops:
        bounds = _bounds(program, op)
        if bounds is None:
            continue
        channel = int(bounds.argmax()) if bounds.numel() else 0
        worst = int(bounds.max()) if bounds.numel() else 0
        limit = 2**31 - 1 if _activation_bits(program, op) <= 8 else 2**63 - 1
        if worst > limit:
            raise ExportError(
                f"layer {op.name!r}: the accumulator of output channel {channel} may reach {worst} > {limit}",
                "give its weights or its input a narrower range (qmin, qmax), or keep the layer float",
            )
        layers.append(LayerBound(op.name, op.kind, worst, channel, limit))
    return OverflowReport(tuple(layers))


def _activation_bits(program: Program, op: Op) -> int:
    operands = op.inputs[:2] if op.kind == "matmul" else op.inputs[:1]
    encodings = [program.encoding_of(name) for name in operands]
    return max(int_type(e.dtype).bits for e in encodings if e is not None)


def _bounds(program: Program, op: Op) -> Tensor | None:
    """Bound per output channel, int64; None where the operator does not accumulate integers."""
    if op.kind not in ("conv", "conv_transpose", "linear", "matmul"):
        return None
    encodings = [program.encoding_of(name) for name in op.inputs[:2]]
    first, second = encodings
    if first is None or second is None:
        return None
    if op.kind == "matmul":
        return _product_bounds(program, op, first, second)
    bias = program.constants[op.inputs[2]] if len(op.inputs) > 2 and op.inputs[2] else None
    if bias is not None and bias.encoding is None:
        return None
    transposed = op.kind == "conv_transpose"
    return accumulator_bound(
        _centred(program, op.inputs[1], second, 1 if transposed else 0),
        first.zero_point[0],
        first.qmin,
        first.qmax,
        None if bias is None else bias.value,
        channel_axis=1 if transposed else 0,
        groups=op.attrs["groups"] if transposed else 1,
    )


def _centred(program: Program, name: str, encoding: Encoding, channel_axis: int) -> Tensor:
    """Codes of a constant less their zero point, int64."""
    codes = program.constants[name].value.to(torch.int64)
    zero_points = torch.tensor(encoding.zero_point, dtype=torch.int64)
    if not zero_points.any():
        return codes
    if encoding.granularity.kind == "per_group":
        raise ExportError(f"weight {name!r} has per-group zero points", "use a symmetric scheme for it")
    axis = encoding.granularity.axis if not encoding.per_tensor else channel_axis
    return codes - zero_points.reshape([-1 if d == axis % codes.dim() else 1 for d in range(codes.dim())])


def _product_bounds(program: Program, op: Op, a: Encoding, b: Encoding) -> Tensor:
    """Bounds of a matrix product, per column where the right operand is constant."""
    left, right = op.inputs[:2]
    if right in program.constants:
        w = _centred(program, right, b, -1)
        columns = w.movedim(-1, 0) if w.dim() > 1 else w[None]
        if w.dim() > 2:  # a column of any of the stacked matrices
            columns = columns.reshape(-1, w.shape[-2])
        return accumulator_bound(columns, a.zero_point[0], a.qmin, a.qmax)
    length = (program.constants[left].value.shape if left in program.constants else program.tensors[left].shape)[-1]
    corners = [(x - a.zero_point[0]) * (y - b.zero_point[0]) for x in (a.qmin, a.qmax) for y in (b.qmin, b.qmax)]
    return torch.tensor([abs(length) * max(abs(corner) for corner in corners)], dtype=torch.int64)
