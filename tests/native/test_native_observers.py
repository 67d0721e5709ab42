"""The native observers gather what the Python observers gather."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import make, tensors
from torch import Tensor

from qat import native
from qat.observers import make_observer
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec


def buffers() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.zeros(65536, dtype=torch.int64),
        torch.tensor(math.inf),
        torch.tensor(-math.inf),
        torch.zeros((), dtype=torch.int64),
    )


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors(), st.integers(0, 4))
def test_minmax_equals_the_observer(isa: str, x: Tensor, channel: int) -> None:
    for axis in (None, channel % x.dim()) if x.dim() and x.numel() else (None,):
        granularity = PER_TENSOR if axis is None else Granularity("per_channel", axis)
        observer = make_observer(ObserverSpec("minmax"), granularity, None if axis is None else x.shape[axis], "x")
        observer.observe(x)
        low, high, nonfinite = native.observe_minmax(x, axis)
        assert torch.equal(low, observer.min_val)
        assert torch.equal(high, observer.max_val)
        assert int(nonfinite) == int(observer.nonfinite)
        assert not bool(torch.signbit(low[low == 0]).any()), "either zero is 0.0, whatever the order of the elements"


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(tensors(), min_size=1, max_size=3))
def test_histograms_equal_the_observer(isa: str, batches: list[Tensor]) -> None:
    observer = make_observer(ObserverSpec("histogram"), PER_TENSOR, None, "x")
    state = buffers()
    for x in batches:
        observer.observe(x)
        native.observe_histogram(x, *state)
    counts, low, high, nonfinite = state
    assert torch.equal(counts, observer.counts)
    assert torch.equal(low, observer.min_val)
    assert torch.equal(high, observer.max_val)
    assert torch.equal(nonfinite, observer.nonfinite)


def test_large_histograms_over_threads(isa: str) -> None:
    """Large enough for several threads, each with counters of its own."""
    x = make((3, 700_001), "contiguous", torch.float32, 1, 0.01)
    observer = make_observer(ObserverSpec("histogram"), PER_TENSOR, None, "x")
    observer.observe(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            counts, low, high, nonfinite = state = buffers()
            native.observe_histogram(x, *state)
            assert torch.equal(counts, observer.counts)
            assert (low.item(), high.item()) == (observer.min_val.item(), observer.max_val.item())
            assert nonfinite.item() == observer.nonfinite.item()
    finally:
        torch.set_num_threads(before)


def test_opcheck(operators: None) -> None:
    for axis in (-1, 1):
        results = torch.library.opcheck(torch.ops.qat.observe_minmax.default, (torch.randn(3, 4, 5), axis))
        assert set(results.values()) == {"SUCCESS"}
    results = torch.library.opcheck(torch.ops.qat.observe_histogram.default, (torch.randn(3, 4), *buffers()))
    assert set(results.values()) == {"SUCCESS"}


def test_compiled_without_a_graph_break(operators: None) -> None:
    def observe(x: Tensor, counts: Tensor, low: Tensor, high: Tensor, nonfinite: Tensor) -> Tensor:
        native.observe_histogram(x * 2, counts, low, high, nonfinite)
        return native.observe_minmax(x, 0)[0]

    x = torch.randn(4, 6)
    eager, compiled = buffers(), buffers()
    low = observe(x, *eager)
    assert torch.equal(torch.compile(observe, fullgraph=True, backend="aot_eager")(x, *compiled), low)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert int(compiled[0].sum()) == 24


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.ones(3, dtype=torch.int32), "x is neither float32"),
        (1, torch.zeros(65535, dtype=torch.int64), "counts is not a contiguous tensor of 65536 int64"),
        (1, torch.zeros(65536, dtype=torch.int32), "counts is not"),
        (1, torch.zeros(1, dtype=torch.int64).expand(65536), "counts is not"),
        (2, torch.zeros(2), "low is not a contiguous tensor of 1 float32"),
        (3, torch.zeros(1, dtype=torch.float64), "high is not"),
        (4, torch.zeros(1), "nonfinite is not"),
    ],
)
def test_bad_input_is_a_message(operators: None, place: int, value: Tensor, message: str) -> None:
    arguments = [torch.ones(3), *buffers()]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.observe_histogram(*arguments)


def test_minmax_refuses_what_it_cannot_do(operators: None) -> None:
    with pytest.raises(RuntimeError, match="axis 3 of a tensor of shape"):
        native.observe_minmax(torch.ones(2, 3), 3)
    with pytest.raises(RuntimeError, match="axis"):
        native.observe_minmax(torch.ones(2, 3), -3)
    with pytest.raises(RuntimeError, match="neither float32 nor bfloat16"):
        native.observe_minmax(torch.ones(2, dtype=torch.float16))
