"""torchvision's networks, reduced: calibrated, exported, and equal in ONNX Runtime in every code of every layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import qat
from qat.torchvision import import_torchvision


def make(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: getattr(import_torchvision("models"), name)(weights=None, num_classes=10, **options)


def vit(layers: int = 2) -> nn.Module:
    models = import_torchvision("models")
    return models.VisionTransformer(64, 16, layers, 4, 64, 128, num_classes=10)


def swin(version: int = 1) -> nn.Module:
    swin_transformer = import_torchvision("models.swin_transformer")
    merging = swin_transformer.PatchMerging if version == 1 else swin_transformer.PatchMergingV2
    block = swin_transformer.SwinTransformerBlock if version == 1 else swin_transformer.SwinTransformerBlockV2
    return swin_transformer.SwinTransformer(
        [4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10, block=block, downsample_layer=merging
    )


#: name: (model, image size)
FAST = {
    "resnet18": (make("resnet18"), 64),
    "mobilenet_v3_small": (make("mobilenet_v3_small"), 64),
    "squeezenet1_1": (make("squeezenet1_1"), 64),
    "vit": (vit, 64),
    "swin": (swin, 64),
}
HEAVY = {
    "resnet50": (make("resnet50"), 64),
    "mobilenet_v2": (make("mobilenet_v2"), 64),
    "shufflenet_v2_x1_0": (make("shufflenet_v2_x1_0"), 64),
    "efficientnet_b0": (make("efficientnet_b0"), 64),
    "mnasnet1_0": (make("mnasnet1_0"), 64),
    "regnet_y_400mf": (make("regnet_y_400mf"), 64),
    "densenet121": (make("densenet121"), 64),
    "googlenet": (make("googlenet", aux_logits=False, init_weights=False), 64),
    "inception_v3": (make("inception_v3", aux_logits=False, init_weights=False), 96),
    "convnext_tiny": (make("convnext_tiny"), 64),
    "vit_b_16": (make("vit_b_16", image_size=64), 64),
    "swin_t": (make("swin_t"), 64),
}


def export(network: Callable[[], nn.Module], size: int, folder: Path) -> None:
    torch.manual_seed(0)
    model, images = network(), torch.randn(8, 3, size, size)
    with torch.no_grad():
        for module in model.modules():
            # torchvision's heads of transformers are zero at first
            if isinstance(module, nn.Linear) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.1)
        # batch norm statistics of data: with the initial ones activations would vanish
        model.train()
        for _ in range(3):
            model(images)
    qmodel = qat.prepare(model.eval(), images, target=qat.load_target("onnxruntime-cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [images])
    assert qmodel.plan.integer_share >= 0.99
    batches = [images[:4], images[4:7], images[7:]]
    verification = qat.export_onnx(qmodel, folder / "m.onnx", samples=batches, verify="layers").verification
    assert verification is not None
    assert verification.samples == 8
    assert [(t.name, t.max_difference, t.unequal) for t in verification.tensors if t.unequal] == []
    # and it is the network
    with torch.no_grad():
        wanted, got = model(images), qat.convert(qmodel)(images)
    assert float((wanted - got).norm()) < 0.5 * float(wanted.norm())


@pytest.mark.parametrize("name", list(FAST))
def test_every_code_of_every_layer(name: str, tmp_path: Path) -> None:
    export(*FAST[name], tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("name", list(HEAVY))
def test_every_code_of_every_layer_of_larger_networks(name: str, tmp_path: Path) -> None:
    export(*HEAVY[name], tmp_path)
