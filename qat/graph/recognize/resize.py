"""Interpolation and padding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn import functional as F

from qat.graph.recognize.base import Site
from qat.graph.recognize.pooling import adaptive
from qat.graph.recognize.types import NotCanonical, Operator, Recognizer

_MODES = {"nearest": "nearest", "linear": "linear", "bilinear": "linear", "trilinear": "linear"}


def _interpolate(
    site: Site,
    x: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: Any = None,
    recompute_scale_factor: Any = None,
    antialias: Any = False,
) -> Operator:
    rank = len(site.shape_of(x)) - 2
    site.spatial(x, rank)
    after = site.shape[2:]
    if min(after) < 0:
        raise NotCanonical("a spatial size depends on the batch size")
    if antialias:
        raise NotCanonical("antialias=True has no integer kind")
    if mode == "area":
        return adaptive(site, x, after, rank, "avg_pool")
    if mode not in _MODES:
        raise NotCanonical(f"mode={mode!r} has no integer kind (nearest and linear have)")
    scales = None
    if scale_factor is not None and not recompute_scale_factor:
        factors = site.static(scale_factor)
        factors = factors if isinstance(factors, (tuple, list)) else (factors,) * rank
        scales = tuple(float(f) for f in factors)
    return site.unary("resize", x, mode=_MODES[mode], size=after, scales=scales, align_corners=bool(align_corners))


def _upsample(site: Site, module: Any, x: Any) -> Operator:
    return _interpolate(
        site,
        x,
        module.size,
        module.scale_factor,
        module.mode,
        module.align_corners,
        module.recompute_scale_factor,
    )


_PAD_MODES = ("constant", "reflect", "replicate")


def _pad(site: Site, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Operator:
    """Padding, or a slice where all amounts are negative."""
    if mode not in _PAD_MODES:
        raise NotCanonical(f"padding mode {mode!r} has no integer kind ({', '.join(_PAD_MODES)} have)")
    shape = site.shape_of(x)
    amounts = tuple(site.static(pad))
    pairs = [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)]
    # torch lists the last dimension first
    pads = [(0, 0)] * (len(shape) - len(pairs)) + pairs[::-1]
    touched = [axis for axis, pair in enumerate(pads) if pair != (0, 0)]
    for axis in touched:
        site.length(x, axis, "padding")
    if not touched:
        return site.unary("identity", x)
    if all(amount <= 0 for amount in amounts) and mode == "constant":
        return site.unary(
            "slice",
            x,
            axes=tuple(touched),
            starts=tuple(-pads[a][0] for a in touched),
            ends=tuple(shape[a] + pads[a][1] for a in touched),
            steps=(1,) * len(touched),
        )
    if min(amounts) < 0:
        raise NotCanonical("it pads and crops in one call; write the crop as a slice")
    return site.unary("pad", x, pads=tuple(pads), mode=mode, value=0.0 if value is None else site.number(value))


def _pad_module(site: Site, module: Any, x: Any, *, rank: int, mode: str) -> Operator:
    return _pad(site, x, site.ints(module.padding, 2 * rank), mode, getattr(module, "value", None))


_RANKS = (1, 2, 3)
_PADDINGS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), "constant"),
    ((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), "constant"),
    ((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), "reflect"),
    ((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), "replicate"),
    ((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), "circular"),
)
MODULES: Mapping[type[nn.Module], Recognizer] = {
    nn.Upsample: _upsample,
    **{
        module: functools.partial(_pad_module, rank=rank, mode=mode)
        for modules, mode in _PADDINGS
        for module, rank in zip(modules, _RANKS, strict=True)
    },
}
FUNCTIONS: Mapping[Callable[..., Any], Recognizer] = {F.interpolate: _interpolate, F.pad: _pad}
METHODS: Mapping[str, Recognizer] = {}
