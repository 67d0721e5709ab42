"""The CUDA kernels of training, whole launches run by an emulation on the CPU: the bits of the CPU's operators.

Sums are compared on numbers whose sums are exact in float64, so that their order does not matter. The emulation runs
the threads of a block in turns, so it finds wrong indices, missing barriers and lanes, and memory that nobody wrote; it
does not find races between blocks.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat import numerics
from qat.scheme import PER_TENSOR, Granularity
from tests.native.cuda_host import emulated, pointer
from tests.native.native_cases import make, same_bits

pytestmark = pytest.mark.usefixtures("operators")
SOURCES = ("fake_quantize.cu", "histogram.cu", "learned.cu", "norm.cu", "ranges.cu")
#: (outer, channels, inner); the last ones have several splits, rows of whole octets, more octets than a grid threads
LAYOUTS = [(2, 3, 5), (7, 4, 1), (3, 1, 2), (2, 16, 40), (5, 40, 9), (3, 5, 1500), (40, 8, 49), (2500, 16, 1)]
#: qmin, qmax, symmetric, middle, power of two
RULES = [
    (0, 255, False, 0, False), (-128, 127, True, 0, False), (0, 255, True, 128, True), (0, 15, True, 0, False),
    (-8, 7, False, 0, True),
]  # fmt: skip
BOUNDS = [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-0.5, 0.5)]
NO_GRID = (None, None, None, None, None, False, 0.0, 0, 1, False, 0, False)
Rule = tuple[int, int, bool, int, bool]
State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Sizes = tuple[int, int, int]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated("cuda_emulated_training.cpp", SOURCES, tmp_path_factory.mktemp("cuda"))


class Quantizer(ctypes.Structure):
    """That of cuda_emulated_training.cpp."""

    _fields_ = (
        ("quantizes", ctypes.c_int32), ("tracks", ctypes.c_int32), ("qmin", ctypes.c_int64), ("qmax", ctypes.c_int64),
        ("symmetric", ctypes.c_int32), ("middle", ctypes.c_int64), ("power_of_two", ctypes.c_int32),
        ("momentum", ctypes.c_float), ("low_bound", ctypes.c_float), ("high_bound", ctypes.c_float),
        ("low", ctypes.c_void_p), ("high", ctypes.c_void_p), ("scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p), ("samples", ctypes.c_void_p),
    )  # fmt: skip


def state_of(channels: int, *, known: bool) -> State:
    """Smallest and largest value, scale, zero point, samples."""
    ends = (-1.5, 2.5) if known else (torch.inf, -torch.inf)
    low, high = (torch.full((channels,), end) for end in ends)
    scale, zero_point = torch.full((channels,), 0.0625), torch.full((channels,), 3, dtype=torch.int32)
    return low, high, scale, zero_point, torch.full((), 5)


def quantizer_of(
    state: State, rule: Rule, *, tracks: bool, bounds: tuple[float, float] = BOUNDS[0], quantizes: bool = True
) -> Any:
    made = Quantizer(quantizes, tracks, *rule, 0.1, *bounds, *(t.data_ptr() for t in state))
    made.state = state  # alive as long as the pointers
    return ctypes.byref(made)


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(
        same_bits(a, b.reshape(a.shape)) if a.is_floating_point() else torch.equal(a, b.reshape(a.shape))
        for a, b in zip(found, wanted, strict=True)
    )


def exact(shape: tuple[int, ...], seed: int, spread: int = 64) -> Tensor:
    """Multiples of 1/16."""
    return torch.randint(-spread, spread + 1, shape, generator=torch.Generator().manual_seed(seed)) / 16


def layout(*sizes: int) -> Any:
    """The Layout (outer, channels, inner)."""
    return ctypes.byref((ctypes.c_int64 * 3)(*sizes))


def bits_for(x: Tensor) -> Tensor:
    return torch.full(((x.numel() + 7) // 8,), 0xA5, dtype=torch.uint8)


def empty_range(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest value and the count of others, before any."""
    low, high = (torch.full((channels,), end) for end in (torch.inf, -torch.inf))
    return low, high, torch.zeros(1, dtype=torch.int64)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 5), st.sampled_from([1, 3, 8, 17, 5000]), st.sampled_from([1, 2, 7, 8, 40])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
    nasty=st.sampled_from([0.0, 0.1, 1.0]),
    per_channel=st.booleans(),
    unaligned=st.booleans(),
)
def test_fake_quantization_is_pytorchs_to_the_bit(
    kernels: ctypes.CDLL, shape: Sizes, dtype: torch.dtype, seed: int, nasty: float, per_channel: bool, unaligned: bool
) -> None:
    x = make(shape, "unaligned" if unaligned else "contiguous", dtype, seed, nasty)
    channels = shape[1] if per_channel else 1
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(channels, generator=generator) + 0.01
    zero = torch.randint(-5, 6, (channels,), generator=generator).float()
    y, bits, (low, high, nonfinite) = torch.empty_like(x), bits_for(x), empty_range(channels)
    function = kernels.fake_quantize_f32 if dtype == torch.float32 else kernels.fake_quantize_bf16
    function(
        pointer(x), pointer(y), pointer(bits), layout(*(shape if channels > 1 else (1, 1, x.numel()))), pointer(scale),
        pointer(zero), ctypes.c_float(-8), ctypes.c_float(7), pointer(low), pointer(high), pointer(nonfinite),
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


@pytest.mark.parametrize("n", [1, 7, 8, 33, 70_001])
def test_masked_gradients_are_the_cpus(kernels: ctypes.CDLL, n: int) -> None:
    grad, bits = make((n,), "contiguous", torch.float32, n, 0.1), torch.randint(0, 256, ((n + 7) // 8,)).byte()
    found = torch.empty_like(grad)
    kernels.mask_f32(pointer(grad), pointer(bits), pointer(found), ctypes.c_int64(n))
    assert same_bits(found, torch.ops.qat.fake_quantize_backward(grad, bits, [1]))


@pytest.mark.parametrize("mantissa_bits", range(11))
def test_private_bins_are_bins(kernels: ctypes.CDLL, mantissa_bits: int) -> None:
    assert kernels.private_count(mantissa_bits) == min(8192, 2 ** (9 + mantissa_bits))


@pytest.mark.parametrize("mantissa_bits", [0, 3, 7, 10])
@pytest.mark.parametrize("sizes", [(1, 1, 70_000), (3, 4, 5), (200, 3, 1), (2, 2, 5000)])
def test_histograms_are_the_cpus(kernels: ctypes.CDLL, sizes: Sizes, mantissa_bits: int) -> None:
    x = make(sizes, "contiguous", torch.float32, mantissa_bits, 0.1)
    x[0, 0, :2] = 0.0
    channels = sizes[1]
    wanted, found = (
        (torch.zeros(channels, 2 ** (9 + mantissa_bits), dtype=torch.int64), *empty_range(channels)) for _ in range(2)
    )
    for batch in (x, x * 1.5):
        torch.ops.qat.observe_histogram(batch, *wanted, 1 if channels > 1 else -1, mantissa_bits)
        counts, *ends = map(pointer, found)
        kernels.histogram(pointer(batch), layout(*sizes), mantissa_bits, counts, *ends)
    assert int(found[0].sum()) > x.numel()
    assert same(found, wanted)


@pytest.mark.parametrize("step", [1, 7, 24, 256])
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_the_threads_of_a_channel_visit_each_of_its_elements_once(
    kernels: ctypes.CDLL, sizes: Sizes, step: int
) -> None:
    assert kernels.visits_once(layout(*sizes), ctypes.c_int64(step)) == 1


@pytest.mark.parametrize("momentum", [None, 0.03])
@pytest.mark.parametrize("sizes", [*LAYOUTS, (1, 300, 3)])
def test_observed_ranges_are_the_cpus(kernels: ctypes.CDLL, sizes: Sizes, momentum: float | None) -> None:
    channels = sizes[1]
    # some ranges are inverted: nothing was seen there
    found = (exact((channels,), 1), exact((channels,), 2), torch.zeros(1, dtype=torch.int64))
    wanted = tuple(t.clone() for t in found)
    for batch in range(3):
        x = make(sizes, "contiguous", torch.float32, batch, 0.3)
        torch.ops.qat.observe_range(x, *wanted, 1, momentum)
        kernels.observe(pointer(x), layout(*sizes), ctypes.c_double(momentum or 0.0), *map(pointer, found))
        assert same(found, wanted)


@pytest.mark.parametrize("nasty", [0.0, 0.2])
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_learned_grids_are_the_cpus(kernels: ctypes.CDLL, sizes: Sizes, nasty: float) -> None:
    x = make(sizes, "contiguous", torch.float32, 5, nasty) if nasty else exact(sizes, 5)
    grad, channels = exact(sizes, 6), sizes[1]
    scale, zero = 2.0 ** -(torch.arange(channels) % 4), exact((channels,), 7, 200)
    y = torch.ops.qat.fake_quantize_learned_forward(x, scale, zero, -8, 7, 1)
    wanted = (y, *torch.ops.qat.fake_quantize_learned_backward(grad, x, scale, zero, -8, 7, 1, 0.3))
    found = (torch.empty_like(x), torch.empty_like(x), torch.empty(channels), torch.empty(channels))
    kernels.learned(
        pointer(x), pointer(grad), pointer(found[0]), pointer(found[1]), layout(*sizes), pointer(scale), pointer(zero),
        ctypes.c_float(-8), ctypes.c_float(7), ctypes.c_double(0.3), pointer(found[2]), pointer(found[3]),
    )  # fmt: skip
    assert same(found[:2], wanted[:2])
    if nasty:  # huge and tiny terms
        torch.testing.assert_close(found[2:], wanted[2:], rtol=1e-6, atol=1e-6, equal_nan=True)
    else:
        assert same(found[2:], wanted[2:])


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [(2, 300, 3), (1, 1, 2000), (1, 40, 1)])
def test_tracked_activations_are_the_cpus(kernels: ctypes.CDLL, sizes: Sizes, rule: Rule, known: bool) -> None:
    found, wanted = (state_of(sizes[1], known=known) for _ in range(2))
    qmin, qmax, *rest = rule
    for batch in range(4):
        x = make(sizes, "contiguous", torch.float32, batch, 0.1 if batch % 2 else 0.0)
        y = torch.ops.qat.fake_quantize_track_forward(x, *wanted, 0.1, qmin, qmax, 1, *rest)
        mine = torch.empty_like(x), bits_for(x)
        quantizer = quantizer_of(found, rule, tracks=True)
        kernels.track(pointer(x), *map(pointer, mine), layout(*sizes), ctypes.c_int64(sizes[0]), quantizer)
        assert same((*mine, *found), (*y, *wanted))


@pytest.mark.parametrize("value", [None, torch.nan, torch.inf, -torch.inf])
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
    kernels: ctypes.CDLL, shape: tuple[int, ...], channel_axis: int, groups: int, form: torch.memory_format,
    rule: Rule, value: float | None,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(groups)
    weight = torch.randn(shape, generator=generator).contiguous(memory_format=form)
    if value is not None:
        weight[(1,) * len(shape)] = value
    outputs = shape[channel_axis] * groups
    gamma, var = torch.randn(outputs, generator=generator), torch.rand(outputs, generator=generator)
    gamma[0], gamma[-1] = -1e-9, 0.0
    qmin, qmax, *rest = rule
    wanted = torch.ops.qat.fake_quantize_weight_forward(
        weight, None, None, gamma, var, 1e-5, 2.0**-20, qmin, qmax, channel_axis, *rest, channel_axis, groups
    )
    channels, inner = shape[channel_axis], weight.stride(channel_axis)
    found = torch.empty_like(weight), bits_for(weight)
    by_group = (weight.stride(0), shape[0], shape[0] // groups) if groups > 1 else (1, 1, 1)
    channel_map = torch.tensor([*by_group, inner, channels])
    kernels.weight(
        pointer(weight), *map(pointer, found), layout(weight.numel() // (channels * inner), channels, inner),
        pointer(gamma), pointer(var), ctypes.c_float(1e-5), ctypes.c_float(2.0**-20), pointer(channel_map),
        quantizer_of(state_of(channels, known=False), rule, tracks=False),
    )  # fmt: skip
    assert same(found, wanted) if value is None else same_bits(found[0], wanted[0])


class NormCase:
    """A batch norm with its running statistics, on a tensor (outer, channels, inner)."""

    def __init__(self, sizes: Sizes, seed: int, *, affine: bool = True) -> None:
        self.sizes, channels = sizes, sizes[1]
        self.x = exact(sizes, seed)
        self.gamma, self.beta = (exact((channels,), seed + k) for k in (1, 2)) if affine else (None, None)
        self.running = exact((channels,), seed + 3), exact((channels,), seed + 4).abs() + 0.5

    def both(
        self, kernels: ctypes.CDLL, batch: bool, rule: Rule, bounds: tuple[float, float], *, tracks: bool, known: bool
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Everything that the kernels and the operator of the CPU return and change."""
        mine, theirs = (state_of(1, known=known) for _ in range(2))
        my_running, their_running = (tuple(t.clone() for t in self.running) for _ in range(2))
        qmin, qmax, *rest = rule
        wanted = torch.ops.qat.norm_quantize_forward(
            self.x, self.gamma, self.beta, *their_running, batch, 0.1, 1e-5, *bounds, *theirs, tracks, 0.1, qmin, qmax,
            *rest,
        )  # fmt: skip
        found = self.run(kernels, batch, quantizer_of(mine, rule, tracks=tracks, bounds=bounds), my_running)
        return (*found, *mine, *my_running), (*wanted, *theirs, *their_running)

    def run(
        self, kernels: ctypes.CDLL, batch: bool, quantizer: Any, running: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Result, bits, mean and inverse deviation of the kernels."""
        made = torch.empty_like(self.x), bits_for(self.x), torch.empty(self.sizes[1]), torch.empty(self.sizes[1])
        kernels.norm_forward(
            pointer(self.x), layout(*self.sizes), ctypes.c_int64(self.sizes[0]), pointer(self.gamma),
            pointer(self.beta), *map(pointer, running), int(batch), ctypes.c_double(0.1), ctypes.c_double(1e-5),
            quantizer, *map(pointer, made),
        )  # fmt: skip
        return made


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_batch_norm_is_the_cpus(kernels: ctypes.CDLL, sizes: Sizes, bounds: tuple[float, float], batch: bool) -> None:
    case = NormCase(sizes, 11)
    for number, (rule, tracks) in enumerate(zip(RULES, (True, True, False, True, False), strict=True)):
        found, wanted = case.both(kernels, batch, rule, bounds, tracks=tracks, known=number % 2 == 0 or not tracks)
        assert same(found, wanted)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("batch", [False, True])
def test_what_is_not_finite_is_as_on_the_cpu(kernels: ctypes.CDLL, value: float, batch: bool) -> None:
    case = NormCase((3, 4, 5), 41)
    case.x[1, 2, 3] = value
    found, wanted = case.both(kernels, batch, RULES[0], BOUNDS[0], tracks=True, known=True)
    assert same(found, wanted)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("with_parameters", [False, True])
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_the_gradient_of_batch_norm_is_the_cpus(
    kernels: ctypes.CDLL, sizes: Sizes, with_parameters: bool, batch: bool
) -> None:
    case = NormCase(sizes, 21, affine=with_parameters)
    plain = quantizer_of(state_of(1, known=False), RULES[0], tracks=False, bounds=(0.0, 6.0), quantizes=False)
    _, bits, mean, inverse = case.run(kernels, batch, plain, tuple(t.clone() for t in case.running))
    grad = exact(sizes, 31)
    if not batch:
        case.x[0, 0, 0] = torch.inf if not with_parameters else 1.0
    wanted = torch.ops.qat.norm_quantize_backward(grad, case.x, bits, case.gamma, mean, inverse, batch, with_parameters)
    found = torch.empty_like(case.x), torch.empty_like(wanted[1]), torch.empty_like(wanted[2])
    kernels.norm_gradients(
        pointer(case.x), pointer(grad), pointer(bits), layout(*sizes), pointer(case.gamma), pointer(mean),
        pointer(inverse), int(batch), int(with_parameters), *map(pointer, found),
    )  # fmt: skip
    assert same(found, wanted)


@pytest.mark.parametrize("quantizes", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(("n", "nasty"), [(77, 0.0), (77, 0.1), (40_000, 0.0)])
def test_additions_are_the_cpus(
    kernels: ctypes.CDLL, n: int, nasty: float, bounds: tuple[float, float], quantizes: bool
) -> None:
    for number, rule in enumerate(RULES):
        x, other = (make((n,), "contiguous", torch.float32, 50 + number + k, nasty) for k in (0, 100))
        found_state, wanted_state = (state_of(1, known=number % 2 == 0) for _ in range(2))
        tracks = quantizes and number != 2
        quantizer = quantizer_of(found_state, rule, tracks=tracks, bounds=bounds, quantizes=quantizes)
        qmin, qmax, *rest = rule
        grid = (*wanted_state, tracks, 0.1, qmin, qmax, *rest) if quantizes else NO_GRID
        wanted = torch.ops.qat.add_quantize_forward(x, other, *bounds, *grid)
        y, bits = torch.empty_like(x), bits_for(x)
        count = ctypes.c_int64(n)
        kernels.add_forward(pointer(x), pointer(other), count, count, quantizer, pointer(y), pointer(bits))
        assert same((y, bits, *found_state), (*wanted, *wanted_state))
