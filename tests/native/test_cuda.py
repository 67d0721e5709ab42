"""The operators on a GPU: those of the CPU to the bit, and codes of the integer reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from qat import native
from qat.integer.kernels import elementwise, linear
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import multiplier
from tests.native.native_cases import same_bits, tensors
from tests.native.test_cuda_host import sum_ratios

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
Y_GRID, SUM_GRID, OTHER_GRID = QParams(0.11, 90, 0, 255), QParams(0.17, 101, 0, 255), QParams(0.09, 3, -128, 127)


@pytest.fixture(autouse=True)
def _kernels() -> None:
    """Skip where the extension was built without the kernels of the GPU."""
    if not native.status().cuda:
        pytest.skip(f"native extension: {native.status()}")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=tensors())
@pytest.mark.parametrize("per_channel", [False, True])
def test_fake_quantization_and_extrema_are_the_cpus(per_channel: bool, x: Tensor) -> None:
    axis = x.dim() - 1 if per_channel and x.dim() else -1
    count = x.shape[axis] if axis >= 0 else 1
    scale, zero = torch.rand(count) + 0.01, torch.randint(-5, 6, (count,))
    on_gpu = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)
    wanted = torch.ops.qat.fake_quantize_observe_forward(x, scale, zero, -8, 7, axis)
    found = torch.ops.qat.fake_quantize_observe_forward(on_gpu, scale.cuda(), zero.cuda(), -8, 7, axis)
    for a, b in zip(found, wanted, strict=True):
        assert same_bits(a.cpu(), b) if b.is_floating_point() else torch.equal(a.cpu(), b)
    y, bits = found[:2]
    grad = torch.randn(x.shape).to(x.dtype)
    back = torch.ops.qat.fake_quantize_backward(grad.cuda(), bits, y.stride())
    assert same_bits(back.cpu(), torch.ops.qat.fake_quantize_backward(grad, wanted[1], wanted[0].stride()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5000, 3, 1, 1), 0), ((4, 40, 33, 31), 1), ((64, 4097), 1), ((1_000_003,), -1), ((8, 16, 56, 56), 1)],
)
def test_large_tensors_and_channels_last(shape: Sequence[int], axis: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (torch.contiguous_format,):
        case = x.contiguous(memory_format=layout)
        wanted = torch.ops.qat.observe_minmax(case, axis)
        found = torch.ops.qat.observe_minmax(case.cuda(), axis)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=tensors())
def test_histograms_are_the_cpus(x: Tensor) -> None:
    def state(device: str) -> list[Tensor]:
        ends = [torch.full((1,), value, device=device) for value in (torch.inf, -torch.inf)]
        counts, nonfinite = (torch.zeros(n, dtype=torch.int64, device=device) for n in (65536, 1))
        return [counts, *ends, nonfinite]

    wanted, found = state("cpu"), state("cuda")
    for _ in range(2):
        torch.ops.qat.observe_histogram(x, *wanted)
        torch.ops.qat.observe_histogram(x.cuda(), *found)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["fake_quantize_forward", "fake_quantize_observe_forward"])
def test_opcheck(name: str) -> None:
    x = torch.randn(3, 4, 5, device="cuda", requires_grad=True)
    args = (x, torch.rand(4, device="cuda") + 0.1, torch.zeros(4, device="cuda"), -8, 7, 1)
    torch.library.opcheck(getattr(torch.ops.qat, name).default, args)


def test_bad_input_is_a_message() -> None:
    x, one = torch.ones(4, device="cuda"), torch.ones(1, device="cuda")
    calls = {
        "scale is not on CUDA": lambda: torch.ops.qat.fake_quantize_forward(x, one.cpu(), one, 0, 7),
        "neither float32 nor bfloat16": lambda: torch.ops.qat.observe_minmax(x.half()),
        "axis 3": lambda: torch.ops.qat.observe_minmax(x, 3),
        "2 values in scale": lambda: torch.ops.qat.fake_quantize_forward(x, x[:2], one, 0, 7),
        "too wide": lambda: torch.ops.qat.fake_quantize_forward(x, one, one, 0, 1 << 24),
        "do not fit": lambda: torch.ops.qat.int8_gemm(x.byte()[None], x.char()[None, :3], None, one, 0, 0, 0, 255),
        "x_zero_point 300": lambda: torch.ops.qat.int8_gemm(x.byte()[None], x.char()[None], None, one, 300, 0, 0, 255),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def int8(*shape: int, signed: bool) -> Tensor:
    return torch.randint(-128 if signed else 0, 128 if signed else 256, shape)


def activation(signed: bool) -> QParams:
    return QParams(0.02, -7 if signed else 120, -128 if signed else 0, 127 if signed else 255)


def on_gpu(codes: Tensor, signed: bool) -> Tensor:
    return codes.to(torch.int8 if signed else torch.uint8).contiguous().cuda()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (7, 5, 3), (65, 33, 17), (128, 128, 64), (129, 130, 68), (300, 1000, 2048), (40000, 256, 80)],
)
def test_products_are_the_integer_reference(m: int, n: int, k: int, signed: bool) -> None:
    x, w, bias = int8(m, k, signed=signed), int8(n, k, signed=True), torch.randint(-999, 999, (n,), dtype=torch.int32)
    w_scale, grid = torch.rand(n) * 0.01 + 0.001, activation(signed)
    wanted = linear.linear(x, grid, w, w_scale, bias, Y_GRID)
    factor = multiplier(grid.scale, w_scale, Y_GRID.scale).cuda()
    args = (on_gpu(x, signed), on_gpu(w, True), bias.cuda(), factor, grid.zero_point, 90, 0, 255)
    assert torch.equal(torch.ops.qat.int8_gemm(*args).cpu().int(), wanted)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "kernel", "stride", "padding", "dilation"),
    [
        (3, 32, 1, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1)),
        (64, 64, 1, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
        (64, 256, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
        (20, 21, 1, (3, 2), (1, 2), (0, 2, 1, 1), (2, 1)),
        (24, 24, 24, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
        (32, 48, 2, (5, 1), (3, 1), (2, 0, 2, 0), (1, 1)),
    ],
)
def test_convolutions_are_the_integer_reference(
    channels: int,
    outputs: int,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    add: bool,
) -> None:
    x, w = int8(3, channels, 29, 31, signed=False), int8(outputs, channels // groups, *kernel, signed=True)
    w_scale, grid = torch.rand(outputs) * 0.01 + 0.001, activation(False)
    wanted = linear.conv(x, grid, w, w_scale, None, Y_GRID, stride, padding, dilation, groups)
    extra: dict[str, object] = {}
    if add:
        residual = int8(*wanted.shape, signed=True)
        wanted = elementwise.add(wanted, Y_GRID, residual, OTHER_GRID, SUM_GRID)
        left, right, fixed = sum_ratios(Y_GRID, OTHER_GRID, SUM_GRID).tolist()
        extra = {"residual": on_gpu(residual.permute(0, 2, 3, 1), True), "sum_qmin": 0, "sum_qmax": 255}
        extra |= {"left_ratio": left, "right_ratio": right, "fixed": fixed}
    factor = multiplier(grid.scale, w_scale, Y_GRID.scale).cuda()
    rows, weight = on_gpu(x.permute(0, 2, 3, 1), False), on_gpu(w.permute(0, 2, 3, 1), True)
    args = (rows, weight, None, factor, grid.zero_point, 90, 0, 255, False, stride, padding, dilation, groups)
    found = torch.ops.qat.int8_conv2d(*args, **extra)
    assert torch.equal(found.permute(0, 3, 1, 2).cpu().int(), wanted)
