"""Static fake quantization: the values of the numerics contract, the gradient of the range mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qat import native, numerics
from qat.errors import DataError, EncodingError
from qat.quantizers import fake_quantize
from qat.scheme import PER_TENSOR, Granularity, Scheme, int_type

DTYPES = ("int8", "uint8", "int16", "uint16", "int4", "uint4")
NASTY = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1e-38,
    3.4028234663852886e38,
    -3.4028234663852886e38,
    float("inf"),
    -float("inf"),
]
NASTY += [float("nan"), 0.5, -0.5, 1.5, 2.5, -2.5, 0.05, 0.15000000596046448]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, int, Granularity]:
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5))
    values = st.one_of(st.sampled_from(NASTY), st.floats(width=32), st.floats(-20, 20, width=32))
    x = torch.from_numpy(draw(hnp.arrays("float32", shape, elements=values)))
    kind = int_type(draw(st.sampled_from(DTYPES)))
    qmin = draw(st.integers(kind.qmin, kind.qmax - 1))
    qmax = draw(st.integers(qmin + 1, kind.qmax))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    name = draw(st.sampled_from(("per_tensor", "per_channel", "per_group")))
    if name == "per_group":
        size = draw(st.integers(1, 4))
        granularity = Granularity("per_group", axis, size)
        sizes = list(shape)
        sizes[axis] = -(-sizes[axis] // size)
        count = int(torch.tensor(sizes).prod())
    else:
        granularity = Granularity(name, axis)  # type: ignore[arg-type]
        count = 1 if name == "per_tensor" else shape[axis]
    scales = st.one_of(st.sampled_from([0.1, 1.0, 2.0**-40, 2.0**111]), st.floats(2.0**-10, 10, width=32))
    scale = torch.tensor(draw(st.lists(scales, min_size=count, max_size=count)), dtype=torch.float32)
    zeros = st.integers(kind.qmin, kind.qmax)
    zero_point = torch.tensor(draw(st.lists(zeros, min_size=count, max_size=count)), dtype=torch.int32)
    if name == "per_tensor":
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return x, scale, zero_point, qmin, qmax, granularity


@settings(deadline=None, max_examples=300)
@given(cases())
def test_value_is_the_numerics_contract_to_the_bit(
    case: tuple[Tensor, Tensor, Tensor, int, int, Granularity],
) -> None:
    x, scale, zero_point, qmin, qmax, granularity = case
    expected = numerics.dequantize(
        numerics.quantize(x, scale, zero_point, qmin, qmax, granularity), scale, zero_point, granularity
    )
    for leaf in (x, x.clone().requires_grad_()):
        got = fake_quantize(leaf, scale, zero_point, qmin, qmax, granularity)
        assert torch.equal(got.detach().view(torch.int32), expected.view(torch.int32))


@settings(deadline=None, max_examples=200)
@given(cases())
def test_gradient_is_the_range_mask(case: tuple[Tensor, Tensor, Tensor, int, int, Granularity]) -> None:
    x, scale, zero_point, qmin, qmax, granularity = case
    x = x.clone().requires_grad_()
    upstream = torch.arange(1.0, x.numel() + 1).reshape(x.shape)
    fake_quantize(x, scale, zero_point, qmin, qmax, granularity).backward(upstream)
    unclamped = torch.round(x.detach() / numerics.expand_to(scale, x, granularity)) + numerics.expand_to(
        zero_point.float(), x, granularity
    )
    inside = (unclamped >= qmin) & (unclamped <= qmax)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(inside, upstream, 0.0))


def test_an_infinite_gradient_outside_the_range_does_not_become_nan() -> None:
    x = torch.tensor([100.0, 1.0], requires_grad=True)
    fake_quantize(x, torch.tensor(0.1), torch.tensor(0), -128, 127).backward(torch.tensor([float("inf"), 2.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_computed_in_float32_and_kept(dtype: torch.dtype) -> None:
    x = (torch.randn(64, generator=torch.Generator().manual_seed(0)) * 3).to(dtype).requires_grad_()
    scale, zero = torch.tensor(0.037), torch.tensor(7, dtype=torch.int32)
    got = fake_quantize(x, scale, zero, 0, 255)
    expected = numerics.dequantize(numerics.quantize(x.detach(), scale, zero, 0, 255), scale, zero).to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    got.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_only_a_mask_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    x = (10 * torch.randn(10)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        fake_quantize(x, torch.tensor(0.001), torch.tensor(0), -128, 127)
    expected = (torch.uint8, 2) if native.status().active else (torch.bool, 10)
    assert [(t.dtype, t.numel()) for t in kept] == [expected]


def test_the_factor_scales_before_and_unscales_after() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    factor = torch.tensor([[2.0], [-0.5], [4.0], [1.0]])
    scale, zero = torch.tensor(0.25), torch.tensor(0, dtype=torch.int32)
    got = fake_quantize(x, scale, zero, -4, 3, factor=factor)
    codes = numerics.quantize(x.detach() * factor, scale, zero, -4, 3)
    assert torch.equal(got, numerics.dequantize(codes, scale, zero) / factor)
    got.sum().backward()
    unclamped = torch.round(x.detach() * factor / scale)
    assert x.grad is not None
    assert torch.equal(x.grad, ((unclamped >= -4) & (unclamped <= 3)).float())


@pytest.mark.parametrize("granularity", [PER_TENSOR, Granularity("per_channel", 1), Granularity("per_group", 1, 2)])
def test_compiled_equals_eager_forward_and_backward(granularity: Granularity) -> None:
    scheme = Scheme("int8", granularity=granularity)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) * 2
    x[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    count = {"per_tensor": 1, "per_channel": 6, "per_group": 12}[granularity.kind]
    scale, zero = numerics.range_to_scale(-torch.rand(count), torch.rand(count), scheme)

    def step(v: Tensor) -> Tensor:
        return fake_quantize(v, scale, zero, -128, 127, granularity) * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_integers_and_too_wide_codes_are_refused() -> None:
    with pytest.raises(DataError, match="int64"):
        fake_quantize(torch.arange(3), torch.tensor(1.0), torch.tensor(0), 0, 255)
    with pytest.raises(EncodingError, match="too wide"):
        fake_quantize(torch.ones(3), torch.tensor(1.0), torch.tensor(0), -(2**31), 2**31 - 1)
