"""The native fake quantization equals the PyTorch one to the bit, and takes part in autograd and compilation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from native_cases import fake_quantizations, make, same_bits
from torch import Tensor

from qat import native
from qat.quantizers import static
from qat.scheme import PER_TENSOR, Granularity


def reference(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    """Value and mask of the PyTorch path."""
    from qat import numerics

    granularity = PER_TENSOR if axis is None else Granularity("per_channel", axis)
    s = numerics.expand_to(scale, x, granularity)
    z = numerics.expand_to(zero_point.to(torch.float32), x, granularity)
    y, mask = static._forward(x, s, z, None, qmin, qmax, with_mask=True)
    assert mask is not None
    return y, mask


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fake_quantizations())
def test_values_and_gradients_are_those_of_pytorch_to_the_bit(
    isa: str, case: tuple[Tensor, Tensor, Tensor, int, int, int | None]
) -> None:
    x, *grid = case
    value, mask = reference(x, *grid)
    assert same_bits(native.fake_quantize(x, *grid), value)
    leaf = x.detach().requires_grad_()
    y = native.fake_quantize(leaf, *grid)
    assert same_bits(y.detach(), value)
    # a gradient in the order of the dimensions, whatever the order of the memory of x
    upstream = torch.arange(1.0, x.numel() + 1).reshape(x.shape).to(x.dtype)
    (gradient,) = torch.autograd.grad(y, leaf, upstream)
    assert torch.equal(gradient, torch.where(mask, upstream, 0.0))


@pytest.mark.parametrize("shape", [(1 << 18,), (3, 33, 65, 31)])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_threads_change_no_bit(isa: str, shape: tuple[int, ...], axis: int | None) -> None:
    axis = axis if len(shape) > 1 else None
    x = make(shape, "permuted", torch.float32, 0, 0.01).requires_grad_()
    count = 1 if axis is None else shape[axis]
    scale, zero = torch.rand(count) + 0.01, torch.zeros(count, dtype=torch.int32)
    upstream = torch.randn(shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            y = native.fake_quantize(x, scale, zero, -128, 127, axis)
            (gradient,) = torch.autograd.grad(y, x, upstream)
            results.append([y.detach(), gradient])
    finally:
        torch.set_num_threads(before)
    assert same_bits(results[0][0], reference(x.detach(), scale, zero, -128, 127, axis)[0])
    for other in results[1:]:
        assert same_bits(other[0], results[0][0])
        assert same_bits(other[1], results[0][1])


def test_memory_formats_are_kept_and_only_bits_are_saved(operators: None) -> None:
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = native.fake_quantize(x, torch.tensor(0.01), torch.tensor(0), -128, 127)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, 50)]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_bits_behind_the_last_element_are_zero(isa: str) -> None:
    for n in range(1, 40):
        _, bits = torch.ops.qat.fake_quantize_forward(torch.zeros(n), torch.ones(1), torch.zeros(1), 0, 1)
        assert sum(byte << (8 * i) for i, byte in enumerate(bits.tolist())) == (1 << n) - 1


def test_an_infinite_gradient_outside_the_range_does_not_become_nan(isa: str) -> None:
    x = torch.tensor([100.0, 1.0] * 20, requires_grad=True)
    y = native.fake_quantize(x, torch.tensor(0.1), torch.tensor(0), -128, 127)
    (gradient,) = torch.autograd.grad(y, x, torch.tensor([float("inf"), 2.0] * 20))
    assert gradient.tolist() == [0.0, 2.0] * 20


def test_the_gradient_has_a_gradient(operators: None) -> None:
    x = torch.tensor([100.0, 1.0], requires_grad=True)
    weight = torch.tensor([3.0, 5.0], requires_grad=True)
    y = native.fake_quantize(x, torch.tensor(0.1), torch.tensor(0), -128, 127)
    (gradient,) = torch.autograd.grad(y, x, weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), weight)
    assert second.tolist() == [0.0, 1.0]


def test_without_a_mask_there_is_no_gradient(operators: None) -> None:
    x = torch.randn(4, requires_grad=True)
    y, bits = torch.ops.qat.fake_quantize_forward(x, torch.ones(1), torch.zeros(1), 0, 15, -1, False)
    assert bits.numel() == 0
    with pytest.raises(RuntimeError, match="with_mask"):
        y.sum().backward()


SAMPLES = {
    "per_tensor": lambda: (torch.randn(3, 5, requires_grad=True), torch.tensor(0.1), torch.tensor(3), 0, 15, -1),
    "per_channel": lambda: (torch.randn(2, 4, 3, 3), torch.rand(4) + 0.1, torch.zeros(4), -8, 7, 1),
    "channels_last": lambda: (
        torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_(),
        torch.rand(4) + 0.1, torch.zeros(4), -8, 7, 1,
    ),
    "bfloat16": lambda: (torch.randn(9).bfloat16().requires_grad_(), torch.tensor(0.1), torch.tensor(0), -8, 7, -1),
    "strided": lambda: (torch.randn(6, 6)[:, ::2], torch.tensor(0.1), torch.tensor(0), -8, 7, -1),
    "empty": lambda: (torch.randn(0, 3), torch.ones(3), torch.zeros(3), -8, 7, 1),
}  # fmt: skip


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(operators: None, sample: str) -> None:
    results = torch.library.opcheck(torch.ops.qat.fake_quantize_forward.default, SAMPLES[sample]())
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("strides", [(5, 1), (1, 3)])
def test_opcheck_of_the_gradient(operators: None, strides: tuple[int, int]) -> None:
    bits = torch.randint(0, 256, (2,), dtype=torch.uint8)
    grad = torch.randn(3, 5, requires_grad=True)
    results = torch.library.opcheck(torch.ops.qat.fake_quantize_backward.default, (grad, bits, strides))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("axis", [None, 1])
def test_compiled_without_a_graph_break(operators: None, axis: int | None, dynamic: bool) -> None:
    count = 1 if axis is None else 6
    scale, zero = torch.rand(count) + 0.05, torch.zeros(count, dtype=torch.int32)

    def step(v: Tensor) -> Tensor:
        return native.fake_quantize(v * 2, scale, zero, -128, 127, axis)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (4, 7):
        x = torch.randn(batch, 6, 3, 3).to(memory_format=torch.channels_last)
        results = []
        for function in (step, compiled):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


X = torch.ones(2, 3)
ONE, ZERO = torch.ones(1), torch.zeros(1)
BAD = {
    "integer values": ((X.long(), ONE, ZERO, 0, 15), "float32 nor bfloat16"),
    "float64 values": ((X.double(), ONE, ZERO, 0, 15), "float32 nor bfloat16"),
    "meta scale": ((X, ONE.to("meta"), ZERO, 0, 15), "scale is on meta and x on cpu"),
    "too many scales": ((X, torch.ones(3), ZERO, 0, 15), "3 values in scale for 1 channels"),
    "too few scales": ((X, torch.ones(2), torch.zeros(3), 0, 15, 1), "2 values in scale for 3 channels"),
    "too few zero points": ((X, torch.ones(3), ZERO, 0, 15, 1), "1 values in zero_point for 3 channels"),
    "no scales": ((X, torch.ones(0), ZERO, 0, 15), "0 values in scale"),
    "float64 scale": ((X, ONE.double(), ZERO, 0, 15), "scale is neither float32"),
    "missing axis": ((X, ONE, ZERO, 0, 15, 2), "axis 2 of a tensor of shape"),
    "negative axis": ((X, ONE, ZERO, 0, 15, -2), "axis -2"),
    "axis of a scalar": ((torch.tensor(1.0), ONE, ZERO, 0, 15, 0), "axis 0"),
    "empty range": ((X, ONE, ZERO, 3, 3), r"\[3, 3\] is empty or too wide"),
    "wide range": ((X, ONE, ZERO, 0, 2**40), "too wide"),
    "no tensor": ((3, ONE, ZERO, 0, 15), "Tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_message(operators: None, case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.fake_quantize_forward(*arguments)


BITS = torch.zeros(1, dtype=torch.uint8)
BAD_GRADIENT = {
    "short mask": ((torch.ones(9), BITS, [1]), "mask_bits does not fit"),
    "long mask": ((torch.ones(8), BITS.repeat(2), [1]), "mask_bits does not fit"),
    "mask of bool": ((torch.ones(8), BITS.bool(), [1]), "mask_bits does not fit"),
    "mask with gaps": ((torch.ones(16), BITS.repeat(4)[::2], [1]), "mask_bits does not fit"),
    "wrong type": ((torch.ones(8).half(), BITS, [1]), "float32 nor bfloat16"),
    "strides of another shape": ((torch.ones(8), BITS, [4, 1]), "strides do not fit"),
    "negative strides": ((torch.ones(8), BITS, [-1]), "strides do not fit"),
    "strides with gaps": ((torch.ones(8), BITS, [2]), "not those of a dense tensor"),
    "overlapping strides": ((torch.ones(8), BITS, [0]), "not those of a dense tensor"),
}


@pytest.mark.parametrize("case", BAD_GRADIENT)
def test_a_bad_gradient_is_a_message(operators: None, case: str) -> None:
    arguments, message = BAD_GRADIENT[case]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.fake_quantize_backward(*arguments)


def test_a_scalar_and_an_empty_tensor(operators: None) -> None:
    for x in (torch.tensor(0.37), torch.zeros(0), torch.zeros(2, 0, 3)):
        y = native.fake_quantize(x.requires_grad_(), torch.tensor(0.1), torch.tensor(0), -8, 7)
        y.sum().backward()
        assert y.shape == x.shape
        assert x.grad is not None
        assert torch.equal(x.grad, torch.ones_like(x))
