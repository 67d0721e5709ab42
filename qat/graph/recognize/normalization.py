"""Batch normalization and layer normalization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qat.graph.recognize.base import Site
from qat.graph.recognize.types import NotCanonical, Operator, Recognizer

_NO_STATISTICS = "it normalizes by the statistics of the batch, not by running ones"


def _batch_norm_module(site: Site, module: Any, x: Any) -> Operator:
    mean, variance = site.own("running_mean"), site.own("running_var")
    if mean is None or variance is None:
        raise NotCanonical(_NO_STATISTICS)
    return Operator(
        "batch_norm",
        (site.tensor(x), site.own("weight"), site.own("bias"), mean, variance),
        {"eps": float(module.eps)},
    )


def _batch_norm(
    site: Site,
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> Operator:
    if training is not False or running_mean is None or running_var is None:
        raise NotCanonical(_NO_STATISTICS)
    inputs = (
        site.tensor(x),
        site.optional_parameter(weight, "weight"),
        site.optional_parameter(bias, "bias"),
        site.parameter(running_mean, "mean"),
        site.parameter(running_var, "variance"),
    )
    return Operator("batch_norm", inputs, {"eps": float(eps)})


def _torch_batch_norm(
    site: Site,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: Any,
    momentum: Any,
    eps: Any,
    cudnn_enabled: Any = True,
) -> Operator:
    return _batch_norm(site, x, running_mean, running_var, weight, bias, training, momentum, eps)


def _layer_norm_module(site: Site, module: Any, x: Any) -> Operator:
    attrs = {"axes_count": len(module.normalized_shape), "eps": float(module.eps)}
    return Operator("layer_norm", (site.tensor(x), site.own("weight"), site.own("bias")), attrs)


def _layer_norm(
    site: Site,
    x: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: Any = 1e-5,
    cudnn_enable: Any = True,
) -> Operator:
    inputs = (
        site.tensor(x),
        site.optional_parameter(weight, "weight"),
        site.optional_parameter(bias, "bias"),
    )
    return Operator("layer_norm", inputs, {"axes_count": len(site.static(normalized_shape)), "eps": float(eps)})


def _refuse_group(site: Site, *args: Any, **kwargs: Any) -> Operator:
    raise NotCanonical("it normalizes by statistics of each sample, for which there is no integer kind")


MODULES: Mapping[type[nn.Module], Recognizer] = {
    nn.BatchNorm1d: _batch_norm_module,
    nn.BatchNorm2d: _batch_norm_module,
    nn.BatchNorm3d: _batch_norm_module,
    nn.SyncBatchNorm: _batch_norm_module,
    nn.LayerNorm: _layer_norm_module,
    nn.GroupNorm: _refuse_group,
    nn.InstanceNorm1d: _refuse_group,
    nn.InstanceNorm2d: _refuse_group,
    nn.InstanceNorm3d: _refuse_group,
}
FUNCTIONS: Mapping[Callable[..., Any], Recognizer] = {
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.group_norm: _refuse_group,
    F.instance_norm: _refuse_group,
}
