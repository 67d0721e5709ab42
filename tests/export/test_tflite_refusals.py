"""What has no int8 form in TFLite is refused by name before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from export_programs import Builder, enc
from tflite_programs import grid, one, weight_of

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.export.overflow import prove_no_overflow
from qat.export.tflite.verify import prove_no_shift_overflow
from qat.integer.program import Constant, Program
from qat.integer.tflite.legalize import legalize
from qat.scheme import Granularity

X = grid(0.02, -17)
POOL: dict[str, Any] = {"kernel": (3, 3), "stride": (2, 2), "ceil_mode": False}


def refused(program: Program, *parts: str) -> None:
    with pytest.raises(ExportError) as error:
        legalize(program)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert error.value.mend


def of(kind: str, x_shape: Any, y_shape: Any, x: Encoding = X, y: Encoding | None = None, **attrs: Any) -> Program:
    return one(kind, x, y or x, x_shape, y_shape, **attrs)


def conv(w: Constant, x: Encoding = X, y: Encoding = X, x_shape: Any = (3, 4, 4), **changes: Any) -> Program:
    dims = w.value.dim() - 2
    attrs = {"stride": (1,) * dims, "padding": ((0, 0),) * dims, "dilation": (1,) * dims, "groups": 1, **changes}
    kind = attrs.pop("kind", "conv")
    return one(kind, x, y, x_shape, (4, *x_shape[1:]), (w, None), **attrs)


def weight(encoding: Encoding, *shape: int) -> Constant:
    return Constant("conv.weight", torch.ones(shape or (4, 3, 1, 1), dtype=torch.int8), encoding)


# tensors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int4"])
def test_activations_of_other_types(dtype: str) -> None:
    refused(of("reshape", (4,), (4,), enc(dtype), shape=(-1, 4)), "'x'", dtype, "int8")


def test_activations_of_a_narrower_range() -> None:
    narrow = Encoding("int8", (0.1,), (0,), -127, 127)
    refused(of("reshape", (4,), (4,), narrow, shape=(-1, 4)), "'x'", "-127 to 127", "qmin and qmax")


def test_activations_with_a_scale_a_channel() -> None:
    several = Encoding("int8", (0.1,) * 4, (0,) * 4, -128, 127, granularity=Granularity("per_channel", 1))
    refused(of("reshape", (4,), (4,), several, shape=(-1, 4)), "'x' has 4 scales")


@pytest.mark.parametrize(
    ("encoding", "cause"),
    [
        (Encoding("int16", (0.1,), (0,), -32768, 32767), "int16, and TFLite's weights are int8"),
        (Encoding("int8", (0.1,), (3,), -128, 127), "zero points"),
        (Encoding("uint8", (0.1,), (127,), 0, 255), "zero points"),
        (
            Encoding("int8", (0.1,) * 8, (0,) * 8, -128, 127, granularity=Granularity("per_group", 1, 2)),
            "a scale for each group",
        ),
    ],
)
def test_weights_of_other_forms(encoding: Encoding, cause: str) -> None:
    refused(conv(weight(encoding)), "weight 'conv.weight' of operator 'block.y'", cause)


def test_a_float_weight() -> None:
    refused(conv(Constant("conv.weight", torch.ones(4, 3, 1, 1))), "weight 'conv.weight'", "is float")


def test_a_float_constant() -> None:
    program = one("add", X, X, (4,), (4,), (Constant("offset", torch.ones(4)),))
    refused(program, "operator 'block.y' (add) reads the float constant 'offset'")


# operators that are computed in float ---------------------------------------------------------------------------------


def test_a_float_island_with_its_cause() -> None:
    b = Builder()
    x = b.input("x", (-1, 4), None)
    b.output(b.op("island", "noise", (x,), (-1, 4), None, call=torch.sin, cause="control flow at model.py:3"))
    refused(b.program(), "'noise' is a float island (control flow at model.py:3)")


def test_operators_and_borders_in_float() -> None:
    b = Builder()
    x = b.input("x", (-1, 4), None)
    b.output(b.op("reshape", "y", (x,), (-1, 4, 1), None, shape=(-1, 4, 1)))
    refused(b.program(), "operator 'y' (reshape) is computed in float")
    b = Builder()
    x = b.input("x", (-1, 4), X)
    plain = b.op("dequantize", "x2:float", (x,), (-1, 4), None)
    b.output(b.op("quantize", "y", (plain,), (-1, 4), grid(0.1)))
    refused(b.program(), "operator 'y' (quantize) is computed in float")


def test_inputs_that_are_no_floats() -> None:
    program = of("reshape", (4,), (4,), shape=(-1, 4))
    tensors = {**program.tensors, "x:float": replace(program.tensors["x:float"], dtype=torch.int64)}
    refused(replace(program, tensors=tensors), "input 'x:float' has dtype torch.int64")


def test_outputs_that_are_not_computed() -> None:
    b = Builder()
    b.output(b.input("x", (-1, 4), X))
    refused(b.program(), "output 'x:float' is not computed")
    constants = {"c": Constant("c", torch.ones(3))}
    refused(replace(b.program(), constants=constants, outputs=("c",)), "output 'c' is not computed")


# operators that TFLite does not have, or not like that ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["div", "layer_norm"])
def test_operators_without_an_int8_kernel(kind: str) -> None:
    program = one(kind, X, X, (4,), (4,), (Constant("c", torch.ones(4)), None), axes_count=1, eps=1e-5)
    refused(program, f"operator 'block.y': TFLite has no int8 {kind}")


@pytest.mark.parametrize("kind", ["reshape", "concat", "pad"])
def test_movements_that_change_the_encoding(kind: str) -> None:
    attrs: dict[str, Any] = {
        "reshape": {"shape": (-1, 4)}, "concat": {"axis": 1}, "pad": {"pads": ((0, 0), (0, 0)), "mode": "constant"},
    }[kind]  # fmt: skip
    refused(of(kind, (4,), (4,), y=grid(0.03), **attrs), f"operator 'block.y' ({kind})", "'x'")


def test_convolutions_that_tflite_does_not_have() -> None:
    per_tensor = Encoding("int8", (0.01,), (0,), -127, 127, True)
    refused(
        conv(weight(per_tensor, 4, 3, 1, 1, 1), x_shape=(3, 2, 4, 4)),
        "'block.y'",
        "no int8 conv of 3 spatial dimensions",
    )
    up: dict[str, Any] = {"kind": "conv_transpose", "output_padding": (0, 0)}
    refused(conv(weight(per_tensor, 4, 1, 1, 1), x_shape=(4, 4, 4), groups=4, **up), "'block.y'", "neither groups")
    refused(conv(weight(per_tensor, 3, 4, 1, 1), dilation=(2, 2), **up), "'block.y'", "nor dilation")


def test_multipliers_beyond_what_31_bits_hold() -> None:
    w = weight_of("conv.weight", torch.ones(4, 3, 1, 1), [1.0, 1.0, 2.0**20, 1.0])
    refused(conv(w, y=grid(2.0**-20)), "'block.y', channel 2, needs the multiplier")
    refused(of("requantize", (4,), (4,), grid(2.0**20), grid(2.0**-12)), "'block.y' needs the multiplier")
    refused(of("mean", (4,), (), grid(2.0**20), grid(2.0**-12), axes=(1,), keepdims=False), "'block.y' needs")
    leaky = {"function": "leaky_relu", "params": {"negative_slope": 2.0**20}}
    refused(of("table", (4,), (4,), grid(1.0), grid(2.0**-12), **leaky), "'block.y' needs the multiplier")


def test_a_sum_whose_result_has_a_far_smaller_scale() -> None:
    constant = Constant("c", torch.ones(4, dtype=torch.int8), grid(2.0**10))
    refused(one("add", X, grid(2.0**-10), (4,), (4,), (constant,)), "'block.y'", "2**19 times")


def test_products_of_too_many_dimensions() -> None:
    constant = Constant("c", torch.ones(4, dtype=torch.int8), X)
    refused(one("matmul", X, X, (4,), (), (constant,)), "'block.y'", "[2, 1] dimensions")


def test_a_rescaling_that_is_none() -> None:
    refused(of("rescale", (4,), (4,), factor=2.0), "'block.y' rescales to another")


def test_a_softmax_of_a_vanishing_scale() -> None:
    refused(of("softmax", (4,), (4,), grid(2.0**-27), grid(1 / 256, -128), axis=1), "'block.y'", "below 2**-26")


def test_pools_that_tflite_does_not_have() -> None:
    shapes: Any = ((3, 9, 9), (3, 4, 4))
    none: Any = ((0, 0), (0, 0))
    refused(of("max_pool", *shapes, **POOL, padding=none, dilation=(2, 2)), "'block.y'", "no dilation")
    ones: Any = ((1, 1), (1, 1))
    refused(
        of("avg_pool", (3, 8, 8), (3, 4, 4), **POOL, padding=ones, count_include_pad=False),
        "'block.y'",
        "does not count",
    )
    ceil = {**POOL, "ceil_mode": True}
    refused(
        of("avg_pool", (3, 8, 8), (3, 5, 5), **ceil, padding=ones, count_include_pad=True),
        "'block.y'",
        "ceil_mode adds",
    )


def test_a_mean_over_the_batch() -> None:
    refused(of("mean", (4,), (4,), axes=(0,), keepdims=False), "'block.y' takes a mean over the batch")


def test_interpolations_that_differ() -> None:
    nearest = {"mode": "nearest", "scales": (1.7,)}
    refused(of("resize", (3, 7), (3, 11), size=(11,), **nearest), "'block.y' picks other neighbours from 7 to 11")
    linear = {"mode": "linear", "align_corners": False, "scales": (1.7, 1.7)}
    refused(of("resize", (3, 7, 7), (3, 11, 11), size=(11, 11), **linear), "'block.y' interpolates by the scale 1.7")
    corners = {"mode": "linear", "align_corners": True}
    refused(of("resize", (3, 7, 7), (3, 1, 4), size=(1, 4), **corners), "'block.y' aligns the corners of a single row")
    refused(of("resize", (3, 7), (3, 14), size=(14,), **corners), "'block.y'", "no int8 resize of 1 spatial dimensions")


def test_paddings_that_tflite_does_not_have() -> None:
    refused(of("pad", (3, 4), (3, 3), pads=((0, 0), (0, 0), (0, -1)), mode="constant"), "'block.y' crops")
    refused(of("pad", (3, 4), (3, 6), pads=((0, 0), (0, 0), (1, 1)), mode="replicate"), "'block.y'", "'replicate'")


def test_an_accumulator_that_a_left_shift_would_overflow() -> None:
    w = weight_of("conv.weight", torch.full((4, 3, 1, 1), 127), [2.0**10] * 4)
    program = legalize(conv(w, x=grid(1.0), y=grid(2.0**-10)))
    report = prove_no_overflow(program)
    with pytest.raises(ExportError, match=r"'block\.y'.*shifts left by 21 bits"):
        prove_no_shift_overflow(program, report)
    harmless = legalize(conv(w, x=grid(1.0), y=grid(2.0**9)))
    prove_no_shift_overflow(harmless, prove_no_overflow(harmless))
