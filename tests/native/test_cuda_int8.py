"""The products and convolutions on a GPU: codes of the integer reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qat import native
from qat.integer.kernels import elementwise, linear
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import multiplier
from tests.native.test_cuda_host import sum_ratios

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
Y_GRID, SUM_GRID, OTHER_GRID = QParams(0.11, 90, 0, 255), QParams(0.17, 101, 0, 255), QParams(0.09, 3, -128, 127)


@pytest.fixture(autouse=True)
def _kernels() -> None:
    """Skip where the extension was built without the kernels of the GPU."""
    if not native.status().cuda:
        pytest.skip(f"native extension: {native.status()}")


def test_bad_input_is_a_message() -> None:
    x, one = torch.ones(4, device="cuda"), torch.ones(1, device="cuda")
    calls = {
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
