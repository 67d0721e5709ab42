"""Convolutions of 3 x 3 large enough for Winograd's algorithm (csrc/kernels/integer/winograd.h), code by code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_layers import RANGES, Conv
from test_int8_conv import KINDS, codes, grid, same_codes

from qat import native
from qat.integer.kernels.qparams import QParams

pytestmark = pytest.mark.skipif(not native.status().active, reason=f"native extension: {native.status().reason}")


@st.composite
def layers(draw: st.DrawFn) -> Conv:
    """Sizes that are no multiple of a tile or a panel, any padding, any grid, several multipliers."""
    inputs, outputs = draw(st.integers(30, 70)), draw(st.integers(30, 70))
    x_type, y_type = draw(KINDS), draw(KINDS)
    padding = tuple(draw(st.integers(0, 2)) for _ in range(4))
    return Conv(
        x=codes(draw, x_type, draw(st.integers(1, 2)), draw(st.integers(11, 15)), draw(st.integers(11, 15)), inputs),
        weight=codes(draw, "s8", outputs, 3, 3, inputs),
        x_type=x_type,
        y_type=y_type,
        x_grid=grid(draw, x_type, 0.02),
        y_grid=grid(draw, y_type, draw(st.sampled_from([0.0001, 0.3, 3.0])), narrow=True),
        w_scale=torch.rand(outputs, generator=torch.Generator().manual_seed(outputs)) * 0.02 + 0.001,
        bias=torch.randint(-5000, 5001, (outputs,)) if draw(st.booleans()) else None,
        padding=padding,  # type: ignore[arg-type]
    )


@settings(max_examples=30, deadline=None)
@given(layers())
def test_convolution(layer: Conv) -> None:
    same_codes(layer)


@settings(max_examples=15, deadline=None)
@given(layers(), st.data(), st.booleans())
def test_residual(layer: Conv, data: st.DataObject, first: bool) -> None:
    layer.residual_type = data.draw(KINDS)
    layer.residual = codes(data.draw, layer.residual_type, layer.x.shape[0], *layer.out_size, layer.weight.shape[0])
    layer.residual_grid = grid(data.draw, layer.residual_type, 0.29)
    layer.residual_first = first
    layer.sum_grid = grid(data.draw, layer.y_type, 0.4, narrow=True)
    same_codes(layer)


@settings(max_examples=10, deadline=None)
@given(layers())
def test_table(layer: Conv) -> None:
    low, high = RANGES[layer.y_type]
    values = torch.randint(low, high + 1, (layer.y_grid.levels,))
    layer.table = values.to(torch.uint8 if low == 0 else torch.int8)
    expected = layer.reference()
    layer.table = layer.table.view(torch.uint8)
    for isa in ("portable", "avx2", "avx512", ""):
        if torch.ops.qat._int8_isa(isa):
            assert torch.equal(layer.native(isa), expected), isa


@pytest.mark.parametrize("of_weight", [-128, 127])
@pytest.mark.parametrize("of_x", [0, 255])
@pytest.mark.parametrize("zero", [0, 255])
@pytest.mark.parametrize("inputs", [112, 120])
def test_the_largest_sums(inputs: int, zero: int, of_x: int, of_weight: int) -> None:
    """Just below and above 2**25 in absolute value, where a sum would lose its sign in 32 bits less six."""
    layer = Conv(
        x=torch.full((1, 12, 12, inputs), of_x),
        weight=torch.full((40, 3, 3, inputs), of_weight),
        x_grid=QParams(0.02, zero, 0, 255),
        y_grid=QParams(0.02 * 0.01 * inputs * 9 * 255 * 128 / 120, 128, 0, 255),
        padding=(1, 1, 1, 1),
    )
    same_codes(layer)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [9, 30])
def test_codes_do_not_depend_on_the_threads(threads: int, size: int) -> None:
    torch.manual_seed(3)
    layer = Conv(
        x=torch.randint(0, 256, (1, size, size, 64)),
        weight=torch.randint(-128, 128, (100, 3, 3, 64)),
        y_grid=QParams(3.0, 100, 0, 255),
        padding=(1, 1, 1, 1),
        w_scale=torch.rand(100) * 0.02,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same_codes(layer)
    finally:
        torch.set_num_threads(before)
