"""The networks for grey images: torchvision's, with a first convolution that reads one channel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qat
from qat.models import grey_mobilenet_v2, grey_vit


@pytest.mark.parametrize(
    ("factory", "kwargs", "size"),
    [(grey_mobilenet_v2, {"width": 0.35}, 28), (grey_vit, {"image_size": 16, "layers": 2, "hidden": 32}, 16)],
)
def test_networks_for_grey_images_are_quantized_whole(factory, kwargs, size):
    torch.manual_seed(0)
    model = factory(**kwargs, num_classes=7).eval()
    images = torch.randn(4, 1, size, size)
    assert model(images).shape == (4, 7)
    qmodel = qat.prepare(model, images, target=qat.load_target("onnxruntime-cpu"))
    qat.calibrate(qmodel, [images], progress=False)
    assert qmodel.plan.integer_macs == qmodel.plan.macs > 0
    assert qat.convert(qmodel)(images).shape == (4, 7)


def test_a_grey_convolution_answers_as_one_of_three_equal_channels():
    torch.manual_seed(0)
    grey = grey_mobilenet_v2(0.35)
    torch.manual_seed(0)
    from qat.torchvision import import_torchvision

    models = import_torchvision("models")
    stages = [
        [1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 4, 1], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1],
    ]  # fmt: skip
    colour = models.mobilenet_v2(num_classes=10, width_mult=0.35, dropout=0.0, inverted_residual_setting=stages)
    image = torch.randn(2, 1, 28, 28)
    for model in (grey, colour):
        assert isinstance(model, nn.Module)
        model.eval()
    torch.testing.assert_close(grey(image), colour(image.expand(2, 3, 28, 28)), rtol=1e-4, atol=1e-5)
