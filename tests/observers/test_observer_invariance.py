"""The same ranges whatever the batch size, the order of batches and the number of parts the data was split in."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.observers import OBSERVERS, make_observer
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

MAX = torch.finfo(torch.float32).max
NASTY = [0.0, -0.0, 1e-45, -1e-45, 2.0**-126, MAX, -MAX, 1.0, -1.0, 0.1]
pytestmark = pytest.mark.filterwarnings("ignore::qat.errors.QuantizationWarning")
EXACT = sorted(name for name, observer in OBSERVERS.items() if not observer.order_dependent)
KINDS = [(PER_TENSOR, None), (Granularity("per_channel", axis=1), 3)]


def test_only_the_moving_average_is_exempt():
    assert set(OBSERVERS) - set(EXACT) == {"moving_average"}


@st.composite
def data_and_split(draw):
    rows = draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, 2, generator=generator) * 10.0 ** draw(st.integers(-6, 6))
    flat = x.view(-1)
    for value in draw(st.lists(st.sampled_from([*NASTY, float("nan"), float("inf")]), max_size=6)):
        flat[draw(st.integers(0, flat.numel() - 1))] = value
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=6)))
    return x, cuts, draw(st.integers(1, 4)), seed


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("granularity", "channels"), KINDS)
@given(drawn=data_and_split())
@settings(max_examples=25, deadline=None)
def test_split_order_and_parts_do_not_matter(name, granularity, channels, drawn):
    x, cuts, parts, seed = drawn
    shuffle = random.Random(seed)

    def make():
        return make_observer(ObserverSpec(name), granularity, channels, "x")

    whole = make()
    whole.observe(x)

    order = list(range(len(x)))
    shuffle.shuffle(order)
    shuffled = x[order]
    # batches of any sizes, empty ones too
    batches = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True)]
    observers = [make() for _ in range(parts)]
    for index, batch in enumerate(batches):
        chosen = shuffle.randrange(parts)
        observers[chosen].observe(batch)
        if index == len(batches) // 2:
            # a resumed run
            resumed = make()
            resumed.load_state_dict(copy.deepcopy(observers[chosen].state_dict()))
            observers[chosen] = resumed
    shuffle.shuffle(observers)
    merged = make()
    for part in observers:
        merged.merge(part)

    expected = whole.state_dict()
    for key, value in merged.state_dict().items():
        assert torch.equal(value, expected[key]), key
    if bool((whole.min_val <= whole.max_val).any()):
        for scheme in (Scheme("uint8"), Scheme("int4", symmetric=True)):
            for mine, other in zip(whole.range(scheme), merged.range(scheme), strict=True):
                assert torch.equal(mine, other)


@pytest.mark.parametrize("name", EXACT)
def test_many_samples_in_any_batch_size(name):
    x = torch.distributions.Laplace(0.0, 1.0).sample((256, 64))
    ranges = []
    for size in (1, 7, 64, 256):
        observer = make_observer(ObserverSpec(name), PER_TENSOR, None, "x")
        for batch in reversed(x.split(size)):
            observer.observe(batch)
        assert int(observer.samples) == 256
        ranges.append(observer.range(Scheme("int8", symmetric=True)))
    assert all(r == ranges[0] for r in ranges)
