"""Networks of torchvision for small grey images, such as those of Fashion-MNIST."""

from __future__ import annotations

from torch import nn

from qat.torchvision import import_torchvision

# expansion, channels, blocks and stride of each stage: 14, 14, 7, 4, 4, 4, 2 and 2 pixels for images of 28x28
_STAGES = [
    [1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 4, 1], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1],
]  # fmt: skip


def grey_mobilenet_v2(width: float = 0.5, num_classes: int = 10) -> nn.Module:
    """Return torchvision's MobileNetV2, reading (N, 1, H, W), with random weights and no dropout.

    Args:
        width: Multiple of the channels of the original.
        num_classes: Number of classes.
    """
    models = import_torchvision("models")
    model: nn.Module = models.mobilenet_v2(
        num_classes=num_classes, width_mult=width, dropout=0.0, inverted_residual_setting=_STAGES
    )
    _read_grey(model.get_submodule("features.0"), "0")
    return model


def grey_vit(
    image_size: int = 28, patch_size: int = 4, layers: int = 4, heads: int = 4, hidden: int = 64, num_classes: int = 10
) -> nn.Module:
    """Return torchvision's VisionTransformer, reading (N, 1, S, S), with random weights.

    Args:
        image_size: S, a multiple of `patch_size`.
        patch_size: Side of the square that is one token.
        layers: Encoder blocks.
        heads: Heads of attention of each.
        hidden: Width of a token; twice that between the linear layers of a block.
        num_classes: Number of classes.
    """
    models = import_torchvision("models")
    model: nn.Module = models.VisionTransformer(
        image_size=image_size, patch_size=patch_size, num_layers=layers, num_heads=heads, hidden_dim=hidden,
        mlp_dim=2 * hidden, num_classes=num_classes,
    )  # fmt: skip
    _read_grey(model, "conv_proj")
    return model


def _read_grey(parent: nn.Module, name: str) -> None:
    """Put a convolution of one input channel in the place of one of three, with a third of its random weights."""
    conv = parent.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    grey = nn.Conv2d(
        1, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None  # type: ignore[arg-type]
    )  # fmt: skip
    grey.weight.data.copy_(conv.weight.data.sum(1, keepdim=True))
    if conv.bias is not None and grey.bias is not None:
        grey.bias.data.copy_(conv.bias.data)
    setattr(parent, name, grey)
