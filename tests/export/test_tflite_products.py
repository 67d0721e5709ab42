"""Operators that multiply and accumulate: every code of LiteRT's reference kernels, also next to ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from export_programs import Builder
from hypothesis import given, settings
from hypothesis import strategies as st
from tflite_programs import at_ties, bias_of, check, grid, one, random_codes, real, weight_of

from qat.encoding import Encoding
from qat.integer.program import Constant

pytest.importorskip("ai_edge_litert")

SCALES = st.floats(2.0**-13, 1.0, width=32)
POINTS = st.integers(-128, 127)
SEEDS = st.integers(0, 1 << 16)


def conv_case(
    x: Encoding,
    y: Encoding,
    x_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    clamp: tuple[float | None, float | None] | None = None,
    bias: bool = True,
    kind: str = "conv",
    per_tensor: bool = False,
    **attrs: Any,
) -> Any:
    dims = len(w_shape) - 2
    plain = {"stride": (1,) * dims, "padding": ((0, 0),) * dims, "dilation": (1,) * dims, "groups": 1}
    axis = 1 if kind == "conv_transpose" else 0
    channels = w_shape[axis]
    scales = [0.01] if per_tensor else torch.linspace(0.002, 0.02, channels).tolist()
    w = weight_of("conv.weight", random_codes(*w_shape).clamp(-127), scales, axis)
    b = bias_of("conv.bias", random_codes(channels, seed=1) * 10, x, w) if bias else None
    return one(kind, x, y, x_shape, y_shape, (w, b), clamp, **{**plain, **attrs})


@settings(max_examples=25)
@given(SCALES, SCALES, st.floats(0.3, 3.0), POINTS, POINTS, SEEDS, st.booleans())
def test_convolutions_round_twice(
    sx: float, sw: float, ratio: float, zx: int, zy: int, seed: int, depthwise: bool
) -> None:
    x, y, channels = grid(sx, zx), grid(sx * sw * 500 * ratio, zy), 32
    scales = (torch.rand(channels, generator=torch.Generator().manual_seed(seed)) * sw + sw / 10).tolist()
    groups = channels if depthwise else 1
    w = weight_of("c.weight", random_codes(channels, channels // groups, 1, 1, seed=seed).clamp(-127), scales)
    b = bias_of("c.bias", at_ties(w.encoding.scale, x, y, channels, seed), x, w)  # type: ignore[union-attr,arg-type]
    program = one(
        "conv", x, y, (channels, 2, 2), (channels, 2, 2), (w, b), stride=(1, 1), padding=((0, 0), (0, 0)),
        dilation=(1, 1), groups=groups,
    )  # fmt: skip
    zeros = real(torch.full((1, channels, 2, 2), zx), x)  # the accumulator is the bias alone
    check(program, [(zeros,), (real(random_codes(1, channels, 2, 2, seed=seed), x),)])


@settings(max_examples=25)
@given(SCALES, SCALES, st.floats(0.3, 3.0), POINTS, POINTS, SEEDS, st.booleans())
def test_fully_connected_rounds_once_in_float64(
    sx: float, sw: float, ratio: float, zx: int, zy: int, seed: int, per_tensor: bool
) -> None:
    x, y, rows = grid(sx, zx), grid(sx * sw * 500 * ratio, zy), 64
    scales = (
        [sw] if per_tensor else (torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * sw + sw / 9).tolist()
    )
    w = weight_of("fc.weight", random_codes(rows, 16, seed=seed).clamp(-127), scales)
    held = list(w.encoding.scale) * (rows if per_tensor else 1)  # type: ignore[union-attr]
    b = bias_of("fc.bias", at_ties(held, x, y, rows, seed), x, w)
    program = one("linear", x, y, (16,), (rows,), (w, b))
    check(program, [(real(torch.full((1, 16), zx), x),), (real(random_codes(1, 16, seed=seed), x),)])


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "y_shape", "attrs", "operators"),
    [
        ((3, 7, 9), (8, 3, 3, 3), (8, 7, 9), {"padding": ((1, 1), (1, 1))}, {"CONV_2D"}),
        ((3, 8, 8), (8, 3, 3, 3), (8, 4, 4), {"padding": ((1, 1), (1, 1)), "stride": (2, 2)}, {"PAD", "CONV_2D"}),
        ((3, 8, 8), (8, 3, 3, 3), (8, 4, 4), {"padding": ((0, 1), (0, 1)), "stride": (2, 2)}, {"CONV_2D"}),
        (
            (3, 9, 9), (8, 3, 3, 3), (8, 5, 5),
            {"padding": ((2, 2), (2, 2)), "stride": (2, 2), "dilation": (2, 2)}, {"CONV_2D"},
        ),
        ((4, 9, 5), (8, 2, 3, 1), (8, 7, 5), {"groups": 2}, {"CONV_2D"}),
        ((4, 9, 5), (8, 1, 3, 3), (8, 9, 5), {"groups": 4, "padding": ((1, 1), (1, 1))}, {"DEPTHWISE_CONV_2D"}),
        ((4, 9, 5), (4, 1, 3, 3), (4, 5, 1), {"groups": 4, "dilation": (2, 2)}, {"DEPTHWISE_CONV_2D"}),
        ((4, 11), (6, 4, 3), (6, 5), {"stride": (2,)}, {"CONV_2D", "RESHAPE", "TRANSPOSE"}),
        (
            (4, 11), (4, 1, 3), (4, 11), {"groups": 4, "padding": ((1, 1),)},
            {"DEPTHWISE_CONV_2D", "RESHAPE", "TRANSPOSE"},
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("per_tensor", [False, True])
def test_convolutions_of_every_shape(
    x_shape: Any, w_shape: Any, y_shape: Any, attrs: Any, operators: set[str], per_tensor: bool
) -> None:
    x, y = grid(0.02, -7), grid(0.1, 11)
    program = conv_case(x, y, x_shape, y_shape, w_shape, per_tensor=per_tensor, **attrs)
    check(program, [(real(random_codes(1, *x_shape, seed=s), x),) for s in range(3)], operators)


def test_no_bias_a_fused_activation_and_an_activation_that_is_none_of_tflites() -> None:
    x, y = grid(0.02, -7), grid(0.1, 11)
    codes = [(real(random_codes(1, 3, 5, 5), x),)]
    case: Any = {"x": x, "y": y, "x_shape": (3, 5, 5), "y_shape": (4, 5, 5), "w_shape": (4, 3, 1, 1)}
    check(conv_case(**case, bias=False), codes, {"CONV_2D"})
    for bounds in ((0.0, None), (0.0, 6.0), (-1.0, 1.0)):
        check(conv_case(**case, clamp=bounds), codes, {"CONV_2D"})
    check(conv_case(**case, clamp=(-2.0, 3.0)), codes, {"CONV_2D", "MAXIMUM", "MINIMUM"})
    check(conv_case(**case, clamp=(None, 3.0)), codes, {"CONV_2D", "MINIMUM"})


@pytest.mark.parametrize(("dtype", "low", "high"), [("uint8", 1, 255), ("int4", -8, 7), ("int8", -127, 127)])
def test_other_weights_keep_their_values(dtype: str, low: int, high: int) -> None:
    x, y = grid(0.02, -7, "uint8"), grid(0.1, 11, "uint8")
    middle = 128 if dtype == "uint8" else 0
    codes = torch.randint(low, high + 1, (4, 3, 3, 3), generator=torch.Generator().manual_seed(0))
    encoding = Encoding(dtype, (0.01,), (middle,), low, high, True)
    w = Constant("conv.weight", codes.to(torch.uint8 if middle else torch.int8), encoding)
    program = one(
        "conv",
        x,
        y,
        (3, 5, 5),
        (4, 3, 3),
        (w, None),
        stride=(1, 1),
        padding=((0, 0), (0, 0)),
        dilation=(1, 1),
        groups=1,
    )
    check(program, [(real(random_codes(1, 3, 5, 5), x),)], {"CONV_2D"})


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "y_shape", "attrs"),
    [
        ((3, 4, 5), (3, 6, 3, 3), (6, 9, 11), {"stride": (2, 2)}),
        (
            (3, 4, 5), (3, 6, 3, 3), (6, 8, 10),
            {"stride": (2, 2), "padding": ((1, 1), (1, 1)), "output_padding": (1, 1)},
        ),
        ((3, 4, 5), (3, 6, 2, 2), (6, 8, 10), {"stride": (2, 2)}),
        ((3, 4, 5), (3, 2, 4, 4), (2, 5, 6), {"padding": ((1, 1), (1, 1))}),
        ((3, 4, 5), (3, 2, 1, 1), (2, 8, 10), {"stride": (2, 2), "output_padding": (1, 1)}),
        ((3, 6), (3, 5, 3), (5, 13), {"stride": (2,)}),
    ],
)  # fmt: skip
def test_transposed_convolutions(x_shape: Any, w_shape: Any, y_shape: Any, attrs: Any) -> None:
    x, y = grid(0.02, -7), grid(0.1, 11)
    given: Any = {"output_padding": (0,) * (len(w_shape) - 2), **attrs}
    program = conv_case(x, y, x_shape, y_shape, w_shape, kind="conv_transpose", **given)
    check(program, [(real(random_codes(1, *x_shape, seed=s), x),) for s in range(2)])


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (7, 2, 5)])
def test_linear_over_the_last_dimension(shape: tuple[int, ...]) -> None:
    x, y = grid(0.02, -7), grid(0.1, 11)
    w = weight_of("fc.weight", random_codes(4, 5).clamp(-127), [0.01, 0.02, 0.03, 0.04])
    program = one("linear", x, y, shape, (*shape[:-1], 4), (w, None), (0.0, None))
    check(program, [(real(random_codes(1, *shape), x),)])


@settings(max_examples=20)
@given(SCALES, SCALES, st.floats(0.2, 5.0), POINTS, POINTS, POINTS, SEEDS)
def test_products_of_activations(sa: float, sb: float, ratio: float, za: int, zb: int, zy: int, seed: int) -> None:
    a, b, y = grid(sa, za), grid(sb, zb), grid(sa * sb * 100 * ratio, zy)
    builder = Builder()
    left, right = builder.input("a", (-1, 2, 4, 6), a), builder.input("b", (-1, 2, 6, 5), b)
    builder.output(builder.op("matmul", "y", (left, right), (-1, 2, 4, 5), y))
    batch = (real(random_codes(1, 2, 4, 6, seed=seed), a), real(random_codes(1, 2, 6, 5, seed=seed + 1), b))
    check(builder.program(), [batch])


def test_a_transposed_operand_of_a_product_is_not_moved() -> None:
    x, y = grid(0.02, 3), grid(0.1, 5)
    builder = Builder()
    left, right = builder.input("a", (-1, 4, 6), x), builder.input("b", (-1, 5, 6), x)
    turned = builder.op("transpose", "t", (right,), (-1, 6, 5), x, perm=(0, 2, 1))
    builder.output(builder.op("matmul", "y", (left, turned), (-1, 4, 5), y))
    batch = (real(random_codes(1, 4, 6), x), real(random_codes(1, 5, 6, seed=1), x))
    check(builder.program(), [batch], {"BATCH_MATMUL"})


def test_a_product_with_a_constant() -> None:
    x, y, e = grid(0.02, 3), grid(0.1, 5), grid(0.03, 4, "uint8")
    constant = Constant("table", (random_codes(6, 5) + 128).to(torch.uint8), e)
    check(one("matmul", x, y, (4, 6), (4, 5), (constant,)), [(real(random_codes(1, 4, 6), x),)])
