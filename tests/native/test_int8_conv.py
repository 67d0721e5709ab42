"""The 8-bit convolutions of every instruction set against PyTorch's reference, code by code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_layers import RANGES, Conv
from torch import Tensor

from qat import native
from qat.integer.kernels.qparams import QParams

ISAS = ("portable", "avx2", "avxvnni", "avx512vnni", "neon", "neondot", "i8mm")
pytestmark = pytest.mark.skipif(not native.status().active, reason=f"native extension: {native.status().reason}")


def runnable() -> list[str]:
    """The instruction sets of this processor."""
    return [isa for isa in ISAS if torch.ops.qat._int8_isa(isa) == isa]


def same_codes(layer: Conv) -> None:
    """Compare every code of every instruction set."""
    expected = layer.reference()
    for isa in runnable():
        torch.testing.assert_close(layer.native(isa), expected, rtol=0, atol=0, msg=lambda m, isa=isa: f"{isa}: {m}")


Draw = Callable[..., Any]


def codes(draw: Draw, kind: str, *shape: int) -> Tensor:
    """Random codes, or only the two ends of the type."""
    low, high = RANGES[kind]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.integers(0, 4)) == 0:
        return torch.where(torch.rand(shape, generator=generator) < 0.5, low, high)
    return torch.randint(low, high + 1, shape, generator=generator)


def grid(draw: Draw, kind: str, scale: float, narrow: bool = False) -> QParams:
    """A grid of the whole type, or a narrower one, with any zero point."""
    low, high = RANGES[kind]
    if narrow and draw(st.booleans()):
        low = draw(st.integers(low, high - 1))
        high = draw(st.integers(low + 1, high))
    return QParams(scale, draw(st.integers(low, high)), low, high)


KINDS = st.sampled_from(["u8", "s8"])


@st.composite
def convolutions(draw: Draw, transposed: bool = False, kinds: Any = KINDS, out_kinds: Any = KINDS) -> Conv:
    """Small layers of odd sizes, some of which every panel width and register tile sees."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    depthwise = not transposed and draw(st.integers(0, 3)) == 0
    if depthwise:
        groups = draw(st.integers(2, 140))
    inputs = groups * (1 if depthwise else draw(st.integers(1, 20)))
    outputs = groups * (1 if depthwise else draw(st.integers(1, 70 // groups)))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    extent = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
    if transposed:
        size = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        padding = tuple(draw(st.integers(0, (e - 1) // 2)) for e in (*extent, *extent))
    else:
        padding = tuple(draw(st.integers(0, e - 1)) for e in (*extent, *extent))
        size = (
            draw(st.integers(max(1, extent[0] - padding[0] - padding[2]), 9)),
            draw(st.integers(max(1, extent[1] - padding[1] - padding[3]), 9)),
        )
    x_type, y_type = draw(kinds), draw(out_kinds)
    spread = 1.0 if x_type in ("u8", "s8") else 1 / 256
    return Conv(
        x=codes(draw, x_type, draw(st.integers(1, 2)), *size, inputs),
        weight=codes(draw, "s8", outputs, *kernel, inputs // groups),
        x_type=x_type,
        y_type=y_type,
        x_grid=grid(draw, x_type, 0.02 * spread),
        # from multipliers far below 1 to some above
        y_grid=grid(draw, y_type, draw(st.sampled_from([0.0001, 0.01, 0.3, 2.0])), narrow=True),
        w_scale=torch.rand(outputs, generator=torch.Generator().manual_seed(outputs)) * 0.02 + 0.001,
        bias=torch.randint(-5000, 5001, (outputs,)) if draw(st.booleans()) else None,
        stride=stride,
        padding=padding,  # type: ignore[arg-type]
        dilation=dilation,
        groups=groups,
        transposed=transposed,
    )


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_convolution(layer: Conv) -> None:
    same_codes(layer)


@settings(max_examples=40, deadline=None)
@given(convolutions(transposed=True))
def test_transposed_convolution(layer: Conv) -> None:
    same_codes(layer)


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.data(), st.booleans())
def test_residual(layer: Conv, data: st.DataObject, first: bool) -> None:
    layer.residual_type = data.draw(KINDS)
    layer.residual = codes(data.draw, layer.residual_type, layer.x.shape[0], *layer.out_size, layer.weight.shape[0])
    layer.residual_grid = grid(data.draw, layer.residual_type, data.draw(st.sampled_from([0.01, 0.29])))
    layer.residual_first = first
    layer.sum_grid = grid(data.draw, layer.y_type, 0.4, narrow=True)
    same_codes(layer)


@settings(max_examples=30, deadline=None)
@given(convolutions())
def test_table(layer: Conv) -> None:
    # codes of one type become codes of the same one
    low, high = RANGES[layer.y_type]
    values = torch.randint(low, high + 1, (layer.y_grid.levels,))
    layer.table = values.to(torch.uint8 if low == 0 else torch.int8)
    expected = layer.reference()
    layer.table = layer.table.view(torch.uint8)
    for isa in runnable():
        assert torch.equal(layer.native(isa), expected), isa


@settings(max_examples=30, deadline=None)
@given(convolutions(), st.booleans(), st.data())
def test_fixed_point_profiles(layer: Conv, double_rounding: bool, data: st.DataObject) -> None:
    outputs = layer.weight.shape[0]
    layer.fixed = torch.randint(2**30, 2**31, (outputs,))
    layer.shift = torch.randint(-14, 2, (outputs,))
    layer.double_rounding = double_rounding
    same_codes(layer)


@settings(max_examples=30, deadline=None)
@given(st.one_of(convolutions(), convolutions(transposed=True)))
def test_result_rounded_from_its_real_value(layer: Conv) -> None:
    layer.wide = True
    same_codes(layer)


SIXTEEN = st.sampled_from(["u16", "s16"])


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(
        convolutions(kinds=SIXTEEN, out_kinds=SIXTEEN),
        convolutions(kinds=SIXTEEN),
        convolutions(out_kinds=SIXTEEN),
        convolutions(transposed=True, kinds=SIXTEEN, out_kinds=SIXTEEN),
    )
)
def test_sixteen_bits(layer: Conv) -> None:
    same_codes(layer)


@settings(max_examples=25, deadline=None)
@given(convolutions(), st.data())
def test_weights_with_zero_points(layer: Conv, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([3, 127]))
    layer.w_zero = torch.randint(-width, width + 1, (layer.weight.shape[0],))
    same_codes(layer)


@settings(max_examples=20, deadline=None)
@given(convolutions())
def test_weights_of_four_bits(layer: Conv) -> None:
    layer.weight = layer.weight // 16
    layer.four_bits = True
    same_codes(layer)


@pytest.mark.parametrize("y_type", ["u8", "s8"])
@pytest.mark.parametrize("multiplier", [0.002, 1.5])
@pytest.mark.parametrize("channels", [5, 32, 64, 130])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 2)])
def test_depthwise_of_three(
    channels: int, stride: tuple[int, int], padding: tuple[int, int, int, int], multiplier: float, y_type: str
) -> None:
    torch.manual_seed(5)
    low, high = RANGES[y_type]
    same_codes(
        Conv(
            x=torch.randint(0, 256, (2, 5, 6, channels)),
            weight=torch.randint(-128, 128, (channels, 3, 3, 1)),
            y_type=y_type,
            y_grid=QParams(0.02 * 0.01 / multiplier, low + 100, low, high - (3 if stride[0] == 1 else 0)),
            bias=torch.randint(-900, 900, (channels,)),
            stride=stride,
            padding=padding,
            dilation=(1 + channels % 2, 1),
            groups=channels,
        )
    )


@pytest.mark.parametrize("x_type", ["u8", "s8"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_large_sums(x_type: str, kernel: int) -> None:
    # pairs of these products leave 16 bits, where AVX2's instruction saturates
    layer = Conv(
        x=torch.full((1, 5, 5, 900), RANGES[x_type][1]),
        weight=torch.full((20, kernel, kernel, 900), 127),
        x_type=x_type,
        x_grid=QParams(0.02, RANGES[x_type][0], *RANGES[x_type]),
        y_grid=QParams(400.0, 0, 0, 255),
        padding=(kernel // 2,) * 4,
    )
    assert 10 < layer.reference().max() < 255
    same_codes(layer)


ENDS = st.sampled_from(["low", "high", "mixed"])


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 40), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2])),
    st.tuples(KINDS, ENDS, ENDS, st.booleans()),
    st.booleans(),
)
def test_ends_of_the_codes(sizes: tuple[int, int, int, int], ends: tuple[str, str, str, bool], depthwise: bool) -> None:
    """The largest products everywhere, with the zero point at an end: sums of two would leave 16 bits."""
    inputs, outputs, kernel, stride = sizes
    x_type, of_x, of_weight, zero_is_low = ends

    def filled(kind: str, which: str, *shape: int) -> Tensor:
        low, high = RANGES[kind]
        ends = {"low": torch.tensor(0.0), "high": torch.tensor(1.0), "mixed": torch.rand(shape).round()}
        return torch.where(ends[which].expand(shape) > 0.5, high, low)

    torch.manual_seed(inputs)
    depth = 1 if depthwise else inputs
    low, high = RANGES[x_type]
    layer = Conv(
        x=filled(x_type, of_x, 2, 4, 5, inputs),
        weight=filled("s8", of_weight, inputs if depthwise else outputs, kernel, kernel, depth),
        x_type=x_type,
        x_grid=QParams(0.02, low if zero_is_low else high, low, high),
        # the largest sum is the last code or the first
        y_grid=QParams(0.02 * 0.01 * depth * kernel**2 * 255 * 128 / 120, 128, 0, 255),
        stride=(stride, stride),
        padding=(kernel // 2,) * 4,
        groups=inputs if depthwise else 1,
    )
    same_codes(layer)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_codes_do_not_depend_on_the_threads(threads: int) -> None:
    torch.manual_seed(3)
    layer = Conv(
        x=torch.randint(0, 256, (3, 14, 13, 40)),
        weight=torch.randint(-128, 128, (150, 3, 3, 40)),
        y_grid=QParams(3.0, 100, 0, 255),
        padding=(1, 1, 1, 1),
        w_scale=torch.rand(150) * 0.02,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same_codes(layer)
    finally:
        torch.set_num_threads(before)
