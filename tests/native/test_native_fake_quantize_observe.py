"""Fake quantization that observes in the same pass has the bits of the two operators that do one of it each."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import fake_quantizations, make, same_bits
from torch import Tensor

from qat import native

#: mantissa bits of the counts, None for the range alone, and the momentum of a moving average
KINDS = ((None, None), (None, 0.3), (None, 1.0), (0, None), (4, None), (7, None), (10, None))


def buffers(channels: int | None, bits: int | None, momentum: float | None) -> native.Statistics:
    """Those of an observer that has seen nothing."""
    shape = () if channels is None else (channels,)
    counts = None if bits is None else torch.zeros((*shape, 2 ** (9 + bits)), dtype=torch.int64)
    low, high = (torch.full(shape, value) for value in (math.inf, -math.inf))
    return native.Statistics(low, high, torch.zeros((), dtype=torch.int64), counts, bits or 0, momentum)


def assert_same_statistics(ours: native.Statistics, theirs: native.Statistics) -> None:
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            assert torch.equal(a, b)
            assert not a.is_floating_point() or same_bits(a, b)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fake_quantizations(), st.sampled_from(KINDS))
def test_bits_are_those_of_both_operators(
    isa: str, case: tuple[Tensor, Tensor, Tensor, int, int, int | None], kind: tuple[int | None, float | None]
) -> None:
    x, *grid, axis = case
    bits, momentum = kind
    channels = None if axis is None else x.shape[axis]
    if channels is not None and bits is not None and channels > 64:
        bits = 0
    ours, theirs = (buffers(channels, bits, momentum) for _ in range(2))
    for batch in (x, x * 0.75, x.relu()):
        native.observe(batch, theirs, axis)
        leaf = batch.detach().requires_grad_()
        expected = native.fake_quantize(leaf, *grid, axis)
        y = native.fake_quantize_observe(leaf, *grid, axis, ours)
        assert same_bits(y.detach(), expected.detach())
        assert y.stride() == expected.stride()
        assert_same_statistics(ours, theirs)
        upstream = torch.arange(1.0, x.numel() + 1).reshape(x.shape).to(x.dtype)
        gradients = [torch.autograd.grad(out, leaf, upstream)[0] for out in (y, expected)]
        assert same_bits(*gradients)
    # without a gradient no mask is made
    assert same_bits(native.fake_quantize_observe(x, *grid, axis, ours), native.fake_quantize(x, *grid, axis))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "axis"), [((300_001,), None), ((3, 33, 65, 31), 1), ((3, 65, 31, 33), -1)])
def test_threads_change_no_bit(
    isa: str, shape: tuple[int, ...], axis: int | None, kind: tuple[int | None, float | None], dtype: torch.dtype
) -> None:
    """Large enough for several threads, each with counters of its own."""
    channels = None if axis is None else shape[axis]
    x = make(shape, "permuted", dtype, 0, 0.01).requires_grad_()
    grid = torch.rand(channels or 1) + 0.01, torch.zeros(channels or 1, dtype=torch.int32), -128, 127
    theirs, upstream = buffers(channels, *kind), torch.randn(shape).to(dtype)
    native.observe(x, theirs, axis)
    expected = native.fake_quantize(x, *grid, axis)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ours = buffers(channels, *kind)
            y = native.fake_quantize_observe(x, *grid, axis, ours)
            assert same_bits(y.detach(), expected.detach())
            assert same_bits(torch.autograd.grad(y, x, upstream)[0], wanted)
            assert_same_statistics(ours, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [7, 300_000])
def test_what_is_not_finite_leaves_nothing_for_the_next_tensor(isa: str, size: int) -> None:
    x = torch.randn(size)
    dirty = x.clone()
    dirty[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    for batch, nonfinite in ((dirty, 3), (x, 0)):
        ours, theirs = buffers(None, 7, None), buffers(None, 7, None)
        y = native.fake_quantize_observe(batch, torch.tensor(0.1), torch.tensor(3), 0, 15, None, ours)
        native.observe(batch, theirs)
        assert_same_statistics(ours, theirs)
        assert int(ours.nonfinite) == nonfinite
        assert bool(y.isfinite().all())


def test_only_the_bits_of_the_mask_are_saved(operators: None) -> None:
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        native.fake_quantize_observe(x, torch.tensor(0.01), torch.tensor(0), -128, 127, None, buffers(None, 7, None))
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, 50)]


def arguments(**changes: Any) -> tuple[Any, ...]:
    low, high, nonfinite, *_ = buffers(3, None, None)
    given: dict[str, Any] = {
        "x": torch.randn(2, 3), "scale": torch.rand(3) + 0.1, "zero_point": torch.zeros(3, dtype=torch.int32),
        "qmin": 0, "qmax": 15, "axis": 1, "low": low, "high": high, "nonfinite": nonfinite, "counts": None,
        "mantissa_bits": 7, "momentum": None, "with_mask": True,
    }  # fmt: skip
    return tuple((given | changes).values())


COUNTS = torch.zeros(3, 512, dtype=torch.int64)
ONE = {"scale": torch.ones(()), "zero_point": torch.zeros(()), "low": torch.ones(()), "high": torch.zeros(())}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.1, "with_mask": False},
        {"counts": COUNTS, "mantissa_bits": 0},
        {"x": torch.randn(5, 5)[:, ::2], "axis": -1, "counts": torch.zeros(65536, dtype=torch.int64), **ONE},
        {"x": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).bfloat16()},
        {"x": torch.zeros(0, 3)},
    ],
)
def test_opcheck(operators: None, changes: dict[str, Any]) -> None:
    results = torch.library.opcheck(torch.ops.qat.fake_quantize_observe.default, arguments(**changes))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("axis", "bits", "momentum"), [(None, 7, None), (1, None, 0.1), (1, 4, None)])
def test_compiled_without_a_graph_break(
    operators: None, axis: int | None, bits: int | None, momentum: float | None, dynamic: bool
) -> None:
    channels = None if axis is None else 6
    scale, zero = torch.rand(channels or 1) + 0.05, torch.zeros(channels or 1, dtype=torch.int32)

    torch._dynamo.reset()

    def step(v: Tensor, statistics: native.Statistics) -> Tensor:
        return native.fake_quantize_observe(v * 2, scale, zero, -128, 127, axis, statistics)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    states = [buffers(channels, bits, momentum) for _ in range(2)]
    for batch in (4, 7):
        x = torch.randn(batch, 6, 3, 3).to(memory_format=torch.channels_last)
        results = []
        for function, state in zip((step, compiled), states, strict=True):
            leaf = x.clone().requires_grad_()
            y = function(leaf, state)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        assert_same_statistics(*states)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 3).double()}, "x is neither float32"),
        ({"x": torch.ones(2, 3).long()}, "x is neither float32"),
        ({"axis": 2}, "axis 2 of a tensor of shape"),
        ({"scale": torch.ones(2)}, "2 values in scale for 3 channels"),
        ({"scale": torch.ones(3, device="meta")}, "scale is on meta and x on cpu"),
        ({"zero_point": torch.zeros(1)}, "1 values in zero_point for 3 channels"),
        ({"qmin": 15}, r"\[15, 15\] is empty or too wide"),
        ({"low": torch.ones(2)}, "low is not a contiguous tensor of 3 float32"),
        ({"low": torch.ones(3, device="meta")}, "low is on meta and x on cpu"),
        ({"high": torch.ones(3).double()}, "high is not"),
        ({"nonfinite": torch.zeros(())}, "nonfinite is not"),
        ({"counts": COUNTS}, "counts is not a contiguous tensor of 196608 int64"),
        ({"counts": COUNTS, "mantissa_bits": 11}, "mantissa_bits 11 is outside"),
        ({"counts": COUNTS, "mantissa_bits": 0, "momentum": 0.1}, "a histogram has no momentum"),
    ],
)
def test_bad_input_is_a_message_and_changes_no_buffer(operators: None, changes: dict[str, Any], message: str) -> None:
    given = arguments(**changes)
    before = [copy.deepcopy(argument) for argument in given]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.fake_quantize_observe(*given)
    for a, b in zip(given, before, strict=True):
        assert not isinstance(a, Tensor) or a.is_meta or torch.equal(a, b)
