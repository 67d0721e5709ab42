"""ResNets for CIFAR (He et al. 2015, section 4.2) with the parameter-free shortcut (option A).

The `state_dict` keys are those of the weights at github.com/akamaster/pytorch_resnet_cifar10, except that the
classifier is called `fc`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every `stride`-th pixel and pads new channels with zeros.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out; the difference to `inputs` is even.
        stride: Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs, H / stride, W / stride) for (N, inputs, H, W)."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            x = functional.pad(x, (0, 0, 0, 0, self.new_channels, self.new_channels))
        return functional.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers: (N, 3, 32, 32) -> (N, classes).

    Args:
        depth: Number of layers: 20, 32, 44, 56 or 110.
        num_classes: Number of classes.
        channels: Channels of the images.
    """

    def __init__(self, depth: int, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (N, classes) of images (N, channels, H, W)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return scores


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def cifar_resnet20(num_classes: int = 10, channels: int = 3) -> CifarResNet:
    """Return a ResNet-20 for CIFAR with random weights."""
    return CifarResNet(20, num_classes, channels)


def cifar_resnet32(num_classes: int = 10, channels: int = 3) -> CifarResNet:
    """Return a ResNet-32 for CIFAR with random weights."""
    return CifarResNet(32, num_classes, channels)
