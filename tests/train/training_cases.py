"""Small models and splits that the tests of training share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qat.quantizers import Quantizer
from qat.scheme import Scheme
from qat.train.data import Split


def blobs(n: int = 96, batch_size: int = 16, name: str = "train", classes: int = 3) -> Split:
    """Points around one centre a class, as 1x1 images."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes
    x = torch.eye(classes, 4)[y] * 3 + 0.3 * torch.randn(n, 4, generator=generator)
    x = x.reshape(n, 4, 1, 1)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch))
        for start in range(0, n, batch_size):
            index = order[start : start + batch_size]
            yield x[index], y[index]

    return Split(name, n, batch_size, batches)


def small(classes: int = 3) -> nn.Sequential:
    """A convolution, a batch norm and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, classes))


class Learned(Quantizer):
    """A quantizer with something to learn; what it multiplies with is its `step_size`."""

    def __init__(self) -> None:
        super().__init__(Scheme("int8"), "learned", 1, "weight")
        self.step_size = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.step_size.mean()


class FakePrepared(nn.Module):
    """Records what the loop asks of a prepared model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()
        self.events: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def set_phase(self, phase: str) -> None:
        self.events.append(phase)

    def freeze_batch_norm(self) -> None:
        self.events.append("freeze")


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same bits."""
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)
