"""Calls that only move values: reshapes, transposes, copies, concatenations, channel shuffles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qat.graph.recognize.base import Site, first_value, reshape_to
from qat.graph.recognize.types import NotCanonical, Operator, Recognizer, Step

# --- reshape: the traced shape says it all


def _reshape(site: Site, x: Any, *args: Any, **kwargs: Any) -> Operator:
    return site.steps(x, reshape_to(site.shape))


def _view(site: Site, x: Any, *args: Any, dtype: Any = None) -> Operator:
    if dtype is not None or (args and isinstance(args[0], torch.dtype)):
        raise NotCanonical("it reads the same bits as another dtype")
    return _reshape(site, x)


def _reshape_module(site: Site, module: nn.Module, x: Any) -> Operator:
    return _reshape(site, x)


# --- transpose


def _transpose_to(site: Site, x: Any, perm: tuple[int, ...]) -> Operator:
    return site.unary("transpose", x, perm=perm)


def _permute(site: Site, x: Any, *dims: Any) -> Operator:
    listed = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return _transpose_to(site, x, site.axes(listed, x))


def _permute_dims(site: Site, x: Any, dims: Any) -> Operator:
    return _permute(site, x, dims)


def _transpose(site: Site, x: Any, dim0: Any, dim1: Any) -> Operator:
    a, b = site.axes((dim0, dim1), x)
    perm = list(range(len(site.shape_of(x))))
    perm[a], perm[b] = b, a
    return _transpose_to(site, x, tuple(perm))


def _swap(site: Site, x: Any, axis0: Any, axis1: Any) -> Operator:
    return _transpose(site, x, axis0, axis1)


def _reverse(site: Site, x: Any) -> Operator:
    return _transpose_to(site, x, tuple(reversed(range(len(site.shape_of(x))))))


def _move(site: Site, x: Any, source: Any, destination: Any) -> Operator:
    sources, destinations = site.axes(source, x), site.axes(destination, x)
    rest = iter(i for i in range(len(site.shape_of(x))) if i not in sources)
    placed = dict(zip(destinations, sources, strict=True))
    return _transpose_to(site, x, tuple(placed[i] if i in placed else next(rest) for i in range(len(site.shape_of(x)))))


# --- copies


def _identity(site: Site, x: Any, *args: Any, **kwargs: Any) -> Operator:
    return site.unary("identity", x)


def _convert(site: Site, x: Any, *args: Any, **kwargs: Any) -> Operator:
    """A copy to another device or dtype: an identity where the dtype stays."""
    source = site.node.args[0] if site.node.args else None
    before = first_value(source).dtype if isinstance(source, torch.fx.Node) else None
    after = first_value(site.node).dtype
    if before != after:
        raise NotCanonical(f"it converts from {before} to {after}")
    return site.unary("identity", x)


# --- repetition


def _expand(site: Site, x: Any, *args: Any, **kwargs: Any) -> Operator:
    return site.unary("expand", x, shape=site.shape)


def _repeat(site: Site, x: Any, *args: Any, **kwargs: Any) -> Operator:
    """Repetition of axes of size one, which is an expansion."""
    before, after = site.shape_of(x), site.shape
    padded = (1,) * (len(after) - len(before)) + before
    if any(b not in (1, a) for b, a in zip(padded, after, strict=True)):
        raise NotCanonical("it repeats an axis of more than one element; write it as a concatenation")
    return _expand(site, x)


# --- concatenation


def _operands(site: Site, tensors: Any) -> tuple[Any, ...]:
    if not isinstance(tensors, (list, tuple)):
        raise NotCanonical("it takes a tuple of tensors as a whole")
    return tuple(site.tensor(t) for t in tensors)


def _concat(site: Site, tensors: Any, dim: Any = 0) -> Operator:
    return Operator("concat", _operands(site, tensors), {"axis": site.axis(dim, site.node)})


def _stack(site: Site, tensors: Any, dim: Any = 0) -> Operator:
    return Operator("stack", _operands(site, tensors), {"axis": site.axis(dim, site.node)})


def _joined(least_rank: int, axis: int) -> Recognizer:
    """`hstack` and its kin on tensors that have the axis."""

    def recognizer(site: Site, tensors: Any) -> Operator:
        operands = _operands(site, tensors)
        if any(len(site.shape_of(t)) < least_rank for t in operands):
            raise NotCanonical("it adds an axis to its operands; write it with unsqueeze and cat")
        return Operator("concat", operands, {"axis": axis})

    return recognizer


# --- shuffles


def _shuffle(site: Site, x: Any, split: tuple[int, ...], perm: tuple[int, ...]) -> Operator:
    steps: tuple[Step, ...] = (reshape_to(split), ("transpose", {"perm": perm}), reshape_to(site.shape))
    return site.steps(x, *steps)


def _pixel_shuffle(site: Site, x: Any, upscale_factor: Any) -> Operator:
    height, width = site.spatial(x, 2)
    n, c = site.shape_of(x)[:2]
    r = site.ints(upscale_factor, 1)[0]
    return _shuffle(site, x, (n, c // (r * r), r, r, height, width), (0, 1, 4, 2, 5, 3))


def _pixel_unshuffle(site: Site, x: Any, downscale_factor: Any) -> Operator:
    height, width = site.spatial(x, 2)
    n, c = site.shape_of(x)[:2]
    r = site.ints(downscale_factor, 1)[0]
    return _shuffle(site, x, (n, c, height // r, r, width // r, r), (0, 1, 3, 5, 2, 4))


def _channel_shuffle(site: Site, x: Any, groups: Any) -> Operator:
    n, c, *spatial = site.shape_of(x)
    g = site.ints(groups, 1)[0]
    return _shuffle(site, x, (n, g, c // g, *spatial), (0, 2, 1, *range(3, 3 + len(spatial))))


# --- identities that act in training


def _dropout_module(site: Site, module: nn.Module, x: Any) -> Operator:
    return Operator("identity", (site.tensor(x),), training_only=True)


def _dropout(site: Site, x: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> Operator:
    if training is not False:
        raise NotCanonical("it is random in inference too")
    return site.unary("identity", x)


def _torch_dropout(site: Site, x: Any, p: Any, train: Any) -> Operator:
    return _dropout(site, x, p, train)


MODULES: Mapping[type[nn.Module], Recognizer] = {
    nn.Flatten: _reshape_module,
    nn.Unflatten: _reshape_module,
    nn.Identity: lambda site, module, x, *args, **kwargs: _identity(site, x),
    nn.PixelShuffle: lambda site, module, x: _pixel_shuffle(site, x, module.upscale_factor),
    nn.PixelUnshuffle: lambda site, module, x: _pixel_unshuffle(site, x, module.downscale_factor),
    nn.ChannelShuffle: lambda site, module, x: _channel_shuffle(site, x, module.groups),
    **dict.fromkeys(
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
        _dropout_module,
    ),
}
#: modules of other packages, by the name of the class
MODULES_BY_NAME: Mapping[str, Recognizer] = {"StochasticDepth": _dropout_module, "DropPath": _dropout_module}
FUNCTIONS: Mapping[Callable[..., Any], Recognizer] = {
    **dict.fromkeys(
        (torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze, torch.ravel), _reshape
    ),
    torch.permute: _permute_dims,
    torch.transpose: _transpose,
    torch.swapaxes: _swap,
    torch.swapdims: _transpose,
    torch.t: _reverse,
    torch.movedim: _move,
    torch.moveaxis: _move,
    torch.clone: _identity,
    torch.detach: _identity,
    torch.broadcast_to: _expand,
    torch.tile: _repeat,
    torch.cat: _concat,
    torch.concat: _concat,
    torch.concatenate: _concat,
    torch.stack: _stack,
    torch.vstack: _joined(2, 0),
    torch.hstack: _joined(2, 1),
    torch.dstack: _joined(3, 2),
    F.pixel_shuffle: _pixel_shuffle,
    F.pixel_unshuffle: _pixel_unshuffle,
    F.channel_shuffle: _channel_shuffle,
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), _dropout
    ),
    torch.dropout: _torch_dropout,
}
METHODS: Mapping[str, Recognizer] = {
    **dict.fromkeys(
        ("reshape", "reshape_as", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"),
        _reshape,
    ),
    "view": _view,
    "permute": _permute,
    "transpose": _transpose,
    "swapaxes": _swap,
    "swapdims": _transpose,
    "t": _reverse,
    "movedim": _move,
    "moveaxis": _move,
    "contiguous": _identity,
    "clone": _identity,
    "detach": _identity,
    **dict.fromkeys(("to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"), _convert),
    "expand": _expand,
    "expand_as": _expand,
    "broadcast_to": _expand,
    "repeat": _repeat,
    "tile": _repeat,
}
