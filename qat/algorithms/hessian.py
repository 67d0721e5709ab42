"""The second moments of what a convolution or linear operator multiplies its weights with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.graph.opgraph import GraphOp

#: elements of the unfolded inputs that are made at a time
_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class WeightMatrix:
    """How the weight of an operator is a batch of matrices, one a group, whose columns are what is summed over.

    Attributes:
        op: The operator.
        shape: Of its weight.
    """

    op: GraphOp
    shape: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return int(self.op.attrs.get("groups", 1))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight (or anything of its shape) as (groups, output channels, columns)."""
        if self.op.kind == "conv_transpose":
            parts = weight.reshape(self.groups, -1, *weight.shape[1:])
            return parts.transpose(1, 2).flatten(2)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight(self, matrix: Tensor) -> Tensor:
        """Return what `matrix` made, in the shape of the weight."""
        if self.op.kind == "conv_transpose":
            inputs, outputs, *kernel = self.shape
            parts = matrix.reshape(self.groups, outputs, inputs // self.groups, *kernel)
            return parts.transpose(1, 2).reshape(self.shape)
        return matrix.reshape(self.shape)

    def rows(self, x: Tensor) -> Tensor:
        """Return the rows that the matrices are multiplied with: (groups, samples x places, columns)."""
        if self.op.kind == "linear":
            return x.reshape(1, -1, x.shape[-1])
        kernel = self.shape[2:]
        attrs = self.op.attrs
        dilation, stride, padding = attrs["dilation"], attrs["stride"], attrs["padding"]
        if self.op.kind == "conv_transpose":
            # a convolution of the input with zeros between its elements, by the kernel turned around
            x = _spread(x, stride)
            extra = attrs["output_padding"]
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding = [(r - low, r - high + e) for r, (low, high), e in zip(reach, padding, extra, strict=True)]
            stride = [1] * len(kernel)
        x = F.pad(x, [side for pair in reversed(list(padding)) for side in pair])
        for d, k in enumerate(kernel):
            x = x.unfold(2 + d, (k - 1) * dilation[d] + 1, stride[d])[..., :: dilation[d]]
        if self.op.kind == "conv_transpose":
            x = x.flip(list(range(-len(kernel), 0)))
        # samples, channels, places, kernel
        samples, channels = x.shape[:2]
        x = x.reshape(samples, self.groups, channels // self.groups, -1, *kernel)
        return x.transpose(2, 3).movedim(1, 0).reshape(self.groups, -1, channels // self.groups * _product(kernel))

    def second_moments(self, batches: Iterable[Tensor]) -> Tensor:
        """Return the sum of the rows' outer products over all samples, float64: (groups, columns, columns)."""
        total: Tensor | None = None
        for x in batches:
            columns = _product(self.shape[1:]) if self.op.kind != "conv_transpose" else _product(self.shape[2:])
            places = x[:1].numel() if self.op.kind == "linear" else _product(x.shape[2:]) * self.groups * columns
            for part in torch.split(x, max(1, _ELEMENTS // max(places, 1))):
                rows = self.rows(part.to(torch.float32))
                moments = (rows.transpose(1, 2) @ rows).to(torch.float64)
                total = moments if total is None else total + moments
        assert total is not None
        return total


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _spread(x: Tensor, stride: Iterable[int]) -> Tensor:
    for d, step in enumerate(stride):
        size = list(x.shape)
        size[2 + d] = (x.shape[2 + d] - 1) * step + 1
        spread = x.new_zeros(size)
        spread[(slice(None),) * (2 + d) + (slice(None, None, step),)] = x
        x = spread
    return x
