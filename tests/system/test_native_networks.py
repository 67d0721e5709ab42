"""torchvision's networks, reduced, on the native runner: whole, and equal to PyTorch in every bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_export_networks import FAST, HEAVY
from torch import nn

import qat
from qat.native import runner

pytestmark = pytest.mark.skipif(not runner.status().active, reason=f"native runner: {runner.status().reason}")

NETWORKS = {**FAST, **HEAVY}
QUICK = [*FAST, "mobilenet_v2", "shufflenet_v2_x1_0"]


def check(name: str) -> None:
    network, size = NETWORKS[name]
    torch.manual_seed(0)
    model, images = network(), torch.randn(3, 3, size, size)
    with torch.no_grad():
        for module in model.modules():
            # torchvision's heads of transformers are zero at first
            if isinstance(module, nn.Linear) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.1)
        model.train()
        model(images)
    qmodel = qat.prepare(model.eval(), images, target=qat.load_target("onnxruntime-cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [images], progress=False)
    imodel = qat.convert(qmodel)
    assert imodel.native.in_pytorch == {}
    assert imodel.native.parts == 1
    before = torch.get_num_threads()
    for batch in (3, 1):
        expected = imodel.run((images[:batch],))[imodel.program.outputs[0]]
        assert len(expected.unique()) > 5
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = imodel(images[:batch])
            torch.set_num_threads(before)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", QUICK)
def test_every_bit(name: str) -> None:
    check(name)


@pytest.mark.heavy
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in QUICK])
def test_every_bit_of_larger_networks(name: str) -> None:
    check(name)
