"""How much of a tensor a range cuts off."""

from __future__ import annotations

import torch
from torch import Tensor

from qat import numerics
from qat.errors import DataError
from qat.scheme import Scheme


def overflow_rate(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> float:
    """Return the share of elements whose code is at a clamp value, MNN's "overflow ratio".

    For symmetric schemes those are the codes `clamp` or more steps away from zero, clamp being the smaller number of
    codes on a side (127 for int8); for affine ones `qmin` and `qmax`, without the one that is zero's own code: half
    of a tensor after ReLU is there, and nothing is lost. An element exactly on the last code counts, as in MNN.

    Args:
        x: Any shape, floating point, not empty.
        scale: float32; one, or one a channel or group.
        zero_point: Integers in the shape of `scale`.
        scheme: Its integer range, symmetry and granularity.

    Raises:
        DataError: `x` is empty.
    """
    if x.numel() == 0:
        raise DataError("an empty tensor has no overflow rate", "give at least one element")
    qmin, qmax = scheme.code_range
    codes = numerics.quantize(x, scale, zero_point, qmin, qmax, scheme.granularity).to(torch.int64)
    zero = numerics.expand_to(zero_point.to(torch.int64), x, scheme.granularity)
    lowest, highest = torch.full_like(zero, qmin), torch.full_like(zero, qmax)
    if scheme.symmetric:
        above, below = qmax - scheme.symmetric_zero_point, scheme.symmetric_zero_point - qmin
        clamp = min(above, below) or max(above, below)
        lowest, highest = torch.maximum(lowest, zero - clamp), torch.minimum(highest, zero + clamp)
    at_clamp = ((codes <= lowest) & (lowest != zero)) | ((codes >= highest) & (highest != zero))
    return float(at_clamp.to(torch.float64).mean())
