"""Weights that make up for the error of what their layer reads: the least squares solution for the float output."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qat.algorithms.sweep import Visit
from qat.algorithms.unfolded import WeightMatrix


def input_pairs(visit: Visit) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a unit's layer reads in the quantized and in the float path, batch by batch."""
    for quantized, reference in zip(visit.quantized_inputs, visit.float_inputs, strict=True):
        yield quantized[0], reference[0]


def damp(moments: Tensor, damping: float) -> Tensor:
    """Add a share of the mean diagonal to the diagonal of each of a batch of matrices."""
    diagonal = moments.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # inputs that are never seen: any code is as good as the nearest
    mean = torch.where(mean > 0, mean, 1.0)
    return moments + torch.diag_embed((mean * damping).expand_as(diagonal))


def correction_damping(visit: Visit, form: WeightMatrix, damping: float) -> float:
    """Return a damping for `corrected` that grows where there are few samples for the weights of a row.

    A linear layer behind a global pooling has one place a sample: its weights could fit the samples to the last digit.
    """
    places = sum(target.numel() for target in visit.targets) / form.outputs
    return damping + form.columns / places


def corrected(weight: Tensor, moments: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Return the weights W' that minimise `|W' q - W f|^2 + damping * mean(diag H) |W' - W|^2` over the samples.

    Args:
        weight: W, float64, (groups, output channels, columns).
        moments: H, the sum of `q^T q` (see `WeightMatrix.moments`).
        cross: The sum of `(f - q)^T q`.
        damping: Share of the mean diagonal of H.
    """
    change: Tensor = torch.linalg.solve(damp(moments, damping), (weight @ cross).transpose(1, 2))
    return weight + change.transpose(1, 2)
