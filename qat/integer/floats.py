"""Canonical operators on floats: what a program computes where a tensor has no encoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.errors import ExportError

FloatOperator = Callable[[Mapping[str, Any], list[Any]], Tensor]


def _pads(padding: tuple[tuple[int, int], ...]) -> list[int]:
    return [side for pair in reversed(padding) for side in pair]


def _padded(x: Tensor, padding: tuple[tuple[int, int], ...], value: float = 0.0) -> Tensor:
    return F.pad(x, _pads(padding), value=value) if any(any(pair) for pair in padding) else x


def conv(attrs: Mapping[str, Any], inputs: list[Any]) -> Tensor:
    """Convolution in 1, 2 or 3 dimensions."""
    x, weight, bias = inputs
    run: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    result: Tensor = run(
        _padded(x, attrs["padding"]), weight, bias, attrs["stride"], 0, attrs["dilation"], attrs["groups"]
    )
    return result


def conv_transpose(attrs: Mapping[str, Any], inputs: list[Any]) -> Tensor:
    """Transposed convolution; begin and end of the padding may differ."""
    x, weight, bias = inputs
    run: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
    full = run(x, weight, bias, attrs["stride"], 0, 0, attrs["groups"], attrs["dilation"])
    crop = [
        (-begin, extra - end) for (begin, end), extra in zip(attrs["padding"], attrs["output_padding"], strict=True)
    ]
    shape = [-1 if d == 1 else 1 for d in range(full.dim())]
    # what output padding appends is bias only
    padded = F.pad(full if bias is None else full - bias.reshape(shape), _pads(tuple(crop)))
    return padded if bias is None else padded + bias.reshape(shape)


def max_pool(attrs: Mapping[str, Any], inputs: list[Any]) -> Tensor:
    """Max pooling."""
    run: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[inputs[0].dim() - 3]
    symmetric = all(begin == end for begin, end in attrs["padding"])
    x = inputs[0] if symmetric else _padded(inputs[0], attrs["padding"], -torch.inf)
    padding = tuple(begin for begin, _ in attrs["padding"]) if symmetric else 0
    result: Tensor = run(x, attrs["kernel"], attrs["stride"], padding, attrs["dilation"], attrs["ceil_mode"])
    return result


def avg_pool(attrs: Mapping[str, Any], inputs: list[Any]) -> Tensor:
    """Average pooling."""
    run: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[inputs[0].dim() - 3]
    padding = tuple(begin for begin, _ in attrs["padding"])
    result: Tensor = run(
        inputs[0], attrs["kernel"], attrs["stride"], padding, attrs["ceil_mode"], attrs["count_include_pad"]
    )
    return result


def resize(attrs: Mapping[str, Any], inputs: list[Any]) -> Tensor:
    """Interpolation of the spatial dimensions."""
    x = inputs[0]
    scales = attrs.get("scales")
    size = None if scales is not None else attrs["size"]
    recompute = None if scales is None else False
    if attrs["mode"] == "nearest":
        return F.interpolate(x, size, scales, "nearest", recompute_scale_factor=recompute)
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()]
    return F.interpolate(x, size, scales, mode, attrs["align_corners"], recompute)


def pad(attrs: Mapping[str, Any], inputs: list[Any]) -> Tensor:
    """Padding of any dimension."""
    if attrs["mode"] == "constant":
        return F.pad(inputs[0], _pads(attrs["pads"]), value=attrs["value"])
    # PyTorch wants the pads of the spatial dimensions, all of them and no others
    spatial = max(inputs[0].dim() - 2, 1)
    return F.pad(inputs[0], _pads(tuple(attrs["pads"])[-spatial:]), mode=attrs["mode"])


def slice_(attrs: Mapping[str, Any], inputs: list[Any]) -> Tensor:
    """Slices along axes; a negative step reverses."""
    x = inputs[0]
    for axis, start, end, step in zip(attrs["axes"], attrs["starts"], attrs["ends"], attrs["steps"], strict=True):
        picked = range(x.shape[axis])[slice(start, end, step)]
        if step == 1:
            x = x.narrow(axis, picked.start, len(picked))
        else:
            x = x.index_select(axis, torch.tensor(list(picked), dtype=torch.int64, device=x.device))
    return x  # type: ignore[no-any-return]


def expand(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Any:
    """Broadcast to a shape in which -k is k times the batch size."""
    return inputs[0].expand([-s * batch if s < 0 else s for s in attrs["shape"]])


def _layer_norm(attrs: Mapping[str, Any], inputs: list[Any]) -> Tensor:
    x = inputs[0]
    return F.layer_norm(x, x.shape[x.dim() - attrs["axes_count"] :], inputs[1], inputs[2], attrs["eps"])


def _function(attrs: Mapping[str, Any], inputs: list[Any]) -> Tensor:
    x, name, params = inputs[0], attrs["function"], attrs.get("params") or {}
    if name == "pow":
        power: Tensor = torch.pow(x, params["exponent"])
        return power
    run = getattr(F, name, None) or getattr(torch, name, None)
    if run is None:
        raise ExportError(f"unknown function {name!r}", "report this model to the developers of qat")
    result: Tensor = run(x, **params)
    return result


#: movements that leave every element as it is; they run on codes and on floats alike
MOVES: Mapping[str, FloatOperator] = MappingProxyType(
    {
        "reshape": lambda attrs, inputs: inputs[0].reshape(attrs["shape"]),
        "transpose": lambda attrs, inputs: inputs[0].permute(attrs["perm"]),
        "slice": slice_,
        "identity": lambda attrs, inputs: inputs[0],
    }
)

#: every other kind, on floats
FLOAT_OPERATORS: Mapping[str, FloatOperator] = MappingProxyType(
    {
        **MOVES,
        "conv": conv,
        "conv_transpose": conv_transpose,
        "linear": lambda attrs, inputs: F.linear(inputs[0], inputs[1], inputs[2]),
        "matmul": lambda attrs, inputs: inputs[0] @ inputs[1],
        "add": lambda attrs, inputs: inputs[0] + inputs[1],
        "sub": lambda attrs, inputs: inputs[0] - inputs[1],
        "mul": lambda attrs, inputs: inputs[0] * inputs[1],
        "div": lambda attrs, inputs: inputs[0] / inputs[1],
        "clamp": lambda attrs, inputs: torch.clamp(inputs[0], attrs["low"], attrs["high"]),
        "table": _function,
        "prelu": lambda attrs, inputs: F.prelu(inputs[0], inputs[1]),
        "softmax": lambda attrs, inputs: torch.softmax(inputs[0], attrs["axis"]),
        "layer_norm": _layer_norm,
        "max_pool": max_pool,
        "avg_pool": avg_pool,
        "mean": lambda attrs, inputs: inputs[0].mean(attrs["axes"], attrs["keepdims"]),
        "resize": resize,
        "pad": pad,
        "concat": lambda attrs, inputs: torch.cat(inputs, attrs["axis"]),
        "rescale": lambda attrs, inputs: inputs[0] * attrs["factor"],
    }
)
