"""Batch norm or an addition, activation and statistics in one operator, against the same one after the other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qat import native
from qat.observers import make_observer
from qat.observers.base import Observer
from qat.scheme import PER_TENSOR, ObserverSpec

SHAPES = [(2, 3, 5, 5), (3, 17, 19, 31), (4, 64, 40, 40), (130, 5), (2, 1, 3, 3), (5, 4, 2, 3, 4)]
BOUNDS = [(0.0, 6.0), (0.0, math.inf), (-math.inf, math.inf), (-0.5, 0.25)]
OBSERVERS = ["histogram", "percentile", "minmax", "moving_average"]
pytestmark = pytest.mark.usefixtures("operators")


def observer_of(name: str) -> Observer:
    return make_observer(ObserverSpec(name), PER_TENSOR, None, "y")


def statistics_of(observer: Observer) -> native.Statistics:
    statistics = observer.statistics()
    assert statistics is not None
    return statistics


def norm_of(channels: int) -> native.Norm:
    g = torch.Generator().manual_seed(channels)
    gamma, beta, mean = (torch.randn(channels, generator=g) for _ in range(3))
    return native.Norm(gamma, beta, mean, torch.rand(channels, generator=g) + 0.5, False, 0.1, 1e-5)


def values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    return x.contiguous(memory_format=torch.channels_last) if seed % 2 and len(shape) == 4 else x


def assert_same_state(one: Observer, other: Observer) -> None:
    for (name, a), (_, b) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        if name != "samples":
            assert torch.equal(a, b), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OBSERVERS)
def test_norm_equals_single_passes(isa: str, shape: tuple[int, ...], name: str) -> None:
    fused, single = observer_of(name), observer_of(name)
    for seed, bounds in enumerate(BOUNDS):
        x = values(shape, seed)
        expected = native.norm_quantize(x, norm_of(shape[1]), bounds, None)
        single.observe(expected)
        y = native.norm_observe(x, norm_of(shape[1]), bounds, statistics_of(fused))
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        assert_same_state(fused, single)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OBSERVERS)
def test_addition_equals_single_passes(isa: str, shape: tuple[int, ...], name: str) -> None:
    fused, single = observer_of(name), observer_of(name)
    for seed, bounds in enumerate(BOUNDS):
        x, other = values(shape, seed), values(shape, seed + 5)
        expected = torch.clamp(x + other, *bounds)
        single.observe(expected)
        assert torch.equal(native.add_observe(x, other, bounds, statistics_of(fused)), expected)
        assert_same_state(fused, single)


def test_counts_do_not_depend_on_threads() -> None:
    x, threads = values((4, 96, 56, 56), 1), torch.get_num_threads()
    observers = [observer_of("histogram") for _ in range(3)]
    try:
        for observer, count in zip(observers, (1, 2, 3), strict=True):
            torch.set_num_threads(count)
            native.norm_observe(x, norm_of(96), (0.0, 6.0), statistics_of(observer))
    finally:
        torch.set_num_threads(threads)
    assert int(observers[0].get_buffer("counts").sum()) == x.numel()
    for observer in observers[1:]:
        assert_same_state(observer, observers[0])


@pytest.mark.parametrize("size", [7, 300])
def test_the_tables_of_a_thread_are_empty_again(size: int) -> None:
    """Infinities and nan are counted by the kernels, and must not turn up in the next tensor."""
    x = values((2, 3, size, size), 1)
    dirty = x.clone()
    dirty[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    native.observe(dirty, statistics_of(observer_of("histogram")))
    clean = observer_of("histogram")
    native.observe(x, statistics_of(clean))
    assert int(clean.get_buffer("counts").sum()) == x.numel()
    bins = (x.reshape(-1).view(torch.int32) >> 16) & 0xFFFF
    assert torch.equal(clean.get_buffer("counts"), torch.bincount(bins, minlength=1 << 16))


@pytest.mark.parametrize("name", ["histogram", "minmax"])
def test_nan_and_infinity_are_counted_and_kept(isa: str, name: str) -> None:
    x = values((2, 3, 40, 40))
    x[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    observer = observer_of(name)
    y = native.norm_observe(x, norm_of(3), (0.0, math.inf), statistics_of(observer))
    # one of the two infinities is clamped
    assert int(observer.nonfinite) == 2
    assert int(torch.isnan(y).sum()) == 1
    assert int(torch.isnan(native.norm_quantize(x, norm_of(3), (0.0, math.inf), None)).sum()) == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_in_place(isa: str, seed: int) -> None:
    x, other = values((3, 8, 33, 33), seed), values((3, 8, 33, 33), seed + 2)
    statistics = statistics_of(observer_of("histogram"))
    for run in (
        lambda t, in_place: native.norm_observe(t, norm_of(8), (0.0, 6.0), statistics, in_place=in_place),
        lambda t, in_place: native.add_observe(t, other, (0.0, 6.0), statistics, in_place=in_place),
        lambda t, in_place: native.add_observe(t, t, (0.0, 6.0), statistics, in_place=in_place),
    ):
        expected, given = run(x, False), x.clone()
        y = run(given, True)
        assert y.data_ptr() == given.data_ptr() != expected.data_ptr()
        assert torch.equal(y, expected)
    # what has gaps cannot be written over
    wide = torch.randn(3, 8, 33, 66)[..., ::2]
    assert native.norm_observe(wide, norm_of(8), (0.0, 6.0), statistics, in_place=True).data_ptr() != wide.data_ptr()


def arguments(**changed: Any) -> dict[str, Any]:
    norm, x = norm_of(3), torch.ones(2, 3, 4, 4)
    low, high, nonfinite, counts, bits, _ = statistics_of(observer_of("histogram"))
    given = {
        "x": x, "gamma": norm.gamma, "beta": norm.beta, "running_mean": norm.running_mean,
        "running_var": norm.running_var, "eps": 1e-5, "low_bound": 0.0, "high_bound": 6.0, "y": torch.empty_like(x),
        "low": low, "high": high, "nonfinite": nonfinite, "counts": counts, "mantissa_bits": bits,
    }  # fmt: skip
    return given | changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 4, 4, dtype=torch.float64)}, "x is not float32"),
        ({"x": torch.ones(3)}, "has no channels"),
        ({"y": torch.ones(2, 3, 4, 5)}, "y of shape"),
        ({"y": torch.ones(2, 3, 4, 8)[..., ::2]}, "give a dense tensor"),
        ({"gamma": torch.ones(2)}, "2 values in gamma"),
        ({"counts": torch.zeros(5, dtype=torch.int64)}, "counts is not"),
        ({"momentum": 0.1}, "a histogram has no momentum"),
        ({"nonfinite": torch.zeros(())}, "nonfinite is not"),
    ],
)
def test_what_does_not_fit_is_a_message(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.norm_observe(**arguments(**change))


def test_opcheck() -> None:
    given = arguments()
    results = torch.library.opcheck(torch.ops.qat.norm_observe.default, tuple(given.values()))
    assert set(results.values()) == {"SUCCESS"}
    state = [given[key] for key in ("y", "low", "high", "nonfinite")]
    operands = (given["x"], given["x"].clone(), 0.0, 6.0, *state, None, 7, 0.1)
    assert set(torch.library.opcheck(torch.ops.qat.add_observe.default, operands).values()) == {"SUCCESS"}
