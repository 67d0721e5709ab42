"""Convolution and linear operators as products of matrices: rows of inputs times rows of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.graph.opgraph import GraphOp

#: elements of rows that are made at a time
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

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.shape[1] * self.groups if self.op.kind == "conv_transpose" else self.shape[0]

    @property
    def columns(self) -> int:
        """Number of weights that an output channel has."""
        return math.prod(self.shape) // self.outputs

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

    def unfold(self, x: Tensor) -> Unfolded:
        """Return the rows that the matrices are multiplied with.

        Args:
            x: Input of the operator.
        """
        if self.op.kind == "linear":
            pixels = x.reshape(-1, x.shape[-1])
            return Unfolded(
                pixels, torch.arange(len(pixels), device=x.device), torch.zeros(1, dtype=torch.long, device=x.device), 1
            )
        kernel, attrs = self.shape[2:], self.op.attrs
        dilation, stride, padding = attrs["dilation"], attrs["stride"], attrs["padding"]
        if self.op.kind == "conv_transpose":
            # a convolution of the input with zeros between its elements, by the kernel turned around
            x = _spread(x, stride)
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            sides = zip(reach, padding, attrs["output_padding"], strict=True)
            padding, stride = [(r - low, r - high + extra) for r, (low, high), extra in sides], [1] * len(kernel)
        x = F.pad(x, [side for pair in reversed(list(padding)) for side in pair])
        starts, taps = torch.arange(len(x), device=x.device), torch.zeros(1, dtype=torch.long, device=x.device)
        for size, k, step, gap in zip(x.shape[2:], kernel, stride, dilation, strict=True):
            places = torch.arange((size - gap * (k - 1) - 1) // step + 1, device=x.device) * step
            turned = torch.arange(k, device=x.device)
            turned = turned.flip(0) if self.op.kind == "conv_transpose" else turned
            starts = (starts[:, None] * size + places).flatten()
            taps = (taps[:, None] * size + turned * gap).flatten()
        return Unfolded(x.movedim(1, -1).reshape(-1, x.shape[1]), starts, taps, self.groups)

    def moments(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Moments:
        """Sum up the rows of a quantized input q and of its float value f over all samples.

        Args:
            batches: Pairs of q and f.
        """
        total: Moments | None = None
        for quantized, reference in batches:
            a, b = self.unfold(quantized.to(torch.float32)), self.unfold(reference.to(torch.float32))
            for base in torch.split(a.base, max(1, _ELEMENTS // a.columns)):
                part = _moments(a.rows(base), b.rows(base))
                total = part if total is None else total + part
        assert total is not None
        return total


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of a layer's input in the quantized (q) and in the float path (f), float64.

    Kept about the means, where products do not cancel (Chan et al., "Algorithms for Computing the Sample Variance",
    1983).

    Attributes:
        count: Number of rows.
        quantized: Mean of q, (groups, columns).
        difference: Mean of f - q, likewise.
        second_about: Of `q^T q`, less the mean, (groups, columns, columns).
        cross_about: Of `(f - q)^T q`, less the means, likewise.
    """

    count: int
    quantized: Tensor
    difference: Tensor
    second_about: Tensor
    cross_about: Tensor

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share, weight = other.count / count, self.count * other.count / count
        q, d = other.quantized - self.quantized, other.difference - self.difference
        return Moments(
            count,
            self.quantized + share * q,
            self.difference + share * d,
            self.second_about + other.second_about + weight * _outer(q, q),
            self.cross_about + other.cross_about + weight * _outer(d, q),
        )

    @property
    def second(self) -> Tensor:
        """The sum of `q^T q`."""
        return self.second_about + self.count * _outer(self.quantized, self.quantized)

    @property
    def cross(self) -> Tensor:
        """The sum of `(f - q)^T q`."""
        return self.cross_about + self.count * _outer(self.difference, self.quantized)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :, None] * b[:, None, :]


def _moments(rows: Tensor, floats: Tensor) -> Moments:
    """Return the moments of some rows, which are overwritten."""
    difference = floats.sub_(rows)
    means = [values.mean(1, keepdim=True, dtype=torch.float64) for values in (rows, difference)]
    for values, mean in zip((rows, difference), means, strict=True):
        values -= mean.to(values.dtype)
    quantized, other = (mean[:, 0] for mean in means)
    second, cross = rows.transpose(1, 2) @ rows, difference.transpose(1, 2) @ rows
    return Moments(rows.shape[1], quantized, other, second.to(torch.float64), cross.to(torch.float64))


@dataclass(frozen=True)
class Unfolded:
    """The input of an operator as rows that are made where they are wanted.

    Attributes:
        pixels: The padded input, (samples x places, channels): what a place needs lies together in memory.
        base: Number of the first pixel for each place of the output, samples first.
        taps: How many pixels after that the others are.
        groups: Groups of channels.
    """

    pixels: Tensor
    base: Tensor
    taps: Tensor
    groups: int

    @property
    def columns(self) -> int:
        """Elements of a row, all groups together."""
        return len(self.taps) * self.pixels.shape[1]

    def windows(self, base: Tensor) -> Tensor:
        """Return what some places see, (places, taps, channels), by their starts."""
        found = self.pixels.index_select(0, (base[:, None] + self.taps).flatten())
        return found.reshape(len(base), len(self.taps), -1)

    def rows(self, base: Tensor) -> Tensor:
        """Return the rows of some places, (groups, places, columns), by their starts."""
        found = self.windows(base).reshape(len(base), len(self.taps), self.groups, -1)
        return found.permute(2, 0, 3, 1).reshape(self.groups, len(base), -1)


def _spread(x: Tensor, stride: Iterable[int]) -> Tensor:
    for d, step in enumerate(stride):
        size = list(x.shape)
        size[2 + d] = (x.shape[2 + d] - 1) * step + 1
        spread = x.new_zeros(size)
        spread[(slice(None),) * (2 + d) + (slice(None, None, step),)] = x
        x = spread
    return x
