"""The native observers gather what the Python observers gather."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import make, tensors
from torch import Tensor

from qat import native
from qat.observers import Observer, make_observer
from qat.observers.binning import BinnedObserver
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme


def buffers() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.zeros(65536, dtype=torch.int64),
        torch.tensor(math.inf),
        torch.tensor(-math.inf),
        torch.zeros((), dtype=torch.int64),
    )


def in_pytorch(name: str, granularity: Granularity, channels: int | None, **options: float) -> Observer:
    """An observer that leaves the native extension alone."""
    observer = make_observer(ObserverSpec(name, options), granularity, channels, "x")
    observer._is_for_native = lambda _: False  # type: ignore[method-assign]
    return observer


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Tensor], Granularity, int | None]:
    """Batches of one shape, and which of their elements share a range."""
    first = draw(tensors())
    axis = None if first.dim() == 0 or first.numel() == 0 else draw(st.sampled_from([None, *range(first.dim())]))
    seed, nasty = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.1]))
    more = [
        make(tuple(first.shape), layout, first.dtype, seed, nasty)
        for layout in draw(st.lists(st.sampled_from(["contiguous", "permuted"]), max_size=2))
    ]
    if draw(st.booleans()):
        more.append(first.relu())
    if axis is None:
        return [first, *more], PER_TENSOR, None
    granularity = Granularity("per_channel", axis - draw(st.sampled_from([0, first.dim()])))
    return [first, *more], granularity, first.shape[axis]


def assert_same_state(ours: Observer, theirs: Observer) -> None:
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(a, b), name


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors(), st.integers(0, 4))
def test_minmax_equals_the_observer(isa: str, x: Tensor, channel: int) -> None:
    for axis in (None, channel % x.dim()) if x.dim() and x.numel() else (None,):
        granularity = PER_TENSOR if axis is None else Granularity("per_channel", axis)
        observer = in_pytorch("minmax", granularity, None if axis is None else x.shape[axis])
        observer.observe(x)
        low, high, nonfinite = native.observe_minmax(x, axis)
        assert torch.equal(low, observer.min_val)
        assert torch.equal(high, observer.max_val)
        assert int(nonfinite) == int(observer.nonfinite)
        assert not bool(torch.signbit(low[low == 0]).any()), "either zero is 0.0, whatever the order of the elements"


KINDS = (
    ("minmax", {}), ("moving_average", {"momentum": 0.3}), ("moving_average", {"momentum": 1.0}),
    ("percentile", {"mantissa_bits": 0}), ("histogram", {}), ("histogram", {"mantissa_bits": 5}),
)  # fmt: skip


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches(), st.sampled_from(KINDS))
def test_observers_have_the_state_that_pytorch_gives(
    isa: str, data: tuple[list[Tensor], Granularity, int | None], kind: tuple[str, dict[str, float]]
) -> None:
    given, granularity, channels = data
    name, options = kind
    ours = make_observer(ObserverSpec(name, options), granularity, channels, "x")
    theirs = in_pytorch(name, granularity, channels, **options)
    for x in given:
        ours.observe(x)
        theirs.observe(x)
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [7, 10])
def test_large_histograms_over_threads(isa: str, dtype: torch.dtype, bits: int) -> None:
    """Large enough for several threads, each with counters of its own."""
    x = make((3, 700_001), "contiguous", dtype, 1, 0.01)
    x[1].relu_()
    theirs = in_pytorch("histogram", PER_TENSOR, None, mantissa_bits=bits)
    theirs.observe(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ours = make_observer(ObserverSpec("histogram", {"mantissa_bits": bits}), PER_TENSOR, None, "x")
            ours.observe(x)
            assert_same_state(ours, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_histograms_by_channel_over_threads(isa: str, memory_format: torch.memory_format) -> None:
    x = make((3, 40, 50, 61), "contiguous", torch.float32, 1, 0.01).to(memory_format=memory_format)
    theirs = in_pytorch("histogram", Granularity("per_channel", 1), 40)
    theirs.observe(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            ours = make_observer(ObserverSpec("histogram"), Granularity("per_channel", 1), 40, "x")
            ours.observe(x)
            assert_same_state(ours, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-45, 6.0, -1e-38])
def test_a_constant_of_either_sign_is_in_one_bin(isa: str, value: float) -> None:
    for n in (5, 300_000):
        counts, low, high, _ = state = buffers()
        x = torch.full((n,), value)
        native.observe_histogram(x, *state)
        assert int(counts.sum()) == n
        assert int(counts[(int(x[0].view(torch.int32)) & 0xFFFFFFFF) >> 16]) == n
        assert low.item() == high.item() == float(x[0])


@st.composite
def observed(draw: st.DrawFn) -> tuple[Observer, Scheme]:
    """A histogram observer that has seen some distribution, and the scheme that it chooses a range for."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    channels = draw(st.sampled_from([None, None, 3]))
    x = torch.randn(3, draw(st.sampled_from([1, 50, 3000])), generator=generator)
    x = x * torch.rand(x.shape, generator=generator) ** draw(st.sampled_from([0, 4, 12]))
    shape = draw(st.sampled_from(["both", "positive", "negative", "bounded", "zero"]))
    x = {"both": x, "positive": x.relu(), "negative": -x.abs(), "bounded": x.clamp(-0.1, 0.3), "zero": x * 0}[shape]
    scheme = Scheme(
        draw(st.sampled_from(["uint8", "int8", "uint4", "int4"])),
        symmetric=draw(st.booleans()),
        observer=ObserverSpec("histogram", {"negative_weight": draw(st.sampled_from([1.0, 1.0, 0.01, 0.0]))}),
        granularity=PER_TENSOR if channels is None else Granularity("per_channel", 0),
    )
    observer = make_observer(scheme.observer, scheme.granularity, channels, "x")
    observer.observe(x)
    return observer, scheme


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(observed())
def test_clip_ranges_are_those_of_the_search_in_pytorch(isa: str, case: tuple[Observer, Scheme]) -> None:
    observer, scheme = case
    ours, theirs = observer._range(scheme), BinnedObserver._range(observer, scheme)  # type: ignore[arg-type]
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-9)


def test_opcheck(operators: None) -> None:
    for axis in (-1, 1):
        results = torch.library.opcheck(torch.ops.qat.observe_minmax.default, (torch.randn(3, 4, 5), axis))
        assert set(results.values()) == {"SUCCESS"}
    x = torch.randn(3, 4)
    by_channel = (torch.zeros(4, 512, dtype=torch.int64), torch.zeros(4), torch.zeros(4), buffers()[3])
    doubles = [torch.rand(4, dtype=torch.float64) for _ in range(2)]
    for operator, arguments in (
        ("observe_histogram", (x, *buffers())),
        ("observe_histogram", (x, *by_channel, 1, 0)),
        ("observe_range", (x, *buffers()[1:])),
        ("observe_range", (x, *by_channel[1:], 1, 0.1)),
        ("clip_ranges", (by_channel[0], *doubles, 0, 1.0, 0.01, 0, 15, False, 0, False)),
    ):
        results = torch.library.opcheck(getattr(torch.ops.qat, operator).default, arguments)
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


ONE, DOUBLES = (torch.ones(1), torch.zeros(1)), [torch.ones(1, dtype=torch.float64)] * 2
RULE = native.GridRule(0, 255, None, symmetric=False, middle=-1, power_of_two=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.observe_histogram(torch.ones(3), *buffers(), mantissa_bits=11), r"mantissa_bits 11 is outside"),
        (lambda: native.observe_histogram(torch.ones(3), *buffers(), mantissa_bits=6), "counts is not a contiguous"),
        (lambda: native.observe_histogram(torch.ones(3, 2), *buffers(), axis=1), "counts is not a contiguous"),
        (lambda: native.observe_range(torch.ones(3, 2), *buffers()[1:], axis=0), "low is not a contiguous tensor of 3"),
        (lambda: native.observe_range(torch.ones(3), *buffers()[1:3], torch.zeros(1)), "nonfinite is not"),
        (lambda: native.clip_ranges(buffers()[0], *DOUBLES, 11, RULE, 0.01), "mantissa_bits 11 is outside"),
        (lambda: native.clip_ranges(buffers()[0], *DOUBLES, 6, RULE, 0.01), "counts is not a contiguous"),
        (lambda: native.clip_ranges(buffers()[0], torch.ones(1), DOUBLES[1], 7, RULE, 0.01), "low is not a contiguous"),
        (lambda: native.clip_ranges(buffers()[0], DOUBLES[0], torch.ones(1), 7, RULE, 0.01), "float64"),
        (lambda: native.clip_ranges(buffers()[0], *DOUBLES, 7, RULE._replace(qmax=0), 0.01), "is empty or too wide"),
        (
            lambda: native.clip_ranges(buffers()[0], *DOUBLES, 7, RULE._replace(symmetric=True), 0.01),
            "middle is outside",
        ),
    ],
)
def test_what_does_not_fit_is_a_message(operators: None, call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
