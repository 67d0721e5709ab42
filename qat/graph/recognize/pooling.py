"""Pooling over windows, adaptive pooling, and means."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qat.graph.recognize.base import Site, symmetric
from qat.graph.recognize.types import NotCanonical, Operator, Recognizer


def _max_pool(
    site: Site,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: Any = False,
    return_indices: Any = False,
    *,
    rank: int,
) -> Operator:
    site.spatial(x, rank)
    if return_indices:
        raise NotCanonical("it also returns indices")
    kernel = site.ints(kernel_size, rank)
    return site.unary(
        "max_pool",
        x,
        kernel=kernel,
        stride=site.ints(stride, rank) if stride is not None and stride != () else kernel,
        padding=symmetric(site.ints(padding, rank)),
        dilation=site.ints(dilation, rank),
        ceil_mode=bool(ceil_mode),
    )


def _max_pool_module(site: Site, module: Any, x: Any, *, rank: int) -> Operator:
    return _max_pool(
        site,
        x,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.ceil_mode,
        module.return_indices,
        rank=rank,
    )


def _avg_pool(
    site: Site,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: Any = False,
    count_include_pad: Any = True,
    divisor_override: Any = None,
    *,
    rank: int,
) -> Operator:
    site.spatial(x, rank)
    if divisor_override is not None:
        raise NotCanonical(f"divisor_override={divisor_override} makes it no average")
    kernel = site.ints(kernel_size, rank)
    return site.unary(
        "avg_pool",
        x,
        kernel=kernel,
        stride=site.ints(stride, rank) if stride is not None and stride != () else kernel,
        padding=symmetric(site.ints(padding, rank)),
        ceil_mode=bool(ceil_mode),
        count_include_pad=bool(count_include_pad),
    )


def _avg_pool_module(site: Site, module: Any, x: Any, *, rank: int) -> Operator:
    return _avg_pool(
        site,
        x,
        module.kernel_size,
        module.stride,
        module.padding,
        module.ceil_mode,
        module.count_include_pad,
        getattr(module, "divisor_override", None),
        rank=rank,
    )


def adaptive(site: Site, x: Any, output_size: Any, rank: int, kind: str) -> Operator:
    """Adaptive pooling as a mean, an ordinary pooling, a repetition or nothing at all.

    Args:
        site: The call.
        x: Its N x C x spatial input.
        output_size: One size or one per spatial dimension; None keeps the input's.
        rank: Number of spatial dimensions.
        kind: `avg_pool` or `max_pool`.

    Raises:
        NotCanonical: The windows are of unequal size.
    """
    before = site.spatial(x, rank)
    wanted = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * rank
    after = tuple(b if w is None else site.ints(w, 1)[0] for b, w in zip(before, wanted, strict=True))
    if after == before:
        return site.unary("identity", x)
    if kind == "avg_pool" and all(a in (1, b) for a, b in zip(after, before, strict=True)):
        axes = tuple(i + 2 for i in range(rank) if after[i] != before[i])
        return site.unary("mean", x, axes=axes, keepdims=True)
    if all(b % a == 0 for a, b in zip(after, before, strict=True)):
        kernel = tuple(b // a for a, b in zip(after, before, strict=True))
        pool = _avg_pool if kind == "avg_pool" else _max_pool
        return pool(site, x, kernel, rank=rank)
    if all(a % b == 0 for a, b in zip(after, before, strict=True)):
        # every window holds one element: it is repeated
        return site.unary("resize", x, mode="nearest", size=after, scales=None, align_corners=False)
    sizes = ["x".join(map(str, size)) for size in (before, after)]
    raise NotCanonical(f"adaptive pooling from {sizes[0]} to {sizes[1]} has windows of unequal size")


def _adaptive_avg(site: Site, x: Any, output_size: Any, *, rank: int) -> Operator:
    return adaptive(site, x, output_size, rank, "avg_pool")


def _adaptive_max(site: Site, x: Any, output_size: Any, return_indices: Any = False, *, rank: int) -> Operator:
    if return_indices:
        raise NotCanonical("it also returns indices")
    return adaptive(site, x, output_size, rank, "max_pool")


def _adaptive_avg_module(site: Site, module: Any, x: Any, *, rank: int) -> Operator:
    return _adaptive_avg(site, x, module.output_size, rank=rank)


def _adaptive_max_module(site: Site, module: Any, x: Any, *, rank: int) -> Operator:
    return _adaptive_max(site, x, module.output_size, module.return_indices, rank=rank)


def _mean(site: Site, x: Any, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> Operator:
    site.same_dtype(dtype)
    axes = () if dim is None else tuple(sorted(site.axes(dim, x)))
    # torch reads no axes as all of them
    axes = axes or tuple(range(len(site.shape_of(x))))
    for axis in axes:
        site.length(x, axis, "a mean")
    return site.unary("mean", x, axes=axes, keepdims=bool(keepdim))


def _sum(site: Site, *args: Any, **kwargs: Any) -> Operator:
    raise NotCanonical("a sum has no integer kind; write it as a mean times the number of elements")


_RANKS = (1, 2, 3)
_part = functools.partial
MODULES: Mapping[type[nn.Module], Recognizer] = {
    **{
        c: _part(_max_pool_module, rank=r)
        for c, r in zip((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _RANKS, strict=True)
    },
    **{
        c: _part(_avg_pool_module, rank=r)
        for c, r in zip((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _RANKS, strict=True)
    },
    nn.AdaptiveAvgPool1d: _part(_adaptive_avg_module, rank=1),
    nn.AdaptiveAvgPool2d: _part(_adaptive_avg_module, rank=2),
    nn.AdaptiveAvgPool3d: _part(_adaptive_avg_module, rank=3),
    nn.AdaptiveMaxPool1d: _part(_adaptive_max_module, rank=1),
    nn.AdaptiveMaxPool2d: _part(_adaptive_max_module, rank=2),
    nn.AdaptiveMaxPool3d: _part(_adaptive_max_module, rank=3),
}
FUNCTIONS: Mapping[Callable[..., Any], Recognizer] = {
    F.max_pool1d: _part(_max_pool, rank=1),
    F.max_pool2d: _part(_max_pool, rank=2),
    F.max_pool3d: _part(_max_pool, rank=3),
    torch.max_pool1d: _part(_max_pool, rank=1),
    torch.max_pool2d: _part(_max_pool, rank=2),
    torch.max_pool3d: _part(_max_pool, rank=3),
    F.avg_pool1d: _part(_avg_pool, rank=1),
    F.avg_pool2d: _part(_avg_pool, rank=2),
    F.avg_pool3d: _part(_avg_pool, rank=3),
    F.adaptive_avg_pool1d: _part(_adaptive_avg, rank=1),
    F.adaptive_avg_pool2d: _part(_adaptive_avg, rank=2),
    F.adaptive_avg_pool3d: _part(_adaptive_avg, rank=3),
    F.adaptive_max_pool1d: _part(_adaptive_max, rank=1),
    F.adaptive_max_pool2d: _part(_adaptive_max, rank=2),
    F.adaptive_max_pool3d: _part(_adaptive_max, rank=3),
    torch.mean: _mean,
    torch.sum: _sum,
}
METHODS: Mapping[str, Recognizer] = {"mean": _mean, "sum": _sum}
