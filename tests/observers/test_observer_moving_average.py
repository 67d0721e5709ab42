from __future__ import annotations

import copy

import pytest
import torch

from qat.observers import make_observer
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

SCHEME = Scheme("uint8")


def average(momentum=None, granularity=PER_TENSOR, channels=None):
    options = {} if momentum is None else {"momentum": momentum}
    return make_observer(ObserverSpec("moving_average", options), granularity, channels, "x")


@pytest.mark.parametrize(("momentum", "weight"), [(None, 0.01), (0.1, 0.1), (1, 1.0)])
def test_recurrence(momentum, weight):
    batches = torch.randn(20, 8, 3)
    observer = average(momentum)
    low = high = None
    for batch in batches:
        observer.observe(batch)
        least, most = float(batch.min()), float(batch.max())
        low = least if low is None else low + weight * (least - low)
        high = most if high is None else high + weight * (most - high)
    found = observer.range(SCHEME)
    assert float(found[0]) == pytest.approx(low, rel=1e-5)
    assert float(found[1]) == pytest.approx(high, rel=1e-5)
    assert int(observer.samples) == 160


def test_first_batch_initialises_each_channel_by_itself():
    observer = average(0.5, Granularity("per_channel", axis=1), 2)
    observer.observe(torch.tensor([[1.0, float("nan")], [3.0, float("nan")]]))
    observer.observe(torch.tensor([[2.0, -8.0], [5.0, 4.0]]))
    low, high = observer.range(SCHEME)
    assert low.tolist() == [1.5, -8.0]
    assert high.tolist() == [4.0, 4.0]


def test_no_overflow_and_no_drift():
    top = torch.finfo(torch.float32).max
    observer = average(0.5)
    observer.observe(torch.tensor([top, top]))
    observer.observe(torch.tensor([-top, -top]))
    assert [float(v) for v in observer.range(SCHEME)] == [0.0, 0.0]
    steady = average(0.3)
    for _ in range(100):
        steady.observe(torch.tensor([-0.1, 0.7]))
    assert [float(v) for v in steady.range(SCHEME)] == torch.tensor([-0.1, 0.7]).tolist()


def test_depends_on_the_order_and_says_so():
    one, two = torch.tensor([-1.0, 1.0]), torch.tensor([-5.0, 9.0])
    ab, ba = average(), average()
    ab.observe(one), ab.observe(two)
    ba.observe(two), ba.observe(one)
    assert ab.range(SCHEME) != ba.range(SCHEME)
    assert ab.order_dependent


def test_merging_takes_the_widest_in_any_order():
    one, two = average(), average()
    one.observe(torch.tensor([-1.0, 4.0]))
    two.observe(torch.tensor([-3.0, 2.0]))
    left, right = copy.deepcopy(one), copy.deepcopy(two)
    left.merge(two)
    right.merge(one)
    assert left.range(SCHEME) == right.range(SCHEME)
    assert [float(v) for v in left.range(SCHEME)] == [-3.0, 4.0]
