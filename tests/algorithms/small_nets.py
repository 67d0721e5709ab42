"""Small networks with every kind of layer that post-training algorithms change, and data for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.graph.prepared import PreparedModel

TARGET = qat.load_target("onnxruntime-cpu")
INT4 = {"weights": {"dtype": "int4"}}


class Residual(nn.Module):
    """Convolutions with batch norm, a residual addition, a depthwise one, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block = Block(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.stem(x))
        return self.head(F.relu6(self.depthwise(y)).mean((2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Transposed(nn.Module):
    """A transposed convolution with batch norm, a grouped one, and a convolution over one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 8, 2, stride=2)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.ConvTranspose2d(8, 8, 2, groups=2)
        self.line = nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(F.relu(self.bn(self.up(x))))
        return self.line(y.flatten(2))  # type: ignore[no-any-return]


class Linears(nn.Module):
    """Linear layers on vectors and on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))  # type: ignore[no-any-return]


class Shared(nn.Module):
    """One linear layer that is called twice, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(8, 8)
        self.once = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.twice(F.relu(self.twice(x))))  # type: ignore[no-any-return]


def images(count: int = 64, seed: int = 1) -> Tensor:
    """Smooth images, (count, 3, 8, 8): neighbouring pixels are correlated, as in photographs."""
    noise = torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 3, 1) * 2


def vectors(count: int = 64, width: int = 16, seed: int = 1) -> Tensor:
    """Correlated features, (count, width)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) * torch.logspace(0.5, -1, width) @ mix


def calibrated(net: nn.Module, data: Tensor, scheme: dict[str, Any] | None = None, **options: Any) -> PreparedModel:
    """Prepare a network whose batch norms have seen data, and calibrate it."""
    net.train()
    with torch.no_grad():
        for _ in range(20):
            net(data)
    net.eval()
    qmodel = qat.prepare(net, data[:2], target=TARGET, scheme=scheme if scheme is not None else INT4, **options)
    qat.calibrate(qmodel, [data], progress=False)
    return qmodel


def make(kind: type[nn.Module], scheme: dict[str, Any] | None = None, seed: int = 0) -> tuple[PreparedModel, Tensor]:
    """Return a calibrated network of a kind, and its data."""
    torch.manual_seed(seed)
    net = kind()
    data = vectors() if kind is Linears else vectors(width=8) if kind is Shared else images()
    return calibrated(net, data, scheme), data
