"""Whole networks: nothing stays float for want of a kind, and kinds and attributes reproduce the output."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from operator_reference import run_operators
from torch import nn

from qat.graph.operators import recognize
from qat.graph.trace import trace
from qat.torchvision import import_torchvision

import_torchvision()
from torchvision import models  # noqa: E402

SWIN = functools.partial(
    models.SwinTransformer, [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10, stochastic_depth_prob=0.1
)
VIT = functools.partial(models.VisionTransformer, 32, 8, 2, 2, 32, 64, num_classes=10)


@pytest.mark.parametrize(
    ("make", "size", "kinds"),
    [
        (models.mobilenet_v3_small, 64, {"conv", "batch_norm", "table", "mul", "mean", "linear"}),
        (models.shufflenet_v2_x0_5, 64, {"split", "slice", "transpose", "concat"}),
        (SWIN, 40, {"chain", "constant", "pad", "softmax", "layer_norm", "matmul"}),
        (VIT, 32, {"expand", "split", "rescale", "matmul", "layer_norm"}),
    ],
)
def test_networks_are_recognized_and_reproduced(make, size, kinds):
    torch.manual_seed(0)
    model = make().eval()
    for value in model.parameters():
        if not value.any():
            nn.init.normal_(value, std=0.1)  # a head of zeros would show nothing
    x = torch.randn(5, 3, size, size)
    made = trace(copy.deepcopy(model), x[:2])
    found = recognize(made)
    assert [op.attrs["cause"] for op in found.values() if op.kind == "island"] == []
    assert kinds <= {op.kind for op in found.values()}
    with torch.no_grad():
        expected = model(x)
    assert expected.std() > 0
    torch.testing.assert_close(run_operators(made, found, x), expected, rtol=1e-4, atol=1e-5)


def test_macs_of_a_known_network():
    made = trace(models.resnet18().eval(), torch.randn(2, 3, 224, 224))
    # 1.814 G multiply-accumulates at 224 x 224 (He et al., Deep Residual Learning for Image Recognition, table 1)
    assert sum(op.macs for op in recognize(made).values()) == pytest.approx(1.814e9, rel=1e-3)
