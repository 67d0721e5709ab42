"""Small networks that the recipes use and torchvision does not have."""

from qat.models.cifar_resnet import CifarResNet, cifar_resnet20, cifar_resnet32
from qat.models.digits import DigitsCNN, digits_cnn
from qat.models.fashion import FashionCNN, fashion_cnn
from qat.models.grey import grey_mobilenet_v2, grey_vit

__all__ = [
    "CifarResNet",
    "DigitsCNN",
    "FashionCNN",
    "cifar_resnet20",
    "cifar_resnet32",
    "digits_cnn",
    "fashion_cnn",
    "grey_mobilenet_v2",
    "grey_vit",
]
