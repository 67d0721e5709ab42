"""What every observer promises about its state: buffers, empty and nasty input, merging, reset, errors."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch

from qat.errors import DataError, SchemeError, StateError
from qat.observers import OBSERVERS, make_observer
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

BY_CHANNEL = Granularity("per_channel", axis=1)
BY_GROUP = Granularity("per_group", axis=1, size=3)
NAMES = sorted(OBSERVERS)
#: what these say of a constant tensor is in test_observer_scales
EXACT_CONSTANTS = [name for name in NAMES if OBSERVERS[name].constant_is_exact]
#: the fallbacks of methods that have too little to go on; that they warn is in test_observer_fallbacks
pytestmark = pytest.mark.filterwarnings("ignore::qat.errors.QuantizationWarning")
AFFINE, SYMMETRIC = Scheme("uint8"), Scheme("int8", symmetric=True)
MAX = torch.finfo(torch.float32).max


def make(name, granularity=PER_TENSOR, channels=None, **options):
    return make_observer(ObserverSpec(name, options), granularity, channels, "layer.weight")


def seen(name, x, **options):
    observer = make(name, **options)
    observer.observe(x)
    return observer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("granularity", "channels"), [(PER_TENSOR, None), (BY_CHANNEL, 5), (BY_GROUP, 8)])
def test_state_is_buffers_of_final_shape(name, granularity, channels):
    observer = make(name, granularity, channels)
    before = {key: (b.shape, b.dtype) for key, b in observer.named_buffers()}
    observer.observe(torch.randn(4, 5))
    assert {key: (b.shape, b.dtype) for key, b in observer.named_buffers()} == before
    assert set(observer.state_dict()) == set(before) == set(observer.reductions())
    assert not list(observer.parameters())

    file = io.BytesIO()
    torch.save(observer.state_dict(), file)
    file.seek(0)
    loaded = make(name, granularity, channels)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (loaded, copy.deepcopy(observer)):
        for low_high, other in zip(observer.range(AFFINE), twin.range(AFFINE), strict=True):
            assert torch.equal(low_high, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("granularity", "channels"), [(PER_TENSOR, None), (BY_CHANNEL, 5), (BY_GROUP, 8)])
def test_range_is_float64_within_the_observed(name, granularity, channels):
    observer = make(name, granularity, channels)
    observer.observe(torch.randn(4, 5))
    for scheme in (AFFINE, SYMMETRIC):
        low, high = observer.range(scheme)
        assert low.dtype == high.dtype == torch.float64
        assert low.shape == high.shape == (() if channels is None else (channels,))
        assert bool((low <= high).all())
        if not observer.gives_scale:
            assert bool((low >= observer.min_val).all())
            assert bool((high <= observer.max_val).all())


def test_minmax_by_tensor_channel_and_ragged_group():
    x = torch.randn(4, 5)
    low, high = seen("minmax", x).range(AFFINE)
    assert (float(low), float(high)) == (float(x.min()), float(x.max()))
    low, high = seen("minmax", x, granularity=BY_CHANNEL, channels=5).range(AFFINE)
    assert torch.equal(low.float(), x.amin(0))
    assert torch.equal(high.float(), x.amax(0))
    low, high = seen("minmax", x, granularity=BY_GROUP, channels=8).range(AFFINE)
    groups = [x[row, cols] for row in range(4) for cols in (slice(0, 3), slice(3, 5))]
    assert low.tolist() == [float(g.min()) for g in groups]
    assert high.tolist() == [float(g.max()) for g in groups]


@pytest.mark.parametrize("axis", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_channel_axis(name, axis):
    x = torch.randn(3, 4, 5, 6)
    count = x.shape[axis]
    observer = seen(name, x, granularity=Granularity("per_channel", axis=axis), channels=count)
    for channel, (low, high) in enumerate(zip(*observer.range(AFFINE), strict=True)):
        fine = {"mantissa_bits": observer.mantissa_bits} if hasattr(observer, "counts") else {}
        one = seen(name, x.select(axis, channel), **fine)
        assert (float(low), float(high)) == tuple(float(v) for v in one.range(AFFINE))


@pytest.mark.parametrize("name", EXACT_CONSTANTS)
def test_one_dimensional_tensor_by_channel(name):
    x = torch.tensor([-1.0, 0.0, 2.0])
    observer = seen(name, x, granularity=Granularity("per_channel"), channels=3)
    low, high = observer.range(AFFINE)
    assert torch.equal(low, x.double())
    assert torch.equal(high, x.double())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_observed(name):
    observer = make(name)
    assert observer.is_empty
    with pytest.raises(StateError, match=r"layer\.weight.*at least one batch"):
        observer.range(AFFINE)
    observer.observe(torch.zeros(0, 3))
    observer.observe(torch.zeros(4, 0))
    assert observer.is_empty
    observer.finite_or_raise()
    observer.observe(torch.ones(2, 3))
    assert not observer.is_empty
    assert int(observer.samples) == 2
    observer.reset()
    assert observer.is_empty
    fresh = make(name).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in observer.state_dict().items())


@pytest.mark.parametrize("name", EXACT_CONSTANTS)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int4", "uint16"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.7, MAX, -MAX, 1e-45, -1e-40, 2.0**-126, 7.0])
def test_constant_tensor_has_exactly_its_value(name, dtype, value):
    scheme = Scheme(dtype, symmetric=dtype.startswith("int"))
    low, high = seen(name, torch.full((3, 4), value)).range(scheme)
    expected = torch.tensor(value).double()
    assert low == expected
    assert high == expected
    assert value != 0.0 or not bool(torch.signbit(low) | torch.signbit(high))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC, Scheme("int4", symmetric=True), Scheme("uint16")])
def test_extreme_finite_values(name, scheme):
    x = torch.tensor([MAX, -MAX, 1e-45, -1e-45, 0.0, -0.0, 1.0])
    observer = seen(name, x)
    low, high = observer.range(scheme)
    assert bool(torch.isfinite(low) & torch.isfinite(high))
    assert -MAX <= float(low) < float(high) <= MAX
    observer.finite_or_raise()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("granularity", "channels"), [(PER_TENSOR, None), (BY_CHANNEL, 4), (BY_GROUP, 6)])
def test_nonfinite_values_are_counted_and_stay_out(name, granularity, channels):
    bad = torch.tensor([[1.0, math.nan, -2.0, math.inf], [0.5, 3.0, -math.inf, 4.0], [-0.5, 1.5, 2.0, 5.0]])
    observer = make(name, granularity, channels)
    observer.observe(bad)
    with pytest.raises(DataError, match=r"other\.name.* 3 of the observed values are nan or inf"):
        observer.finite_or_raise("other.name")
    with pytest.raises(DataError, match=r"layer\.weight"):
        observer.finite_or_raise()
    low, high = observer.range(AFFINE)
    assert bool((torch.isfinite(low) & torch.isfinite(high)).all())
    if not observer.gives_scale:
        assert float(low.min()) >= -2.0
        assert float(high.max()) <= 5.0
    if channels is None:
        # the same statistic as without the bad values
        clean = seen(name, bad[torch.isfinite(bad)])
        assert clean.range(AFFINE) == (low, high)
    # a channel without any finite value has an empty range, others are not disturbed
    if granularity == BY_CHANNEL:
        observer.reset()
        observer.observe(torch.tensor([[math.nan, 1.0, 2.0, -3.0]]))
        low, high = observer.range(AFFINE)
        assert (float(low[0]), float(high[0])) == (0.0, 0.0)
        if observer.constant_is_exact:
            assert low.tolist() == high.tolist() == [0.0, 1.0, 2.0, -3.0]


@pytest.mark.parametrize("name", NAMES)
def test_only_nonfinite_values(name):
    observer = seen(name, torch.tensor([math.nan, math.inf]))
    assert not observer.is_empty
    with pytest.raises(DataError, match=r"layer\.weight.*2 of the observed"):
        observer.range(AFFINE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_other_dtypes_are_observed_as_float32(name, dtype):
    x = (torch.randn(8, 16) * 3).to(dtype)
    assert seen(name, x).range(AFFINE) == seen(name, x.to(torch.float32)).range(AFFINE)


def test_float64_beyond_float32_counts_as_infinite():
    observer = seen("minmax", torch.tensor([1e300, 1.0], dtype=torch.float64))
    assert int(observer.nonfinite) == 1


@pytest.mark.parametrize("name", NAMES)
def test_layout_and_gradients_do_not_matter(name):
    x = torch.randn(2, 6, 5, 4)
    strange = x.to(memory_format=torch.channels_last)[:, ::2].requires_grad_()
    observer = seen(name, strange)
    assert observer.range(AFFINE) == seen(name, x[:, ::2].contiguous()).range(AFFINE)
    assert not any(buffer.requires_grad for buffer in observer.buffers())
    assert observer(strange) is strange


@pytest.mark.parametrize("name", NAMES)
def test_casting_the_model_keeps_the_state_exact(name):
    x = torch.tensor([70000.0, -1.2345678])
    observer = seen(name, x)
    before = {key: value.clone() for key, value in observer.state_dict().items()}
    observer.half().bfloat16().double()
    after = observer.state_dict()
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("granularity", "channels"), [(PER_TENSOR, None), (BY_CHANNEL, 5)])
def test_compiled_equals_eager(name, granularity, channels):
    batches = [torch.randn(4, 5) * 3, torch.tensor([[1.0, math.nan, -7.0, math.inf, 0.0]])]
    eager, compiled = make(name, granularity, channels), make(name, granularity, channels)
    torch.compiler.reset()
    step = torch.compile(compiled, backend="eager", fullgraph=True)
    for x in batches:
        eager.observe(x)
        step(x)
    expected = eager.state_dict()
    for key, value in compiled.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_works_in_inference_mode(name):
    observer = make(name)
    with torch.inference_mode():
        observer.observe(torch.randn(3, 3))
    observer.observe(torch.randn(3, 3))
    assert int(observer.samples) == 6
    copy.deepcopy(observer).merge(observer)


@pytest.mark.parametrize("name", NAMES)
def test_merge_refuses_what_was_made_otherwise(name):
    mine = seen(name, torch.randn(4, 5))
    others = [
        make("minmax" if name != "minmax" else "percentile"),
        make(name, BY_CHANNEL, 5),
    ]
    if mine.options:
        key, option = next(iter(mine.OPTIONS.items()))
        others.append(make(name, **{key: option.choices[-1] if option.choices else option.high}))
        assert others[-1].options != mine.options
    before = copy.deepcopy(mine.state_dict())
    for other in others:
        with pytest.raises(StateError, match="made alike"):
            mine.merge(other)
    assert all(torch.equal(value, before[key]) for key, value in mine.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_wrong_channels_are_named(name):
    observer = make(name, BY_CHANNEL, 5)
    with pytest.raises(DataError, match=r"layer\.weight.*\(4, 6\) has 6 channels"):
        observer.observe(torch.randn(4, 6))
    with pytest.raises(DataError, match=r"layer\.weight.*no axis 1"):
        observer.observe(torch.randn(4))
    assert observer.is_empty
    with pytest.raises(SchemeError, match=r"layer\.weight"):
        make(name, PER_TENSOR, 5)
    with pytest.raises(SchemeError, match=r"layer\.weight"):
        make(name, BY_CHANNEL, None)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_what_is_documented(name):
    def size(observer):
        return sum(b.numel() * b.element_size() for key, b in observer.named_buffers() if b.numel() > 1)

    mebi, kibi = 1 << 20, 1 << 10
    tensor, channel = {
        "minmax": (0, 0), "moving_average": (0, 0), "arq": (0, 0), "dynamic_fixed_point": (0, 0),
        "mace": (32 * kibi, 32 * kibi), "kl": (4 * mebi, 512 * kibi), "hfmg": (2 * mebi, 128 * kibi),
        "auto": (mebi, 64 * kibi), "lp": (256 * kibi, 64 * kibi), "sqnr": (256 * kibi, 64 * kibi),
    }.get(name, (512 * kibi, 64 * kibi))  # fmt: skip
    assert size(make(name)) == tensor
    # and min_val, max_val and the count of samples by channel
    assert size(make(name, BY_CHANNEL, 32)) == 32 * (channel + 8 + 8 * (name == "mace"))
