"""Equalization: factors of channels that make a model easier to quantize and leave what it computes as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qat.algorithms.channels import ChannelGroups, channel_groups, group_indices
from qat.algorithms.noise import NoisyLayer, NoisyTensor, least_noise_factors
from qat.algorithms.rewrite import in_float, refuse_calibrated, same_function, scale_channels
from qat.algorithms.statistics import ChannelStatistics, channel_statistics
from qat.errors import DataError, StateError
from qat.graph.opgraph import GraphOp
from qat.graph.prepared import PreparedModel
from qat.quantizers import WeightFakeQuantize
from qat.scheme import Scheme

Method = Literal["noise", "weights", "activations"]
#: factors stay within this and its inverse
_LARGEST = 1e4
_ROUNDS = 50
_STILL = 1e-3


@dataclass(frozen=True)
class Equalization:
    """What `equalize` did.

    Attributes:
        method: How the factors were chosen.
        channels: Channels that were scaled.
        largest: Largest factor, or inverse of one.
        noise_before: Expected quantization noise before (method `noise`), or None.
        noise_after: And after.
        undone: Why nothing was changed in the end, or "".
    """

    method: Method
    channels: int
    largest: float
    noise_before: float | None = None
    noise_after: float | None = None
    undone: str = ""


def equalize(
    qmodel: PreparedModel,
    batches: Iterable[Any] | None = None,
    *,
    method: Method = "noise",
    strength: float = 0.5,
    samples: int | None = None,
    progress: bool | None = None,
) -> Equalization:
    """Scale channels between operators so that activations and weights lose less in quantization.

    The float model computes the same afterwards; that is checked on random inputs, and the rewrite undone with a
    warning where it does not hold. Call it before `qat.calibrate`.

    Args:
        qmodel: A prepared model that was not calibrated yet; its float weights are changed.
        batches: As for `qat.calibrate`; not needed for the method `weights`.
        method: `noise`: the least expected noise of activations and weights together (`qat.algorithms.noise`).
            `weights`: cross-layer equalization, the factors that give the rows that write a channel and the columns
            that read it the same range (Nagel et al., ICCV 2019, section 4.1), repeated until they stand still.
            `activations`: `a**strength / w**(1 - strength)` with the largest magnitudes of the activation and of the
            weights that read it (SmoothQuant, Xiao et al., ICML 2023, equation 4; AMCT's DMQ balancer).
        strength: How much of the range goes from activations to weights (`activations`; AMCT: migration_strength, 0.2
            to 0.8).
        samples: Stop after this many samples; None for all.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        StateError: The model was calibrated already, or there is no such method.
        DataError: `batches` is missing or has no batch, or `strength` is outside [0, 1].
    """
    if method not in get_args(Method):
        raise StateError(f"unknown method of equalization {method!r}", f"choose one of {', '.join(get_args(Method))}")
    if not 0.0 <= strength <= 1.0:
        raise DataError(f"strength {strength} of the equalization is outside [0, 1]", "AMCT allows 0.2 to 0.8")
    refuse_calibrated(qmodel, "equalization")
    groups = channel_groups(qmodel)
    before = after = None
    if method == "weights":
        factors = _weight_factors(qmodel, groups)
    else:
        if batches is None:
            raise DataError(f"equalization by {method} needs data", "give batches, or choose the method weights")
        axes = _axes(qmodel, groups)
        with in_float(qmodel):
            statistics = channel_statistics(
                qmodel,
                batches,
                axes,
                samples=samples,
                progress=progress,
                description="equalize",
                sensitivity=method == "noise",
            )
        if method == "activations":
            factors = _activation_factors(qmodel, groups, statistics, strength)
        else:
            tensors = noisy_tensors(qmodel, groups, statistics)
            factors, before, after = least_noise_factors(
                tensors, noisy_layers(qmodel, groups, statistics), groups.count
            )
    factors = factors.clamp(1.0 / _LARGEST, _LARGEST)
    factors[0] = 1.0
    with same_function(qmodel, f"equalization by {method}") as undone:
        scale_channels(qmodel, groups, factors)
    largest = float(torch.maximum(factors, 1.0 / factors).max())
    changed = int((factors[groups.groups] != 1.0).sum())
    if undone:
        return Equalization(method, 0, 1.0, before, before, undone[0])
    return Equalization(method, changed, largest, before, after)


# --- weights alone, and weights with activations by a formula


def _weight_factors(qmodel: PreparedModel, groups: ChannelGroups) -> Tensor:
    factors = torch.ones(groups.count, dtype=torch.float64)
    layers = noisy_layers(qmodel, groups, {})
    norms = _norm_magnitudes(qmodel, groups)
    for _ in range(_ROUNDS):
        written, read = _ranges(layers, factors, groups.count)
        written = torch.maximum(written, norms / factors)
        known = (written > 0) & (read > 0)
        step = torch.where(known, (written / read.clamp(min=1e-30)).sqrt(), 1.0)
        step[0] = 1.0
        factors = (factors * step).clamp(1.0 / _LARGEST, _LARGEST)
        if float((step.log().abs()).max()) < _STILL:
            break
    return factors


def _ranges(layers: list[NoisyLayer], factors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest magnitudes of the rows that write each group, and of the columns that read it."""
    written, read = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    for layer in layers:
        scaled = layer.largest * factors[layer.groups_in] / factors[layer.groups_out]
        written.scatter_reduce_(0, layer.groups_out.reshape(-1), scaled.reshape(-1), "amax")
        read.scatter_reduce_(0, layer.groups_in.reshape(-1), scaled.reshape(-1), "amax")
    return written, read


def _norm_magnitudes(qmodel: PreparedModel, groups: ChannelGroups) -> Tensor:
    """Return the largest |gamma| of the layer norms that write each group."""
    values = qmodel.float_state_dict()
    found = torch.zeros(groups.count, dtype=torch.float64)
    for writer in groups.writers:
        if writer.op.kind == "layer_norm":
            gamma = values[writer.parameters[0].key].abs().to("cpu", torch.float64)
            found.scatter_reduce_(0, groups.groups[writer.ids], gamma, "amax")
    return found


def _activation_factors(
    qmodel: PreparedModel, groups: ChannelGroups, statistics: Mapping[str, ChannelStatistics], strength: float
) -> Tensor:
    activations = torch.zeros(groups.count, dtype=torch.float64)
    for name, found in statistics.items():
        channels = groups.tensors.get(name)
        if channels is not None:
            magnitude = torch.maximum(-found.least, found.most).clamp(min=0.0)
            activations.scatter_reduce_(0, groups.groups[channels.ids], magnitude, "amax")
    ones = torch.ones(groups.count, dtype=torch.float64)
    _, read = _ranges(noisy_layers(qmodel, groups, {}), ones, groups.count)
    known = (activations > 0) & (read > 0)
    factors = activations.clamp(min=1e-30) ** strength / read.clamp(min=1e-30) ** (1.0 - strength)
    return torch.where(known, factors, 1.0)


# --- the model as the noise sees it


def _axes(qmodel: PreparedModel, groups: ChannelGroups) -> dict[str, int]:
    """Return the dimension of the channels of every tensor whose statistics are needed."""
    axes: dict[str, int] = {}
    wanted = {entry.name for entry in qmodel.plan if entry.decision == "integer" and entry.role != "weight"}
    wanted |= {op.tensors[0] for op in qmodel.opgraph.ops.values() if op.weight is not None and op.tensors}
    for name, shape in qmodel.opgraph.shapes.items():
        # only where the batch comes first
        if name not in wanted or len(shape) < 2 or shape[0] >= 0:
            continue
        axes[name] = groups.tensors[name].axis if name in groups.tensors else 1
        if axes[name] == 0:
            del axes[name]
    for op in qmodel.opgraph.ops.values():
        if op.weight is None or op.shape is None or op.shape[0] >= 0:
            continue
        if op.tensors and op.tensors[0] in axes and op.tensors[0] not in groups.tensors:
            axes[op.tensors[0]] = _input_axis(qmodel, op)
        axes[_batch_norm_output(qmodel, op) or op.name] = len(op.shape) - 1 if op.kind == "linear" else 1
    return axes


def _input_axis(qmodel: PreparedModel, op: GraphOp) -> int:
    return len(qmodel.opgraph.shapes[op.tensors[0]]) - 1 if op.kind == "linear" else 1


def noisy_tensors(
    qmodel: PreparedModel, groups: ChannelGroups, statistics: Mapping[str, ChannelStatistics]
) -> list[NoisyTensor]:
    """Return the quantized activations whose channels have statistics, those of a tie together."""
    members: dict[str, list[str]] = {}
    for entry in qmodel.plan:
        if entry.decision == "integer" and entry.role != "weight" and entry.quantizer and entry.fixed is None:
            members.setdefault(entry.quantizer, []).append(entry.name)
    found = []
    for head, names in members.items():
        known = [name for name in names if name in statistics]
        if not known:
            continue
        scheme = qmodel.activation_quantizers()[head].scheme
        qmin, qmax = scheme.code_range
        found.append(
            NoisyTensor(
                torch.cat([_groups_of(groups, name, len(statistics[name].low)) for name in known]),
                torch.cat([_typical(statistics[name].low, statistics[name].least) for name in known]),
                torch.cat([_typical(statistics[name].high, statistics[name].most) for name in known]),
                scheme.symmetric,
                qmax - qmin,
                torch.cat([statistics[name].sensitivity for name in known]),
            )
        )
    return found


def _typical(mean: Tensor, extreme: Tensor) -> Tensor:
    """Return the end of a range as an observer may choose it: between that of a usual sample and that of all."""
    return (mean + extreme) / 2


def _groups_of(groups: ChannelGroups, name: str, count: int) -> Tensor:
    if name not in groups.tensors:
        return torch.zeros(count, dtype=torch.int64)
    return groups.groups[groups.tensors[name].ids]


def noisy_layers(
    qmodel: PreparedModel, groups: ChannelGroups, statistics: Mapping[str, ChannelStatistics]
) -> list[NoisyLayer]:
    """Return the weighted operators; without statistics of its input a layer takes the power as 1."""
    readers = {reader.op.name: reader.ids for reader in groups.readers}
    writers = {writer.op.name: writer.ids for writer in groups.writers}
    quantizers = {key: quantizer for key, quantizer, _ in qmodel.weight_quantizers()}
    values = qmodel.float_state_dict()
    layers = []
    for op in qmodel.opgraph.ops.values():
        if op.weight is None:
            continue
        weight = values[op.weight.key].detach().to("cpu", torch.float64)
        quantizer = quantizers.get(op.weight.key)
        inputs, outputs = group_indices(op, tuple(weight.shape))
        factor = None if quantizer is None else quantizer.factor()
        if factor is not None:
            spread = factor.detach().to("cpu", torch.float64)[outputs]
            weight = weight * spread.reshape(*spread.shape, *([1] * (weight.dim() - 2)))
        taps = weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]
        # with a batch norm it is its result that has the groups
        written = _batch_norm_output(qmodel, op) or op.name
        ids_in, ids_out = readers.get(op.name), writers.get(written)
        zeros = torch.zeros_like(inputs)
        power = (
            statistics[op.tensors[0]].square[inputs] if op.tensors[0] in statistics else torch.ones_like(taps[..., 0])
        )
        output = statistics.get(written)
        layers.append(
            NoisyLayer(
                largest=taps.abs().amax(2),
                taps=taps.shape[2],
                groups_in=zeros if ids_in is None else groups.groups[ids_in][inputs],
                groups_out=zeros if ids_out is None else groups.groups[ids_out][outputs],
                power=power,
                sensitivity=output.sensitivity[outputs] if output is not None else torch.zeros_like(taps[..., 0]),
                grids=_grids(quantizer, inputs.shape),
                levels=0 if quantizer is None else _levels(quantizer.scheme),
            )
        )
    return layers


def _batch_norm_output(qmodel: PreparedModel, op: GraphOp) -> str | None:
    assert op.weight is not None
    entry = next((e for e in qmodel.plan if e.role == "weight" and e.name == op.weight.key), None)
    return entry.source_tensor if entry is not None else None


def _grids(quantizer: WeightFakeQuantize | None, shape: torch.Size) -> Tensor:
    """Return which elements of the first two dimensions share a grid; of groups, one tap stands for all."""
    first, second = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None, :]
    if quantizer is None or quantizer.scheme.granularity.kind == "per_tensor":
        return 0 * first + 0 * second
    granularity = quantizer.scheme.granularity
    if granularity.kind == "per_channel":
        return first + 0 * second if granularity.axis == 0 else 0 * first + second
    size = granularity.size or 1
    return first * -(-shape[1] // size) + second // size


def _levels(scheme: Scheme) -> int:
    qmin, qmax = scheme.code_range
    return qmax - scheme.symmetric_zero_point if scheme.symmetric else (qmax - qmin) // 2
