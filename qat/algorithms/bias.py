"""Bias correction: the mean error that quantization adds to each output channel of a layer goes into its bias.

Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction" (ICCV 2019), section 4.2
and appendix D.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qat.algorithms.channels import group_indices
from qat.algorithms.outputs import Distance, OutputError
from qat.algorithms.sweep import DEFAULT_MEMORY, Visit, gather, sweep
from qat.algorithms.units import Layer, layer_units, quantized_layers
from qat.errors import DataError, QuantizationWarning, StateError
from qat.graph.prepared import PreparedModel

Method = Literal["empirical", "analytic"]


@dataclass(frozen=True)
class BiasCorrection:
    """What `correct_bias` did.

    Attributes:
        method: `empirical` or `analytic`.
        corrected: Names of the layers whose bias was changed.
        kept: Layers that kept their bias: their output was no better with the correction, or the model's was worse
            with all of them.
        skipped: Why each other layer was left as it was, by name.
    """

    method: Method
    corrected: tuple[str, ...]
    kept: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def correct_bias(
    qmodel: PreparedModel,
    batches: Iterable[Any] | None = None,
    *,
    method: Method = "empirical",
    samples: int | None = None,
    memory: int = DEFAULT_MEMORY,
    float_model: nn.Module | None = None,
    progress: bool | None = None,
) -> BiasCorrection:
    """Correct the bias (or the beta of a folded batch norm) of every quantized layer of a calibrated model.

    Where the model's outputs on the given samples end up farther from the float model's than they were, which happens
    where the outputs depend on few places of a layer (the class token of a transformer), all of it is undone, with a
    warning.

    Args:
        qmodel: The calibrated model, which is changed.
        batches: As for `qat.calibrate`; not needed for `analytic`.
        method: `empirical`: layer by layer, the mean difference between the outputs of the float and of the quantized
            model, with all that quantization has done before the layer. `analytic`: `-(Q(w) - w) E[x]`, the error of
            the weights alone, with the mean that the batch norm and the ReLU before the layer promise; no data.
        samples: Take at most as many; None for all.
        memory: Bytes for activations (see `qat.algorithms.sweep.gather`).
        float_model: The model that `qmodel` was made of, where its weights have been changed since.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        StateError: The model was not calibrated, or there is no such method.
        DataError: No batch, or one that does not fit.
        CheckpointError: `float_model` is another model.
    """
    if method not in get_args(Method):
        raise StateError(
            f"unknown method of bias correction {method!r}", f"choose one of {', '.join(get_args(Method))}"
        )
    work = _Work(method)
    if method == "analytic":
        qmodel.encodings()  # says which tensor has no range
        for layer in quantized_layers(qmodel).values():
            work.promise(qmodel, layer)
        return work.result()
    if batches is None:
        raise DataError("empirical bias correction needs data", "give batches, or choose the method analytic")
    given = gather(qmodel, batches, samples=samples, memory=memory)
    outputs = OutputError(qmodel, given, float_model)
    before, state = outputs.measure(), {key: value.clone() for key, value in qmodel.state_dict().items()}
    sweep(
        qmodel, given, layer_units(qmodel, "norm"), work.measure, float_model=float_model, progress=progress,
        title="bias correction",
    )  # fmt: skip
    after = outputs.measure() if work.corrected else before
    if after.is_worse_than(before):
        qmodel.load_state_dict(state)
        work.undo(before, after)
    return work.result()


class _Work:
    def __init__(self, method: Method) -> None:
        self.method: Method = method
        self.corrected: list[str] = []
        self.kept: list[str] = []
        self.skipped: list[tuple[str, str]] = []

    def result(self) -> BiasCorrection:
        return BiasCorrection(self.method, tuple(self.corrected), tuple(self.kept), tuple(self.skipped))

    def measure(self, visit: Visit) -> None:
        (layer,) = visit.unit.layers
        bias = self._bias(visit.root, layer)
        if bias is None:
            return
        before = visit.error()
        old = bias.detach().clone()
        total, count = torch.zeros(bias.numel(), dtype=torch.float64), 0
        for have, want in zip(visit.outputs(), visit.targets, strict=True):
            rows = (want.to(torch.float64) - have.to(torch.float64)).movedim(_axis(layer, want), 0).flatten(1)
            total += rows.sum(1).cpu()
            count += rows.shape[1]
        with torch.no_grad():
            bias += (total / max(count, 1)).to(bias)
        if visit.error() < before:
            self.corrected.append(layer.name)
            return
        with torch.no_grad():
            bias.copy_(old)
        self.kept.append(layer.name)

    def undo(self, before: Distance, after: Distance) -> None:
        """Note that the biases are again what they were."""
        warnings.warn(
            f"bias correction is undone: it moved the model's outputs away from the float model's (relative squared "
            f"error {after.squared:.3g}, before {before.squared:.3g}; divergence {after.divergence:.3g}, before "
            f"{before.divergence:.3g}), though it helped each of {len(self.corrected)} layers by itself",
            QuantizationWarning,
            stacklevel=3,
        )
        self.kept, self.corrected = [*self.corrected, *self.kept], []

    def promise(self, qmodel: PreparedModel, layer: Layer) -> None:
        mean = _promised_mean(qmodel, layer)
        if mean is None:
            self._skip(layer, "no batch norm (with a ReLU) writes what it reads")
            return
        bias = self._bias(qmodel, layer)
        if bias is None:
            return
        weight = layer.weight.detach()
        error = (layer.quantizer(weight) - weight).to(torch.float64)
        inputs, outputs = group_indices(layer.op, tuple(weight.shape))
        taps = error.flatten(2).sum(2) if error.dim() > 2 else error
        moved = torch.zeros(bias.numel(), dtype=torch.float64)
        moved.scatter_add_(0, outputs.reshape(-1), (taps * mean[inputs]).reshape(-1))
        gain = layer.gain()
        moved = moved if gain is None else moved * gain
        with torch.no_grad():
            bias -= moved.to(bias)
        self.corrected.append(layer.name)

    def _bias(self, root: PreparedModel, layer: Layer) -> Tensor | None:
        """Return the parameter that is added to the layer's output, or None with a note why there is none."""
        if layer.calls > 1:
            self._skip(layer, f"{layer.key} is shared by {layer.calls} layers")
            return None
        offset = layer.offset(root)
        if offset is None:
            self._skip(layer, "it has no bias")
        return offset

    def _skip(self, layer: Layer, why: str) -> None:
        warnings.warn(f"the bias of {layer.name!r} is not corrected: {why}", QuantizationWarning, stacklevel=2)
        self.skipped.append((layer.name, why))


def _axis(layer: Layer, output: Tensor) -> int:
    return output.dim() - 1 if layer.op.kind == "linear" else 1


def _promised_mean(qmodel: PreparedModel, layer: Layer) -> Tensor | None:
    """Return the mean of each channel that a batch norm, and a clamp after it, give to a layer's input, or None.

    The batch norm's result is normal with mean beta and deviation |gamma|; of a clamped normal variable the mean is
    known (the same paper, appendix C).
    """
    ops, name = qmodel.opgraph.ops, layer.op.tensors[0]
    op = ops.get(name)
    low, high = -math.inf, math.inf
    if op is not None and op.kind == "clamp":
        low = -math.inf if op.attrs["low"] is None else float(op.attrs["low"])
        high = math.inf if op.attrs["high"] is None else float(op.attrs["high"])
        op = ops.get(op.tensors[0])
    if op is None or op.kind != "batch_norm":
        return None
    values = qmodel.float_state_dict()
    keys = [getattr(item, "key", None) for item in op.inputs[1:3]]
    if any(key is None for key in keys):
        return None
    gamma, beta = (values[key].detach().to("cpu", torch.float64) for key in keys if key is not None)
    return clamped_normal_mean(beta, gamma.abs(), low, high)


def clamped_normal_mean(mean: Tensor, deviation: Tensor, low: float, high: float) -> Tensor:
    """Return the mean of normal variables that are clamped to [low, high].

    Args:
        mean: Of the variables, float64.
        deviation: Standard deviations, not negative, likewise.
        low: Lower bound; may be -inf.
        high: Upper bound; may be inf.
    """
    sigma = deviation.clamp(min=1e-12)
    result = torch.zeros_like(mean)
    inside = torch.ones_like(mean)
    edges = []
    for bound, sign in ((low, 1.0), (high, -1.0)):
        if math.isinf(bound):
            edges.append(torch.zeros_like(mean))
            continue
        z = (bound - mean) / sigma
        # share of the variable beyond the bound, which becomes the bound
        beyond = 0.5 * torch.erfc(-sign * z / math.sqrt(2.0))
        result += bound * beyond
        inside -= beyond
        edges.append(torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi))
    return result + mean * inside + sigma * (edges[0] - edges[1])
