"""DoReFa: weights through tanh, activations clipped to a range that stays.

Source: Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients"
(2016), sections 2.3 and 2.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantizers.method import Method
from qat.quantizers.tanh import tanh_ratio, tanh_weight


class DoReFa(Method):
    """What is quantized of a weight is `tanh(w) * max(abs(w)) / max(abs(tanh(w)))`; there are no parameters.

    The paper divides by `max(abs(tanh(w)))`, so that weights are in [-1, 1], and relies on a batch norm to undo the
    scale; multiplied by the largest weight, a trained network keeps its function, with or without batch norm. The
    grid is the scheme's, with a code for zero (the paper's has none), and its range is that of the transformed
    weight. That weight, folded with a batch norm, is what export writes. The ratio of the maxima is a constant to
    the gradient.

    An activation is clipped to its calibrated range, which stays: the paper's [0, 1], times the range.
    """

    name = "dorefa"
    about = "weights through tanh, scaled to their own largest magnitude; activations clipped to the calibrated range"
    source = "Zhou et al., 2016"

    @property
    def transforms(self) -> bool:
        """Of weights."""
        return self.role == "weight"

    def transform(self, weight: Tensor) -> Tensor:
        """Return the weight through tanh, float32."""
        return tanh_weight(weight.to(torch.float32))

    def untransform(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return the inverse of tanh, with the ratio of `weight`."""
        return torch.atanh(values / tanh_ratio(weight.to(torch.float32)))
