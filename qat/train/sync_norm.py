"""Batch norms whose statistics are those of the batches of all processes.

`torch.nn.SyncBatchNorm` refuses tensors on the CPU, and is another class, by which neither fused passes nor folding
would know the module. Here the modules stay what they are, with their state and keys, and get another `forward` while
they are trained; it is one implementation for all devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from qat.train import processes


class _Synchronized(_BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        values = x.to(torch.float32)
        with torch.no_grad():
            mean, variance, count = _moments(values)
            self._follow(mean, variance, count)
        out: Tensor = _Normalize.apply(values, self.weight, self.bias, mean, variance, count, self.eps)  # type: ignore[no-untyped-call]
        return out.to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics, as `torch.nn.BatchNorm2d` does."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        weight = 0.0 if momentum is None else momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        unbiased = variance * (count / (count - 1.0).clamp(min=1.0))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)


class _Synchronized1d(_Synchronized, nn.BatchNorm1d):
    pass


class _Synchronized2d(_Synchronized, nn.BatchNorm2d):
    pass


class _Synchronized3d(_Synchronized, nn.BatchNorm3d):
    pass


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _Synchronized1d,
    nn.BatchNorm2d: _Synchronized2d,
    nn.BatchNorm3d: _Synchronized3d,
}


@contextlib.contextmanager
def synchronized_norms(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Let the batch norms of a model take their statistics over all processes while the block runs.

    That is for training mode; in evaluation they do what they always do. Nothing happens in a single process.

    Yields:
        Module paths of the batch norms of other classes, which are left alone.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)} if processes.size() > 1 else {}
    changed = {module: type(module) for module in norms.values() if type(module) in _KINDS}
    alone = tuple(name for name, m in norms.items() if m not in changed and not isinstance(m, nn.SyncBatchNorm))
    try:
        for module, kind in changed.items():
            module.__class__ = _KINDS[kind]  # type: ignore[assignment]
        yield alone
    finally:
        for module, kind in changed.items():
            module.__class__ = kind


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance, float32 (C,), of all processes' (N, C, ...), and how many values are in each.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """
    variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    own = torch.cat([mean.double(), variance.double(), mean.new_full((1,), x.numel() // x.shape[1]).double()])
    each = torch.stack(processes.tensor_of_each(own))
    means, variances, counts = each[:, : len(mean)], each[:, len(mean) : -1], each[:, -1:]
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    variance = (counts * (variances + (means - mean).square())).sum(0) / count
    return mean.float(), variance.float(), count


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # with given statistics: the gradient but for what comes through them, and the two sums that this is made of
        direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack(processes.tensor_of_each(torch.stack([of_weight, of_bias]).double())).sum(0)
        by_weight, by_bias = (sums / count).float()
        root = torch.rsqrt(variance + ctx.eps)
        scale = root if weight is None else weight.float() * root
        shape = [1, -1, *([1] * (x.dim() - 2))]
        slope, offset = (by_weight * root * scale).view(shape), (by_bias * scale).view(shape)
        dx = direct.sub_((x - mean.view(shape)).mul_(slope).add_(offset))
        _, with_weight, with_bias, *_ = ctx.needs_input_grad
        return dx, of_weight if with_weight else None, of_bias if with_bias else None, None, None, None, None
