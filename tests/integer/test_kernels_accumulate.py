from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels_ort import generator, random_integer
from torch import Tensor
from torch.nn import functional

from qat.errors import ExportError, PlanError
from qat.integer.kernels import accumulate
from qat.integer.kernels.accumulate import accumulator_bound, conv_accumulate, matmul_accumulate


def _codes(g: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=g)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_is_the_integer_one(dims: int, transposed: bool) -> None:
    g = generator(dims)
    for _ in range(12):
        groups = [1, 2, 8][random_integer(g, 0, 2)]
        stride, dilation = ([random_integer(g, 1, 3) for _ in range(dims)] for _ in range(2))
        kernel = [random_integer(g, 1, 3) for _ in range(dims)]
        padding = [random_integer(g, 0, 1) for _ in range(2 * dims)]
        extra = [random_integer(g, 0, s - 1) for s in stride]
        x, zero, w_zero = _codes(g, 0, 255, 2, 8, *[7] * dims), random_integer(g, 0, 255), random_integer(g, -3, 3)
        if transposed:
            w = _codes(g, -128, 127, 8, 16 // groups, *kernel)
            begins, ends = padding[:dims], padding[dims:]
            op = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[dims - 1]
            full = op((x - zero).double(), (w - w_zero).double(), None, stride, 0, 0, groups, dilation)
            crop = [s for d in reversed(range(dims)) for s in (-begins[d], extra[d] - ends[d])]
            expected = functional.pad(full, crop)
        else:
            w = _codes(g, -128, 127, 16, 8 // groups, *kernel)
            flat = [s for d in reversed(range(dims)) for s in (padding[d], padding[dims + d])]
            op = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
            padded = functional.pad((x - zero).double(), flat)
            expected = op(padded, (w - w_zero).double(), None, stride, 0, dilation, groups)
            extra = [0] * dims
        acc = conv_accumulate(x, zero, w, stride, padding, dilation, groups, transposed, extra, w_zero)
        assert acc.dtype == torch.int32
        assert torch.equal(acc.long(), expected.long())


def test_a_transposed_convolution_agrees_with_pytorch_about_padding() -> None:
    g = generator()
    x, w = _codes(g, -8, 7, 1, 4, 5, 6), _codes(g, -8, 7, 4, 3, 3, 4)
    expected = functional.conv_transpose2d(x.double(), w.double(), None, (2, 3), (1, 2), (1, 2))
    acc = conv_accumulate(x, 0, w, (2, 3), (1, 2), transposed=True, output_padding=(1, 2))
    assert torch.equal(acc.double(), expected)


@pytest.mark.parametrize("depth", [1, 515, 4096, 70000])
def test_products_beyond_the_exact_range_of_float32_stay_exact(depth: int) -> None:
    g = generator(depth)
    a, b = _codes(g, 0, 255, 3, 5, depth), _codes(g, -128, 127, depth, 4)
    a[0], b[:, 0], b[:, 1] = 255, 127, -128
    acc = matmul_accumulate(a, 0, b, 0)
    assert torch.equal(acc.long(), a @ b)
    pointwise = conv_accumulate(a.transpose(1, 2), 0, b.t().reshape(4, depth, 1))
    assert torch.equal(pointwise.long(), (a @ b).transpose(1, 2))


def test_sixteen_bit_products_need_more_than_32_bits() -> None:
    g = generator()
    a, b = _codes(g, 0, 65535, 4, 300), _codes(g, -32768, 32767, 300, 5)
    a[0], b[:, 0] = 65535, 32767
    acc = matmul_accumulate(a, 7, b, -9)
    assert acc.dtype == torch.int64
    assert torch.equal(acc, (a - 7) @ (b + 9))


def test_the_parts_of_a_large_reduction_cover_it_and_stay_exact() -> None:
    g = generator()
    sums = _codes(g, 0, 9000, 6, 100).double()
    cuts = accumulate._parts(sums, 255)
    assert cuts is not None
    assert cuts[0] == 0
    assert cuts[-1] == 100
    assert len(cuts) > 2
    for begin, end in pairwise(cuts):
        assert begin < end
        assert float(sums[:, begin:end].sum(1).max()) * 255 < 2**24
    assert accumulate._parts(torch.full((1, 3), 2.0**24, dtype=torch.float64), 2) is None


def test_reduced_precision_modes_do_not_reach_the_accumulators() -> None:
    g = generator()
    a, b = _codes(g, 0, 255, 64, 96), _codes(g, -128, 127, 96, 64)
    x, w = _codes(g, 0, 255, 2, 32, 12, 12), _codes(g, -128, 127, 32, 32, 3, 3)
    expected = functional.conv2d((x - 3).double(), w.double(), padding=1).long()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(matmul_accumulate(a, 5, b, 0).long(), (a - 5) @ b)
        assert torch.equal(conv_accumulate(x, 3, w, padding=1).long(), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_batches_broadcast_and_empty_operands_work() -> None:
    g = generator()
    a, b = _codes(g, 0, 255, 2, 1, 3, 4), _codes(g, 0, 255, 5, 4, 6)
    assert torch.equal(matmul_accumulate(a, 1, b, 2).long(), (a - 1) @ (b - 2))
    assert matmul_accumulate(a[:0], 1, b, 2).shape == (0, 5, 3, 6)
    assert torch.equal(matmul_accumulate(a[..., :0], 1, b[:, :0], 2), torch.zeros(2, 5, 3, 6, dtype=torch.int32))


@given(
    st.lists(st.integers(-128, 127), min_size=1, max_size=12),
    st.integers(-128, 127),
    st.integers(0, 255),
    st.integers(-(2**31), 2**31 - 1),
)
def test_the_bound_is_attained_by_the_worst_input(w: list[int], qmin: int, width: int, bias: int) -> None:
    qmax, zero = qmin + width, qmin + width // 3
    bound = int(accumulator_bound(torch.tensor([w]), zero, qmin, qmax, torch.tensor([bias])))
    highest = sum(max(v * (qmax - zero), v * (qmin - zero)) for v in w)
    lowest = sum(min(v * (qmax - zero), v * (qmin - zero)) for v in w)
    # the bias may come first or last: with it or without it, no partial sum is larger
    assert bound == max(highest + max(bias, 0), -(lowest + min(bias, 0)))
    assert bound >= max(abs(highest + bias), abs(lowest + bias), abs(bias) if bias > 0 or lowest else 0)


def test_the_bound_of_a_grouped_transposed_convolution_is_per_output_channel() -> None:
    g = generator()
    w = _codes(g, -128, 127, 8, 3, 2, 2)
    bound = accumulator_bound(w, 10, 0, 255, channel_axis=1, groups=2)
    assert bound.shape == (6,)
    for group in range(2):
        for channel in range(3):
            row = w[4 * group : 4 * group + 4, channel].reshape(1, -1)
            assert int(bound[3 * group + channel]) == int(accumulator_bound(row, 10, 0, 255))


def test_arguments_that_fit_no_convolution_are_named() -> None:
    x, w = torch.zeros(1, 1, 4, 4, dtype=torch.int32), torch.ones(1, 1, 2, 2, dtype=torch.int32)
    with pytest.raises(PlanError, match="stride"):
        conv_accumulate(x, 0, w, stride=(1, 1, 1))
    with pytest.raises(PlanError, match="padding"):
        conv_accumulate(x, 0, w, padding=(1, 1, 1))
    with pytest.raises(PlanError, match="padding"):
        conv_accumulate(x, 0, w, padding=(1, 1, 1), transposed=True)
    with pytest.raises(ExportError, match="float64"):
        matmul_accumulate(torch.full((1, 8), 2**30), 0, torch.full((8, 1), 2**30), 0)
    with pytest.raises(ExportError, match="float64"):
        conv_accumulate(torch.full((1, 8, 1), 2**30), 0, torch.full((1, 8, 1), 2**30))
