"""The arithmetic and the index logic of the CUDA kernels, compiled as plain C++ and run on the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat import numerics
from qat.integer.kernels import elementwise, linear
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import multiplier
from qat.scheme import PER_TENSOR, Granularity
from tests.native.native_cases import make, same_bits


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    library = tmp_path_factory.mktemp("cuda") / "host.so"
    source = Path(__file__).with_name("cuda_host_entry.cpp")
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


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


def test_private_bins_are_bins(host: ctypes.CDLL) -> None:
    assert host.round_trip_bins() == 8192


def test_gradients_of_a_learned_grid_are_autograds(host: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(4000, generator=generator) for _ in range(2))
    scale, zero = torch.tensor(0.13, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    steps = x / scale
    rounded = steps + (torch.round(steps) - steps).detach()
    ((rounded + zero).clamp(-8, 7) - zero).mul(scale).backward(grad)
    sums = torch.zeros(2, dtype=torch.float64)
    numbers = [ctypes.c_float(v) for v in (float(scale.detach()), 2.0, -8.0, 7.0)]
    host.learned(pointer(x), pointer(grad), ctypes.c_int64(4000), *numbers, pointer(sums[:1]), pointer(sums[1:]))
    torch.testing.assert_close(sums[0].float(), scale.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sums[1].float(), zero.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_batch_norm_with_an_activation_is_pytorchs(host: ctypes.CDLL, activation: int, frozen: bool) -> None:
    generator = torch.Generator().manual_seed(activation)
    x, grad = (torch.randn(3000, generator=generator) * 3 + 1 for _ in range(2))
    gamma, beta = (torch.tensor([v], requires_grad=True) for v in (1.7, 0.4))
    mean, variance = (
        (torch.tensor([0.8]), torch.tensor([7.0])) if frozen else (x.mean()[None], x.var(correction=0)[None])
    )
    inputs = x.clone().requires_grad_()
    z = torch.nn.functional.batch_norm(inputs[:, None], mean.clone(), variance.clone(), gamma, beta, not frozen)
    wanted = (lambda t: t, torch.relu, torch.nn.functional.relu6)[activation](z).flatten()
    wanted.backward(grad)
    y, dx, sums = torch.empty(3000), torch.empty(3000), torch.empty(2)
    numbers = [ctypes.c_float(float(v)) for v in (mean, (variance + 1e-5).rsqrt(), 1.7, 0.4)]
    host.norm(
        pointer(x), pointer(grad), ctypes.c_int64(3000), *numbers, activation, int(frozen), pointer(y), pointer(dx),
        pointer(sums[:1]), pointer(sums[1:]),
    )  # fmt: skip
    for found, expected in ((y, wanted.detach()), (dx, inputs.grad), (sums[:1], gamma.grad), (sums[1:], beta.grad)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [(2, 3, 5), (7, 4, 1), (1, 1, 9), (3, 1, 2)])
def test_a_reduction_visits_each_element_of_a_channel_once(host: ctypes.CDLL, layout: tuple[int, int, int]) -> None:
    assert host.visits_once(*map(ctypes.c_int64, layout)) == 1


def test_a_tile_through_the_fragments_is_the_product(host: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (16, 64), generator=generator, dtype=torch.uint8)
    b = torch.randint(-128, 128, (16, 64), generator=generator, dtype=torch.int8)
    c = torch.zeros(16, 16, dtype=torch.int32)
    host.tile_product(pointer(a), pointer(b), pointer(c))
    assert torch.equal(c, a.int() @ b.int().t())


def test_no_phase_of_ldmatrix_meets_a_bank_twice(host: ctypes.CDLL) -> None:
    assert host.fewest_banks() == 8


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("x_signed", [False, True])
@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "kernel", "stride", "padding", "dilation"),
    [
        (3, 8, 1, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
        (16, 5, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
        (6, 6, 6, (3, 2), (1, 2), (0, 2, 1, 1), (2, 1)),
        (8, 12, 2, (5, 1), (3, 1), (2, 0, 2, 0), (1, 1)),
    ],
)
def test_convolution_is_the_integer_reference(
    host: ctypes.CDLL,
    channels: int,
    outputs: int,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    x_signed: bool,
    add: bool,
) -> None:
    generator = torch.Generator().manual_seed(channels)

    def codes(*shape: int, signed: bool) -> Tensor:
        return torch.randint(-128 if signed else 0, 128 if signed else 256, shape, generator=generator)

    x = codes(2, channels, 9, 7, signed=x_signed)
    w = codes(outputs, channels // groups, *kernel, signed=True)
    bias = torch.randint(-3000, 3000, (outputs,), generator=generator, dtype=torch.int32)
    w_scale = torch.rand(outputs, generator=generator) * 0.01 + 0.001
    x_grid = QParams(0.05, -7 if x_signed else 120, -128 if x_signed else 0, 127 if x_signed else 255)
    y_grid, sum_grid = QParams(0.11, 90, 0, 255), QParams(0.17, 101, 0, 255)
    wanted = linear.conv(x, x_grid, w, w_scale, bias, y_grid, stride, padding, dilation, groups)
    other_grid = QParams(0.09, 3, -128, 127)
    residual = codes(*wanted.shape, signed=True)
    ratios = torch.zeros(3)
    if add:
        wanted = elementwise.add(wanted, y_grid, residual, other_grid, sum_grid)
        ratios = sum_ratios(y_grid, other_grid, sum_grid)

    def nhwc(t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).contiguous().to(torch.uint8)

    x_rows, w_rows, residual_rows = nhwc(x), w.permute(0, 2, 3, 1).contiguous().to(torch.int8), nhwc(residual)
    out_h, out_w = wanted.shape[2:]
    shape = torch.tensor(
        [
            2,
            9,
            7,
            out_h,
            out_w,
            channels // groups,
            outputs // groups,
            groups,
            *kernel,
            *stride,
            *padding[:2],
            *dilation,
        ],
        dtype=torch.int32,
    )
    grid = torch.tensor([90, 0, 255, 0, int(add), 0, 1, 0, 255], dtype=torch.int32)
    y = torch.empty(2, out_h, out_w, outputs, dtype=torch.uint8)
    factor = multiplier(x_grid.scale, w_scale, y_grid.scale)
    host.conv(
        pointer(x_rows), int(x_signed), x_grid.zero_point, pointer(w_rows), pointer(bias), pointer(factor),
        pointer(shape), pointer(grid), pointer(ratios), pointer(residual_rows), pointer(y),
    )  # fmt: skip
    assert torch.equal(y, nhwc(wanted))


def sum_ratios(left: QParams, right: QParams, total: QParams) -> Tensor:
    """`Sum` of csrc/kernels/integer/requantize.h: float32, products fused (float64 holds them exactly)."""
    a, b = (torch.tensor(q.scale) / torch.tensor(total.scale) for q in (left, right))
    zero = b * torch.tensor(float(right.zero_point))
    fixed = total.zero_point - (a.double() * left.zero_point + zero.double()).float()
    return torch.stack([a, b, fixed])
