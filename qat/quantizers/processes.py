"""What quantizers need where several processes train."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Tell whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def with_zero_gradients(y: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    """Return `y`, in a graph where the backward pass gives other tensors a gradient of zero."""
    out: Tensor = _ZeroGradients.apply(y, *others)  # type: ignore[no-untyped-call]
    return out


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(other) for other in ctx.saved_tensors)
