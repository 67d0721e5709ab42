"""QDrop in native passes: the numbers of places, and what keeps its value, with the bits of PyTorch's path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import same_bits, tensors
from torch import Tensor, nn

from qat import native
from qat.quantizers import OBSERVE, TRACK, FakeQuantize, dropping
from qat.quantizers.fused import add_fake_quantize, norm_fake_quantize
from qat.scheme import QuantizerSpec, Scheme

RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def numbers(like: Tensor, seed: int, *, fused: bool) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        if not fused:
            patch.setattr(native, "runs_on", lambda _: False)
        return dropping.place_numbers(like, torch.tensor(seed))


@RELAXED
@given(x=tensors(), seed=st.integers(0, 2**63 - 1))
def test_native_equals_pytorch(isa: str, x: Tensor, seed: int) -> None:
    ours, theirs = (numbers(x.float(), seed, fused=fused) for fused in (True, False))
    assert ours.stride() == theirs.stride()
    assert torch.equal(ours, theirs)


def test_numbers_are_uniform_and_those_of_two_seeds_have_nothing_in_common(operators: None) -> None:
    x = torch.empty(1 << 18)
    first, *others = (numbers(x, seed, fused=True) / 2**24 for seed in (1, 2, 1 << 40, 12345678901234567))
    assert float(first.min()) >= 0.0
    assert float(first.max()) < 1.0
    counts = torch.histc(first, 64, 0.0, 1.0)
    # chi-square of 63 degrees of freedom: mean 63, deviation 11
    assert float(((counts - 4096).square() / 4096).sum()) < 120
    neighbours = torch.stack([first[:-1], first[1:]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.01
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 0.01


def quantizer_of(name: str, drop: float) -> FakeQuantize:
    quantizer = FakeQuantize(Scheme("uint8", qmax=15, quantizer=QuantizerSpec(name, {"drop": drop})), "y")
    quantizer.set_phase(OBSERVE)
    quantizer(torch.tensor([-0.3, 2.5]))
    quantizer.finish()
    quantizer.set_phase(TRACK)
    return quantizer.train()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("addition", [True, False])
def test_a_static_quantizer_is_fused_and_has_the_bits_of_the_single_passes(
    isa: str, form: torch.memory_format, training: bool, addition: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    for key in ("norm_quantize", "add_quantize"):
        function = getattr(native, key)
        monkeypatch.setattr(native, key, lambda *a, f=function: (used.append(a[3] is not None), f(*a))[1])
    found = []
    for fused in (True, False):
        torch.manual_seed(3)
        quantizer = quantizer_of("qdrop", 0.4).train(training)
        x, other = (torch.randn(4, 6, 5, 7).contiguous(memory_format=form) for _ in range(2))
        leaf = x.requires_grad_()
        norm = nn.BatchNorm2d(6).train(training)
        if not fused:  # with a hook on the quantizer the passes are two
            quantizer.register_forward_hook(lambda *_: None)
        if addition:
            y = add_fake_quantize(leaf, other, nn.ReLU(), quantizer)
        else:
            y = norm_fake_quantize(leaf, norm, nn.ReLU(), quantizer)
        wanted = [leaf, *([] if addition else norm.parameters())]
        state = [b.clone() for b in quantizer.buffers() if b.dtype == torch.float32]
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted), *state])
    assert used == [True, False]
    for have, want in zip(*found, strict=True):
        assert same_bits(have, want)
    codes = found[0][0] / quantizer.scale
    kept = ((codes - codes.round()).abs() > 1e-3).float().mean()
    assert (float(kept) > 0.1) is training


def test_the_state_of_the_generator_decides_which_elements_are_kept(operators: None) -> None:
    quantizer, x = quantizer_of("lsq", 0.5), torch.randn(2, 3, 4, 4)
    norm = nn.BatchNorm2d(3)
    state = torch.get_rng_state()
    first = [norm_fake_quantize(x, norm, None, quantizer) for _ in range(2)]
    torch.set_rng_state(state)
    again = [norm_fake_quantize(x, norm, None, quantizer) for _ in range(2)]
    assert not torch.equal(*first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_compiled_without_a_graph_break(operators: None) -> None:
    quantizer, norm = quantizer_of("lsq", 0.5), nn.BatchNorm2d(3)

    def step(x: Tensor) -> Tensor:
        return norm_fake_quantize(x, norm, nn.ReLU(), quantizer)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    results = []
    for function in (step, compiled):
        torch.manual_seed(5)
        y = function(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, *quantizer.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck_and_bad_input(operators: None) -> None:
    ops, x, seed = torch.ops.qat, torch.ones(2, 3), torch.tensor(5)
    assert set(torch.library.opcheck(ops.drop_numbers.default, (x, seed)).values()) == {"SUCCESS"}
    grid = (
        torch.tensor(-1.0),
        torch.tensor(1.0),
        torch.tensor(0.1),
        torch.tensor(3, dtype=torch.int32),
        torch.tensor(0),
    )
    added = (x, x, 0.0, 6.0, *grid, True, 0.1, 0, 15, False, 0, False, True, seed, 0.5)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.add_quantize_forward.default, added, test_utils=checks)
    norm = (None, None, torch.zeros(3), torch.ones(3), True, 0.1, 1e-5)
    torch.library.opcheck(ops.norm_quantize_forward.default, (x, *norm, *added[2:]), test_utils=checks)
    with pytest.raises(RuntimeError, match="like is not float32"):
        ops.drop_numbers(x.double(), seed)
    with pytest.raises(RuntimeError, match="seed is not one int64 value on the CPU"):
        ops.drop_numbers(x, seed.float())
    with pytest.raises(RuntimeError, match="give a probability"):
        ops.add_quantize_forward(*added[:-1], -0.1)
