"""`LearnedRounding`: a weight whose rounding, down or up, is learned by gradient.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (ICML 2020), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearnedRounding(nn.Module):
    """The soft-quantized weight `(clamp(floor(w / step) + h + z, qmin, qmax) - z) * step`.

    `h = clamp(sigmoid(v) (zeta - gamma) + gamma, 0, 1)`, the rectified sigmoid, goes from rounding down, 0, to rounding
    up, 1. It starts where the soft weight is the float one (or its nearest code, where that is out of range).

    Args:
        steps: The weight in steps of its grid, float32.
        step: The size of a step in units of the weight, of a shape that broadcasts (negative where a batch norm's
            factor is).
        zero_point: Of the grid, of a shape that broadcasts.
        code_range: Smallest and largest code.
        stretch: (gamma, zeta), how far the sigmoid reaches beyond 0 and 1.
    """

    base: Tensor
    step: Tensor
    zero_point: Tensor

    def __init__(
        self,
        steps: Tensor,
        step: Tensor,
        zero_point: Tensor,
        code_range: tuple[int, int],
        stretch: tuple[float, float] = (-0.1, 1.1),
    ) -> None:
        super().__init__()
        self.qmin, self.qmax = code_range
        self.gamma, self.zeta = stretch
        base = torch.floor(steps)
        self.register_buffer("base", base)
        self.register_buffer("step", step)
        self.register_buffer("zero_point", zero_point)
        share = (steps - base - self.gamma) / (self.zeta - self.gamma)
        self.logits = nn.Parameter(torch.logit(share))

    def up(self) -> Tensor:
        """Return h, how far each weight is rounded up, between 0 and 1."""
        return torch.clamp(torch.sigmoid(self.logits) * (self.zeta - self.gamma) + self.gamma, 0.0, 1.0)

    def weight(self) -> Tensor:
        """Return the soft-quantized weight, float32."""
        low, high = self.qmin - self.zero_point, self.qmax - self.zero_point
        return torch.clamp(self.base + self.up(), low, high) * self.step

    def indecision(self, beta: float) -> Tensor:
        """Return the sum of `1 - |2 h - 1|**beta`: the number of weights that are neither down nor up."""
        return (1.0 - (2.0 * self.up() - 1.0).abs().pow(beta)).sum()

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the codes that were learned, int32."""
        up = (self.logits >= 0).to(torch.float32)
        return torch.clamp(self.base + up + self.zero_point, self.qmin, self.qmax).to(torch.int32)
