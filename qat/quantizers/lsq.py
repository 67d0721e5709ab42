"""LSQ and LSQ+: the scale, and the offset, are learned with a balanced gradient.

Sources: Esser et al., "Learned Step Size Quantization" (ICLR 2020); Bhalgat et al., "LSQ+: Improving low-bit
quantization through learnable offsets and better initialization" (CVPR workshops 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from qat.observers.options import Option
from qat.quantizers.method import FLOOR, Method, Start, at_least


class LSQ(Method):
    """The scale is a parameter, `step`; the zero point stays what calibration made it.

    The gradient of the step is that of `fake_quantize_learned` times `1 / sqrt(N * levels)` (section 2.2): N is the
    number of weights, or of an activation's elements in one sample, that share the step, and `levels` the number of
    steps above zero (2**(bits-1) - 1 for a symmetric tensor, 2**bits - 1 for one with a zero point).
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "init": Option(
            str, "range", choices=("range", "mean"),
            about="of symmetric weights: the observer's range, or 2 mean(abs(w)) / sqrt(levels) as in the paper",
        ),
    }  # fmt: skip
    name = "lsq"
    about = "the scale is learned, its gradient times 1 / sqrt(N levels); the zero point stays"
    source = "Esser et al., ICLR 2020"
    homogeneous = True

    @property
    def names(self) -> tuple[str, ...]:
        """`step`."""
        return ("step",)

    def values(self, start: Start) -> Sequence[Tensor]:
        """Return the scale itself."""
        return (start.scale,)

    def grid(self, parameters: Sequence[Tensor], start: Start) -> tuple[Tensor, Tensor]:
        """Return the step, which is kept positive, and the zero point of calibration."""
        return at_least(parameters[0], start.scale * FLOOR), start.zero_point.to(torch.float32)

    def gradient_factor(self, x: Tensor, count: int) -> float:
        """Return `1 / sqrt(N * levels)`."""
        shared = x.numel() / count
        if self.role == "activation" and x.dim() > 1:
            shared /= max(x.shape[0], 1)
        return 1.0 / math.sqrt(max(shared, 1.0) * self.levels)

    def initial_magnitude(self, rows: Tensor) -> Tensor | None:
        """Return the paper's initial step, times the levels, where it is asked for."""
        if self.options["init"] == "range":
            return None
        return 2.0 * rows.abs().mean(1) * math.sqrt(self.levels)


class LSQPlus(LSQ):
    """Scale and offset are parameters: `step`, and `offset`, the value at which the code would be zero.

    The zero point is `-offset / step`, rounded. The gradients are those of the paper (section 3.2): of the offset, 1
    outside the range and 0 inside it; both times the factor of `lsq`. A symmetric tensor, such as a weight, has no
    offset.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "init": Option(
            str, "range", choices=("range", "sigma"),
            about="of symmetric weights: the observer's range, or the larger of abs(mean -+ 3 sigma) as in the paper",
        ),
    }  # fmt: skip
    name = "lsq_plus"
    about = "scale and offset are learned, with the gradient factor of `lsq`"
    source = "Bhalgat et al., CVPR workshops 2020"

    @property
    def names(self) -> tuple[str, ...]:
        """`step`, and `offset` where the scheme is not symmetric."""
        return ("step",) if self.scheme.symmetric else ("step", "offset")

    def values(self, start: Start) -> Sequence[Tensor]:
        """Return the scale, and the value of code zero."""
        if self.scheme.symmetric:
            return (start.scale,)
        return start.scale, -start.zero_point.to(torch.float32) * start.scale

    def grid(self, parameters: Sequence[Tensor], start: Start) -> tuple[Tensor, Tensor]:
        """Return the step, which is kept positive, and the zero point that the offset makes."""
        scale, zero_point = super().grid(parameters, start)
        return (scale, zero_point) if self.scheme.symmetric else (scale, -parameters[1] / scale)

    def initial_magnitude(self, rows: Tensor) -> Tensor | None:
        """Return the paper's initial range, where it is asked for."""
        if self.options["init"] == "range":
            return None
        mean, sigma = rows.mean(1), 3.0 * rows.std(1, correction=0)
        # the paper's scale is this over 2**(bits-1), one more than the levels
        whole = 1 << self.levels.bit_length()
        return torch.maximum((mean - sigma).abs(), (mean + sigma).abs()) * (self.levels / whole)
