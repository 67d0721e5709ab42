"""Statistics of channels over data: what algorithms that rewrite weights need to know of activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from qat.algorithms.output_error import project_back, without_parameters
from qat.errors import DataError
from qat.graph.batches import first_samples, model_inputs, sample_count
from qat.graph.prepared import PreparedModel
from qat.graph.subgraph import node_values


@dataclass
class ChannelStatistics:
    """Running statistics of the channels of one tensor, float64, (C,).

    Attributes:
        low: Mean over the samples of each sample's smallest value.
        high: Mean over the samples of each sample's largest value.
        square: Mean of the squares of the values.
        least: Smallest value of all.
        most: Largest value of all.
        sensitivity: Mean over the samples of the sum of squares, over the places of the channel, of the derivatives of
            the outputs times random signs: by how much independent noise of variance 1 in the channel changes the
            outputs, squared, to first order (`qat.algorithms.output_error`). Zeros where it was not asked for, or where
            the outputs do not depend on the tensor.
    """

    low: Tensor
    high: Tensor
    square: Tensor
    least: Tensor
    most: Tensor
    sensitivity: Tensor


class _Sums:
    def __init__(self, channels: int) -> None:
        self.sums = torch.zeros(3, channels, dtype=torch.float64)
        self.least = torch.full((channels,), torch.inf, dtype=torch.float64)
        self.most = torch.full((channels,), -torch.inf, dtype=torch.float64)
        self.samples = 0
        self.slopes = torch.zeros(channels, dtype=torch.float64)

    def add(self, x: Tensor, axis: int) -> None:
        rows = x.detach().movedim(axis, 1).flatten(2) if x.dim() > 2 else x.detach()[:, :, None]
        low, high = (bound.to(torch.float64).cpu() for bound in torch.aminmax(rows, dim=2))
        square = rows.to(torch.float32).square().mean(2).double().cpu()
        self.sums += torch.stack([low.sum(0), high.sum(0), square.sum(0)])
        self.least = torch.minimum(self.least, low.amin(0))
        self.most = torch.maximum(self.most, high.amax(0))
        self.samples += x.shape[0]

    def add_gradient(self, gradient: Tensor, axis: int) -> None:
        rows = gradient.detach().movedim(axis, 1).flatten(2) if gradient.dim() > 2 else gradient.detach()[:, :, None]
        self.slopes += rows.to(torch.float32).square().sum(2).double().cpu().sum(0)

    def result(self) -> ChannelStatistics:
        count = max(self.samples, 1)
        low, high, square = self.sums / count
        return ChannelStatistics(low, high, square, self.least, self.most, self.slopes / count)


class _Watcher(fx.Interpreter):
    def __init__(self, qmodel: PreparedModel, axes: Mapping[str, int]) -> None:
        super().__init__(qmodel, graph=qmodel.graph)
        # of a value that is quantized there are two nodes; without fake quantization they are equal
        self.names = {node: name for node, name in node_values(qmodel).items() if node.meta.get("quantizes") is None}
        self.axes = axes
        self.sums: dict[str, _Sums] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        name = self.names.get(n)
        if name is not None and name in self.axes and isinstance(value, Tensor) and value.numel():
            axis = self.axes[name]
            sums = self.sums.setdefault(name, _Sums(value.shape[axis]))
            sums.add(value, axis)
            if torch.is_grad_enabled() and value.is_floating_point():
                # the first tensors of a model depend on nothing that has a gradient; operators in place may change the
                # copy
                value = value if value.requires_grad else value.detach().requires_grad_()
                value.register_hook(lambda gradient: sums.add_gradient(gradient, axis))  # type: ignore[no-untyped-call]
                value = value.clone()
        return value


def channel_statistics(
    qmodel: PreparedModel,
    batches: Iterable[Any],
    axes: Mapping[str, int],
    *,
    samples: int | None = None,
    progress: bool | None = None,
    description: str = "statistics",
    sensitivity: bool = False,
) -> dict[str, ChannelStatistics]:
    """Observe channels of tensors in one pass over the data, in the model's present phase and mode.

    Args:
        qmodel: The model.
        batches: As for `qat.calibrate`.
        axes: Dimension of the channels of each tensor to watch; the batch is dimension 0.
        samples: Stop after this many samples; None for all.
        progress: Show a progress bar; None for only on a terminal.
        description: What the bar says.
        sensitivity: Go back through the model too, for the sensitivities; its parameters get no gradients.

    Raises:
        DataError: No batch, or one that does not fit.
    """
    watcher = _Watcher(qmodel, axes)
    seen = 0
    hidden = None if progress is None else not progress
    with without_parameters(qmodel), torch.set_grad_enabled(sensitivity):
        for batch in tqdm(batches, desc=description, unit="batch", leave=False, disable=hidden):
            inputs = model_inputs(qmodel, batch)
            if samples is not None:
                inputs = first_samples(qmodel, inputs, samples - seen)
            outputs = watcher.run(*(x.detach().clone() for x in inputs))
            if sensitivity:
                project_back(outputs, inputs)
            seen += sample_count(qmodel, inputs)
            if samples is not None and seen >= samples:
                break
    if not seen:
        raise DataError("no data to equalize on", "give at least one batch")
    return {name: sums.result() for name, sums in watcher.sums.items()}
