"""torchvision's classifiers trace without an island and equal themselves at another batch size."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import qat.torchvision
from qat.errors import QatError
from qat.graph.trace import trace, traced_forward
from qat.torchvision import import_torchvision

SMALL = {
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "resnet18": 32,
    "shufflenet_v2_x1_0": 32,
    "squeezenet1_1": 32,
}
LARGE = {
    "efficientnet_b0": 32,
    "googlenet": 32,
    "convnext_tiny": 32,
    "densenet121": 32,
    "vit_b_16": 224,
    "swin_t": 64,
    "swin_v2_t": 64,
    "regnet_y_400mf": 32,
    "mnasnet1_0": 32,
}


def build(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    return getattr(import_torchvision("models"), name)(weights=None, num_classes=7, **options)


def check(model, size):
    model.eval()
    traced = trace(copy.deepcopy(model), torch.randn(1, 3, size, size))
    traced.graph.lint()
    assert traced.islands == ()
    assert traced.static_batch is None
    x = torch.randn(4, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(traced_forward(traced)(x), model(x), atol=1e-6, rtol=1e-5)
    return traced


@pytest.mark.parametrize("name", SMALL)
def test_small_classifiers(name):
    traced = check(build(name), SMALL[name])
    paths = dict(traced.root.named_modules())
    called = [n for n in traced.graph.nodes if n.op == "call_module"]
    assert called
    assert all(node.meta["name"].split("#")[0] == node.target for node in called if node.target in paths)


@pytest.mark.heavy
@pytest.mark.parametrize("name", LARGE)
def test_large_classifiers(name):
    check(build(name), LARGE[name])


def test_vision_transformer():
    vit = import_torchvision("models").vision_transformer.VisionTransformer
    model = vit(32, 16, 2, 4, 32, 64, dropout=0.1, attention_dropout=0.1, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    traced = check(model, 32)
    names = {n.meta["name"] for n in traced.graph.nodes}
    assert {"class_token", "encoder.pos_embedding", "encoder.layers.encoder_layer_1.self_attention.softmax"} < names


def test_dense_connections_and_branches():
    check(import_torchvision("models.densenet").DenseNet(4, (2, 2), 8, drop_rate=0.1, num_classes=5), 32)
    check(import_torchvision("models.googlenet").Inception(3, 4, 4, 6, 2, 4, 4), 16)
    convnext = import_torchvision("models.convnext")
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 2)]
    check(convnext.ConvNeXt(blocks, num_classes=5), 32)


@pytest.mark.parametrize("second", [False, True])
def test_swin_transformer(second):
    swin = import_torchvision("models").swin_transformer
    options = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if second else {}
    model = swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("position_bias_table"):
            nn.init.normal_(parameter)
    traced = check(model, 40)
    drops = [n for n in traced.graph.nodes if "stochastic_depth" in n.meta["name"]]
    assert len(drops) == 8
    run = traced_forward(traced)
    run(torch.randn(2, 3, 40, 40)).sum().backward()
    # the table, or the network that computes the bias, still learns
    wanted = "cpb_mlp.0.weight" if second else "relative_position_bias_table"
    grads = [p.grad for name, p in traced.root.named_parameters() if name.endswith(wanted)]
    assert len(grads) == 4
    assert all(g is not None and float(g.abs().sum()) > 0 for g in grads)


def test_training_behaviour_survives_tracing():
    traced = check(build("mobilenet_v2"), 32)
    traced.root.train()
    before = traced.root.features[0][1].running_mean.clone()
    traced_forward(traced)(torch.randn(4, 3, 32, 32))
    assert not torch.equal(before, traced.root.features[0][1].running_mean)


def test_the_door_to_torchvision():
    assert import_torchvision().__name__ == "torchvision"
    assert import_torchvision("transforms.v2") is sys.modules["torchvision.transforms.v2"]
    with pytest.raises(QatError, match=r"cannot import torchvision.nothing.*install the torchvision that fits"):
        import_torchvision("nothing")


def test_an_import_that_fails_otherwise_is_told(monkeypatch):
    def broken(name):
        raise RuntimeError("something else")

    monkeypatch.setattr(qat.torchvision.importlib, "import_module", broken)
    with pytest.raises(QatError, match="something else"):
        import_torchvision()
