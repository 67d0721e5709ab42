"""Phases and frozen batch norms on a small network, in eager mode and under torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize

from qat.errors import CheckpointError, StateError
from qat.quantizers import (
    FLOAT,
    OBSERVE,
    QUANTIZE,
    TRACK,
    FakeQuantize,
    Phase,
    Quantizer,
    WeightFakeQuantize,
    freeze_batch_norm,
    pack_frozen,
    set_phase,
    unpack_frozen,
)
from qat.scheme import Granularity, Scheme


class Net(nn.Module):
    """Conv, batch norm and ReLU with all of their fake quantizers."""

    def __init__(self) -> None:
        super().__init__()
        self.input = FakeQuantize(Scheme("uint8"), "x")
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.output = FakeQuantize(Scheme("int8", symmetric=True, granularity=Granularity("per_channel", 1)), "relu", 6)
        self.head = nn.Linear(6, 2)
        weights = Scheme("int8", symmetric=True, granularity=Granularity("per_channel", 0))
        for name, module, bn in (("conv", self.conv, self.bn), ("head", self.head, None)):
            quantizer = WeightFakeQuantize(weights, f"{name}.weight", module.weight.shape, bn)
            parametrize.register_parametrization(module, "weight", quantizer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.output(torch.relu(self.bn(self.conv(self.input(x)))))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Net()


def calibrate(net: Net) -> None:
    set_phase(net, OBSERVE)
    net.eval()
    for seed in range(2):
        net(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed)))
    net.input.finish()
    net.output.finish()
    for module, weight in ((net.conv, net.conv.weight), (net.head, net.head.weight)):
        module.parametrizations.weight[0].refresh(weight)  # type: ignore[union-attr, operator, index]
    net.train()


def train_steps(net: Net, forward: object, count: int) -> list[Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for seed in range(count):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(10 + seed))
        loss = forward(x).square().mean()  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_set_phase_reaches_every_quantizer(net: Net) -> None:
    quantizers = [m for m in net.modules() if isinstance(m, Quantizer)]
    assert len(quantizers) == 4
    for phase in (OBSERVE, QUANTIZE, TRACK, FLOAT, Phase(observing=True, quantizing=True)):
        set_phase(net, phase)
        assert {q.phase for q in quantizers} == {phase}


def test_float_phase_is_the_float_network(net: Net) -> None:
    x = torch.randn(2, 3, 5, 5)
    weights = [m.parametrizations.weight.original for m in (net.conv, net.head)]  # type: ignore[union-attr]
    y = torch.relu(copy.deepcopy(net.bn)(nn.functional.conv2d(x, weights[0])))
    assert torch.equal(net(x), nn.functional.linear(y.mean((2, 3)), weights[1], net.head.bias))


def test_training_learns_through_the_fake_quantizers(net: Net) -> None:
    calibrate(net)
    set_phase(net, TRACK)
    losses = train_steps(net, net, 8)
    assert float(losses[-1]) < float(losses[0])
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())
    assert net.output.encoding().provenance == "qat"


def test_compiled_training_equals_eager(net: Net) -> None:
    calibrate(net)
    set_phase(net, TRACK)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    expected, got = train_steps(net, net, 4), train_steps(twin, compiled, 4)
    assert torch.allclose(torch.stack(expected), torch.stack(got), rtol=1e-5)
    for (name, a), b in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-6), name


def test_every_change_of_phase_costs_at_most_one_compilation(net: Net) -> None:
    calibrate(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    steps = (
        lambda: set_phase(net, FLOAT),
        lambda: set_phase(net, TRACK),
        lambda: set_phase(net, QUANTIZE),
        lambda: freeze_batch_norm(net),
        lambda: net.eval(),
    )
    for change in steps:
        before = counter.frame_count
        change()
        train_steps(net, compiled, 3)
        assert counter.frame_count - before <= 1
    total = counter.frame_count
    # what has been compiled is not compiled again
    for change in (lambda: set_phase(net.train(), TRACK), lambda: set_phase(net, QUANTIZE)):
        change()
        train_steps(net, compiled, 2)
    assert counter.frame_count == total


def test_bf16_autocast_trains_with_finite_float32_gradients(net: Net) -> None:
    calibrate(net)
    set_phase(net, TRACK)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(4, 3, 6, 6))
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert bool(torch.isfinite(parameter.grad).all())
    assert net.output.scale.dtype == torch.float32


def test_freezing_batch_norm_stops_its_statistics_but_not_its_weights(net: Net) -> None:
    set_phase(net, FLOAT)
    names = freeze_batch_norm(net)
    assert names == ("bn",)
    before, gamma = net.bn.running_var.clone(), net.bn.weight.detach().clone()
    train_steps(net, net, 2)
    assert torch.equal(net.bn.running_var, before)
    assert not torch.equal(net.bn.weight, gamma)
    net.train()
    assert net.bn.training
    assert freeze_batch_norm(net, names) == names
    assert not net.bn.training
    assert freeze_batch_norm(net.train(), ()) == ()
    assert net.bn.training


def test_freezing_an_unknown_batch_norm_names_it(net: Net) -> None:
    with pytest.raises(StateError, match="'conv'"):
        freeze_batch_norm(net, ["bn", "conv"])
    assert net.bn.training


def test_frozen_names_round_trip_and_broken_ones_are_refused() -> None:
    packed = pack_frozen(("layer1.0.bn1", "bn"))
    assert packed.dtype == torch.uint8
    assert unpack_frozen(packed) == ("layer1.0.bn1", "bn")
    assert unpack_frozen(pack_frozen(())) == ()
    for broken in (
        None,
        torch.zeros(2),
        packed[:-1],
        torch.tensor(list(b'{"frozen_batch_norms": 3}')).byte(),
    ):
        with pytest.raises(CheckpointError, match="frozen"):
            unpack_frozen(broken)
