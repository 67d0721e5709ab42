"""Pooling, means, interpolation and movements against LiteRT's reference kernels, and where transposes are inserted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from export_programs import Builder
from hypothesis import given, settings
from hypothesis import strategies as st
from tflite_programs import check, grid, one, random_codes, real, weight_of

from qat.encoding import Encoding
from qat.integer.program import Constant

pytest.importorskip("ai_edge_litert")

POINTS = st.integers(-128, 127)
X = grid(0.02, -17)


def run(
    kind: str,
    x_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    operators: set[str] | None = None,
    x: Encoding = X,
    y: Encoding | None = None,
    batches: int = 2,
    **attrs: Any,
) -> None:
    program = one(kind, x, y or x, x_shape, y_shape, **attrs)
    samples = [(real(random_codes(1, *x_shape, seed=s), x),) for s in range(batches)]
    # averages near zero, where rounding away from zero shows
    samples += [(real(random_codes(1, *x_shape, seed=9) // 64, x),)]
    check(program, samples, operators)


def window(kernel: tuple[int, ...], stride: tuple[int, ...], *padding: tuple[int, int], ceil: bool = False) -> Any:
    pairs = padding or ((0, 0),) * len(kernel)
    return {"kernel": kernel, "stride": stride, "padding": pairs, "ceil_mode": ceil}


@pytest.mark.parametrize(
    ("x_shape", "y_shape", "attrs", "operators"),
    [
        ((3, 8, 8), (3, 4, 4), window((2, 2), (2, 2)), {"MAX_POOL_2D"}),
        ((3, 7, 9), (3, 4, 5), window((3, 3), (2, 2), (1, 1), (1, 1)), {"MAX_POOL_2D"}),
        ((3, 8, 8), (3, 4, 4), window((3, 3), (2, 2), (1, 1), (1, 1)), {"PADV2", "MAX_POOL_2D"}),
        ((3, 8, 8), (3, 4, 4), window((3, 3), (2, 2), ceil=True), {"MAX_POOL_2D"}),
        ((3, 6, 6), (3, 6, 6), window((3, 3), (1, 1), (1, 1), (1, 1)), {"MAX_POOL_2D"}),
        ((3, 9), (3, 4), window((2,), (2,)), {"MAX_POOL_2D", "TRANSPOSE", "RESHAPE"}),
    ],
)
def test_max_pool(x_shape: Any, y_shape: Any, attrs: Any, operators: set[str]) -> None:
    run("max_pool", x_shape, y_shape, operators, dilation=(1,) * len(attrs["kernel"]), **attrs)


@pytest.mark.parametrize(
    ("x_shape", "y_shape", "attrs", "counted", "operators"),
    [
        ((3, 8, 8), (3, 4, 4), window((2, 2), (2, 2)), True, {"AVERAGE_POOL_2D"}),
        ((3, 7, 7), (3, 1, 1), window((7, 7), (7, 7)), True, {"AVERAGE_POOL_2D"}),
        ((3, 9, 9), (3, 5, 5), window((3, 3), (2, 2), (1, 1), (1, 1)), True, {"PAD", "AVERAGE_POOL_2D"}),
        ((3, 9, 9), (3, 5, 5), window((3, 3), (2, 2), (1, 1), (1, 1)), False, {"AVERAGE_POOL_2D"}),
        ((3, 6, 6), (3, 6, 6), window((3, 3), (1, 1), (1, 1), (1, 1)), False, {"AVERAGE_POOL_2D"}),
        ((3, 8, 8), (3, 4, 4), window((3, 3), (2, 2), ceil=True), True, {"AVERAGE_POOL_2D"}),
        ((3, 9), (3, 4), window((2,), (2,)), True, {"AVERAGE_POOL_2D", "TRANSPOSE", "RESHAPE"}),
    ],
)
@pytest.mark.parametrize("zero_point", [-128, -17, 0, 55])
def test_avg_pool(x_shape: Any, y_shape: Any, attrs: Any, counted: bool, operators: set[str], zero_point: int) -> None:
    run("avg_pool", x_shape, y_shape, operators, grid(0.02, zero_point), count_include_pad=counted, **attrs)


def test_an_average_of_another_encoding_is_requantized() -> None:
    attrs = window((2, 2), (2, 2))
    run(
        "avg_pool",
        (3, 8, 8),
        (3, 4, 4),
        {"AVERAGE_POOL_2D", "QUANTIZE"},
        y=grid(0.015, 4),
        count_include_pad=True,
        **attrs,
    )


@settings(max_examples=20)
@given(
    st.floats(2.0**-9, 1.0, width=32), st.floats(0.125, 4.0, width=32), POINTS, POINTS, st.integers(1, 9),
    st.integers(1, 9), st.sampled_from([(2, 3), (1,), (3,), (1, 2, 3), (-1, -2)]), st.booleans(),
    st.integers(0, 1 << 16),
)  # fmt: skip
def test_means(
    sx: float, ratio: float, zx: int, zy: int, height: int, width: int, axes: tuple[int, ...], keep: bool, seed: int
) -> None:
    x, y, shape = grid(sx, zx), grid(sx * ratio, zy), (5, height, width)
    reduced = {a % 4 for a in axes}
    y_shape = tuple(1 if d in reduced else n for d, n in enumerate((1, *shape)) if keep or d not in reduced)
    program = one("mean", x, y, shape, y_shape[1:], axes=axes, keepdims=keep)
    check(program, [(real(random_codes(1, *shape, seed=seed), x),)])


def test_a_mean_over_many_elements() -> None:
    run("mean", (2, 64, 64), (2,), {"MEAN", "TRANSPOSE"} - {"TRANSPOSE"}, y=grid(0.001, 3), axes=(2, 3), keepdims=False)


@pytest.mark.parametrize(
    ("size_in", "size_out"), [((4, 4), (8, 8)), ((5, 7), (10, 14)), ((7, 5), (3, 4)), ((6, 6), (9, 13))]
)
@pytest.mark.parametrize("mode", ["nearest", "half_pixel", "align_corners"])
def test_interpolation(size_in: tuple[int, int], size_out: tuple[int, int], mode: str) -> None:
    nearest = mode == "nearest"
    operators = {"RESIZE_NEAREST_NEIGHBOR"} if nearest else {"RESIZE_BILINEAR"}
    attrs = {"mode": "nearest"} if nearest else {"mode": "linear", "align_corners": mode == "align_corners"}
    run("resize", (3, *size_in), (3, *size_out), operators, size=size_out, **attrs)
    run("resize", (3, *size_in), (3, *size_out), operators | {"QUANTIZE"}, y=grid(0.03, 2), size=size_out, **attrs)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_bilinear_interpolation_of_any_size(h: int, w: int, height: int, width: int, align: bool) -> None:
    if align and (height == 1 or width == 1):
        align = False
    run("resize", (2, h, w), (2, height, width), size=(height, width), mode="linear", align_corners=align, batches=1)


def test_interpolation_of_one_dimension() -> None:
    run("resize", (3, 5), (3, 10), size=(10,), mode="nearest")


@pytest.mark.parametrize(
    ("attrs", "y_shape", "operator"),
    [
        ({"pads": ((0, 0), (0, 0), (1, 2), (3, 0)), "mode": "constant", "value": 0.0}, (3, 7, 8), "PAD"),
        ({"pads": ((0, 0), (1, 1), (0, 0), (0, 0)), "mode": "constant", "value": 0.0}, (5, 4, 5), "PAD"),
        ({"pads": ((1, 2), (3, 0)), "mode": "constant", "value": -0.31}, (3, 7, 8), "PADV2"),
        ({"pads": ((0, 0), (0, 0), (1, 2), (3, 0)), "mode": "reflect"}, (3, 7, 8), "MIRROR_PAD"),
    ],
)
def test_padding(attrs: Any, y_shape: Any, operator: str) -> None:
    pads = ((0, 0),) * (4 - len(attrs["pads"])) + attrs["pads"]
    run("pad", (3, 4, 5), y_shape, {operator}, **{**attrs, "pads": pads})


@pytest.mark.parametrize(
    ("slices", "y_shape", "operator"),
    [
        ([(1, 1, 3, 1)], (2, 6, 8), "SLICE"),
        ([(2, 1, None, 2), (3, None, -1, 3)], (4, 3, 3), "STRIDED_SLICE"),
        ([(3, None, None, -1)], (4, 6, 8), "STRIDED_SLICE"),
        ([(3, 6, 1, -2), (2, -3, None, 1)], (4, 3, 3), "STRIDED_SLICE"),
    ],
)
def test_slices(slices: list[tuple[int, Any, Any, int]], y_shape: Any, operator: str) -> None:
    axes, starts, ends, steps = (tuple(values) for values in zip(*slices, strict=True))
    run("slice", (4, 6, 8), y_shape, {operator}, axes=axes, starts=starts, ends=ends, steps=steps)


def test_expand_broadcasts() -> None:
    run("expand", (4, 1, 1), (4, 3, 5), {"BROADCAST_TO"}, shape=(-1, 4, 3, 5))


def test_concat_in_the_order_of_the_larger_operand() -> None:
    b = Builder()
    x = b.input("x", (-1, 4, 6, 6), X)
    other = b.constant(Constant("c", random_codes(1, 2, 6, 6).to(torch.int8), X))
    b.output(b.op("concat", "y", (x, other, x), (-1, 10, 6, 6), X, axis=1))
    check(b.program(), [(real(random_codes(1, 4, 6, 6), X),)], {"CONCATENATION"})


def classifier(flat: tuple[int, ...], *, readers: int = 1, clamp: bool = False) -> Any:
    """A pooled image, flattened, and linear layers that read it."""
    b = Builder()
    x = b.input("x", (-1, 3, 8, 8), X)
    attrs = window((2, 2), (2, 2))
    pooled = b.op("max_pool", "pool", (x,), (-1, 3, 4, 4), X, dilation=(1, 1), **attrs)
    row = b.op("reshape", "flat", (pooled,), (-1, *flat), X, shape=(-1, *flat))
    if clamp:
        row = b.op("clamp", "act", (row,), (-1, *flat), X, low=0.0, high=None)
    for number in range(readers):
        w = b.constant(weight_of(f"fc{number}.weight", random_codes(5, flat[-1]).clamp(-127), [0.01]))
        b.output(b.op("linear", f"fc{number}", (row, w, ""), (-1, *flat[:-1], 5), grid(0.2, 3)))
    return b.program()


def test_flattening_before_linear_layers_permutes_their_weights() -> None:
    codes = [(real(random_codes(1, 3, 8, 8), X),)]
    check(classifier((48,), readers=2), codes, {"MAX_POOL_2D", "RESHAPE", "FULLY_CONNECTED"})
    # what else reads it sees the user's order
    check(classifier((48,), clamp=True), codes, {"MAX_POOL_2D", "TRANSPOSE", "RESHAPE", "RELU", "FULLY_CONNECTED"})
    check(classifier((3, 16)), codes, {"MAX_POOL_2D", "TRANSPOSE", "RESHAPE", "FULLY_CONNECTED"})


def test_a_transpose_of_the_program_is_no_operator() -> None:
    b = Builder()
    x = b.input("x", (-1, 3, 4, 5), X)
    last = b.op("transpose", "t", (x,), (-1, 4, 5, 3), X, perm=(0, 2, 3, 1))
    w = b.constant(weight_of("fc.weight", random_codes(6, 3).clamp(-127), [0.01]))
    b.output(b.op("linear", "fc", (last, w, ""), (-1, 4, 5, 6), grid(0.05, 3)))
    # the file's input is (N, H, W, C), where the linear layer finds its features; its output, 4-D, is brought there too
    check(b.program(), [(real(random_codes(1, 3, 4, 5), X),)], {"FULLY_CONNECTED", "TRANSPOSE"})


def test_a_channel_shuffle() -> None:
    b = Builder()
    x = b.input("x", (-1, 6, 4, 4), X)
    split = b.op("reshape", "split", (x,), (-1, 2, 3, 4, 4), X, shape=(-1, 2, 3, 4, 4))
    turned = b.op("transpose", "turn", (split,), (-1, 3, 2, 4, 4), X, perm=(0, 2, 1, 3, 4))
    b.output(b.op("reshape", "y", (turned,), (-1, 6, 4, 4), X, shape=(-1, 6, 4, 4)))
    check(b.program(), [(real(random_codes(1, 6, 4, 4), X),)], {"TRANSPOSE", "RESHAPE"})


def test_a_transposed_input_that_is_the_output() -> None:
    run("transpose", (3, 4), (4, 3), {"TRANSPOSE"}, perm=(0, 2, 1))
