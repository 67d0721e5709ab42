"""A small convolutional network for 8x8 digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.models.blocks import conv_bn_relu


class DigitsCNN(nn.Module):
    """Two convolutions, a depthwise-separable residual block and a linear layer: (N, 1, 8, 8) -> (N, classes).

    Args:
        width: Channels of the first convolution.
        num_classes: Number of classes.
    """

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = conv_bn_relu(1, width)
        self.down = conv_bn_relu(width, 2 * width, stride=2)
        self.depthwise = conv_bn_relu(2 * width, 2 * width, groups=2 * width)
        self.pointwise = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width))
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (N, classes) of images (N, 1, 8, 8)."""
        x = self.down(self.stem(x))
        x = self.relu(x + self.pointwise(self.depthwise(x)))
        scores: Tensor = self.classifier(torch.flatten(self.pool(x), 1))
        return scores


def digits_cnn(width: int = 16, num_classes: int = 10) -> DigitsCNN:
    """Return a `DigitsCNN` with random weights."""
    return DigitsCNN(width, num_classes)
