"""What folding a batch norm multiplies a weight with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

#: Smallest |gamma| that is used: keeps the factor away from zero. The outputs of a batch norm are off by less
#: than this times the normalized value, far below any activation's scale.
GAMMA_FLOOR = 2.0**-20


@torch.library.custom_op("qat::snapshot", mutates_args=())
def _snapshot(x: Tensor) -> Tensor:
    """Return a copy that compiled code keeps for the backward pass.

    The forward pass changes the running variance. What is computed from it, the compiler would compute once more in the
    backward pass, from the changed variance (pytorch/pytorch#197039); it leaves custom operators as they are.
    """
    return x.clone()


@_snapshot.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def folding_factor(bn: _BatchNorm) -> Tensor | None:
    """Return `gamma / sqrt(running_var + eps)`, float32 (channels,), without gradient; None without statistics.

    A gamma below `GAMMA_FLOOR` in magnitude is used as that, with its sign.
    """
    if bn.running_var is None:
        return None
    variance = bn.running_var.detach()
    if torch.compiler.is_compiling():
        variance = _snapshot(variance)
    variance = variance.to(torch.float32) + bn.eps
    # torch's float32 root may be off by one bit, the float64 one rounded to float32 never is
    root = torch.sqrt(variance.to(torch.float64)).to(torch.float32)
    if bn.weight is None:
        return 1.0 / root
    gamma = bn.weight.detach().to(torch.float32)
    floor = torch.copysign(torch.full_like(gamma, GAMMA_FLOOR), gamma)
    return torch.where(gamma.abs() < GAMMA_FLOOR, floor, gamma) / root


def spread(factor: Tensor, weight: Tensor, channel_axis: int, groups: int) -> Tensor:
    """Return the factor of output channels so that it broadcasts against the weight.

    Args:
        factor: (output channels,).
        weight: The weight.
        channel_axis: Axis of the output channels: 0, or 1 for transposed convolutions.
        groups: Groups of a transposed convolution, whose output channels are groups x the axis.
    """
    if channel_axis == 0 or groups == 1:
        return factor.reshape([-1 if d == channel_axis else 1 for d in range(weight.dim())])
    # (groups, 1, out / groups) over the input channels of each group
    rows = factor.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return rows.reshape(weight.shape[0], weight.shape[1], *([1] * (weight.dim() - 2)))
