"""The index logic of the CUDA kernels and the arithmetic of the products, compiled as plain C++ and run on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qat.integer.kernels import elementwise, linear
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import multiplier
from tests.native.cuda_host import compiled, pointer


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("cuda_host_logic.cpp", tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("mantissa_bits", range(11))
def test_private_bins_are_bins(host: ctypes.CDLL, mantissa_bits: int) -> None:
    assert host.private_count(mantissa_bits) == min(8192, 2 ** (9 + mantissa_bits))


@pytest.mark.parametrize("step", [1, 7, 24, 256])
@pytest.mark.parametrize("layout", [(2, 3, 5), (7, 4, 1), (1, 1, 9), (3, 1, 2), (5, 40, 9), (3, 5, 700), (300, 3, 1)])
def test_the_threads_of_a_channel_visit_each_of_its_elements_once(
    host: ctypes.CDLL, layout: tuple[int, int, int], step: int
) -> None:
    assert host.visits_once(*map(ctypes.c_int64, (*layout, step))) == 1


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
