"""Batch norm or an addition, activation, tracking and fake quantization in one operator, against the single modules."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from qat.quantizers import OBSERVE, QUANTIZE, TRACK, FakeQuantize, Phase
from qat.quantizers.fused import Activation, add_fake_quantize, norm_fake_quantize
from qat.scheme import Scheme

pytestmark = pytest.mark.usefixtures("operators")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def norm_of(channels: int, *, affine: bool = True, seed: int = 0) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(channels, affine=affine)
    if affine:
        with torch.no_grad():
            norm.weight.copy_(torch.randn(channels, generator=generator))
            norm.bias.copy_(torch.randn(channels, generator=generator))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.randn(channels, generator=generator))
    norm.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
    return norm


def quantizer_of(phase: Phase, **scheme: Any) -> FakeQuantize:
    quantizer = FakeQuantize(Scheme(**{"dtype": "uint8", "symmetric": False, **scheme}), "y", momentum=0.1)
    quantizer.set_phase(OBSERVE)
    quantizer(torch.tensor([-1.0, 2.5]))
    quantizer.finish()
    quantizer.set_phase(phase)
    return quantizer.train()


def values(shape: tuple[int, ...], form: str = "contiguous", seed: int = 1, spread: float = 2.0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread + 0.5
    return x.contiguous(memory_format=FORMATS[form]).requires_grad_()


def single(x: Tensor, norm: nn.Module, activation: Activation, quantizer: FakeQuantize) -> Tensor:
    y = norm(x)
    if isinstance(activation, nn.Module):
        y = activation(y)
    elif activation == "relu":
        y = F.relu(y)
    return quantizer(y)  # type: ignore[no-any-return]


def both(
    x: Tensor, norm: nn.BatchNorm2d, activation: Activation, quantizer: FakeQuantize
) -> list[tuple[Tensor, list[Tensor], dict[str, Tensor]]]:
    """Outputs, gradients and state of the fused call, and of the modules one after the other."""
    results = []
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    for run in (norm_fake_quantize, single):
        own, ours, theirs = x.detach().clone().requires_grad_(), copy.deepcopy(norm), copy.deepcopy(quantizer)
        y = run(own, ours, copy.deepcopy(activation), theirs)
        inputs = [own, *ours.parameters()]
        gradients = list(torch.autograd.grad((y * weights).sum(), inputs))
        state = {**ours.state_dict(), **{k: v for k, v in theirs.state_dict().items() if k != "_extra_state"}}
        results.append((y.detach(), gradients, state))
    return results


def assert_same(results: list[tuple[Tensor, list[Tensor], dict[str, Tensor]]], quantizer: FakeQuantize) -> None:
    (y, gradients, state), (want, want_gradients, want_state) = results
    # a value next to a tie may round to the neighbouring code; that is one step for a few elements
    apart = (y - want).abs()
    assert float(apart.max()) <= 1.001 * float(state["scale"])
    assert float((apart > 1e-5).float().mean()) <= 0.01
    for key, value in want_state.items():
        torch.testing.assert_close(state[key], value, **TOLERANCE)
    for have, wanted in zip(gradients, want_gradients, strict=True):
        torch.testing.assert_close(have, wanted, rtol=1e-4, atol=1e-4 * max(1.0, float(wanted.abs().max())))
    assert y.stride() == want.stride()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(4, 16, 8, 8), (3, 7, 5, 3), (2, 1, 9, 4), (5, 33, 1, 1), (1, 40, 7, 7)])
@pytest.mark.parametrize("training", [True, False])
def test_one_call_is_the_modules_one_after_the_other(
    isa: str, form: str, shape: tuple[int, ...], training: bool
) -> None:
    norm, quantizer = norm_of(shape[1]).train(training), quantizer_of(TRACK)
    assert_same(both(values(shape, form), norm, nn.ReLU(), quantizer), quantizer)


@pytest.mark.parametrize("activation", [None, "relu", nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.5, 1.5)])
@pytest.mark.parametrize("phase", [TRACK, QUANTIZE])
def test_activations_and_phases(activation: Activation, phase: Phase) -> None:
    quantizer = quantizer_of(phase)
    assert_same(both(values((4, 6, 6, 5)), norm_of(6), activation, quantizer), quantizer)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)),
    form=st.sampled_from(list(FORMATS)),
    training=st.booleans(),
    affine=st.booleans(),
    spread=st.sampled_from([1e-2, 1.0, 100.0]),
    dtype=st.sampled_from(["uint8", "int8"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    shape: tuple[int, int, int, int], form: str, training: bool, affine: bool, spread: float, dtype: str, seed: int
) -> None:
    if training and shape[0] * shape[2] * shape[3] < 4:
        return  # the variance of so few values is anything
    norm = norm_of(shape[1], affine=affine, seed=seed).train(training)
    quantizer = quantizer_of(TRACK, dtype=dtype)
    assert_same(both(values(shape, form, seed, spread), norm, "relu", quantizer), quantizer)


def test_the_variance_of_values_far_from_zero() -> None:
    x = values((4, 3, 8, 8)).detach() * 1e-2 + 1000.0
    norm = nn.BatchNorm2d(3)
    norm_fake_quantize(x, norm, None, quantizer_of(QUANTIZE))
    exact = x.double().transpose(0, 1).flatten(1).var(1)
    assert norm.running_var is not None
    torch.testing.assert_close((norm.running_var.double() - 0.9) / 0.1, exact, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_results_do_not_depend_on_threads(form: str) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, gradients, state = both(values((8, 24, 33, 31), form), norm_of(24), "relu", quantizer_of(TRACK))[0]
            found.append([y, *gradients, *state.values()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_batch_with_nan_moves_no_range() -> None:
    quantizer = quantizer_of(TRACK)
    scale = quantizer.scale.clone()
    x = values((2, 3, 4, 4)).detach()
    x[0, 0, 0, 0] = math.nan
    norm = norm_of(3).eval()
    y, want = norm_fake_quantize(x, norm, None, quantizer), single(x, norm, None, quantizer_of(TRACK))
    torch.testing.assert_close(y, want)
    assert torch.equal(quantizer.scale, scale)


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", nn.ReLU6()])
def test_addition(isa: str, activation: Activation, tracks: bool) -> None:
    results = []
    for fused in (True, False):
        x, other = values((3, 5, 7, 6), "channels_last"), values((3, 5, 7, 6), "contiguous", seed=9)
        quantizer = quantizer_of(TRACK if tracks else QUANTIZE)
        if fused:
            y = add_fake_quantize(x, other, activation, quantizer)
        else:
            total = x + other
            y = quantizer(single(total, nn.Identity(), activation, nn.Identity()))  # type: ignore[arg-type]
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        results.append([y.detach(), x.grad, other.grad, quantizer.scale, quantizer.zero_point, quantizer.min_val])
    for have, want in zip(*results, strict=True):
        assert torch.equal(have, want)


def test_an_addition_that_broadcasts_is_left_to_pytorch() -> None:
    quantizer = quantizer_of(QUANTIZE)
    x, other = values((2, 3, 4, 4)), values((1, 3, 1, 1))
    assert torch.equal(add_fake_quantize(x, other, None, quantizer), quantizer(x + other))


def test_opcheck() -> None:
    x, bias = values((2, 3, 4, 4)).detach(), torch.zeros(3)
    buffers = (torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(0.1), torch.tensor(0, dtype=torch.int32),
               torch.tensor(0))  # fmt: skip
    tail = (True, 0.1, 0, 255, False, 0, False)
    norm = (torch.ones(3), bias, torch.zeros(3), torch.ones(3), True, 0.1, 1e-5, 0.0, 6.0)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.qat.norm_quantize_forward.default, (x, *norm, *buffers, *tail), test_utils=checks)
    torch.library.opcheck(
        torch.ops.qat.add_quantize_forward.default, (x, x.clone(), 0.0, math.inf, *buffers, *tail), test_utils=checks
    )
    _, bits, mean, invstd = torch.ops.qat.norm_quantize_forward(x, *norm, *buffers, *tail)
    torch.library.opcheck(
        torch.ops.qat.norm_quantize_backward.default,
        (x, x, bits, torch.ones(3), mean, invstd, True, True),
        test_utils=checks,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.float64)}, "x is not float32"),
        ({"x": torch.zeros(0, 3, 4, 4)}, "no channels or no elements"),
        ({"x": torch.zeros(5)}, "no channels or no elements"),
        ({"x": torch.zeros(1, 3, 1, 1)}, "one value a channel"),
        ({"gamma": torch.ones(4)}, "4 values in gamma for 3 channels"),
        ({"running_mean": torch.zeros(3, dtype=torch.float64)}, "running_mean is not a contiguous tensor of 3 float32"),
        ({"scale": torch.ones(2)}, "scale is not a contiguous tensor of 1 float32"),
        ({"low": None}, "scale is given without low"),
        ({"scale": None}, "track is set without a scale"),
        ({"qmax": 0}, "integer range"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {
        "x": torch.zeros(2, 3, 4, 4), "gamma": torch.ones(3), "beta": torch.zeros(3), "running_mean": torch.zeros(3),
        "running_var": torch.ones(3), "batch_statistics": True, "momentum": 0.1, "eps": 1e-5, "low_bound": 0.0,
        "high_bound": 6.0, "low": torch.zeros(()), "high": torch.ones(()), "scale": torch.ones(()),
        "zero_point": torch.zeros((), dtype=torch.int32), "tracked": torch.tensor(0), "track": True, "average": 0.1,
        "qmin": 0, "qmax": 255, "symmetric": False, "middle": 0, "power_of_two": False,
    } | change  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.norm_quantize_forward(**given)


def test_bad_gradient() -> None:
    x, statistic = torch.zeros(2, 3, 4, 4), torch.ones(3)
    for grad, bits, message in (
        (torch.zeros(2, 3, 4, 5), torch.zeros(12, dtype=torch.uint8), "grad of shape"),
        (x, torch.zeros(11, dtype=torch.uint8), "mask_bits does not fit"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.qat.norm_quantize_backward(grad, x, bits, None, statistic, statistic, True, True)
    with pytest.raises(RuntimeError, match="give tensors of one shape"):
        torch.ops.qat.add_quantize_forward(
            x, torch.zeros(2, 3), 0.0, 1.0, None, None, None, None, None, False, 0.0, 0, 1, False, 0, False
        )
