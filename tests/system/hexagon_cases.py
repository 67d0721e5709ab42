"""One network for every operator and function that a Hexagon target file speaks of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
Make = Callable[[], tuple[nn.Module, Inputs]]


class Call(nn.Module):
    """A function of tensors, with modules and parameters of its own."""

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def image(*sizes: int) -> Tensor:
    return torch.randn(1, *(sizes or (8, 12, 12)))


def one(function: Callable[..., Any], **members: Any) -> Make:
    return lambda: (Call(function, **members), (image(),))


def two(function: Callable[..., Any]) -> Make:
    return lambda: (Call(function), (image(), image()))


def layer(make: Callable[[], nn.Module], *sizes: int) -> Make:
    return lambda: (make(), (image(*sizes),))


def moved(function: Callable[[Tensor], Tensor]) -> Make:
    """Data movement behind an addition: alone it is no integer operator."""
    return lambda: (Call(lambda m, a, b: function(a + b)), (image(), image()))


def function(f: Callable[[Tensor], Tensor], *, positive: bool = False) -> Make:
    return lambda: (Call(lambda m, a: f(a)), (image().abs() + 0.3 if positive else 2 * image(),))


CASES: dict[str, Make] = {
    "conv": layer(lambda: nn.Conv2d(8, 16, 3, padding=1)),
    "conv_1d": layer(lambda: nn.Conv1d(8, 16, 3), 8, 20),
    "conv_3d": layer(lambda: nn.Conv3d(8, 8, 3), 8, 5, 6, 7),
    "conv_depthwise": layer(lambda: nn.Conv2d(8, 8, 3, groups=8)),
    "conv_groups_dilation": layer(lambda: nn.Conv2d(8, 16, 3, groups=2, dilation=2)),
    "conv_relu6": layer(lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU6())),
    "conv_transpose": layer(lambda: nn.ConvTranspose2d(8, 6, 3, stride=2)),
    # one scale for the weight, and so one for the bias
    "conv_transpose_depthwise": layer(lambda: nn.ConvTranspose2d(8, 8, 3, stride=2, groups=8)),
    "linear": lambda: (nn.Linear(12, 10), (torch.randn(1, 12),)),
    "linear_3d": lambda: (nn.Linear(12, 10), (torch.randn(1, 5, 12),)),
    "matmul": lambda: (Call(lambda m, a, b: a @ b), (torch.randn(1, 6, 7), torch.randn(1, 7, 5))),
    "batch_norm": lambda: (
        Call(lambda m, a, b: m.norm(a + b), norm=nn.BatchNorm2d(8).train(False)),
        (image(), image()),
    ),
    "add": two(lambda m, a, b: a + b),
    "add_constant": one(lambda m, a: a + m.c, c=nn.Parameter(torch.linspace(-1, 1, 8).reshape(1, 8, 1, 1))),
    "add_scalar": one(lambda m, a: a + 0.7),
    "sub": two(lambda m, a, b: a - b),
    "mul": two(lambda m, a, b: a * b),
    "mul_constant": one(lambda m, a: a * m.c, c=nn.Parameter(torch.linspace(-1, 1, 8).reshape(1, 8, 1, 1))),
    "div": lambda: (Call(lambda m, a, b: a / b), (image(), image().abs() + 0.5)),
    "relu": layer(nn.ReLU),
    "clamp": one(lambda m, a: a.clamp(-0.5, 0.6)),
    "prelu": layer(lambda: nn.PReLU(8)),
    "softmax": layer(lambda: nn.Softmax(-1)),
    "softmax_channels": layer(lambda: nn.Softmax(1)),
    "layer_norm": layer(lambda: nn.LayerNorm(12)),
    "avg_pool": layer(lambda: nn.AvgPool2d(3, stride=2, padding=1)),
    "mean": layer(lambda: nn.AdaptiveAvgPool2d(1)),
    "mean_last": one(lambda m, a: a.mean(-1)),
    "max_pool": moved(lambda x: F.max_pool2d(x, 3, 2, 1)),
    "resize_nearest": moved(lambda x: F.interpolate(x, scale_factor=2)),
    "resize_linear": moved(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "resize_corners": moved(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)),
    "pad": moved(lambda x: F.pad(x, (1, 1, 2, 2))),
    "pad_reflect": moved(lambda x: F.pad(x, (1, 1, 2, 2), mode="reflect")),
    "pad_value": moved(lambda x: F.pad(x, (1, 1, 2, 2), value=1.5)),
    "concat": two(lambda m, a, b: torch.cat([a, b], 1)),
    "concat_requantized": two(lambda m, a, b: torch.cat([a + b, torch.softmax(b, 1)], 1)),
    "stack": two(lambda m, a, b: torch.stack([a, b], 1)),
    "reshape": moved(lambda x: x.flatten(1)),
    "transpose": moved(lambda x: x.permute(0, 2, 3, 1)),
    "slice": moved(lambda x: x[:, 2:6, ::2]),
    "expand": moved(lambda x: x[:, :, :1, :1].expand(-1, -1, 3, 4)),
    "rescale": moved(lambda x: x * 0.5 + 1),
    "roll": moved(lambda x: torch.roll(x, (1, 2), (2, 3))),
    "pixel_shuffle": moved(lambda x: F.pixel_shuffle(x, 2)),
    "sigmoid": function(torch.sigmoid),
    "tanh": function(torch.tanh),
    "hardsigmoid": function(F.hardsigmoid),
    "hardswish": function(F.hardswish),
    "silu": function(F.silu),
    # what the compiler fuses
    "conv_silu": layer(lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.SiLU())),
    "conv_silu_depthwise": layer(lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.SiLU())),
    "gelu": function(F.gelu),
    "leaky_relu": function(lambda x: F.leaky_relu(x, 0.1)),
    "elu": function(F.elu),
    "softplus": function(F.softplus),
    "mish": function(F.mish),
    "exp": function(torch.exp),
    "log": function(torch.log, positive=True),
    "sqrt": function(torch.sqrt, positive=True),
    "rsqrt": function(torch.rsqrt, positive=True),
    "abs": function(torch.abs),
    "neg": function(torch.neg),
    "reciprocal": function(torch.reciprocal, positive=True),
    "pow": function(lambda x: x**2),
    "erf": function(torch.erf),
    "sin": function(torch.sin),
    "cos": function(torch.cos),
}
