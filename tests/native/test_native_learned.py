"""Native fake quantization on learned grids equals the PyTorch path; its sums have the same bits for all threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from learned_cases import cases, pytorch, run
from torch import Tensor

from qat import native
from qat.quantizers import learned


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), st.booleans())
def test_native_equals_pytorch(
    isa: str, case: tuple[Tensor, Tensor, Tensor, int, int, int | None], clips: bool
) -> None:
    ours, theirs = run(case, 0.3, learned.is_for_native, clips), run(case, 0.3, pytorch, clips)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        # both add the same float32 numbers in float64, in another order
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [None, 1, 0])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sums_have_the_same_bits_for_every_number_of_threads(
    isa: str, axis: int | None, memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 65, 31, generator=generator).to(memory_format=memory_format)
    count = () if axis is None else (x.shape[axis],)
    case = (x, torch.rand(count, generator=generator) + 0.01, torch.full(count, 7.6), 0, 15, axis)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(case, 1.0, learned.is_for_native))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for a, b in zip(results[0][2:], run(case, 1.0, pytorch)[2:], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-3)


def test_opcheck(operators: None) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    scale, zero_point = torch.full((4,), 0.1, requires_grad=True), torch.full((4,), 3.3, requires_grad=True)
    forward = torch.ops.qat.fake_quantize_learned_forward.default
    backward = torch.ops.qat.fake_quantize_learned_backward.default
    for arguments in (
        (x, scale, zero_point, 0, 15, 1, 0.5),
        (x, scale, zero_point, 0, 15, 1, 0.5, True),
        (x, torch.tensor(0.1), torch.tensor(3.0), 0, 15),
        (torch.randn(0, 4), scale, zero_point, 0, 15, 1),
        (torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last), scale, zero_point, 0, 15, 1),
    ):
        assert set(torch.library.opcheck(forward, arguments).values()) == {"SUCCESS"}
        plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        assert set(torch.library.opcheck(backward, (torch.ones_like(plain[0]), *plain)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(operators: None, dynamic: bool) -> None:
    def step(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return native.fake_quantize_learned(x * 2, scale, zero_point, 0, 15, 1, 0.5)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (4, 7):
        results = []
        for function in (step, compiled):
            leaves = [
                t.requires_grad_()
                for t in (torch.linspace(-1, 1, batch * 3).reshape(batch, 3), torch.ones(3), torch.ones(3))
            ]
            y = function(*leaves)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


X, ONE, ZERO = torch.ones(2, 3), torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.long(), ONE, ZERO, 0, 15), "x is neither float32"),
        ((X, torch.ones(2), ZERO, 0, 15), "2 values in scale for 1 channels"),
        ((X, torch.ones(3), ZERO, 0, 15, 1), "1 values in zero_point for 3 channels"),
        ((X, ONE, ZERO, 15, 0), "is empty or too wide"),
        ((X, ONE, ZERO, 0, 15, 5), "axis 5 of a tensor of shape"),
    ],
)
def test_bad_input_is_a_message(operators: None, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.fake_quantize_learned_forward(*arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.fake_quantize_learned_backward(torch.ones(2, 3), *arguments)


@pytest.mark.parametrize("grad", [torch.ones(3, 2), torch.ones(2, 3).bfloat16(), torch.ones(6)])
def test_a_gradient_of_another_shape_or_type_is_refused(operators: None, grad: Tensor) -> None:
    with pytest.raises(RuntimeError, match="give a gradient of the shape and type of x"):
        torch.ops.qat.fake_quantize_learned_backward(grad, X, ONE, ZERO, 0, 15)
