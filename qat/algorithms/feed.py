"""What a unit computes on samples that are drawn at random, with its quantization dropped at random.

Source: Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization" (ICLR
2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qat.algorithms.sweep import Visit
from qat.algorithms.unfolded import Unfolded, WeightMatrix
from qat.algorithms.units import ELEMENTWISE

#: places that are drawn a sample where the places of a layer's output are drawn singly
_PLACES = 32
#: operators that act on each place of a layer's output for itself
_BY_PLACE = ELEMENTWISE | {"batch_norm", "clamp"}
Quantize = Callable[[fx.Node, Tensor], Tensor | None]


def make_feed(
    visit: Visit, size: int, drop: float, seed: int, quantize: Quantize | None = None
) -> SampleFeed | PlaceFeed:
    """Choose how to draw: single places of a single layer, or whole samples.

    Args:
        visit: The unit with its data.
        size: Samples a step. Where dimension 0 of what the unit reads does not count samples, a step gets one batch.
        drop: Probability of an element of a quantized activation to be float.
        seed: Of both.
        quantize: Fake-quantizes in place of a node's module: (node, what it reads) -> result or None.
    """
    kind = PlaceFeed if is_by_place(visit) else SampleFeed
    return kind(visit, size, drop, seed, quantize)


class _Feed:
    def __init__(self, visit: Visit, size: int, drop: float, seed: int, quantize: Quantize | None) -> None:
        self.visit, self.size, self.drop, self.quantize = visit, size, drop, quantize
        self.device = visit.targets[0].device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        #: what the fake quantizer that ends the unit has read in the last step; None where there is none
        self.unquantized: Tensor | None = None

    def change(self, node: fx.Node, value: Any, before: Any) -> Any:
        """Replace the result of a fake quantizer, or elements of it by what went in."""
        if node.meta.get("quantizes") is None:
            return value
        if node is self.visit.unit.output:
            # its noise would blur what the weights learn: they see the value before it, and it sees them as they are
            self.unquantized = before
            learned = self.quantize(node, before.detach()) if self.quantize is not None else None
            return before.detach() if learned is None else learned
        learned = self.quantize(node, before) if self.quantize is not None else None
        return self._mix(value if learned is None else learned, before)

    def _mix(self, quantized: Any, reference: Any) -> Any:
        if not isinstance(quantized, Tensor):
            return quantized
        if not self.drop or not quantized.is_floating_point():
            return quantized.clone()
        chance = torch.rand(quantized.shape, generator=self.generator, device=quantized.device)
        return torch.where(chance < self.drop, reference, quantized)


class PlaceFeed(_Feed):
    """Draws places of a layer's output, from all samples alike.

    Neighbouring places see nearly the same, so that some from everywhere tell as much as all of a few samples, at a
    fraction of the cost.
    """

    def __init__(self, visit: Visit, size: int, drop: float, seed: int, quantize: Quantize | None = None) -> None:
        super().__init__(visit, size, drop, seed, quantize)
        (self.layer,) = visit.unit.layers
        self.form = WeightMatrix(self.layer.op, tuple(self.layer.weight.shape))
        self.linear = self.layer.op.kind == "linear"
        self.quantized = self.form.unfold(_joined(visit.quantized_inputs)[0])
        self.reference = self.form.unfold(_joined(visit.float_inputs)[0]) if drop else None
        targets = torch.cat(visit.targets)
        self.spread = (1,) * (0 if self.linear else targets.dim() - 2)
        self.target = (targets if self.linear else targets.movedim(1, -1)).reshape(len(self.quantized.base), -1)

    def step(self) -> tuple[Tensor, Tensor]:
        """Return the output at the places of a step, and the target."""
        count = self.size * _PLACES
        total = len(self.target)
        places = torch.arange(total, device=self.device)
        if count < total:
            places = torch.randint(total, (count,), generator=self.generator, device=self.device)
        layer = self.layer
        weight = self.form.matrix(getattr(layer.owner, layer.attribute))
        if weight.shape[0] == self.quantized.pixels.shape[1] > 1 and weight.shape[1] == 1:
            # depthwise: many products of single rows are slow as products of matrices
            out = (self._drawn(Unfolded.windows, places) * weight.squeeze(1).T).sum(1)
        else:
            out = (self._drawn(Unfolded.rows, places) @ weight.transpose(1, 2)).transpose(0, 1).flatten(1)
        if layer.bias is not None:
            out = out + getattr(self.visit.root.get_submodule(layer.bias.module), layer.bias.attribute)
        out = out.reshape(*out.shape, *self.spread)
        out = self.visit.unit.run_from(self.visit.root, out, self.change)
        return out, self.target[places].reshape(out.shape)

    def _drawn(self, take: Callable[[Unfolded, Tensor], Tensor], places: Tensor) -> Tensor:
        quantized = take(self.quantized, self.quantized.base[places])
        if self.reference is None:
            return quantized
        mixed: Tensor = self._mix(quantized, take(self.reference, self.reference.base[places]))
        return mixed


class SampleFeed(_Feed):
    """Draws samples."""

    def __init__(self, visit: Visit, size: int, drop: float, seed: int, quantize: Quantize | None = None) -> None:
        super().__init__(visit, size, drop, seed, quantize)
        counts = [len(target) for target in visit.targets]
        self.by_sample = all(
            isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
            for inputs, count in zip(visit.quantized_inputs, counts, strict=True)
            for value in inputs
        )
        self.count = sum(counts)
        if self.by_sample:
            self.quantized = _joined(visit.quantized_inputs)
            self.reference = _joined(visit.float_inputs) if drop else [None] * len(self.quantized)
            self.target = torch.cat(visit.targets)

    def step(self) -> tuple[Tensor, Tensor]:
        """Return the output on the samples of a step, and the target."""
        inputs, target = self._draw()
        change = self.change if self.drop or self.quantize is not None else None
        return self.visit.unit.run(self.visit.root, inputs, change), target

    def _draw(self) -> tuple[list[Any], Tensor]:
        # copies, for an operator may work in place
        if not self.by_sample:
            i = int(torch.randint(len(self.visit.targets), (), generator=self.generator, device=self.device))
            pairs = zip(self.visit.quantized_inputs[i], self.visit.float_inputs[i], strict=True)
            return [self._mix(q, f) for q, f in pairs], self.visit.targets[i]
        rows = torch.randperm(self.count, generator=self.generator, device=self.device)[: self.size]
        inputs = [
            self._mix(q[rows], None if f is None else f[rows])
            for q, f in zip(self.quantized, self.reference, strict=True)
        ]
        return inputs, self.target[rows]


def is_by_place(visit: Visit) -> bool:
    """Whether a unit is one layer and what acts on each place of its output for itself."""
    unit = visit.unit
    if len(unit.layers) != 1 or len(unit.inputs) != 1:
        return False
    (layer,) = unit.layers
    kinds = {op.node: op.kind for op in visit.root.opgraph.ops.values()}
    if kinds.get(unit.nodes[0].name) != layer.op.kind or unit.nodes[0].name != layer.op.node:
        return False
    return all(n.meta.get("quantizes") or kinds.get(n.name) in _BY_PLACE for n in unit.nodes[1:])


def _joined(batches: tuple[tuple[Any, ...], ...]) -> list[Any]:
    return [torch.cat([inputs[k] for inputs in batches]) for k in range(len(batches[0]))]
