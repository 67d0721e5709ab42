"""Quantizers, observers and their gradients on a GPU: the native operators are chosen, with the results of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qat import native
from qat.quantizers import OBSERVE, QUANTIZE, TRACK, FakeQuantize, Phase, WeightFakeQuantize
from qat.quantizers.fused import norm_fake_quantize
from qat.scheme import Granularity, Scheme

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture(autouse=True)
def _kernels() -> None:
    """Skip where the extension was built without the kernels of the GPU."""
    if not native.status().cuda:
        pytest.skip(f"native extension: {native.status()}")


class Layer(nn.Module):
    """A quantized convolution, batch norm, ReLU and the fused quantizer of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        scheme = Scheme(dtype="int8", symmetric=True, granularity=Granularity("per_channel", 0))
        self.weight = WeightFakeQuantize(scheme, "weight", self.conv.weight.shape, self.norm)
        self.quantizer = FakeQuantize(Scheme(dtype="uint8"), "y", momentum=0.1)
        self.weight.set_phase(QUANTIZE)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, self.weight(self.conv.weight))
        return norm_fake_quantize(x, self.norm, "relu", self.quantizer)


@pytest.mark.parametrize("phase", [OBSERVE, TRACK, QUANTIZE])
def test_a_layer_in_training_is_the_cpus(phase: Phase) -> None:
    torch.manual_seed(0)
    layer = Layer()
    layer.quantizer.set_phase(OBSERVE)
    layer(torch.randn(4, 3, 20, 20))
    layer.quantizer.finish()
    layer.quantizer.set_phase(phase)
    twin = copy.deepcopy(layer).cuda()
    for _ in range(3):
        x = torch.randn(4, 3, 20, 20)
        layer.zero_grad()
        twin.zero_grad()
        layer(x).square().mean().backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            twin(x.cuda()).square().mean().backward()
        names = {event.key for event in profile.key_averages()}
        operators = {"norm_quantize_forward", "norm_quantize_backward", "fake_quantize_weight_forward"}
        assert {f"qat::{name}" for name in operators} <= names
    state = {name: value.cpu() for name, value in twin.state_dict().items()}
    torch.testing.assert_close(state, dict(layer.state_dict()), rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(twin.parameters(), layer.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.cpu(), theirs.grad, rtol=1e-2, atol=1e-3)


def test_opcheck() -> None:
    x = torch.randn(3, 4, 5, device="cuda", requires_grad=True)
    args = (x, torch.rand(4, device="cuda") + 0.1, torch.zeros(4, device="cuda"), -8, 7, 1)
    torch.library.opcheck(torch.ops.qat.fake_quantize_forward.default, args)
    low, high = (torch.full((4,), value, device="cuda") for value in (torch.inf, -torch.inf))
    nonfinite = torch.zeros((), dtype=torch.int64, device="cuda")
    args = (x.detach(), *args[1:], low, high, nonfinite, None, 7, 0.1, True)
    torch.library.opcheck(torch.ops.qat.fake_quantize_observe.default, args)
