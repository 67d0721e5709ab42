"""High-bias absorption: what a ReLU always lets through of a bias goes into the biases of the layers that read it.

A channel that never falls below c > 0 before its ReLU wastes the codes from 0 to c. Its bias is lowered by c, and every
layer that reads it adds W c to its own bias.

Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction" (ICCV 2019), section
4.1.3. There c is beta - 3 |gamma| of the batch norm; here it is the smallest value that was seen, so nothing that was
seen changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.algorithms.channels import group_indices
from qat.algorithms.rewrite import in_float, random_inputs, refuse_calibrated, same_function
from qat.algorithms.statistics import channel_statistics
from qat.graph.operators import ParamRef
from qat.graph.opgraph import GraphOp
from qat.graph.prepared import PreparedModel


@dataclass(frozen=True)
class Absorption:
    """What `absorb_high_bias` did.

    Attributes:
        layers: Names of the tensors before a ReLU that were lowered.
        channels: How many of their channels.
        undone: Why nothing was changed in the end, or "".
    """

    layers: tuple[str, ...]
    channels: int
    undone: str = ""


@dataclass(frozen=True)
class _Place:
    """A writer, its ReLU, and all that read the ReLU's result."""

    writer: GraphOp
    bias: ParamRef
    readers: tuple[GraphOp, ...]
    #: where W c goes: a bias (added), or the running mean of the batch norm that follows (taken off)
    shifts: tuple[tuple[ParamRef, float], ...]


def absorb_high_bias(
    qmodel: PreparedModel, batches: Iterable[Any], *, samples: int | None = None, progress: bool | None = None
) -> Absorption:
    """Lower what never falls below zero before a ReLU; the float model computes the same on all that was seen.

    Layers that pad their input are left alone: the border reads zeros, not the ReLU. Call it before `qat.calibrate`,
    after `equalize`.

    Args:
        qmodel: A prepared model that was not calibrated yet; its float weights are changed.
        batches: As for `qat.calibrate`.
        samples: Stop after this many samples; None for all.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        StateError: The model was calibrated already.
        DataError: No batch, or one that does not fit.
    """
    refuse_calibrated(qmodel, "absorption of biases")
    places = {place.writer.name: place for place in _places(qmodel)}
    axes = {name: _channel_axis(place.writer) for name, place in places.items()}
    with in_float(qmodel):
        seen = channel_statistics(qmodel, batches, axes, samples=samples, progress=progress, description="absorb")
        drawn = channel_statistics(qmodel, [random_inputs(qmodel)], axes, progress=False)
    values = qmodel.float_state_dict()
    lowered: dict[str, int] = {}
    with same_function(qmodel, "absorption of biases") as undone, torch.no_grad():
        for name, place in places.items():
            c = torch.minimum(seen[name].least, drawn[name].least).clamp(min=0.0)
            if not bool((c > 0).any()):
                continue
            values[place.bias.key].sub_(c.to(values[place.bias.key]))
            for reader, (target, sign) in zip(place.readers, place.shifts, strict=True):
                values[target.key].add_((sign * _through(reader, values, c)).to(values[target.key]))
            lowered[name] = int((c > 0).sum())
    if undone:
        return Absorption((), 0, undone[0])
    return Absorption(tuple(lowered), sum(lowered.values()))


def _through(op: GraphOp, values: dict[str, Tensor], constant: Tensor) -> Tensor:
    """Return what a layer makes of an input that is constant in each channel, without its bias, float64, (Cout,)."""
    assert op.weight is not None
    weight = values[op.weight.key].detach().to("cpu", torch.float64)
    inputs, outputs = group_indices(op, tuple(weight.shape))
    taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    result = torch.zeros(int(outputs.max()) + 1, dtype=torch.float64)
    return result.scatter_add_(0, outputs.reshape(-1), (taps * constant[inputs]).reshape(-1))


def _channel_axis(op: GraphOp) -> int:
    assert op.shape is not None
    return len(op.shape) - 1 if op.kind == "linear" else 1


def _places(qmodel: PreparedModel) -> list[_Place]:
    graph, found = qmodel.opgraph, []
    users = graph.users()
    uses: dict[str, int] = {}
    for op in graph.ops.values():
        for item in op.inputs:
            if isinstance(item, ParamRef):
                uses[item.key] = uses.get(item.key, 0) + 1
    for op in graph.ops.values():
        bias = op.inputs[2] if op.kind in ("conv", "linear", "conv_transpose", "batch_norm") else None
        relu = _only(users, graph.outputs, op.name)
        if not isinstance(bias, ParamRef) or uses[bias.key] > 1 or relu is None or op.shape is None:
            continue
        if relu.kind != "clamp" or relu.attrs["low"] != 0.0 or relu.attrs["high"] is not None:
            continue
        readers = tuple(users.get(relu.name, ()))
        if not readers or relu.name in graph.outputs:
            continue
        shifts = [_shift(reader, users, graph.outputs, uses) for reader in readers]
        if all(_takes_constant(reader) for reader in readers) and all(shift is not None for shift in shifts):
            found.append(_Place(op, bias, readers, tuple(shift for shift in shifts if shift is not None)))
    return found


def _only(users: dict[str, list[GraphOp]], outputs: tuple[str, ...], name: str) -> GraphOp | None:
    readers = users.get(name, [])
    return readers[0] if len(readers) == 1 and name not in outputs else None


def _takes_constant(op: GraphOp) -> bool:
    """Whether a constant input gives a constant output: no position of the output reads padding."""
    if op.kind == "linear":
        return op.shape is not None and len(op.shape) == 2
    padding = op.attrs.get("padding", ())
    return op.kind == "conv" and all(low == high == 0 for low, high in padding)


def _shift(
    op: GraphOp, users: dict[str, list[GraphOp]], outputs: tuple[str, ...], uses: dict[str, int]
) -> tuple[ParamRef, float] | None:
    after = _only(users, outputs, op.name)
    if after is not None and after.kind == "batch_norm":
        mean = after.inputs[3]
        return (mean, -1.0) if isinstance(mean, ParamRef) and uses[mean.key] == 1 else None
    bias = op.inputs[2] if len(op.inputs) > 2 else None
    return (bias, 1.0) if isinstance(bias, ParamRef) and uses[bias.key] == 1 else None
