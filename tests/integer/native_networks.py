"""Small networks with every kind of operator that the native runner has, and some that it lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whole_networks import Fn, conv

Made = tuple[nn.Module, tuple[Tensor, ...]]


def image(*sizes: int) -> tuple[Tensor, ...]:
    return (torch.randn(*(sizes or (3, 4, 9, 7))),)


def between(*moves: Callable[[Tensor], Tensor], count: int = 4) -> Made:
    """Every movement between two convolutions."""
    convs = {f"b{i}": conv(count) for i in range(len(moves))}
    return Fn(lambda m, x: [getattr(m, f"b{i}")(f(m.a(x))) for i, f in enumerate(moves)], a=conv(), **convs), image()


def layers() -> Made:
    made = nn.Sequential(
        nn.Conv2d(4, 12, 3, 2, 1, bias=False), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Hardswish(),
        nn.Conv2d(12, 8, (1, 3), (1, 2), (0, 1), groups=4), nn.SiLU(),
        nn.Conv2d(8, 6, 3, padding=2, dilation=2), nn.ReLU6(),
        nn.Conv2d(6, 5, 2, padding="same"), nn.LeakyReLU(0.2),
    )  # fmt: skip
    return made, image(3, 4, 15, 13)


def transposed() -> Made:
    made = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, (2, 3), (3, 1), groups=2),
        nn.ConvTranspose2d(4, 3, 4, 2, 1, dilation=2), nn.Hardswish(),
    )  # fmt: skip
    return made, image(3, 4, 5, 6)


def one_dimension() -> Made:
    made = nn.Sequential(
        nn.Conv1d(4, 6, 3, 2, 1), nn.ReLU(), nn.MaxPool1d(3, 2, 1, ceil_mode=True), nn.Conv1d(6, 4, 1),
        nn.AvgPool1d(3, 2, 1, True), nn.ConvTranspose1d(4, 4, 3, 2), nn.Upsample(scale_factor=1.7),
        nn.Upsample(scale_factor=2.0), nn.Conv1d(4, 3, 3, padding=1, groups=1),
    )  # fmt: skip
    return made, image(3, 4, 29)


def fully_connected() -> Made:
    def forward(m: Fn, x: Tensor) -> Any:
        y = F.relu(m.a(x))
        return m.b(y).sigmoid(), m.c(y.mT).tanh(), m.d(F.gelu(y) + m.e(y)), m.d(y.reshape(-1, 8))

    members = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3, bias=False), "c": nn.Linear(7, 2), "d": nn.Linear(8, 8)}
    return Fn(forward, **members, e=nn.Linear(8, 8)), image(3, 7, 5)


def residuals() -> Made:
    def forward(m: Fn, x: Tensor) -> Any:
        x = F.relu(m.stem(x))
        y = F.relu(m.a(x) + x)
        y = F.relu(y + m.b(y))
        z = m.c(y) + m.d(x)
        shared = m.e(z)
        return F.relu6(shared + y), shared, F.hardswish(m.f(z) + z)

    return Fn(forward, **{name: conv() for name in ("stem", "a", "b", "c", "d", "e", "f")}), image()


def arithmetic() -> Made:
    def forward(m: Fn, x: Tensor, y: Tensor) -> Any:
        a, b = m.a(x), m.b(y)
        gate = torch.sigmoid(m.c(a.mean((2, 3), keepdim=True)))
        return [
            a + b, a - b, a * b, a / (b.sigmoid() + 1), a * gate, gate * a, gate + a, a + gate, a + 1.5, 2 - a, 0.3 * a,
            a + m.row, m.row + b, a * m.column, (a * b + m.row).clamp(-0.3, 0.9), F.relu(a - b), a[:, :1] + b,
            a.mean((1, 2, 3), keepdim=True) + b.mean((1, 2, 3), keepdim=True),
            a.flatten(1).mean(1) + b.flatten(1).mean(1),
        ]  # fmt: skip

    members = {"a": conv(), "b": conv(), "c": conv(kernel=1), "row": torch.randn(7), "column": torch.randn(4, 9, 1)}
    return Fn(forward, **members), (*image(), *image())


def functions() -> Made:
    names = ["gelu", "silu", "elu", "softplus", "mish", "tanh", "hardsigmoid", "leaky_relu"]

    def forward(m: Fn, x: Tensor) -> Any:
        y = m.a(x)
        more = [y.abs(), -y, y.exp(), y.clamp(-0.5, 0.5), y.clamp(0.25, 1.0), m.one(y), m.many(y)]
        return [getattr(F, name)(y) for name in names] + more

    return Fn(forward, a=conv(), one=nn.PReLU(), many=nn.PReLU(4)), image()


def pooling() -> Made:
    pools = [
        nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, 1, dilation=2),
        nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d((3, 2), 2, (1, 0), count_include_pad=False), nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((None, 1)),
    ]  # fmt: skip
    return between(*pools)


def means() -> Made:
    axes = [(2, 3), (1,), (1, 2), (3,), (2,), (1, 2, 3), (-1,)]
    return Fn(lambda m, x: [m.a(x).mean(a, keepdim=k) for a in axes for k in (True, False)], a=conv()), image()


def resizing() -> Made:
    options: list[dict[str, Any]] = [
        {"scale_factor": 2}, {"size": (11, 13)}, {"scale_factor": 1.3}, {"scale_factor": 2, "mode": "bilinear"},
        {"scale_factor": 1.3, "mode": "bilinear"}, {"size": (5, 17), "mode": "bilinear"},
        {"size": (11, 5), "mode": "bilinear", "align_corners": True},
    ]  # fmt: skip
    return between(*(lambda y, o=o: F.interpolate(y, **o) for o in options))


def moving() -> Made:
    return between(
        lambda y: F.pad(y, (1, 2, 0, 3)), lambda y: F.pad(y, (1, 2, 2, 1), "reflect"),
        lambda y: F.pad(y, (0, 2, 2, 1), "replicate"), lambda y: F.pad(y, (1, 1, 1, 1), value=0.5),
        lambda y: y[..., 1:5],
        lambda y: y[:, :, ::2, 1:], lambda y: y.flip(-1), lambda y: y.mT, lambda y: y.permute(0, 1, 3, 2)[:, :, 1:],
        lambda y: torch.cat([y, y * 0.5], 2), lambda y: torch.cat([y[:, 2:], y[:, :2].relu()], 1),
        lambda y: torch.roll(y, (1, -2), (2, 3)),
        lambda y: y.reshape(y.shape[0], 2, 2, 9, 7).transpose(1, 2).flatten(1, 2),
        lambda y: y.flatten(2).reshape(y.shape[0], 4, 7, 9), lambda y: y[:, :1].expand(-1, 4, -1, -1),
        lambda y: torch.stack([y[:, 0], y[:, 3], y[:, 1], y[:, 2]], 1),
        lambda y: F.pixel_shuffle(F.pad(y, (0, 1, 0, 1)), 2).repeat(1, 4, 1, 1),
    )  # fmt: skip


def heads() -> Made:
    def forward(m: Fn, x: Tensor) -> Any:
        y = F.relu(m.a(x))
        return m.wide(y.flatten(1)), m.pooled(y.mean((2, 3))), m.pooled(F.adaptive_avg_pool2d(y, 1).flatten(1))

    return Fn(forward, a=conv(), wide=nn.Linear(4 * 63, 5), pooled=nn.Linear(4, 5)), image()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.token = nn.Linear(8, 16), nn.Linear(16, 8), nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.second(x))))


def attention() -> Made:
    return Attention(), image(3, 6, 8)


def normalization() -> Made:
    def forward(m: Fn, x: Tensor) -> Any:
        y = m.a(x)
        return [
            m.last(y),
            m.two(y),
            m.channels(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            y.softmax(1),
            y.softmax(-1),
            y.softmax(2),
        ]

    members = {"last": nn.LayerNorm(7), "two": nn.LayerNorm((9, 7)), "channels": nn.LayerNorm(4)}
    return Fn(forward, a=conv(), **members), image()


def products() -> Made:
    def forward(m: Fn, x: Tensor) -> Any:
        y = m.a(x)
        flat = y.flatten(2)
        return [
            y @ y.mT,
            y.mT @ y,
            flat @ flat.mT,
            (flat.mT @ flat).softmax(-1) @ flat.mT,
            y @ m.matrix,
            m.matrix.mT @ y.mT,
        ]

    return Fn(forward, a=conv(), matrix=torch.randn(7, 5)), image()


def islands() -> Made:
    def forward(m: Fn, x: Tensor) -> Any:
        y = m.norm(F.relu(m.a(x)))
        z = m.b(y) + x
        return m.c(z), m.norm(z), F.hardswish(m.three(z[:, :, None])[:, :, 0])

    return Fn(forward, a=conv(), b=conv(), c=conv(), norm=nn.GroupNorm(2, 4), three=nn.Conv3d(4, 4, 1)), image()


NETWORKS: dict[str, Callable[[], Made]] = {
    make.__name__: make
    for make in (
        layers, transposed, one_dimension, fully_connected, residuals, arithmetic, functions, pooling, means, resizing,
        moving, heads, attention, normalization, products, islands,
    )
}  # fmt: skip

#: settings under which each of them is quantized
SCHEMES: dict[str, dict[str, Any]] = {
    "uint8": {},
    "int8": {"scheme": {"activations": {"dtype": "int8"}}},
    "uint16": {"scheme": {"activations": {"dtype": "uint16"}}},
    "int4 weights": {"scheme": {"weights": {"dtype": "int4"}}},
    "arm": {"target": "arm-cpu"},
}
