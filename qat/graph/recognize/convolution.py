"""Convolutions and transposed convolutions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn import functional as F

from qat.graph.recognize.base import Site, symmetric
from qat.graph.recognize.types import NotCanonical, Operator, ParamRef, Recognizer


def _padding(site: Site, value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Padding per spatial dimension, with `valid` and `same` spelled out."""
    if value == "valid":
        return symmetric((0,) * len(kernel))
    if value == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(value, str):
        raise NotCanonical(f"padding={value!r} is unknown")
    return symmetric(site.ints(value, len(kernel)))


def _convolution(
    site: Site,
    x: Any,
    weight: ParamRef,
    bias: ParamRef | None,
    *,
    rank: int,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
) -> Operator:
    site.spatial(x, rank)
    shape = site.shape_of(weight)
    dilations = site.ints(dilation, rank)
    attrs = {
        "stride": site.ints(stride, rank),
        "padding": _padding(site, padding, shape[2:], dilations),
        "dilation": dilations,
        "groups": site.ints(groups, 1)[0],
    }
    macs = site.macs(site.shape, math.prod(shape[1:]))
    return Operator("conv", (site.tensor(x), weight, bias), attrs, macs)


def _refuse_padding_mode(mode: str) -> None:
    if mode != "zeros":
        raise NotCanonical(
            f"padding_mode={mode!r} is a padding and a convolution in one module; write them as two modules"
        )


def _module(site: Site, module: Any, x: Any, *, rank: int) -> Operator:
    _refuse_padding_mode(module.padding_mode)
    return _convolution(
        site,
        x,
        site.own_required("weight"),
        site.own("bias"),
        rank=rank,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
    )


def _functional(rank: int) -> Recognizer:
    def recognizer(
        site: Site,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
    ) -> Operator:
        return _convolution(
            site,
            x,
            site.parameter(weight, "weight"),
            site.optional_parameter(bias, "bias"),
            rank=rank,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )

    return recognizer


def _transposed(
    site: Site,
    x: Any,
    weight: ParamRef,
    bias: ParamRef | None,
    *,
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: Any,
    groups: Any,
) -> Operator:
    shape = site.shape_of(weight)
    rank = len(shape) - 2
    site.spatial(x, rank)
    attrs = {
        "stride": site.ints(stride, rank),
        "padding": symmetric(site.ints(padding, rank)),
        "output_padding": site.ints(output_padding, rank),
        "dilation": site.ints(dilation, rank),
        "groups": site.ints(groups, 1)[0],
    }
    macs = site.macs(site.shape_of(x), math.prod(shape[1:]))
    return Operator("conv_transpose", (site.tensor(x), weight, bias), attrs, macs)


def _module_transposed(site: Site, module: Any, x: Any, output_size: Any = None) -> Operator:
    _refuse_padding_mode(module.padding_mode)
    output_padding: tuple[int, ...] = module.output_padding
    if output_size is not None:
        # the output padding is what the traced result exceeds the least possible size by
        rank = len(module.kernel_size)
        before, after = site.spatial(x, rank), site.shape[2:]
        output_padding = tuple(
            after[i]
            - (
                (before[i] - 1) * module.stride[i]
                - 2 * module.padding[i]
                + module.dilation[i] * (module.kernel_size[i] - 1)
                + 1
            )
            for i in range(rank)
        )
    return _transposed(
        site,
        x,
        site.own_required("weight"),
        site.own("bias"),
        stride=module.stride,
        padding=module.padding,
        output_padding=output_padding,
        dilation=module.dilation,
        groups=module.groups,
    )


def _functional_transposed(
    site: Site,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: Any = 1,
    dilation: Any = 1,
) -> Operator:
    return _transposed(
        site,
        x,
        site.parameter(weight, "weight"),
        site.optional_parameter(bias, "bias"),
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
    )


MODULES: Mapping[type[nn.Module], Recognizer] = {
    nn.Conv1d: functools.partial(_module, rank=1),
    nn.Conv2d: functools.partial(_module, rank=2),
    nn.Conv3d: functools.partial(_module, rank=3),
    nn.ConvTranspose1d: _module_transposed,
    nn.ConvTranspose2d: _module_transposed,
    nn.ConvTranspose3d: _module_transposed,
}
FUNCTIONS: Mapping[Callable[..., Any], Recognizer] = {
    F.conv1d: _functional(1),
    F.conv2d: _functional(2),
    F.conv3d: _functional(3),
    F.conv_transpose1d: _functional_transposed,
    F.conv_transpose2d: _functional_transposed,
    F.conv_transpose3d: _functional_transposed,
}
