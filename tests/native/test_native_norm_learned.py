"""Batch norm or an addition, activation and a learned grid in one operator, against the single operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import make, same_bits
from torch import Tensor, nn

from qat import native
from qat.native import Drop, LearnedGrid, Norm
from qat.quantizers import OBSERVE, TRACK, FakeQuantize
from qat.quantizers.dropping import keep_some
from qat.quantizers.fused import add_fake_quantize, norm_fake_quantize
from qat.scheme import QuantizerSpec, Scheme

pytestmark = pytest.mark.usefixtures("operators")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BOUNDS = [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-0.5, 1.5)]
CODES = [(0, 15), (-8, 7), (0, 255)]
DROPS = [None, None, 0.0, 0.3, 1.0]
#: What the compared functions return: the value, and the gradients of the leaves.
Result = tuple[Tensor, ...]


def leaves_of(norm: Norm, grid: LearnedGrid, *tensors: Tensor) -> tuple[list[Tensor], Norm, LearnedGrid]:
    """Copies with gradients: tensors, then gamma and beta where they are, scale, zero point."""
    own = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    gamma, beta, scale, zero_point = (
        None if t is None else t.detach().clone().requires_grad_() for t in (norm.gamma, norm.beta, *grid[:2])
    )
    assert scale is not None
    assert zero_point is not None
    mean, var = (None if t is None else t.clone() for t in (norm.running_mean, norm.running_var))
    norm = norm._replace(gamma=gamma, beta=beta, running_mean=mean, running_var=var)
    grid = grid._replace(scale=scale, zero_point=zero_point)
    return [*own, *(t for t in (gamma, beta) if t is not None), scale, zero_point], norm, grid


def learned(y: Tensor, grid: LearnedGrid, drop: Drop | None = None) -> Tensor:
    codes = (grid.qmin, grid.qmax, None, grid.grad_scale, grid.clips)
    out = native.fake_quantize_learned(y, grid.scale, grid.zero_point, *codes)
    return out if drop is None else keep_some(y, out, drop.probability, drop.seed)


def dropped(probability: float | None, seed: int) -> Drop | None:
    return None if probability is None else Drop(torch.tensor(seed * 0x123456789ABC), probability)


def compared(
    fused: Callable[..., Tensor], single: Callable[..., Tensor], norm: Norm, grid: LearnedGrid, *tensors: Tensor
) -> None:
    """All has the same bits but the sums of the grid, whose order is another one."""
    results = []
    for function in (fused, single):
        leaves, own, on = leaves_of(norm, grid, *tensors)
        y = function(*leaves[: len(tensors)], own, on)
        upstream = torch.linspace(-1, 1.5, y.numel()).reshape(y.shape)
        gradients = torch.autograd.grad(y, leaves, upstream)
        assert function is single or y.stride() == torch.empty_like(leaves[0]).stride()
        results.append(([y.detach(), *gradients[:-2], own.running_mean, own.running_var], gradients[-2:]))
    for have, want in zip(results[0][0], results[1][0], strict=True):
        assert (have is None and want is None) or same_bits(have, want)
    for have, want in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(have, want, rtol=2e-6, atol=1e-6 * grid.grad_scale * tensors[0].numel() ** 0.5)


def norm_of(channels: int, seed: int, *, batch: bool, affine: bool = True) -> Norm:
    generator = torch.Generator().manual_seed(seed)
    gamma, beta, mean, var = torch.randn(4, channels, generator=generator).unbind()
    weights = (gamma, beta) if affine else (None, None)
    return Norm(*weights, mean.clone(), var.abs() + 0.5, batch, 0.1, 1e-5)


def grid_of(seed: int, codes: tuple[int, int], grad_scale: float = 0.3, clips: bool = False) -> LearnedGrid:
    generator = torch.Generator().manual_seed(seed)
    zero_point = torch.rand((), generator=generator) * (codes[1] - codes[0] + 6) + codes[0] - 3
    return LearnedGrid(torch.rand((), generator=generator) * 0.2 + 0.01, zero_point, *codes, grad_scale, clips)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    form=st.sampled_from(list(FORMATS)),
    batch=st.booleans(),
    affine=st.booleans(),
    bounds=st.sampled_from(BOUNDS),
    codes=st.sampled_from(CODES),
    clips=st.booleans(),
    drop=st.sampled_from(DROPS),
    nasty=st.sampled_from([0.0, 0.0, 0.05]),
    seed=st.integers(0, 1000),
)
def test_the_fused_pass_of_a_batch_norm(
    isa: str, shape: tuple[int, ...], form: str, batch: bool, affine: bool, bounds: tuple[float, float],
    codes: tuple[int, int], clips: bool, drop: float | None, nasty: float, seed: int,
) -> None:  # fmt: skip
    chosen = dropped(drop, seed)
    batch = batch and math.prod(shape) > shape[1]
    x = make(shape, "contiguous", torch.float32, seed, nasty).contiguous(memory_format=FORMATS[form])
    compared(
        lambda x, norm, grid: native.norm_quantize_learned(x, norm, bounds, grid, chosen),
        lambda x, norm, grid: learned(native.norm_quantize(x, norm, bounds, None), grid, chosen),
        norm_of(shape[1], seed, batch=batch, affine=affine),
        grid_of(seed, codes, clips=clips),
        x,
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 9), max_size=4).map(tuple),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "permuted", "strided", "unaligned"])] * 2),
    bounds=st.sampled_from(BOUNDS),
    codes=st.sampled_from(CODES),
    clips=st.booleans(),
    drop=st.sampled_from(DROPS),
    nasty=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 1000),
)
def test_the_fused_pass_of_an_addition(
    isa: str, shape: tuple[int, ...], layouts: tuple[str, str], bounds: tuple[float, float], codes: tuple[int, int],
    clips: bool, drop: float | None, nasty: float, seed: int,
) -> None:  # fmt: skip
    chosen = dropped(drop, seed)
    tensors = [make(shape, layout, torch.float32, seed + k, nasty) for k, layout in enumerate(layouts)]
    compared(
        lambda x, other, _, grid: native.add_quantize_learned(x, other, bounds, grid, chosen),
        lambda x, other, _, grid: learned(native.add_quantize(x, other, bounds, None), grid, chosen),
        Norm(None, None, None, None, False, 0.0, 0.0),
        grid_of(seed, codes, clips=clips),
        *tensors,
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("batch", [True, False])
def test_results_do_not_depend_on_threads(form: str, batch: bool) -> None:
    x = make((8, 24, 33, 31), "contiguous", torch.float32, 0, 0.0).contiguous(memory_format=FORMATS[form])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves, norm, grid = leaves_of(norm_of(24, 0, batch=batch), grid_of(0, (0, 15)), x, x * 0.5)
            y = native.norm_quantize_learned(leaves[0], norm, (0.0, 6.0), grid)
            z = native.add_quantize_learned(y, leaves[1], (0.0, 6.0), grid)
            found.append([z.detach(), *torch.autograd.grad(z, leaves, torch.linspace(-1, 1, z.numel()).view_as(z))])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_sums_of_many_elements_are_exact_to_float32() -> None:
    # each contributes about the same: in float32 the sum would stop growing
    x = torch.full((1, 1, 2049, 2049), 0.3)
    scale, zero_point = torch.tensor(0.25, requires_grad=True), torch.tensor(0.0)
    grid = LearnedGrid(scale, zero_point, 0, 15, 1.0)
    y = native.add_quantize_learned(x, torch.zeros_like(x), (0.0, math.inf), grid)
    (gradient,) = torch.autograd.grad(y.sum(), scale)
    each = 1.0 - float(torch.tensor(0.3) / 0.25)
    assert float(gradient) == pytest.approx(each * x.numel(), rel=1e-6)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, scale = torch.randn(2, 3, 4, 4), torch.tensor(0.1, requires_grad=True)
    grid = LearnedGrid(scale, torch.tensor(3.0), 0, 15, 1.0)
    norm = norm_of(3, 0, batch=True)
    native.norm_quantize_learned(x, norm, (0.0, 6.0), grid).sum().backward()
    first, scale.grad = scale.grad, None
    native.add_quantize_learned(x, x, (0.0, 6.0), grid).sum().backward()
    assert first is not None
    assert scale.grad is not None
    assert norm.gamma is not None
    assert norm.gamma.grad is None
    with torch.no_grad():
        assert not native.norm_quantize_learned(x, norm, (0.0, 6.0), grid).requires_grad
        assert not native.add_quantize_learned(x, x, (0.0, 6.0), grid).requires_grad


# -- quantizers


def quantizer_of(name: str, **options: object) -> FakeQuantize:
    scheme = Scheme("uint8", symmetric=False, qmax=15, quantizer=QuantizerSpec(name, options))
    quantizer = FakeQuantize(scheme, "y")
    quantizer.set_phase(OBSERVE)
    quantizer(torch.tensor([-0.3, 2.5]))
    quantizer.finish()
    quantizer.set_phase(TRACK)
    return quantizer.train()


@pytest.mark.parametrize(
    ("name", "drop"),
    [("lsq", 0.0), ("lsq", 0.5), ("lsq_plus", 0.0), ("tqt", 0.0), ("ulq", 0.0), ("pact", 0.0), ("pact", 0.3)],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("addition", [True, False])
def test_every_quantizer_that_learns_a_grid_is_fused(
    name: str, drop: float, training: bool, addition: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    whole = {name: getattr(native, name) for name in ("norm_quantize_learned", "add_quantize_learned")}
    for key, function in whole.items():
        monkeypatch.setattr(native, key, lambda *a, f=function, k=key: (used.append(k), f(*a))[1])
    found = []
    for fused in (True, False):
        torch.manual_seed(1)
        quantizer = quantizer_of(name, drop=drop).train(training)
        x, other = (torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
        leaf = x.requires_grad_()
        norm = nn.BatchNorm2d(6).train(training)
        # with a hook on the quantizer the passes are two
        if not fused:
            quantizer.register_forward_hook(lambda *_: None)
        if addition:
            y = add_fake_quantize(leaf, other, nn.ReLU(), quantizer)
        else:
            y = norm_fake_quantize(leaf, norm, nn.ReLU(), quantizer)
        wanted = [leaf, *quantizer.parameters(), *([] if addition else norm.parameters())]
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    assert used == ["add_quantize_learned" if addition else "norm_quantize_learned"]
    assert torch.equal(found[0][0], found[1][0])
    for have, want in zip(*found, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


# -- operators


def test_opcheck() -> None:
    x = torch.randn(2, 3, 4, 4)
    norm = (torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3), True, 0.1, 1e-5)
    grid = (torch.tensor(0.1), torch.tensor([3.3]), 0, 15)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    ops = torch.ops.qat
    forward, backward = ops.norm_quantize_learned_forward.default, ops.norm_quantize_learned_backward.default
    dropping = (True, torch.tensor(7), 0.5)
    for last in ((True,), (False,), (), (True, *dropping)):
        torch.library.opcheck(forward, (x, *norm, 0.0, 6.0, *grid, *last), test_utils=checks)
    _, bits, mean, invstd = forward(x, *norm, 0.0, 6.0, *grid)
    for last in ((), (0.5, False), (0.5, False, *dropping)):
        given = (x, x, bits, *norm[:2], mean, invstd, True, 0.0, 6.0, *grid, *last)
        torch.library.opcheck(backward, given, test_utils=checks)
    leaves = [t.requires_grad_() for t in (x, x.clone(), torch.tensor(0.1), torch.tensor(3.3))]
    added = (*leaves[:2], 0.0, math.inf, *leaves[2:], 0, 15)
    assert set(torch.library.opcheck(ops.add_quantize_learned_forward.default, added).values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(ops.add_quantize_learned_forward.default, (*added, 0.5)).values()) == {"SUCCESS"}
    whole = (*added, 0.5, *dropping)
    assert set(torch.library.opcheck(ops.add_quantize_learned_forward.default, whole).values()) == {"SUCCESS"}
    plain = [t.detach() if isinstance(t, Tensor) else t for t in added]
    for last in ((), (0.5, False), (0.5, False, *dropping)):
        given = (torch.ones_like(plain[0]), *plain, *last)
        assert set(torch.library.opcheck(ops.add_quantize_learned_backward.default, given).values()) == {"SUCCESS"}


X, ONE, ZERO = torch.zeros(2, 3, 4, 4), torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.float64)}, "x is not float32"),
        ({"x": torch.zeros(0, 3, 4, 4)}, "no channels or no elements"),
        ({"gamma": torch.ones(4)}, "4 values in gamma for 3 channels"),
        ({"scale": torch.ones(2)}, "2 values in scale for 1 channels"),
        ({"zero_point": torch.ones(3)}, "3 values in zero_point for 1 channels"),
        ({"qmax": 0}, "integer range"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed is not one int64 value on the CPU"),
        ({"seed": torch.zeros(())}, "seed is not one int64 value on the CPU"),
        ({"seed": torch.tensor(1), "drop": 1.5}, r"drop is 1.5\d*; give a probability in \[0, 1\]"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {
        "x": X, "gamma": torch.ones(3), "beta": torch.zeros(3), "running_mean": torch.zeros(3),
        "running_var": torch.ones(3), "batch_statistics": True, "momentum": 0.1, "eps": 1e-5, "low_bound": 0.0,
        "high_bound": 6.0, "scale": ONE, "zero_point": ZERO, "qmin": 0, "qmax": 255,
    } | change  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.norm_quantize_learned_forward(**given)


def test_bad_gradients() -> None:
    statistic, bits = torch.ones(3), torch.zeros(12, dtype=torch.uint8)
    ops = torch.ops.qat
    for grad, mask, scale, message in (
        (torch.zeros(2, 3, 4, 5), bits, ONE, "grad of shape"),
        (X, bits[1:], ONE, "mask_bits does not fit"),
        (X, bits, torch.ones(2), "2 values in scale"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.norm_quantize_learned_backward(
                grad, X, mask, None, None, statistic, statistic, True, 0.0, 6.0, scale, ZERO, 0, 15
            )
    with pytest.raises(RuntimeError, match="give tensors of one shape"):
        ops.add_quantize_learned_forward(X, torch.zeros(2, 3), 0.0, 1.0, ONE, ZERO, 0, 15)
    for grad, other in ((X, torch.zeros(2, 3)), (torch.zeros(2, 3), X)):
        with pytest.raises(RuntimeError, match="give those of one forward pass"):
            ops.add_quantize_learned_backward(grad, X, other, 0.0, 1.0, ONE, ZERO, 0, 15)
