"""Elementwise operators and functions of one tensor: every pair, every code, against LiteRT's reference kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from export_programs import Builder
from hypothesis import given, settings
from hypothesis import strategies as st
from tflite_programs import check, every_code, grid, one, random_codes, real

from qat.encoding import Encoding
from qat.integer.program import Constant, Program

pytest.importorskip("ai_edge_litert")

SCALES = st.floats(2.0**-13, 1.0, width=32)
RATIOS = st.floats(2.0**-7, 2.0**7, width=32)
POINTS = st.integers(-128, 127)


def every_pair(kind: str, a: Encoding, b: Encoding, y: Encoding) -> tuple[Program, list[tuple[torch.Tensor, ...]]]:
    """An operator on all pairs of codes: a column of all codes against a row of them."""
    codes = torch.arange(-128, 128)
    builder = Builder()
    left, right = builder.input("a", (-1, 256, 1), a), builder.input("b", (-1, 1, 256), b)
    builder.output(builder.op(kind, "y", (left, right), (-1, 256, 256), y))
    return builder.program(), [(real(codes.reshape(1, 256, 1), a), real(codes.reshape(1, 1, 256), b))]


@pytest.mark.parametrize("kind", ["add", "sub", "mul"])
@settings(max_examples=15)
@given(SCALES, RATIOS, RATIOS, POINTS, POINTS, POINTS)
def test_every_pair_of_codes(kind: str, sa: float, to_b: float, to_y: float, za: int, zb: int, zy: int) -> None:
    a, b = grid(sa, za), grid(sa * to_b, zb)
    y = grid((a.scale[0] * b.scale[0] * 60 if kind == "mul" else a.scale[0] + b.scale[0]) * to_y, zy)
    check(*every_pair(kind, a, b, y), {kind.upper()})


SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], bool]] = [
    (a, b, constant)
    for a, b in [
        ((4, 3, 5), (4, 3, 5)), ((4, 3, 5), (4, 1, 1)), ((4, 3, 5), (5,)), ((4, 3, 5), (3, 1)), ((4, 3, 5), ()),
        ((4, 1, 1), (1, 3, 5)), ((3,), (4, 1)), ((2, 2, 3, 4), (2, 1, 3, 1)), ((6,), (6,)),
    ]
    for constant in (False, True)
    if constant or len(a) == len(b)  # two inputs with a batch have the same number of dimensions
]  # fmt: skip


@pytest.mark.parametrize("kind", ["add", "sub", "mul"])
@pytest.mark.parametrize(("a_shape", "b_shape", "constant"), SHAPES)
def test_broadcasting(kind: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...], constant: bool) -> None:
    a, b, y = grid(0.02, 3), grid(0.03, -9, "uint8"), grid(0.05, 1)
    builder = Builder()
    left = builder.input("a", (-1, *a_shape), a)
    result = torch.broadcast_shapes((1, *a_shape), b_shape if constant else (1, *b_shape))
    if constant:
        codes = (random_codes(*b_shape, seed=2) + 128).to(torch.uint8)
        right = builder.constant(Constant("c", codes, b))
    else:
        right = builder.input("b", (-1, *b_shape), b)
    builder.output(builder.op(kind, "y", (left, right), (-1, *result[1:]), y))
    batch = [real(random_codes(1, *a_shape), a)] + ([] if constant else [real(random_codes(1, *b_shape, seed=1), b)])
    check(builder.program(), [tuple(batch)], {kind.upper()})


def test_a_sum_keeps_the_layout_of_a_convolution_before_it() -> None:
    """An operand of fewer dimensions is brought to the order of the other one."""
    x, y = grid(0.02, 3), grid(0.05, 1)
    builder = Builder()
    image = builder.input("x", (-1, 4, 6, 6), x)
    pooled = builder.op(
        "max_pool", "pool", (image,), (-1, 4, 3, 3), x, kernel=(2, 2), stride=(2, 2), padding=((0, 0), (0, 0)),
        dilation=(1, 1), ceil_mode=False,
    )  # fmt: skip
    row = builder.constant(Constant("row", random_codes(4, 1, 3).to(torch.int8), grid(0.01, 4)))
    builder.output(builder.op("add", "y", (pooled, row), (-1, 4, 3, 3), y))
    check(builder.program(), [(real(random_codes(1, 4, 6, 6), x),)], {"MAX_POOL_2D", "ADD"})


@pytest.mark.parametrize(
    ("low", "high", "operators"),
    [
        (0.0, None, {"RELU"}), (0.0, 6.0, {"RELU6"}), (-1.0, 1.0, {"RELU_N1_TO_1"}),
        (-2.0, 3.0, {"MAXIMUM", "MINIMUM"}), (0.5, None, {"MAXIMUM"}), (None, 0.5, {"MINIMUM"}),
        (1.0, 1.0, {"MAXIMUM", "MINIMUM"}),
    ],
)  # fmt: skip
def test_clamps(low: float | None, high: float | None, operators: set[str]) -> None:
    x = grid(0.0625, -5)
    check(one("clamp", x, x, (256,), (256,), low=low, high=high), every_code((256,), x, 1), operators)
    # another encoding of the result: requantized first
    y = grid(0.05, -20)
    check(one("clamp", x, y, (256,), (256,), low=low, high=high), every_code((256,), x, 1), operators | {"QUANTIZE"})


@settings(max_examples=25)
@given(SCALES, RATIOS, POINTS, POINTS)
def test_requantization(sx: float, ratio: float, zx: int, zy: int) -> None:
    x, y = grid(sx, zx), grid(sx * ratio, zy)
    check(one("requantize", x, y, (256,), (256,)), every_code((256,), x, 1), {"QUANTIZE"})


@settings(max_examples=25)
@given(SCALES, POINTS, st.lists(st.floats(-200.0, 200.0, width=32), min_size=8, max_size=64), st.integers(0, 255))
def test_floats_are_quantized_half_away_from_zero(scale: float, zero: int, values: list[float], code: int) -> None:
    x = grid(scale, zero)
    ties = [(code - 128 + half) * x.scale[0] for half in (0.5, -0.5)]
    data = torch.tensor([*values, *ties, 0.0, -0.0, torch.inf, -torch.inf]).reshape(1, -1)
    builder = Builder()
    source = builder.input("x", (-1, data.shape[1]), x)
    builder.output(builder.op("reshape", "y", (source,), (-1, data.shape[1], 1), x, shape=(-1, data.shape[1], 1)))
    check(builder.program(), [(data[:, :-2].repeat(1, 2)[:, : data.shape[1]],)], io="float")


FUNCTIONS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("sigmoid", {}, {"LOGISTIC", "QUANTIZE"}),
    ("tanh", {}, {"TANH", "QUANTIZE"}),
    ("hardswish", {}, {"HARD_SWISH"}),
    ("gelu", {}, {"GELU"}),
    ("gelu", {"approximate": "tanh"}, {"GELU"}),
    ("leaky_relu", {"negative_slope": 0.1}, {"LEAKY_RELU"}),
    ("silu", {}, {"LOGISTIC", "MUL"}),
    ("hardsigmoid", {}, {"ADD", "MUL"}),
    ("elu", {}, {"CAST", "ADD", "GATHER"}),
    ("leaky_relu", {"negative_slope": -0.1}, {"CAST", "ADD", "GATHER"}),
    ("mish", {}, {"CAST", "ADD", "GATHER"}),
    ("softplus", {}, {"CAST", "ADD", "GATHER"}),
    ("erf", {}, {"CAST", "ADD", "GATHER"}),
    ("abs", {}, {"CAST", "ADD", "GATHER"}),
    ("relu6", {}, {"RELU6", "RELU", "MAXIMUM", "MINIMUM", "QUANTIZE"}),
]


@pytest.mark.parametrize(("function", "params", "operators"), FUNCTIONS, ids=lambda v: v if isinstance(v, str) else "")
@settings(max_examples=10)
@given(st.floats(2.0**-9, 0.25, width=32), st.floats(0.25, 4.0, width=32), POINTS, st.integers(-100, 100))
def test_functions_of_every_code(
    function: str, params: dict[str, Any], operators: set[str], sx: float, ratio: float, zx: int, zy: int
) -> None:
    x, y = grid(sx, zx), grid(sx * ratio, zy)
    program = one("table", x, y, (256,), (256,), function=function, params=params)
    model = check(program, every_code((256,), x, 1))
    assert set(model.operators) <= operators


@pytest.mark.parametrize(
    ("function", "y"),
    [("sigmoid", grid(1 / 256, -128)), ("tanh", grid(1 / 128, 0)), ("sigmoid", grid(1 / 256, -128, "uint8"))],
)  # fmt: skip
def test_a_prescribed_encoding_needs_no_requantization(function: str, y: Encoding) -> None:
    x = grid(0.05, 3)
    model = check(one("table", x, y, (256,), (256,), function=function), every_code((256,), x, 1))
    assert "QUANTIZE" not in model.operators


@pytest.mark.parametrize("factor", [0.125, 3.0, 0.1, 1e-3])
def test_a_rescaling_keeps_every_code(factor: float) -> None:
    x = grid(0.05, 3)
    y = grid(float(torch.tensor(x.scale[0]) * torch.tensor(factor)), 3)
    check(one("rescale", x, y, (256,), (256,), factor=factor), every_code((256,), x, 1), {"MUL"})


@settings(max_examples=20)
@given(
    st.floats(2.0**-12, 2.0, width=32),
    st.integers(1, 200),
    st.sampled_from([-1, 1, 2]),
    POINTS,
    st.integers(0, 1 << 16),
)
def test_softmax(scale: float, length: int, axis: int, zero: int, seed: int) -> None:
    x, shape = grid(scale, zero), [3, 4]
    shape.insert(axis - 1 if axis > 0 else 2, length)
    program = one("softmax", x, grid(1 / 256, -128), tuple(shape), tuple(shape), axis=axis)
    codes = random_codes(1, *shape, seed=seed)
    check(program, [(real(codes, x),), (real(codes // 16, x),)])


@pytest.mark.parametrize("shape", [(), (5,)])
@settings(max_examples=20)
@given(
    st.floats(2.0**-9, 0.25, width=32), st.floats(0.25, 4.0, width=32), POINTS, POINTS,
    st.lists(st.floats(-2.0, 2.0, width=32), min_size=5, max_size=5),
)  # fmt: skip
def test_prelu(shape: tuple[int, ...], sx: float, ratio: float, zx: int, zy: int, slopes: list[float]) -> None:
    x, y = grid(sx, zx), grid(sx * ratio, zy)
    values = torch.tensor(slopes) if shape else torch.tensor(slopes[0])
    program = one("prelu", x, y, (5, 16, 16), (5, 16, 16), (Constant("slope", values),))
    model = check(program, every_code((5, 16, 16), x, 1))
    assert set(model.operators) <= ({"PRELU"} if shape else {"LEAKY_RELU", "CAST", "ADD", "GATHER"}) | {"TRANSPOSE"}


def test_softmax_to_another_encoding() -> None:
    x = grid(0.05, 3)
    program = one("softmax", x, grid(0.01, 5), (4, 7), (4, 7), axis=2)
    check(program, [(real(random_codes(1, 4, 7), x),)], {"SOFTMAX", "QUANTIZE"})
