"""A small convolutional network for 28x28 grey images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.models.blocks import conv_bn_relu


class FashionCNN(nn.Module):
    """Three stages of convolutions with pooling between: (N, 1, 28, 28) -> (N, classes).

    Args:
        width: Channels of the first stage; doubled in each further one.
        num_classes: Number of classes.
        dropout: Probability of dropping a feature before the classifier.
    """

    def __init__(self, width: int = 16, num_classes: int = 10, dropout: float = 0.1) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(conv_bn_relu(1, width), conv_bn_relu(width, width))
        self.stage2 = nn.Sequential(conv_bn_relu(width, 2 * width), conv_bn_relu(2 * width, 2 * width))
        self.stage3 = nn.Sequential(conv_bn_relu(2 * width, 4 * width), conv_bn_relu(4 * width, 4 * width))
        self.max_pool = nn.MaxPool2d(2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (N, classes) of images (N, 1, 28, 28)."""
        x = self.max_pool(self.stage1(x))
        x = self.max_pool(self.stage2(x))
        x = self.pool(self.stage3(x))
        scores: Tensor = self.classifier(self.dropout(torch.flatten(x, 1)))
        return scores


def fashion_cnn(width: int = 16, num_classes: int = 10, dropout: float = 0.1) -> FashionCNN:
    """Return a `FashionCNN` with random weights."""
    return FashionCNN(width, num_classes, dropout)
