"""`Feed`: samples of a unit, drawn at random, with its quantization dropped at random.

Source: Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization" (ICLR
2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qat.algorithms.sweep import Visit


class Feed:
    """Draws the samples of a step, and replaces elements of quantized activations by their float values.

    Args:
        visit: The unit with its data.
        size: Samples a step. Where dimension 0 of what the unit reads does not count samples, a step gets one batch.
        drop: Probability of an element to be float.
        seed: Of both.
        quantize: Fake-quantizes in place of a node's module: (node, what it reads) -> result or None.
    """

    def __init__(
        self,
        visit: Visit,
        size: int,
        drop: float,
        seed: int,
        quantize: Callable[[fx.Node, Tensor], Tensor | None] | None = None,
    ) -> None:
        self.visit, self.size, self.drop, self.quantize = visit, size, drop, quantize
        self.device = visit.targets[0].device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        counts = [len(target) for target in visit.targets]
        self.by_sample = all(
            isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
            for inputs, count in zip(visit.quantized_inputs, counts, strict=True)
            for value in inputs
        )
        self.places = [(i, row) for i, count in enumerate(counts) for row in range(count)]

    def draw(self) -> tuple[list[Any], Tensor]:
        """Return inputs and target of a step; they are copies, for an operator may work in place."""
        quantized, reference = self.visit.quantized_inputs, self.visit.float_inputs
        if not self.by_sample:
            i = int(torch.randint(len(quantized), (), generator=self.generator, device=self.device))
            return [self._mix(q, f) for q, f in zip(quantized[i], reference[i], strict=True)], self.visit.targets[i]
        order = torch.randperm(len(self.places), generator=self.generator, device=self.device)
        places = [self.places[p] for p in order[: self.size].tolist()]
        inputs = [
            self._mix(_rows(quantized, places, k), _rows(reference, places, k) if self.drop else None)
            for k in range(len(self.visit.unit.inputs))
        ]
        return inputs, torch.stack([self.visit.targets[i][row] for i, row in places])

    def change(self, node: fx.Node, value: Any, before: Any) -> Any:
        """Replace the result of a fake quantizer, or elements of it by what went in."""
        if node.meta.get("quantizes") is None:
            return value
        learned = self.quantize(node, before) if self.quantize is not None else None
        value = value if learned is None else learned
        return value if node is self.visit.unit.output else self._mix(value, before)

    def _mix(self, quantized: Any, reference: Any) -> Any:
        if not isinstance(quantized, Tensor):
            return quantized
        if not self.drop or not quantized.is_floating_point():
            return quantized.clone()
        chance = torch.rand(quantized.shape, generator=self.generator, device=quantized.device)
        return torch.where(chance < self.drop, reference, quantized)


def _rows(batches: tuple[tuple[Any, ...], ...], places: list[tuple[int, int]], k: int) -> Tensor:
    return torch.stack([batches[i][k][row] for i, row in places])
