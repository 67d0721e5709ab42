"""A quantizer that observes and quantizes does it in one native operator, with the results and the state of PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_cases import make, same_bits
from torch import Tensor, nn

from qat.errors import StateError
from qat.quantizers import OBSERVE, FakeQuantize, Phase, activation, static
from qat.quantizers.fused import add_fake_quantize, norm_fake_quantize
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

OBSERVE_AND_QUANTIZE = Phase(observing=True, quantizing=True)
ONE = {"qat::fake_quantize_observe": 1}
pytestmark = pytest.mark.usefixtures("operators")


def calibrated(scheme: Scheme, channels: int | None = None, phase: Phase = OBSERVE_AND_QUANTIZE) -> FakeQuantize:
    quantizer = FakeQuantize(scheme, "x", channels)
    quantizer.set_phase(OBSERVE)
    quantizer(torch.linspace(-1.0, 3.0, 400 * (channels or 1)).reshape(100, -1, 2, 2))
    quantizer.finish()
    quantizer.set_phase(phase)
    return quantizer


def in_pytorch(call: Callable[[], Any], quantizer: FakeQuantize) -> Any:
    """Call with the native extension left alone."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (activation, static):
            patch.setattr(module, "is_for_native", lambda *_, **__: False)
        patch.setattr(quantizer.observer, "_is_for_native", lambda _: False)
        return call()


def operators_of(call: Callable[[], Any]) -> dict[str, int]:
    """How often each native operator is called."""
    with torch.profiler.profile() as profile:
        call()
    return {event.key: event.count for event in profile.key_averages() if event.key.startswith("qat::")}


SPECS = (
    ObserverSpec("minmax"), ObserverSpec("moving_average", {"momentum": 0.3}), ObserverSpec("histogram"),
    ObserverSpec("percentile", {"percentile": 99.0}), ObserverSpec("kl"), ObserverSpec("mace"),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "strided"])
@pytest.mark.parametrize("axis", [None, 1, -3])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_quantizer_has_the_results_and_the_state_that_pytorch_gives(
    spec: ObserverSpec, axis: int | None, layout: str, dtype: torch.dtype
) -> None:
    granularity = PER_TENSOR if axis is None else Granularity("per_channel", axis)
    ours = calibrated(Scheme("uint8", observer=spec, granularity=granularity), None if axis is None else 5)
    theirs = copy.deepcopy(ours)
    for seed in range(3):
        x = make((6, 5, 11, 12), layout, dtype, seed, 0.0)
        upstream = torch.arange(1.0, x.numel() + 1).reshape(x.shape).to(dtype)

        def step(quantizer: FakeQuantize, x: Tensor = x, upstream: Tensor = upstream) -> tuple[Tensor, Tensor]:
            leaf = x.detach().requires_grad_()
            y = quantizer(leaf)
            return y.detach(), torch.autograd.grad(y, leaf, upstream)[0]

        for a, b in zip(step(ours), in_pytorch(lambda step=step: step(theirs), theirs), strict=True):
            assert same_bits(a, b)
    assert int(ours.observer.samples) == 100 + 3 * 6
    for (name, a), (_, b) in zip(ours.observer.named_buffers(), theirs.observer.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    ours.finish()
    in_pytorch(theirs.finish, theirs)
    assert ours.encoding() == theirs.encoding()


@pytest.mark.parametrize("spec", SPECS[:-1], ids=lambda spec: spec.name)
def test_one_operator_does_it_all(spec: ObserverSpec) -> None:
    quantizer = calibrated(Scheme(observer=spec)).eval()
    x = torch.randn(4, 5)
    assert operators_of(lambda: quantizer(x)) == ONE
    assert operators_of(lambda: quantizer(x.requires_grad_())) == ONE | {"qat::_all_set": 1}
    by_channel = calibrated(Scheme(observer=spec, granularity=Granularity("per_channel", 1)), 5)
    assert operators_of(lambda: by_channel(x.detach())) == ONE


def test_where_something_else_is_to_be_done_the_operators_stay_apart() -> None:
    x = torch.randn(4, 5)
    alone = {"qat::fake_quantize_forward": 1}
    scheme = Scheme(observer=ObserverSpec("minmax"))
    quantizer = calibrated(scheme)
    before = copy.deepcopy(quantizer.observer)
    assert operators_of(lambda: quantizer(x, constant=True)) == alone
    assert operators_of(lambda: quantizer(torch.zeros(0, 5))) == alone
    assert all(torch.equal(a, b) for a, b in zip(before.buffers(), quantizer.observer.buffers(), strict=True))
    tracking = calibrated(scheme, phase=Phase(observing=True, quantizing=True, tracking=True))
    assert operators_of(lambda: tracking(x)) == {"qat::observe_range": 1, "qat::fake_quantize_track_forward": 1}
    assert operators_of(lambda: tracking.eval()(x)) == ONE
    samples = calibrated(Scheme(observer=ObserverSpec("mace")))
    assert operators_of(lambda: samples(x)) == {"qat::observe_minmax": 1, "qat::fake_quantize_forward": 1}
    fixed = FakeQuantize(scheme, "x", fixed=(0.0, 1.0))
    fixed.set_phase(OBSERVE_AND_QUANTIZE)
    assert operators_of(lambda: fixed(x)) == alone
    assert operators_of(lambda: quantizer(x.double())) == {"qat::observe_range": 1}


def test_without_a_range_the_batch_is_observed_before_the_error() -> None:
    quantizer = FakeQuantize(Scheme(), "x")
    quantizer.set_phase(OBSERVE_AND_QUANTIZE)
    with pytest.raises(StateError, match="'x'"):
        quantizer(torch.randn(4, 5))
    assert int(quantizer.observer.samples) == 4


def test_behind_a_fused_norm_or_addition_it_is_one_more_operator() -> None:
    quantizer, norm = calibrated(Scheme(observer=ObserverSpec("histogram"))), nn.BatchNorm2d(3).eval()
    x = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        found = operators_of(lambda: norm_fake_quantize(x, norm, "relu", quantizer))
    assert found == ONE | {"qat::norm_quantize_forward": 1}
    found = operators_of(lambda: add_fake_quantize(x, x, "relu", quantizer))
    assert found == ONE | {"qat::add_quantize_forward": 1}


def test_compiled_code_keeps_to_pytorch_without_a_graph_break() -> None:
    eager, compiled = (calibrated(Scheme(observer=ObserverSpec("histogram"))) for _ in range(2))
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = make((5, 7), "contiguous", torch.float32, seed, 0.0)
        assert torch.equal(run(x), eager(x))
    for (name, a), (_, b) in zip(eager.named_buffers(), compiled.named_buffers(), strict=True):
        assert torch.equal(a, b), name
