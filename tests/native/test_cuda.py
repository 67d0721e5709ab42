"""The operators of training on a GPU have the bits of the CPU's.

They run on a GPU where there is one, and everywhere under an emulation of its blocks and warps (`cuda_emulator`). That
finds wrong indices, missing barriers and lanes, and memory that nobody wrote; it finds no races between blocks. Sums
are compared on numbers whose sums are exact in float64, so that their order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat import native
from tests.native.cuda_host import emulated_operators
from tests.native.native_cases import NASTY, make, same_bits, tensors

#: qmin, qmax, symmetric, middle, power of two
RULES = [
    (0, 255, False, 0, False), (-128, 127, True, 0, False), (0, 255, True, 128, True), (0, 15, True, 0, False),
    (-8, 7, False, 0, True),
]  # fmt: skip
BOUNDS = [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-0.5, 0.5)]
#: Of QDrop; it stays on the CPU
SEED = torch.tensor(0x123456789ABCDEF)
#: With short and long runs of a channel, rows of whole octets, one and several splits (36 in the last)
SHAPES = [(2, 3, 5), (7, 4), (4, 40, 7, 7), (300, 24), (8, 8, 12, 12), (2, 2, 190, 190)]
FORMATS = [torch.contiguous_format, torch.channels_last]
RELAXED = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Rule = tuple[int, int, bool, int, bool]
Bounds = tuple[float, float]


class Machine:
    """Where the operators run that are compared with the CPU's."""

    def __init__(self, name: str, operators: Any) -> None:
        self.device = "cuda" if name == "gpu" else "cpu"
        self.operators = operators

    def moved(self, argument: Any) -> Any:
        """A copy there of a tensor, with its strides and as (un)aligned; other arguments as they are."""
        if not isinstance(argument, Tensor) or argument.data_ptr() == SEED.data_ptr():
            return argument
        offset = argument.storage_offset() % 16
        size = 1 + sum((n - 1) * s for n, s in zip(argument.shape, argument.stride(), strict=True))
        memory = torch.empty(offset + max(size, 0), dtype=argument.dtype, device=self.device)
        there = memory.as_strided(argument.shape, argument.stride(), offset)
        if argument.numel() and 0 in argument.stride():
            expanded = [1 if s == 0 else n for n, s in zip(argument.shape, argument.stride(), strict=True)]
            there.as_strided(expanded, argument.stride(), offset).copy_(argument[tuple(slice(n) for n in expanded)])
        else:
            there.copy_(argument)
        return there

    def call(self, name: str, *arguments: Any) -> Any:
        """Call an operator there, while the host must not wait for the device."""
        operator = getattr(self.operators, name)
        if self.device == "cpu":
            return operator(*arguments)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return operator(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def check(self, name: str, *arguments: Any, close: bool = False) -> list[Tensor]:
        """Call an operator on the CPU and there; returned and changed tensors must have the same bits, or be close.

        Returns:
            What the CPU's returned.
        """
        here = [argument.clone() if _is_state(argument) else argument for argument in arguments]
        there = [self.moved(argument) for argument in arguments]
        wanted, found = getattr(torch.ops.qat, name)(*here), self.call(name, *there)
        results, expected = (
            [*_tensors(made), *(t for t in given if isinstance(t, Tensor))]
            for made, given in ((found, there), (wanted, here))
        )
        assert [t.stride() for t in _tensors(found)] == [t.stride() for t in _tensors(wanted)]
        if close:
            torch.testing.assert_close([t.cpu() for t in results], expected, rtol=1e-6, atol=1e-6, equal_nan=True)
        else:
            assert same(results, expected)
        for argument, changed in zip(arguments, here, strict=True):
            if _is_state(argument):  # the next call goes on from there
                argument.copy_(changed)
        return _tensors(wanted)


def _is_state(argument: Any) -> bool:
    is_small = isinstance(argument, Tensor) and argument.dim() < 2 and argument.is_contiguous()
    return is_small and argument.data_ptr() != SEED.data_ptr()


def _tensors(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else list(made or ())


@pytest.fixture(scope="module", params=[pytest.param("emulated", marks=pytest.mark.heavy), "gpu"])
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    status = native.status()
    if not status.active:
        pytest.skip(f"native extension: {status.reason}")
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU")
        if not status.cuda:
            pytest.skip(f"native extension: {status}")
        return Machine("gpu", torch.ops.qat)
    return Machine("emulated", emulated_operators(tmp_path_factory.mktemp("cuda")))


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(
        same_bits(a.cpu(), b) if b.dtype in {torch.float32, torch.bfloat16} else torch.equal(a.cpu(), b)
        for a, b in zip(found, wanted, strict=True)
    )


def exact(shape: Sequence[int], seed: int) -> Tensor:
    """Multiples of 1/16, whose sums and sums of products are exact in float64."""
    return torch.randint(-64, 65, tuple(shape), generator=torch.Generator().manual_seed(seed)) / 16


def observed(channels: int, bins: int = 0) -> list[Tensor]:
    """The buffers of an observer before any batch: counts, low, high, nonfinite."""
    ends = [torch.full((channels,), value) for value in (torch.inf, -torch.inf)]
    return [torch.zeros(channels * bins, dtype=torch.int64), *ends, torch.zeros(1, dtype=torch.int64)]


def tracked(channels: int, *, known: bool) -> list[Tensor]:
    """The buffers of a quantizer: low, high, scale, zero point, samples."""
    ends = (-1.5, 2.5) if known else (torch.inf, -torch.inf)
    low, high = (torch.full((channels,), end) for end in ends)
    zero_point = torch.full((channels,), 3, dtype=torch.int32)
    return [low, high, torch.full((channels,), 0.0625), zero_point, torch.zeros((), dtype=torch.int64)]


def axis_and_channels(x: Tensor, per_channel: bool) -> tuple[int, int]:
    axis = x.dim() - 1 if per_channel and x.dim() else -1
    return axis, x.shape[axis] if axis >= 0 else 1


def formed(x: Tensor, form: torch.memory_format) -> Tensor:
    if form == torch.channels_last and x.dim() != 4:
        pytest.skip("channels_last has four dimensions")
    return x.contiguous(memory_format=form)


# ---- static grids and observers


@RELAXED
@given(x=tensors())
@pytest.mark.parametrize("per_channel", [False, True])
def test_fake_quantization_extrema_and_gradient(machine: Machine, per_channel: bool, x: Tensor) -> None:
    axis, channels = axis_and_channels(x, per_channel)
    scale, zero = torch.rand(channels) + 0.01, torch.randint(-5, 6, (channels,))
    y, bits = machine.check("fake_quantize_forward", x, scale, zero, -8, 7, axis)
    machine.check("fake_quantize_forward", x, scale, zero, -8, 7, axis, False)
    machine.check("observe_minmax", x, axis)
    machine.check("fake_quantize_backward", torch.randn(x.shape).to(x.dtype), bits, list(y.stride()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5000, 3, 1, 1), 0), ((2, 40, 33, 31), 1), ((16, 4097), 1), ((100_003,), -1), ((2, 16, 56, 56), 1)],
)
def test_large_tensors(machine: Machine, shape: Sequence[int], axis: int, dtype: torch.dtype) -> None:
    x = torch.randn(*shape).to(dtype)
    channels = shape[axis] if axis >= 0 else 1
    for form in FORMATS if len(shape) == 4 else FORMATS[:1]:
        given = (x.contiguous(memory_format=form), torch.rand(channels) + 0.01, torch.zeros(channels), -8, 7, axis)
        machine.check("fake_quantize_forward", *given)
        for bins in (0, 2**9) if channels == 1 else (0,):  # histograms by channel are a pass of their own
            counts, *state = observed(channels, bins)
            machine.check("fake_quantize_observe", *given, *state, counts if bins else None, 0, None, True)


@RELAXED
@given(x=tensors(), mantissa_bits=st.sampled_from([0, 4, 7]))
@pytest.mark.parametrize("per_channel", [False, True])
def test_histograms(machine: Machine, per_channel: bool, x: Tensor, mantissa_bits: int) -> None:
    axis, channels = axis_and_channels(x, per_channel)
    state = observed(channels, 2 ** (9 + mantissa_bits))
    for _ in range(2):
        machine.check("observe_histogram", x, *state, axis, mantissa_bits)
    assert int(state[0].sum()) == 2 * int(x.isfinite().sum())


@pytest.mark.parametrize("axis", [-1, 0])
def test_histograms_of_the_finest_bins(machine: Machine, axis: int) -> None:
    x = make((3, 5000), "contiguous", torch.float32, 0, 0.1)
    machine.check("observe_histogram", x, *observed(3 if axis == 0 else 1, 2**19), axis, 10)


@RELAXED
@given(x=tensors(), momentum=st.sampled_from([None, 0.03]))
@pytest.mark.parametrize("per_channel", [False, True])
def test_observed_ranges(machine: Machine, per_channel: bool, momentum: float | None, x: Tensor) -> None:
    axis, channels = axis_and_channels(x, per_channel)
    _, *state = observed(channels)
    for batch in (x, x * 0.75, x * 2):
        machine.check("observe_range", batch, *state, axis, momentum)


@RELAXED
@given(x=tensors(), mantissa_bits=st.sampled_from([0, 4, 7]), momentum=st.sampled_from([None, 0.03]))
@pytest.mark.parametrize("per_channel", [False, True])
def test_observed_and_fake_quantized(
    machine: Machine, per_channel: bool, momentum: float | None, mantissa_bits: int, x: Tensor
) -> None:
    axis, channels = axis_and_channels(x, per_channel)
    grid = torch.rand(channels) + 0.01, torch.randint(-5, 6, (channels,))
    mantissa_bits = mantissa_bits if channels < 64 else 0  # gigabytes else
    counts, *of_histogram = observed(channels, 2 ** (9 + mantissa_bits))
    _, *of_range = observed(channels)
    for batch, with_mask in ((x, True), (x * 0.75, False), (x * 2, True)):
        given = (batch, *grid, -8, 7, axis)
        machine.check("fake_quantize_observe", *given, *of_histogram, counts, mantissa_bits, None, with_mask)
        machine.check("fake_quantize_observe", *given, *of_range, None, 7, momentum, with_mask)
    assert int(counts.sum()) == sum(int(batch.isfinite().sum()) for batch in (x, x * 0.75, x * 2))


# ---- grids that follow the data


@RELAXED
@given(x=tensors(), rule=st.sampled_from(RULES), known=st.booleans())
@pytest.mark.parametrize("per_channel", [False, True])
def test_tracked_activations(machine: Machine, per_channel: bool, rule: Rule, known: bool, x: Tensor) -> None:
    axis, channels = axis_and_channels(x, per_channel)
    state = tracked(channels, known=known)
    qmin, qmax, *rest = rule
    for batch in (x, x * 0.75, x * 2):
        machine.check("fake_quantize_track_forward", batch, *state, 0.1, qmin, qmax, axis, *rest)


@pytest.mark.parametrize("rule", RULES)
def test_ranges_with_nan_and_infinities_do_not_move(machine: Machine, rule: Rule) -> None:
    channels = 6 * len(NASTY)
    x = torch.randn(channels, 5)
    x[::6, 2] = torch.tensor(NASTY)
    state = tracked(channels, known=True)
    qmin, qmax, *rest = rule
    machine.check("fake_quantize_track_forward", x, *state, 0.1, qmin, qmax, 0, *rest)
    moved = state[0] != -1.5
    assert torch.equal(moved | (state[1] != 2.5), x.isfinite().all(1))


@pytest.mark.parametrize("value", [None, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", [None, *RULES])
@pytest.mark.parametrize(
    ("shape", "axis", "channel_axis", "groups", "form"),
    [
        ((8, 3, 3, 3), 0, 0, 1, torch.contiguous_format),
        ((8, 3, 3, 3), 0, 0, 1, torch.channels_last),
        ((8, 3, 1, 1), -1, 0, 1, torch.channels_last),
        ((12, 5), 0, 0, 1, torch.contiguous_format),
        ((6, 4, 2, 3), 1, 1, 1, torch.contiguous_format),
        ((6, 4, 2, 3), 1, 1, 3, torch.channels_last),
        ((6, 4, 2, 3), -1, 1, 2, torch.contiguous_format),
        ((6, 1, 2, 3), 1, 1, 6, torch.contiguous_format),
    ],
)
def test_weights(
    machine: Machine, shape: Sequence[int], axis: int, channel_axis: int, groups: int, form: torch.memory_format,
    rule: Rule | None, value: float | None,
) -> None:  # fmt: skip
    channels, outputs = shape[axis] if axis >= 0 else 1, shape[channel_axis] * groups
    gamma, var = torch.randn(outputs), torch.rand(outputs)
    gamma[0], gamma[-1] = -1e-9, 0.0
    grid = (None, None) if rule else (torch.rand(channels) + 0.01, torch.randint(-3, 4, (channels,)))
    qmin, qmax, *rest = rule or RULES[-1]
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(*shape).to(dtype).contiguous(memory_format=form)
        if value is not None:
            weight[(0,) * len(shape)] = value
        for norm in ((None, None), (None, var), (gamma, var)):
            machine.check(
                "fake_quantize_weight_forward", weight, *grid, *norm, 1e-5, 2.0**-20, qmin, qmax, axis, *rest,
                channel_axis, groups,
            )  # fmt: skip


# ---- learned grids


@pytest.mark.parametrize("nasty", [None, 0.0, 0.2])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("shape", "axis"), [*((shape, 1) for shape in SHAPES), ((50_001,), -1), ((700, 9), 0)])
def test_learned_grids(
    machine: Machine, shape: Sequence[int], axis: int, form: torch.memory_format, nasty: float | None
) -> None:
    values = exact(shape, 0) if nasty is None else make(tuple(shape), "contiguous", torch.float32, 3, nasty)
    x, grad = formed(values, form), exact(shape, 1)
    channels = shape[axis] if axis >= 0 else 1
    scale, zero_point = 2.0 ** -(torch.arange(channels) % 4).float(), exact((channels,), 7) * 4
    rest = (scale, zero_point, -8, 7, axis, 0.25)
    machine.check("fake_quantize_learned_forward", x, *rest)
    for clips in (False, True):
        machine.check("fake_quantize_learned_backward", grad, x, *rest, clips, close=nasty is not None)
    arguments = [machine.moved(t) for t in (grad, x, *rest)]
    first, second = (machine.call("fake_quantize_learned_backward", *arguments) for _ in range(2))
    assert same(first, [t.cpu() for t in second])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axis", "channel_axis", "groups", "form"),
    [
        ((8, 3, 3, 3), 0, 0, 1, torch.contiguous_format),
        ((40, 24, 3, 3), 0, 0, 1, torch.channels_last),
        ((8, 3, 1, 1), -1, 0, 1, torch.channels_last),
        ((12, 5), 1, 0, 1, torch.contiguous_format),
        ((6, 4, 2, 3), 1, 1, 3, torch.channels_last),
        ((0, 4, 2, 3), 1, 1, 1, torch.contiguous_format),
    ],
)
def test_learned_weights(
    machine: Machine, shape: Sequence[int], axis: int, channel_axis: int, groups: int, form: torch.memory_format,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    channels, outputs = shape[axis] if axis >= 0 else 1, shape[channel_axis] * groups
    weight, grad = (exact(shape, k).to(dtype).contiguous(memory_format=form) for k in (0, 1))
    scale, zero_point = 2.0 ** -(torch.arange(channels) % 4).float(), exact((channels,), 7) * 4
    place = (-8, 7, axis, channel_axis, groups, 0.25)
    norms = [(None, torch.rand(outputs) + 0.5, 1e-5)]
    # powers of two as factors: sums stay exact
    norms += [(2.0 ** (torch.arange(outputs) % 3).float(), torch.full((outputs,), 4.0), 0.0)]
    for gamma, var, eps in norms:
        _, factor = machine.check(
            "fake_quantize_weight_learned_forward", weight, scale, zero_point, gamma, var, eps, 2.0**-20, *place
        )
        for with_zero_point in (False, True):
            machine.check(
                "fake_quantize_weight_learned_backward", grad, weight, scale, zero_point, factor, *place,
                with_zero_point, close=gamma is None,
            )  # fmt: skip


# ---- elements


@RELAXED
@given(x=tensors())
def test_numbers_of_places_and_the_weights_of_dorefa(machine: Machine, x: Tensor) -> None:
    weight = x.float()
    machine.check("drop_numbers", weight, SEED)
    y, ratio = machine.check("tanh_weight_forward", weight)
    machine.check("tanh_weight_backward", torch.randn(y.shape), weight, ratio)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES[2:5])
def test_elements_that_keep_their_value(
    machine: Machine, shape: Sequence[int], form: torch.memory_format, bounds: Bounds
) -> None:
    x, other = formed(exact(shape, 0), form), formed(exact(shape, 1), form)
    x[(0,) * x.dim()] = torch.nan
    mean, var = exact((shape[1],), 2), exact((shape[1],), 3).abs() + 0.5
    qmin, qmax, *rest = RULES[0]
    for tracks in (False, True):
        state = tracked(1, known=True)
        last = (tracks, 0.1, qmin, qmax, *rest, True, SEED, 0.4)
        machine.check("norm_quantize_forward", x, None, None, mean, var, False, 0.1, 1e-5, *bounds, *state, *last)
        machine.check("add_quantize_forward", x, other, *bounds, *state, *last)


# ---- fused passes


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES[:5])
def test_batch_norm_on_a_learned_grid(
    machine: Machine, shape: Sequence[int], form: torch.memory_format, bounds: Bounds
) -> None:
    x, grad = formed(exact(shape, 0), form), exact(shape, 1)
    gamma, beta, mean, var = (exact((shape[1],), k) for k in range(2, 6))
    for number, (codes, batch) in enumerate([((0, 15), True), ((-8, 7), False)]):
        grid = (torch.tensor(0.25), torch.tensor(3.3), *codes)
        weights = (gamma, beta) if number % 2 else (None, None)
        _, bits, means, inverses = machine.check(
            "norm_quantize_learned_forward", x, *weights, mean.clone(), var.abs() + 0.5, batch, 0.1, 1e-5, *bounds,
            *grid,
        )  # fmt: skip
        back = (grad, x, bits, *weights, means, inverses, batch, *bounds, *grid, 0.25)
        for with_zero_point in (False, True):
            # the grid's sums are of any numbers
            machine.check("norm_quantize_learned_backward", *back, with_zero_point, close=True)
        for last in ((True, None, 0.0), (False, SEED, 0.4), (True, SEED, 1.0)):
            _, bits, means, inverses = machine.check(
                "norm_quantize_learned_forward", x, *weights, mean.clone(), var.abs() + 0.5, batch, 0.1, 1e-5, *bounds,
                *grid, True, *last,
            )  # fmt: skip
            back = (grad, x, bits, *weights, means, inverses, batch, *bounds, *grid, 0.25)
            machine.check("norm_quantize_learned_backward", *back, True, *last, close=True)
        there = [machine.moved(argument) for argument in back]
        first, second = (machine.call("norm_quantize_learned_backward", *there) for _ in range(2))
        assert same(first, [t.cpu() for t in second])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_learned_grids_behind_what_is_not_finite(machine: Machine, value: float) -> None:
    x, grad = exact((3, 4, 5), 0), exact((3, 4, 5), 1)
    x[1, 2, 3] = value
    running, grid = (exact((4,), 2), exact((4,), 3).abs() + 0.5), (torch.tensor(0.25), torch.tensor(3.0), 0, 15)
    _, bits, *statistics = machine.check(
        "norm_quantize_learned_forward", x, None, None, *running, False, 0.1, 1e-5, 0.0, 6.0, *grid
    )
    back = (grad, x, bits, None, None, *statistics, False, 0.0, 6.0, *grid)
    machine.check("norm_quantize_learned_backward", *back, close=True)
    other = exact((3, 4, 5), 4)
    machine.check("add_quantize_learned_backward", grad, x, other, 0.0, 6.0, *grid, close=True)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("shape", [(7, 11), (40_003,), (), (0, 3)])
def test_additions_on_learned_grids(machine: Machine, shape: tuple[int, ...], bounds: Bounds) -> None:
    x, other, grad = (exact(shape, k) for k in (5, 6, 7))
    for codes in [(0, 15), (-8, 7)]:
        grid = (torch.tensor(0.25), torch.tensor([3.3]), *codes, 0.25)
        machine.check("add_quantize_learned_forward", x, other, *bounds, *grid)
        for with_zero_point in (False, True):
            machine.check("add_quantize_learned_backward", grad, x, other, *bounds, *grid, with_zero_point)
        for last in ((True, None, 0.0), (False, SEED, 0.4), (True, SEED, 1.0)):
            machine.check("add_quantize_learned_forward", x, other, *bounds, *grid, *last)
            machine.check("add_quantize_learned_backward", grad, x, other, *bounds, *grid, True, *last)
        if len(shape) == 2:
            turned = (x, other.t().contiguous().t(), *bounds, *grid)
            machine.check("add_quantize_learned_forward", *turned)
            machine.check("add_quantize_learned_backward", grad.t().contiguous().t(), *turned)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm(
    machine: Machine, shape: Sequence[int], form: torch.memory_format, bounds: Bounds, batch: bool
) -> None:
    x, grad = formed(exact(shape, 0), form), exact(shape, 1)
    gamma, beta, mean, var = (exact((shape[1],), k) for k in range(2, 6))
    cases = [*zip(RULES, (True, True, False, True, False), strict=True), (None, False)]
    for number, (rule, tracks) in enumerate(cases):
        qmin, qmax, *rest = rule or RULES[0]
        state = tracked(1, known=not tracks) if rule else (None,) * 5
        weights = (gamma, beta) if number % 3 else (None, None)
        _, bits, means, inverses = machine.check(
            "norm_quantize_forward", x, *weights, mean.clone(), var.abs() + 0.5, batch, 0.1, 1e-5, *bounds, *state,
            tracks, 0.1, qmin, qmax, *rest,
        )  # fmt: skip
    for with_parameters in (False, True):
        back = (grad, x, bits, weights[0], means, inverses, batch, with_parameters)
        machine.check("norm_quantize_backward", *back)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("batch", [False, True])
def test_batch_norm_of_what_is_not_finite(machine: Machine, value: float, batch: bool) -> None:
    x, grad = exact((3, 4, 5), 0), exact((3, 4, 5), 1)
    x[1, 2, 3] = value
    running, state = (exact((4,), 2), exact((4,), 3).abs() + 0.5), tracked(1, known=True)
    rest = (batch, 0.1, 1e-5, 0.0, 6.0, *state, True, 0.1, 0, 255, False, 0, False)
    _, bits, *statistics = machine.check("norm_quantize_forward", x, None, None, *running, *rest)
    machine.check("norm_quantize_backward", grad, x, bits, None, *statistics, batch, False)


def test_batch_norm_of_any_numbers_is_close_and_repeats(machine: Machine) -> None:
    x, grad = torch.randn(8, 16, 12, 12), torch.randn(8, 16, 12, 12)
    running = torch.zeros(16), torch.ones(16)
    plain = (None, None, None, None, None, False, 0.0, 0, 1, False, 0, False)
    arguments = (x, torch.randn(16), torch.randn(16), *running, True, 0.1, 1e-5, 0.0, 6.0, *plain)
    _, bits, *statistics = machine.check("norm_quantize_forward", *arguments, close=True)
    back = (grad, x, bits, arguments[1], *statistics, True, True)
    machine.check("norm_quantize_backward", *back, close=True)
    there = [machine.moved(argument) for argument in back]
    first, second = (machine.call("norm_quantize_backward", *there) for _ in range(2))
    assert same(first, [t.cpu() for t in second])


@pytest.mark.parametrize("rule", [None, *RULES])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(("shape", "nasty"), [((7, 11), 0.0), ((7, 11), 0.1), ((40_003,), 0.0), ((), 0.0)])
def test_additions(machine: Machine, shape: tuple[int, ...], nasty: float, bounds: Bounds, rule: Rule | None) -> None:
    x, other = (make(shape, "contiguous", torch.float32, k, nasty) for k in (5, 6))
    qmin, qmax, *rest = rule or RULES[0]
    for tracks in (False, True) if rule else (False,):
        state = tracked(1, known=not tracks) if rule else (None,) * 5
        last = (*bounds, *state, tracks, 0.1, qmin, qmax, *rest)
        machine.check("add_quantize_forward", x, other, *last)
        if len(shape) == 2:
            machine.check("add_quantize_forward", x, other.t().contiguous().t(), *last)


# ---- errors


def test_bad_input_is_a_message(machine: Machine) -> None:
    x, one = (machine.moved(torch.ones(n)) for n in (4, 1))
    ops = machine.operators
    calls: dict[str, Callable[[], Any]] = {
        "neither float32 nor bfloat16": lambda: ops.observe_minmax(x.half()),
        "axis 3": lambda: ops.observe_minmax(x, 3),
        "2 values in scale": lambda: ops.fake_quantize_forward(x, x[:2], one, 0, 7),
        "too wide": lambda: ops.fake_quantize_forward(x, one, one, 0, 1 << 24),
        "mantissa_bits 11": lambda: ops.observe_histogram(x, x, x, x, x, -1, 11),
        "low is not a contiguous tensor of 1 float32": lambda: ops.observe_range(x, x, one, one),
        "a histogram has no momentum": lambda: ops.fake_quantize_observe(
            x, one, one, 0, 7, -1, one, one, one, one, 7, 0.1, True
        ),
        "x of shape .* has no channels": lambda: ops.norm_quantize_forward(
            x, None, None, None, None, True, 0.1, 1e-5, 0, 6, None, None, None, None, None, False, 0.1, 0, 1, False, 0,
            False,
        ),
        "give those of one forward pass": lambda: ops.norm_quantize_backward(x, x, x, None, x, x, True, True),
        "gamma is given without var": lambda: ops.fake_quantize_weight_forward(
            x, None, None, x, None, 0.1, 0.1, 0, 7, 0, False, 0, False
        ),
    }  # fmt: skip
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()
