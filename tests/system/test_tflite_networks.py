"""Whole networks as `.tflite` files: equal to LiteRT's reference kernels in every code of every tensor."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.models import cifar_resnet
from qat.torchvision import import_torchvision

pytest.importorskip("ai_edge_litert")


def make(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(import_torchvision("models"), name)(weights=None, num_classes=10, **options)


FAST: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cifar_resnet20": (cifar_resnet.cifar_resnet20, (3, 32, 32)),
    "squeezenet1_1": (make("squeezenet1_1"), (3, 64, 64)),
}
HEAVY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mobilenet_v3_small": (make("mobilenet_v3_small"), (3, 64, 64)),
    "mobilenet_v2": (make("mobilenet_v2"), (3, 64, 64)),
    "resnet18": (make("resnet18"), (3, 64, 64)),
    "efficientnet_b0": (make("efficientnet_b0"), (3, 64, 64)),
    "shufflenet_v2_x1_0": (make("shufflenet_v2_x1_0"), (3, 64, 64)),
}


def export(network: Callable[[], nn.Module], shape: tuple[int, ...], folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model, images = network(), torch.randn(4, *shape)
    with torch.no_grad():
        # batch norm statistics of data: with the initial ones activations would vanish
        model.train()
        for _ in range(2):
            model(images)
    return compare(model, images, folder, **options)


def compare(model: nn.Module, images: torch.Tensor, folder: Path, samples: int = 2, **options: Any) -> Any:
    qmodel = qat.prepare(model.eval(), images, target=qat.load_target("arm-cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [images])
    result = qat.export_tflite(qmodel, folder / "m.tflite", samples=[images[:samples]], verify="layers", **options)
    assert result.verification is not None
    assert [(t.name, t.max_difference, t.unequal) for t in result.verification.tensors if t.unequal] == []
    return result


@pytest.mark.parametrize("name", list(FAST))
def test_every_code_of_every_layer(name: str, tmp_path: Path) -> None:
    export(*FAST[name], tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("name", list(HEAVY))
def test_every_code_of_every_layer_of_larger_networks(name: str, tmp_path: Path) -> None:
    export(*HEAVY[name], tmp_path)


# trained weights and real data ----------------------------------------------------------------------------------------


def reference(data_root: Path) -> ModuleType:
    """How the networks of the data folder are built and fed."""
    sys.path.insert(0, str(data_root))
    try:
        spec = importlib.util.spec_from_file_location("data_reference", data_root / "reference.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(data_root))
    return module


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["ds_cnn_kws", "cifar_resnet20", "mobilenet_v1_025"])
def test_trained_networks_on_real_data(name: str, data_root: Path, tmp_path: Path) -> None:
    task = reference(data_root).TASKS[name]
    images = next(iter(task.calib(32)))
    images = images[0] if isinstance(images, (tuple, list)) else images
    result = compare(task.model(), images, tmp_path, samples=4)
    # XNNPACK rounds otherwise: recorded, and not far off (10 of 255 codes seen in mobilenet_v1_025)
    assert result.default is not None
    assert result.default.worst.max_difference < 32
