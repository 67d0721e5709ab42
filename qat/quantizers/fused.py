"""Batch norm or an addition, its activation and its quantizer as one call: for training, and for calibration.

Each function computes what the modules compute one after the other, with the same state, up to the rounding of float32:
by one native operator where there is one for the case, else by calling the modules.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat import native
from qat.quantizers.activation import FakeQuantize
from qat.quantizers.dropping import draw_seed
from qat.quantizers.processes import is_distributed

#: An activation: a module, the name of a function, or none.
Activation = nn.Module | str | None

_DIMS: dict[type[nn.Module], tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def activation_bounds(activation: Activation) -> tuple[float, float] | None:
    """Return between which values an activation is the identity; None for one that has no fused form."""
    if activation is None:
        return -math.inf, math.inf
    if activation == "relu" or type(activation) is nn.ReLU:
        return 0.0, math.inf
    if activation == "relu6":
        return 0.0, 6.0
    if type(activation) in (nn.ReLU6, nn.Hardtanh):
        return float(activation.min_val), float(activation.max_val)  # type: ignore[union-attr,arg-type]
    return None


def has_norm_pass(norm: nn.Module) -> bool:
    """Tell whether a module is a batch norm that can be fused."""
    return type(norm) in _DIMS


def norm_fake_quantize(
    x: Tensor, norm: nn.Module, activation: Activation, quantizer: FakeQuantize, makers: tuple[nn.Module, ...] = ()
) -> Tensor:
    """Return `quantizer(activation(norm(x)))`.

    Args:
        x: float, (N, C, ...).
        norm: A batch norm.
        activation: What follows it.
        quantizer: Of the result.
        makers: The modules that made `x`, for this call alone: without gradients the result may overwrite it.
    """
    bounds = activation_bounds(activation)
    if bounds is None or not _has_native_norm(x, norm) or _is_hooked(norm, activation):
        return quantizer(_activate(activation, norm(x)))  # type: ignore[no-any-return]
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    statistics = norm.training or norm.running_mean is None
    kept = not norm.training or norm.track_running_stats
    values = native.Norm(
        norm.weight, norm.bias, norm.running_mean if kept else None, norm.running_var if kept else None, statistics,
        norm.momentum or 0.0, norm.eps,
    )  # fmt: skip
    if not statistics and _is_observed(quantizer) and not _needs_gradient(x, norm.weight, norm.bias):
        y = native.norm_observe(x, values, bounds, _statistics(quantizer), in_place=_is_free(makers))
        quantizer.observer.count_samples(y)
        return y
    if not _is_simple(quantizer, x.device):
        return quantizer(native.norm_quantize(x, values, bounds, None))  # type: ignore[no-any-return]
    if quantizer.learning:
        return native.norm_quantize_learned(x, values, bounds, _learned_grid(quantizer, x), _drop(quantizer))
    return native.norm_quantize(x, values, bounds, _grid(quantizer), _drop(quantizer))


def add_fake_quantize(
    x: Tensor, other: Tensor, activation: Activation, quantizer: FakeQuantize, makers: tuple[nn.Module, ...] = ()
) -> Tensor:
    """Return `quantizer(activation(x + other))`.

    Args:
        x: float, any shape.
        other: Likewise; shapes broadcast.
        activation: What follows the addition.
        quantizer: Of the result.
        makers: As in `norm_fake_quantize`.
    """
    bounds = activation_bounds(activation)
    fits = isinstance(other, Tensor) and isinstance(x, Tensor) and x.shape == other.shape and x.numel() > 0
    fits = fits and x.device == other.device
    if bounds is None or not fits or not (_is_native(x) and _is_native(other)) or _is_hooked(activation):
        return quantizer(_activate(activation, x + other))  # type: ignore[no-any-return]
    if _is_observed(quantizer) and not _needs_gradient(x, other):
        y = native.add_observe(x, other, bounds, _statistics(quantizer), in_place=_is_free(makers))
        quantizer.observer.count_samples(y)
        return y
    if not _is_simple(quantizer, x.device):
        return quantizer(native.add_quantize(x, other, bounds, None))  # type: ignore[no-any-return]
    if quantizer.learning:
        return native.add_quantize_learned(x, other, bounds, _learned_grid(quantizer, x), _drop(quantizer))
    return native.add_quantize(x, other, bounds, _grid(quantizer), _drop(quantizer))


def _activate(activation: Activation, x: Tensor) -> Tensor:
    if activation is None:
        return x
    if isinstance(activation, nn.Module):
        return activation(x)  # type: ignore[no-any-return]
    return F.relu(x) if activation == "relu" else F.relu6(x)


def _is_native(x: Tensor) -> bool:
    # in this order: not every device has an autocast
    return x.dtype == torch.float32 and native.runs_on(x.device) and not torch.is_autocast_enabled(x.device.type)


def _has_native_norm(x: Tensor, norm: nn.Module) -> bool:
    """Tell whether the native pass has this case; whatever is wrong is left to the module."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not _is_native(x) or x.numel() == 0:
        return False
    if x.dim() not in _DIMS.get(type(norm), ()) or x.shape[1] != norm.num_features:
        return False
    if norm.training and (norm.momentum is None or x.numel() == x.shape[1]):
        return False
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(t is None or (t.dtype == torch.float32 and t.device == x.device) for t in tensors)


def _is_hooked(*parts: Activation) -> bool:
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    return any(isinstance(part, nn.Module) and any(getattr(part, hooks) for hooks in _HOOKS) for part in parts)


def _is_simple(quantizer: FakeQuantize, device: torch.device) -> bool:
    """Tell whether a quantizer does nothing but track or learn one grid on this device, and quantize one tensor."""
    return (
        quantizer.quantizing
        and (quantizer.is_plain or quantizer.is_plainly_learned)
        and not quantizer.observing
        and not quantizer.tied
        and quantizer.scheme.granularity.kind == "per_tensor"
        and (quantizer.ready or quantizer.tracks)
        and not (quantizer.tracks and is_distributed())
        and quantizer.scale.device == device
        and not _is_hooked(quantizer)
    )


def _is_observed(quantizer: FakeQuantize) -> bool:
    """Tell whether a quantizer does nothing but observe one tensor, by statistics that a native pass can take."""
    return (
        quantizer.observing
        and not quantizer.quantizing
        and not quantizer.tracks
        and quantizer.fixed is None
        and quantizer.scheme.granularity.kind == "per_tensor"
        and quantizer.scale.device.type == "cpu"
        and quantizer.observer.statistics() is not None
        and not _is_hooked(quantizer)
    )


def _statistics(quantizer: FakeQuantize) -> native.Statistics:
    statistics = quantizer.observer.statistics()
    assert statistics is not None
    return statistics


def _is_free(makers: tuple[nn.Module, ...]) -> bool:
    """Tell whether a tensor may be overwritten: hooks of the modules that made it may have kept it."""
    return bool(makers) and not _is_hooked(*makers)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _grid(quantizer: FakeQuantize) -> native.Grid:
    q = quantizer
    state = (q.min_val, q.max_val, q.scale, q.zero_point, q.tracked)
    return native.Grid(state, q.rule, q.tracks, q.momentum)


def _learned_grid(quantizer: FakeQuantize, x: Tensor) -> native.LearnedGrid:
    scale, zero_point, factor = quantizer.learned_grid(x)
    return native.LearnedGrid(
        scale, zero_point, quantizer.rule.qmin, quantizer.rule.qmax, factor, quantizer.method.clips
    )


def _drop(quantizer: FakeQuantize) -> native.Drop | None:
    return native.Drop(draw_seed(), quantizer.method.drop) if quantizer.drops else None
