"""The logic of the CUDA kernels of training, compiled as plain C++ and run on the CPU: the bits of the CPU's operators.

Sums are compared on numbers whose sums are exact in float64, so that their order does not matter.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat import numerics
from qat.scheme import PER_TENSOR, Granularity
from tests.native.cuda_host import compiled, pointer
from tests.native.native_cases import make, same_bits

pytestmark = pytest.mark.usefixtures("operators")
LAYOUTS = [(2, 3, 5), (7, 4, 1), (1, 1, 9), (3, 1, 2), (2, 16, 40), (5, 24, 1), (1, 5, 300)]
#: qmin, qmax, symmetric, middle, power of two
RULES = [(0, 255, False, 0, False), (-128, 127, True, 0, False), (0, 255, True, 128, True), (0, 15, True, 0, False),
         (-8, 7, False, 0, True)]  # fmt: skip
BOUNDS = [(-torch.inf, torch.inf), (0.0, torch.inf), (0.0, 6.0), (-0.5, 0.5)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("cuda_host_training.cpp", tmp_path_factory.mktemp("cuda"))


class Quantizer(ctypes.Structure):
    """That of cuda_host_training.cpp."""

    _fields_ = (
        ("quantizes", ctypes.c_int32), ("tracks", ctypes.c_int32), ("qmin", ctypes.c_int64), ("qmax", ctypes.c_int64),
        ("symmetric", ctypes.c_int32), ("middle", ctypes.c_int64), ("power_of_two", ctypes.c_int32),
        ("momentum", ctypes.c_float), ("low_bound", ctypes.c_float), ("high_bound", ctypes.c_float),
        ("low", ctypes.c_void_p), ("high", ctypes.c_void_p), ("scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
    )  # fmt: skip


State = tuple[Tensor, Tensor, Tensor, Tensor]


def state_of(channels: int, *, known: bool) -> State:
    """Smallest and largest value, scale, zero point."""
    ends = (-1.5, 2.5) if known else (torch.inf, -torch.inf)
    low, high = (torch.full((channels,), end) for end in ends)
    return low, high, torch.full((channels,), 0.0625), torch.full((channels,), 3, dtype=torch.int32)


def quantizer_of(
    state: State, rule: tuple[int, int, bool, int, bool], *, tracks: bool, bounds: tuple[float, float] = BOUNDS[0],
    quantizes: bool = True,
) -> Quantizer:  # fmt: skip
    made = Quantizer(quantizes, tracks, *rule, 0.1, *bounds, *(t.data_ptr() for t in state))
    made.state = state  # alive as long as the pointers
    return made


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(
        same_bits(a, b.reshape(a.shape)) if a.dtype == torch.float32 else torch.equal(a, b.reshape(a.shape))
        for a, b in zip(found, wanted, strict=True)
    )


def exact(shape: tuple[int, ...], seed: int, spread: int = 64) -> Tensor:
    """Multiples of 1/16."""
    return torch.randint(-spread, spread + 1, shape, generator=torch.Generator().manual_seed(seed)) / 16


def sizes(*layout: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in layout]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 8, 17]), st.sampled_from([1, 2, 7, 8, 40])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
    nasty=st.sampled_from([0.0, 0.1, 1.0]),
    per_channel=st.booleans(),
)
def test_fake_quantization_is_pytorchs_to_the_bit(
    host: ctypes.CDLL, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, nasty: float, per_channel: bool
) -> None:
    x = make(shape, "contiguous", dtype, seed, nasty)
    channels = shape[1] if per_channel else 1
    inner = shape[2] if per_channel and channels > 1 else x.numel() // channels
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(channels, generator=generator) + 0.01
    zero = torch.randint(-5, 6, (channels,), generator=generator).float()
    y, bits = torch.empty_like(x), torch.zeros((x.numel() + 7) // 8, dtype=torch.uint8)
    low, high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
    nonfinite = torch.zeros((), dtype=torch.int64)
    function = host.fake_quantize_f32 if dtype == torch.float32 else host.fake_quantize_bf16
    sizes = [ctypes.c_int64(v) for v in (x.numel(), channels, inner if channels > 1 else x.numel())]
    function(
        pointer(x), pointer(y), pointer(bits), *sizes, pointer(scale), pointer(zero), ctypes.c_float(-8),
        ctypes.c_float(7), pointer(low), pointer(high), pointer(nonfinite),
    )  # fmt: skip

    granularity = Granularity("per_channel", 1) if per_channel else PER_TENSOR
    s, z = (numerics.expand_to(t if per_channel else t[0], x, granularity) for t in (scale, zero))
    steps = torch.round(x.float() / s)
    codes = torch.where(steps.isnan(), 0.0, steps) + z
    assert same_bits(y, ((codes.clamp(-8, 7) - z) * s).to(dtype))
    inside = (steps + z >= -8) & (steps + z <= 7)
    found = torch.stack([bits >> i & 1 for i in range(8)], 1).flatten()
    assert torch.equal(found[: x.numel()].bool(), inside.flatten())
    assert not found[x.numel() :].any()
    finite = x.isfinite()
    flat = [t.movedim(1, 0).reshape(channels, -1) for t in (x.float(), finite)]
    assert torch.equal(low, torch.where(flat[1], flat[0], torch.inf).amin(1))
    assert torch.equal(high, torch.where(flat[1], flat[0], -torch.inf).amax(1))
    assert int(nonfinite) == int((~finite).sum())


@pytest.mark.parametrize("mantissa_bits", range(11))
def test_private_bins_are_bins(host: ctypes.CDLL, mantissa_bits: int) -> None:
    assert host.private_count(mantissa_bits) == min(8192, 2 ** (9 + mantissa_bits))


@pytest.mark.parametrize("mantissa_bits", [0, 3, 7, 10])
def test_counts_are_the_cpus(host: ctypes.CDLL, mantissa_bits: int) -> None:
    x = make((3000,), "contiguous", torch.float32, mantissa_bits, 0.3)
    low, high, nonfinite = torch.tensor([torch.inf]), torch.tensor([-torch.inf]), torch.zeros(1, dtype=torch.int64)
    wanted, found = (torch.zeros(2 ** (9 + mantissa_bits), dtype=torch.int64) for _ in range(2))
    torch.ops.qat.observe_histogram(x, wanted, low, high, nonfinite, -1, mantissa_bits)
    host.histogram(pointer(x), ctypes.c_int64(3000), mantissa_bits, pointer(found))
    assert int(wanted.sum()) == int(x.isfinite().sum())
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("step", [1, 7, 24, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_threads_of_a_channel_visit_each_of_its_elements_once(
    host: ctypes.CDLL, layout: tuple[int, int, int], step: int
) -> None:
    assert host.visits_once(*sizes(*layout, step)) == 1


@pytest.mark.parametrize("nasty", [0.0, 0.2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_learned_grids_are_the_cpus(host: ctypes.CDLL, layout: tuple[int, int, int], nasty: float) -> None:
    x = make(layout, "contiguous", torch.float32, 5, nasty) if nasty else exact(layout, 5)
    grad, channels = exact(layout, 6), layout[1]
    scale, zero = 2.0 ** -(torch.arange(channels) % 4), exact((channels,), 7, 200)
    wanted = torch.ops.qat.fake_quantize_learned_backward(grad, x, scale, zero, -8, 7, 1, 0.3)
    found = (torch.empty_like(x), torch.empty(channels), torch.empty(channels))
    host.learned(
        pointer(x), pointer(grad), pointer(found[0]), *sizes(*layout), pointer(scale), pointer(zero),
        ctypes.c_float(-8), ctypes.c_float(7), ctypes.c_double(0.3), pointer(found[1]), pointer(found[2]),
    )  # fmt: skip
    assert same_bits(found[0], wanted[0])
    if nasty:  # huge and tiny terms
        torch.testing.assert_close(found[1:], wanted[1:], rtol=1e-6, atol=1e-6, equal_nan=True)
    else:
        assert same(found[1:], wanted[1:])


def test_moving_averages_are_the_cpus(host: ctypes.CDLL) -> None:
    channels = 200
    found = [exact((channels,), 1), exact((channels,), 2)]  # some are inverted: nothing was seen before
    wanted = [t.clone() for t in found]
    for batch in range(3):
        x = make((channels, 3), "contiguous", torch.float32, batch, 0.3)
        low, high, _ = torch.ops.qat.observe_minmax(x, 0)
        torch.ops.qat.observe_range(x, *wanted, torch.zeros(1, dtype=torch.int64), 0, 0.03)
        ends = [pointer(t) for t in (*found, low, high)]
        host.average(*ends, ctypes.c_int64(channels), ctypes.c_double(0.03))
        assert same(tuple(found), tuple(wanted))
    assert not bool(torch.isinf(torch.stack(found)).all())


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_tracked_ranges_and_their_grids_are_the_cpus(
    host: ctypes.CDLL, rule: tuple[int, int, bool, int, bool], known: bool
) -> None:
    channels, tracked = 300, torch.zeros((), dtype=torch.int64)
    found, wanted = (state_of(channels, known=known) for _ in range(2))
    for batch in range(3):
        x = make((channels, 2), "contiguous", torch.float32, batch, 0.2)
        qmin, qmax, *rest = rule
        torch.ops.qat.fake_quantize_track_forward(x, *wanted, tracked, 0.1, qmin, qmax, 0, *rest)
        low, high = x.amin(1) + 0.0, x.amax(1) + 0.0  # nan where one is
        quantizer = quantizer_of(found, rule, tracks=True)
        host.track(pointer(low), pointer(high), ctypes.c_int64(channels), ctypes.byref(quantizer))
        assert same(found, wanted)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("shape", "channel_axis", "groups", "form"),
    [
        ((8, 3, 3, 3), 0, 1, torch.contiguous_format),
        ((8, 3, 3, 3), 0, 1, torch.channels_last),
        ((12, 5), 0, 1, torch.contiguous_format),
        ((6, 4, 2, 3), 1, 1, torch.contiguous_format),
        ((6, 4, 2, 3), 1, 3, torch.channels_last),
        ((6, 4, 2, 3), 1, 2, torch.contiguous_format),
    ],
)
def test_weights_are_the_cpus(
    host: ctypes.CDLL, shape: tuple[int, ...], channel_axis: int, groups: int, form: torch.memory_format,
    rule: tuple[int, int, bool, int, bool],
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(groups)
    weight = torch.randn(shape, generator=generator).contiguous(memory_format=form)
    outputs = shape[channel_axis] * groups
    gamma, var = torch.randn(outputs, generator=generator), torch.rand(outputs, generator=generator)
    gamma[0], gamma[-1] = -1e-9, 0.0
    qmin, qmax, *rest = rule
    wanted = torch.ops.qat.fake_quantize_weight_forward(
        weight, None, None, gamma, var, 1e-5, 2.0**-20, qmin, qmax, channel_axis, *rest, channel_axis, groups
    )
    channels, inner = shape[channel_axis], weight.stride(channel_axis)
    found = torch.empty_like(weight), torch.zeros_like(wanted[1])
    rows = shape[0] // groups
    by_group = (weight.stride(0), shape[0], rows) if groups > 1 else (1, 1, 1)
    channel_map = torch.tensor([*by_group, inner, channels])
    quantizer = quantizer_of(state_of(channels, known=False), rule, tracks=False)
    host.weight(
        pointer(weight), pointer(found[0]), pointer(found[1]),
        *sizes(weight.numel() // (channels * inner), channels, inner), pointer(gamma), pointer(var),
        ctypes.c_float(1e-5), ctypes.c_float(2.0**-20), pointer(channel_map), ctypes.byref(quantizer),
    )  # fmt: skip
    assert same_bits(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


class NormCase:
    """One batch norm with its buffers; channels are the second dimension of a tensor (outer, channels, inner)."""

    def __init__(self, layout: tuple[int, int, int], seed: int, *, affine: bool = True) -> None:
        channels = layout[1]
        self.layout = layout
        self.x = exact(layout, seed)
        self.gamma, self.beta = (exact((channels,), seed + k) for k in (1, 2)) if affine else (None, None)
        self.running = exact((channels,), seed + 3), exact((channels,), seed + 4).abs() + 0.5

    def forward(
        self, host: ctypes.CDLL, batch: bool, quantizer: Quantizer, running: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, ...]:
        y, bits = torch.empty_like(self.x), torch.zeros((self.x.numel() + 7) // 8, dtype=torch.uint8)
        mean, inverse = torch.empty(self.layout[1]), torch.empty(self.layout[1])
        host.norm_forward(
            pointer(self.x), *sizes(*self.layout), pointer(self.gamma), pointer(self.beta),
            *map(pointer, running), int(batch), ctypes.c_double(0.1), ctypes.c_double(1e-5),
            ctypes.byref(quantizer), *map(pointer, (y, bits, mean, inverse)),
        )  # fmt: skip
        return y, bits, mean, inverse

    def cpu(
        self, batch: bool, bounds: tuple[float, float], running: tuple[Tensor, Tensor], grid: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = torch.ops.qat.norm_quantize_forward(
            self.x, self.gamma, self.beta, *running, batch, 0.1, 1e-5, *bounds, *grid
        )
        return made


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout[0] * layout[2] > 1])
def test_batch_norm_is_the_cpus(
    host: ctypes.CDLL, layout: tuple[int, int, int], bounds: tuple[float, float], batch: bool
) -> None:
    case = NormCase(layout, 11)
    for number, (rule, tracks) in enumerate(zip(RULES, (True, True, False, True, False), strict=True)):
        found_state, wanted_state = (state_of(1, known=number % 2 == 0 or not tracks) for _ in range(2))
        found_running, wanted_running = (tuple(t.clone() for t in case.running) for _ in range(2))
        quantizer = quantizer_of(found_state, rule, tracks=tracks, bounds=bounds)
        found = case.forward(host, batch, quantizer, found_running)
        tracked = torch.zeros((), dtype=torch.int64)
        qmin, qmax, *rest = rule
        grid = (*wanted_state, tracked, tracks, 0.1, qmin, qmax, *rest)
        wanted = case.cpu(batch, bounds, wanted_running, grid)
        assert same((*found, *found_state, *found_running), (*wanted, *wanted_state, *wanted_running))


NO_GRID = (None, None, None, None, None, False, 0.0, 0, 1, False, 0, False)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout[0] * layout[2] > 1])
def test_the_gradient_of_batch_norm_is_the_cpus(
    host: ctypes.CDLL, layout: tuple[int, int, int], affine: bool, batch: bool
) -> None:
    case = NormCase(layout, 21, affine=affine)
    quantizer = quantizer_of(state_of(1, known=False), RULES[0], tracks=False, bounds=(0.0, 6.0), quantizes=False)
    _, bits, mean, inverse = case.forward(host, batch, quantizer, tuple(t.clone() for t in case.running))
    # sums of products with these are exact too
    grad = exact(layout, 31)
    wanted = torch.ops.qat.norm_quantize_backward(grad, case.x, bits, case.gamma, mean, inverse, batch, True)
    found = torch.empty_like(case.x), torch.empty(layout[1]), torch.empty(layout[1])
    host.norm_backward(
        pointer(case.x), pointer(grad), pointer(bits), *sizes(*layout), pointer(case.gamma), pointer(mean),
        pointer(inverse), int(batch), *map(pointer, found),
    )  # fmt: skip
    assert same(found, wanted)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("batch", [False, True])
def test_what_is_not_finite_is_as_on_the_cpu(host: ctypes.CDLL, value: float, batch: bool) -> None:
    case = NormCase((3, 4, 5), 41)
    case.x[1, 2, 3] = value
    found_state, wanted_state = (state_of(1, known=True) for _ in range(2))
    found_running, wanted_running = (tuple(t.clone() for t in case.running) for _ in range(2))
    found = case.forward(host, batch, quantizer_of(found_state, RULES[0], tracks=True), found_running)
    grid = (*wanted_state, torch.zeros((), dtype=torch.int64), True, 0.1, 0, 255, False, 0, False)
    wanted = case.cpu(batch, BOUNDS[0], wanted_running, grid)
    assert same((*found, *found_state, *found_running), (*wanted, *wanted_state, *wanted_running))


@pytest.mark.parametrize("quantizes", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("nasty", [0.0, 0.1])
def test_additions_are_the_cpus(host: ctypes.CDLL, nasty: float, bounds: tuple[float, float], quantizes: bool) -> None:
    for number, rule in enumerate(RULES):
        x, other = (make((7, 11), "contiguous", torch.float32, 50 + number + k, nasty) for k in (0, 100))
        found_state, wanted_state = (state_of(1, known=number % 2 == 0) for _ in range(2))
        tracks = quantizes and number != 2
        quantizer = quantizer_of(found_state, rule, tracks=tracks, bounds=bounds, quantizes=quantizes)
        qmin, qmax, *rest = rule
        grid = (*wanted_state, torch.zeros((), dtype=torch.int64), tracks, 0.1, qmin, qmax, *rest)
        wanted = torch.ops.qat.add_quantize_forward(x, other, *bounds, *(grid if quantizes else NO_GRID))
        y, bits = torch.empty_like(x), torch.zeros(10, dtype=torch.uint8)
        host.add_forward(
            pointer(x), pointer(other), ctypes.c_int64(77), ctypes.byref(quantizer), pointer(y), pointer(bits)
        )
        assert same((y, bits, *found_state), (*wanted, *wanted_state))
