"""The expected quantization noise of a model as a function of its channels' factors, and the factors with the least.

A layer k reads channel c with the factor s_c taken out of the activation and put into its weight. With steps D = range
/ codes the noise that quantization adds to the outputs of the model, squared and to first order, is

    activations:  sum_c (D_T s_c)^2 / 12  H_c
    weights:      sum_oc (d_o s_o / s_c)^2 / 12  E[x_c^2] H_o

where D_T comes from the range of x_c / s_c over the channels of the tensor, d_o from that of w_oc s_c / s_o over the
weights that share a grid, s_o are the factors of the layer's own output, and the sensitivity H of a channel is what
noise of variance 1 in it does to the outputs: the sum over its places of the squares of the outputs' derivatives
(`qat.algorithms.statistics`). A channel of small values that the outputs hang on gets codes before a large one that
they do not. The sum over all tensors and layers is minimised over log s by gradient descent. This is a method of this
project. Its extreme cases are known: weights alone give cross-layer equalization (Nagel et al., "Data-Free Quantization
through Weight Equalization and Bias Correction", ICCV 2019), activations of a layer norm against weights SmoothQuant
(Xiao et al., ICML 2023) and AMCT's DMQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoisyTensor:
    """Activations that share a grid.

    Attributes:
        groups: Group of each channel, int64, (C,).
        low: Lower end of the range of each channel, float64, (C,).
        high: Upper end, likewise.
        symmetric: The grid is symmetric around zero.
        levels: Steps of the grid.
        sensitivity: Of each channel, float64, (C,).
    """

    groups: Tensor
    low: Tensor
    high: Tensor
    symmetric: bool
    levels: int
    sensitivity: Tensor


@dataclass(frozen=True)
class NoisyLayer:
    """A weighted operator.

    Attributes:
        largest: Largest magnitude of the weight (with its batch norm folded in) over the taps, float64, (A, B).
        taps: Number of taps.
        groups_in: Group of the input channel of each element, int64, (A, B).
        groups_out: Group of the output channel, likewise.
        power: Mean square of the input of each element, float64, (A, B).
        sensitivity: Of the output channel of each element, likewise.
        grids: Number of the grid of each element, int64, (A, B).
        levels: Codes from zero to the largest magnitude; 0 for a weight that stays float.
    """

    largest: Tensor
    taps: int
    groups_in: Tensor
    groups_out: Tensor
    power: Tensor
    sensitivity: Tensor
    grids: Tensor
    levels: int


def noise(logs: Tensor, tensors: Sequence[NoisyTensor], layers: Sequence[NoisyLayer]) -> Tensor:
    """Return the expected squared change of the outputs by the noise of all tensors and layers together.

    Args:
        logs: Logarithms of the factors by group, (count,); that of group 0 must be 0.
        tensors: Activations.
        layers: Weighted operators.
    """
    total = logs.new_zeros(())
    for t in tensors:
        s = logs[t.groups].exp()
        low, high = torch.clamp((t.low / s).amin(), max=0.0), torch.clamp((t.high / s).amax(), min=0.0)
        width = 2 * torch.maximum(-low, high) if t.symmetric else high - low
        total = total + ((width / t.levels) ** 2 / 12) * (t.sensitivity * s**2).sum()
    for layer in layers:
        if layer.levels == 0:
            continue
        s_in, s_out = logs[layer.groups_in].exp(), logs[layer.groups_out].exp()
        scaled = (layer.largest * s_in / s_out).reshape(-1)
        count = int(layer.grids.max()) + 1
        largest = scaled.new_zeros(count).scatter_reduce(0, layer.grids.reshape(-1), scaled, "amax")
        step = largest[layer.grids] / layer.levels
        total = total + (layer.taps * (step * s_out / s_in) ** 2 / 12 * layer.power * layer.sensitivity).sum()
    return total


def least_noise_factors(
    tensors: Sequence[NoisyTensor], layers: Sequence[NoisyLayer], count: int, *, steps: int = 300, rate: float = 0.05
) -> tuple[Tensor, float, float]:
    """Return the factors by group with the least expected noise, (count,), and the noise before and after.

    Args:
        tensors: Activations.
        layers: Weighted operators.
        count: Number of groups; the factor of group 0 is 1.
        steps: Steps of Adam on the logarithms.
        rate: Its rate; it falls to zero along a cosine.
    """
    logs = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logs], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    free = torch.ones(count, dtype=torch.float64)
    free[0] = 0.0
    best, best_noise, first = logs.detach().clone(), float("inf"), 0.0
    for step in range(steps + 1):
        value = noise(logs * free, tensors, layers)
        current = float(value.detach())
        if step == 0:
            first = current
        if current < best_noise:
            best, best_noise = (logs * free).detach().clone(), current
        if step == steps or current == 0.0:
            break
        optimizer.zero_grad()
        # noises differ by orders of magnitude between models and layers
        torch.autograd.backward(value.log())
        optimizer.step()
        schedule.step()
    return best.exp(), first, best_noise
