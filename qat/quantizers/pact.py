"""PACT: the clip of an activation is learned.

Source: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks" (2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from qat.observers.options import Option
from qat.quantizers.method import FLOOR, Method, Role, Start, at_least


class PACT(Method):
    """The clip of an activation is a parameter, `alpha`; after a ReLU it is the upper end of the range.

    The gradient of alpha is 1 for each element that is clipped and 0 for others (section 3 of the paper). Of a tensor
    with negative values, alpha is the longer end of the range, and the other end keeps its ratio to it: the zero point
    stays. The paper's regularizer is `penalty`, `decay / 2 * alpha**2`: a term of the loss, that reaches alpha by the
    gradient `decay * alpha`, whatever the optimizer. `PreparedModel.quantizer_loss` adds it up.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "decay": Option(float, 1e-4, 0.0, 1.0, about="weight of alpha**2 / 2 in `quantizer_loss`"),
    }
    name = "pact"
    roles: ClassVar[tuple[Role, ...]] = ("activation",)
    about = "the clip is learned: gradient 1 where it clips, 0 elsewhere; L2 decay as a term of the loss"
    source = "Choi et al., 2018"
    clips = True

    @property
    def names(self) -> tuple[str, ...]:
        """`alpha`."""
        return ("alpha",)

    def _steps(self, start: Start) -> Tensor:
        """Return the steps between zero and the longer end."""
        zero_point = start.zero_point.to(torch.float32)
        return torch.maximum(self.qmax - zero_point, zero_point - self.qmin)

    def values(self, start: Start) -> Sequence[Tensor]:
        """Return the longer end of the grid."""
        return (start.scale * self._steps(start),)

    def grid(self, parameters: Sequence[Tensor], start: Start) -> tuple[Tensor, Tensor]:
        """Return the scale that ends at alpha, and the zero point of calibration."""
        (first,) = self.values(start)
        # by the ratio, so that the first grid is the calibrated one to the bit
        scale = start.scale * (at_least(parameters[0], first * FLOOR) / first)
        return scale, start.zero_point.to(torch.float32)

    def penalty(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """Return `decay / 2 * sum(alpha**2)`."""
        decay = float(self.options["decay"])
        return 0.5 * decay * parameters[0].square().sum() if decay else None
