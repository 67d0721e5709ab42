"""Every canonical kind, executed by ONNX Runtime, against the float operator on dequantized values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from export_programs import B, Builder, bias, enc, execute, integer, samples, single, weight

from qat.encoding import Encoding
from qat.export.emitters.spatial import nearest_indices
from qat.export.onnx import program_to_onnx
from qat.export.verify import Verification, verify_onnx
from qat.integer.program import Constant, Program

U8, S8, S16, U16, S4, U4 = (enc(d) for d in ("uint8", "int8", "int16", "uint16", "int4", "uint4"))
EVERY_DTYPE = pytest.mark.parametrize("e", [U8, S8, U16, S16, U4, S4, None], ids=lambda e: e.dtype if e else "float")
THREE_DTYPES = pytest.mark.parametrize("e", [U8, S8, S16, None], ids=lambda e: e.dtype if e else "float")


def name_of(e: Any) -> str | None:
    return e.dtype if isinstance(e, Encoding) else "float" if e is None else None


def check(
    program: Program,
    share: float = 0.01,
    spread: float = 1.5,
    bound: float = 1.0,
    shift: float = 0.0,
    kernels: float = 0.0,
) -> Verification:
    """Compare ONNX Runtime with the float reference and with the integer kernels.

    The kernels are to give every code of it, except for a share `kernels` that may be off by one.
    """
    batches = [tuple(x * spread + shift for x in batch) for batch in samples(program, spread=1.0)]
    model = program_to_onnx(program)
    result = verify_onnx(model, program, batches, execute, level="layers")
    assert result.ok(bound, share), str(result)
    exact = verify_onnx(model, program, batches, integer, level="layers")
    assert all(t.max_difference <= 1 and t.unequal_share <= kernels for t in exact.tensors), str(exact)
    return result


def randn(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(
    kind: str,
    x_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    w: torch.Tensor,
    x: Encoding | None,
    y: Encoding | None,
    dtype: str = "int8",
    **attrs: Any,
) -> Program:
    """An operator with a per-channel integer weight and bias; with float ones where `x` is None."""
    if kind == "conv_transpose":
        channels = w.shape[1] * attrs["groups"]
        # one scale: the groups of a transposed convolution share an axis of the weight, but not their outputs
        if x is not None:
            scale = float(w.abs().max()) / 127
            e = Encoding("int8", (scale,), (0,), -127, 127, symmetric=True)
            bias_e = Encoding("int32", (scale * x.scale[0],), (0,), -(2**31), 2**31 - 1)
            constants = (
                Constant("w", e.quantize(w).to(torch.int8), e),
                Constant("b", bias_e.quantize(randn(channels)), bias_e),
            )
            return single(kind, x_shape, y_shape, x, y, constants, **attrs)
    elif x is not None:
        weights = weight("w", w, dtype)
        assert weights.encoding is not None
        return single(
            kind, x_shape, y_shape, x, y, (weights, bias("b", randn(w.shape[0]), x, weights.encoding)), **attrs
        )
    else:
        channels = w.shape[0]
    return single(kind, x_shape, y_shape, x, y, (Constant("w", w), Constant("b", randn(channels))), **attrs)


# products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y"),
    [(U8, U8), (S8, S8), (U16, U16), (S16, S16), (U8, U4), (U4, S8), (None, None)],
    ids=name_of,
)
def test_conv_in_every_dtype(x: Encoding | None, y: Encoding | None) -> None:
    attrs: dict[str, Any] = {"stride": (2, 1), "padding": ((1, 0), (0, 1)), "dilation": (1, 2), "groups": 1}
    check(product("conv", (B, 4, 9, 9), (B, 8, 4, 6), randn(8, 4, 3, 3) / 6, x, y, **attrs))


@pytest.mark.parametrize("dtype", ["int4", "int8", "int16"])
def test_weights_of_every_dtype(dtype: str) -> None:
    attrs: dict[str, Any] = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1}
    check(product("conv", (B, 4, 5, 5), (B, 7, 5, 5), randn(7, 4, 1, 1) / 2, U8, U8, dtype, **attrs))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_conv_of_every_rank(rank: int, groups: int) -> None:
    attrs: dict[str, Any] = {"stride": (1,) * rank, "padding": ((1, 1),) * rank, "dilation": (1,) * rank}
    x, y, w = (B, 4, *[6] * rank), (B, 8, *[6] * rank), randn(8, 4 // groups, *[3] * rank) / 6
    check(product("conv", x, y, w, U8, U8, groups=groups, **attrs))


def test_conv_without_bias_keeps_the_int8_weight() -> None:
    w = weight("features.0.weight", randn(8, 3, 1, 1))
    attrs: dict[str, Any] = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1}
    program = single("conv", (B, 3, 4, 4), (B, 8, 4, 4), U8, enc(low=-8.0, high=8.0), (w, None), **attrs)
    check(program)
    (codes,) = [t for t in program_to_onnx(program).graph.initializer if t.name == "features.0.weight/codes"]
    assert list(codes.dims) == [8, 3, 1, 1]
    assert codes.raw_data == w.value.numpy().tobytes()


@pytest.mark.parametrize("e", [U8, S16, None], ids=name_of)
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_transpose(e: Encoding | None, groups: int) -> None:
    attrs: dict[str, Any] = {
        "stride": (2, 2),
        "padding": ((1, 1), (1, 1)),
        "output_padding": (1, 0),
        "dilation": (1, 1),
    }
    w = randn(4, 6 // groups, 3, 4) / 6
    check(product("conv_transpose", (B, 4, 5, 5), (B, 6, 10, 10), w, e, e, groups=groups, **attrs), kernels=0.001)


@pytest.mark.parametrize("e", [U8, S8, U16, None], ids=name_of)
@pytest.mark.parametrize("leading", [(B,), (B, 5), (B, 2, 3), (-2, 3)], ids=str)
def test_linear_of_every_rank(e: Encoding | None, leading: tuple[int, ...]) -> None:
    check(product("linear", (*leading, 12), (*leading, 7), randn(7, 12) / 4, e, e))


def test_linear_with_four_bit_groups() -> None:
    w, groups = randn(6, 16), 4
    from qat.scheme import Granularity

    scales = w.reshape(6, groups, 4).abs().amax(2) / 7
    granularity = Granularity("per_group", 1, 4)
    e = Encoding("int4", tuple(scales.flatten().tolist()), (0,) * 24, -7, 7, True, granularity)
    y = enc(low=-16.0, high=16.0)
    check(single("linear", (B, 16), (B, 6), U8, y, (Constant("w", e.quantize(w).to(torch.int8), e), None)))


@pytest.mark.parametrize(("a", "b"), [(U8, U8), (S8, S8), (U8, S8), (S16, S16), (None, None)], ids=name_of)
def test_matmul_of_two_activations(a: Encoding | None, b: Encoding | None) -> None:
    builder = Builder()
    left, right = builder.input("q", (B, 2, 5, 8), a), builder.input("k", (B, 2, 8, 6), b)
    y = enc(a.dtype, -16.0, 16.0) if a else None
    builder.output(builder.op("matmul", "attention.scores", (left, right), (B, 2, 5, 6), y))
    check(builder.program())


# elementwise -----------------------------------------------------------------------------------------------


@EVERY_DTYPE
@pytest.mark.parametrize("kind", ["add", "sub", "mul", "div"])
def test_arithmetic_with_broadcasting(kind: str, e: Encoding | None) -> None:
    builder = Builder()
    divisor = None if e is None else enc(e.dtype, 0.5, 3.0)
    y = None if e is None else enc(e.dtype, -5.3, 6.1)
    a, b = builder.input("a", (B, 4, 3, 3), e), builder.input("b", (B, 4, 1, 1), divisor if kind == "div" else e)
    builder.output(builder.op(kind, "block.y", (a, b), (B, 4, 3, 3), y))
    # dividing by something next to zero makes any last bit of the runtime's large
    check(builder.program(), shift=2.0 if kind == "div" else 0.0, spread=0.3 if kind == "div" else 1.5)


def test_a_float_scaled_by_an_integer_constant() -> None:
    program = single("mul", (B, 4), (B, 4), None, None, (Constant("y.scalar1", torch.tensor(3)),))
    check(program)


@pytest.mark.parametrize("e", [U8, None], ids=name_of)
def test_arithmetic_with_a_constant(e: Encoding | None) -> None:
    value = randn(1, 4, 1, 1)
    other = Constant("shift", value) if e is None else Constant("shift", e.quantize(value).to(torch.uint8), e)
    y = None if e is None else enc(low=-5.0, high=5.3)
    program = single("add", (B, 4, 3, 3), (B, 4, 3, 3), e, y, (other,))
    check(program)
    assert "shift" in {name for node in program_to_onnx(program).graph.node for name in node.input}


@EVERY_DTYPE
@pytest.mark.parametrize(("low", "high"), [(0.0, None), (0.0, 2.0), (-1.0, 1.0), (None, 1.0)], ids=str)
def test_clamp(low: float | None, high: float | None, e: Encoding | None) -> None:
    check(single("clamp", (B, 4, 5), (B, 4, 5), e, e, low=low, high=high))


@pytest.mark.parametrize(("low", "high"), [(0.0, None), (0.0, 2.0), (-1.0, 1.0)], ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_a_clamp_between_two_encodings_is_not_merged_away(dtype: str, low: float, high: float | None) -> None:
    y = enc(dtype, low, 2.5 if high is None else high)
    check(single("clamp", (B, 4, 16), (B, 4, 16), enc(dtype), y, low=low, high=high))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_requantization_is_not_merged_away(dtype: str) -> None:
    builder = Builder()
    source = builder.input("x", (B, 4, 16), enc(dtype))
    y = builder.op("table", "y", (source,), (B, 4, 16), enc(dtype, -1.0, 1.1), function="tanh", params={})
    builder.output(builder.op("requantize", "z", (y,), (B, 4, 16), enc(dtype, -0.9, 1.3)))
    builder.output(builder.op("requantize", "w", (source,), (B, 4, 16), enc(dtype, -2.0, 2.9)))
    check(builder.program())


def test_a_clamp_at_which_the_codes_saturate_already_is_no_operator() -> None:
    e = enc(low=0.0, high=5.0)
    program = single("clamp", (B, 4, 5), (B, 4, 5), e, e, low=0.0, high=6.0)
    assert {n.op_type for n in program_to_onnx(program).graph.node} == {"QuantizeLinear", "DequantizeLinear"}
    check(program)


@THREE_DTYPES
@pytest.mark.parametrize("count", [1, 4])
def test_prelu(e: Encoding | None, count: int) -> None:
    slope = Constant("act.weight", torch.linspace(0.1, 0.4, count))
    check(single("prelu", (B, 4, 3, 3), (B, 4, 3, 3), e, e, (slope,)))
    check(single("prelu", (B, 4), (B, 4), e, e, (slope,)))


def test_rescale_is_another_scale_on_the_same_codes() -> None:
    y = Encoding(U8.dtype, (U8.scale[0] * 0.125,), U8.zero_point, 0, 255)
    program = single("rescale", (B, 4), (B, 4), U8, y, factor=0.125)
    model = program_to_onnx(program)
    assert [n.op_type for n in model.graph.node] == ["QuantizeLinear", "DequantizeLinear"]
    assert model.graph.node[1].input[0] == "x/codes"
    check(program)


@pytest.mark.parametrize("y", [U8, None], ids=name_of)
def test_rescale_to_an_unrelated_encoding_multiplies(y: Encoding | None) -> None:
    builder = Builder()
    source = builder.input("x", (B, 4), None)
    builder.output(builder.op("rescale", "y", (source,), (B, 4), None, factor=0.5))
    if y is not None:
        builder.output(builder.op("quantize", "z", ("y",), (B, 4), y))
    model = program_to_onnx(builder.program())
    assert model.graph.node[0].op_type == "Mul"
    check(builder.program())


FUNCTIONS: list[tuple[str, dict[str, Any]]] = [
    *[(f, {}) for f in ("sigmoid", "tanh", "hardsigmoid", "hardswish", "silu", "softplus", "mish", "exp", "abs")],
    *[(f, {}) for f in ("neg", "erf", "sin", "cos")],
    ("gelu", {"approximate": "none"}),
    ("gelu", {"approximate": "tanh"}),
    ("leaky_relu", {"negative_slope": 0.1}),
    ("elu", {"alpha": 0.7}),
    ("softplus", {"beta": 2.0, "threshold": 3.0}),
    ("pow", {"exponent": 2.0}),
]
POSITIVE_FUNCTIONS = ["log", "sqrt", "rsqrt", "reciprocal"]


@THREE_DTYPES
@pytest.mark.parametrize(("function", "params"), FUNCTIONS, ids=str)
def test_functions(function: str, params: dict[str, Any], e: Encoding | None) -> None:
    y = None if e is None else enc(e.dtype, -2.0, 8.0)
    check(single("table", (B, 4, 16), (B, 4, 16), e, y, function=function, params=params))


@pytest.mark.parametrize("function", POSITIVE_FUNCTIONS)
def test_functions_of_positive_numbers(function: str) -> None:
    # zero point 0 and no code of 0 in the data: the function is finite on every value that occurs
    program = single("table", (B, 64), (B, 64), enc(low=0.0, high=5.0), enc(), function=function, params={})
    check(program, spread=0.3, shift=2.0)


# normalization, pooling, grid --------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (U8, Encoding("uint8", (1 / 256,), (0,), 0, 255)),
        (S8, Encoding("int8", (1 / 256,), (-128,), -128, 127)),
        (U8, enc(low=0.0, high=0.6)),
        (S16, Encoding("uint16", (1 / 65536,), (0,), 0, 65535)),
        (None, None),
    ],
    ids=name_of,
)
def test_softmax_saturates_and_follows_its_encoding(x: Encoding | None, y: Encoding | None, axis: int) -> None:
    program = single("softmax", (B, 6, 6), (B, 6, 6), x, y, axis=axis)
    # 16 bits are finer than the runtime's float32 exponentials; codes near 0.6 come over 8-bit probabilities
    check(program, share=0.6, spread=6.0, bound=2.0 if x is S16 else 1.0)


@THREE_DTYPES
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_layer_norm(e: Encoding | None, affine: bool, count: int) -> None:
    shape = (5, 12)[2 - count :]
    constants = (
        (Constant("norm.weight", randn(*shape) + 1), Constant("norm.bias", randn(*shape))) if affine else (None, None)
    )
    y = None if e is None else enc(e.dtype, -6.0, 6.0)
    check(
        single("layer_norm", (B, 5, 12), (B, 5, 12), e, y, constants, axes_count=count, eps=1e-5),
        share=0.02,
        kernels=0.02,
    )


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("size", "out", "kernel", "stride", "padding", "dilation", "ceil"),
    [
        (8, 4, 2, 2, 0, 1, False),
        (7, 4, 3, 2, 1, 1, False),
        (7, 4, 2, 2, 0, 1, True),
        (10, 4, 3, 3, 1, 1, True),
        (9, 5, 3, 1, 0, 2, False),
    ],
)
def test_max_pool(
    e: Any, size: int, out: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool
) -> None:
    attrs: dict[str, Any] = {
        "kernel": (kernel,) * 2,
        "stride": (stride,) * 2,
        "padding": ((padding, padding),) * 2,
        "dilation": (dilation,) * 2,
        "ceil_mode": ceil,
    }
    # all values negative: a padding of zeros would win
    check(single("max_pool", (B, 3, size, size), (B, 3, out, out), e, e, **attrs), spread=0.3, shift=-1.5)


@THREE_DTYPES
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("size", "out", "kernel", "stride", "padding", "ceil"),
    [(8, 4, 2, 2, 0, False), (7, 4, 3, 2, 1, False), (7, 4, 2, 2, 0, True), (8, 5, 3, 2, 1, True)],
)
def test_avg_pool(
    e: Any, rank: int, counted: bool, size: int, out: int, kernel: int, stride: int, padding: int, ceil: bool
) -> None:
    attrs: dict[str, Any] = {
        "kernel": (kernel,) * rank,
        "stride": (stride,) * rank,
        "padding": ((padding, padding),) * rank,
        "ceil_mode": ceil,
        "count_include_pad": counted,
    }
    # zero points that are not the middle code: padding has to be the real zero
    x, y = (None, None) if e is None else (enc(e.dtype, -1.0, 4.0), enc(e.dtype, -0.9, 3.7))
    check(single("avg_pool", (B, 3, *[size] * rank), (B, 3, *[out] * rank), x, y, **attrs), shift=1.0, kernels=0.005)


@THREE_DTYPES
@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("axes", [(2, 3), (-1, -2), (1,), (1, 2), (3,), (1, 2, 3)], ids=str)
def test_mean(e: Encoding | None, axes: tuple[int, ...], keepdims: bool) -> None:
    shape = (B, 4, 6, 5)
    reduced = [a % 4 for a in axes]
    out = tuple(1 if d in reduced else n for d, n in enumerate(shape) if keepdims or d not in reduced)
    y = None if e is None else enc(e.dtype, -2.9, 2.6)
    check(single("mean", shape, out, e, y, axes=axes, keepdims=keepdims))


def test_a_mean_over_the_spatial_dimensions_is_a_global_average_pool() -> None:
    program = single("mean", (B, 4, 6, 5), (B, 4), U8, U8, axes=(2, 3), keepdims=False)
    kinds = [n.op_type for n in program_to_onnx(program).graph.node if "Linear" not in n.op_type]
    assert kinds == ["GlobalAveragePool", "Reshape"]


@THREE_DTYPES
@pytest.mark.parametrize(
    ("size", "out", "scales"),
    [
        ((4, 4), (8, 8), None),
        ((6, 5), (9, 7), None),
        ((4, 6), (6, 9), (1.5, 1.5)),
        ((7, 7), (3, 5), None),
        ((10,), (23,), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["nearest", "linear", "align_corners"])
def test_resize(
    e: Any, size: tuple[int, ...], out: tuple[int, ...], scales: tuple[float, ...] | None, mode: str
) -> None:
    attrs: dict[str, Any] = {
        "mode": "linear" if mode == "align_corners" else mode,
        "size": out,
        "scales": scales,
        "align_corners": mode == "align_corners",
    }
    share = 0.0 if mode == "nearest" else 0.05
    check(
        single("resize", (B, 3, *size), (B, 3, *out), e, e, **attrs),
        share=share,
        kernels=0.01 if len(size) == 1 else 0.0,
    )


@pytest.mark.parametrize("size_in", range(1, 40))
def test_nearest_resize_has_the_indices_of_pytorch(size_in: int) -> None:
    for size_out in range(1, 80):
        ramp = torch.arange(size_in, dtype=torch.float32)[None, None]
        expected = torch.nn.functional.interpolate(ramp, size=size_out, mode="nearest")[0, 0].long().tolist()
        assert nearest_indices(size_in, size_out, None, 1).tolist() == expected, (size_in, size_out)


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.77, 1.1, 1.3, 1.5, 2.0, 2.1, 3.7])
def test_nearest_resize_by_a_factor_has_the_indices_of_pytorch(scale: float) -> None:
    for size_in in range(4, 40):
        ramp = torch.arange(size_in, dtype=torch.float32)
        line = torch.nn.functional.interpolate(ramp[None, None], scale_factor=scale, mode="nearest")[0, 0]
        plane = ramp[None, None, None].expand(1, 1, size_in, size_in).contiguous()
        row = torch.nn.functional.interpolate(plane, scale_factor=scale, mode="nearest")[0, 0, 0]
        assert nearest_indices(size_in, len(line), scale, 1).tolist() == line.long().tolist(), size_in
        assert nearest_indices(size_in, len(row), scale, 2).tolist() == row.long().tolist(), size_in


@EVERY_DTYPE
@pytest.mark.parametrize("mode", ["zeros", "value", "reflect", "replicate"])
def test_pad(mode: str, e: Encoding | None) -> None:
    e = None if e is None else enc(e.dtype, -1.0, 4.0)
    attrs: dict[str, Any] = {
        "pads": ((0, 0), (0, 0), (1, 2), (3, 0)),
        "mode": "constant" if mode in ("zeros", "value") else mode,
        "value": 2.5 if mode == "value" else 0.0,
    }
    check(single("pad", (B, 3, 5, 4), (B, 3, 8, 7), e, e, **attrs), share=0.0)


# shape -----------------------------------------------------------------------------------------------------


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("kind", "y_shape", "attrs"),
    [
        ("reshape", (B, 24), {"shape": (-1, 24)}),
        ("reshape", (-4, 6), {"shape": (-1, 6)}),
        ("transpose", (B, 6, 4), {"perm": (0, 2, 1)}),
        ("slice", (B, 2, 3), {"axes": (1, 2), "starts": (1, 0), "ends": (3, 6), "steps": (1, 2)}),
        ("slice", (B, 4, 6), {"axes": (2,), "starts": (-1,), "ends": (-(2**31),), "steps": (-1,)}),
        ("slice", (B, 4, 6), {"axes": (1, 2), "starts": (None, None), "ends": (None, None), "steps": (-1, 1)}),
        ("expand", (2, B, 4, 6), {"shape": (2, -1, 4, 6)}),
        ("identity", (B, 4, 6), {}),
    ],
    ids=str,
)
def test_movers_copy_codes(kind: str, y_shape: tuple[int, ...], attrs: dict[str, Any], e: Encoding | None) -> None:
    check(single(kind, (B, 4, 6), y_shape, e, e, **attrs), share=0.0)


@pytest.mark.parametrize("e", [U8, None], ids=name_of)
def test_expand_of_a_constant_to_the_batch(e: Encoding | None) -> None:
    builder = Builder()
    source = builder.input("x", (-2, 5, 6), e)
    token = randn(1, 1, 6)
    k = Constant("class_token", token if e is None else e.quantize(token).to(torch.uint8), e)
    wide = builder.op("expand", "expand", (builder.constant(k),), (-2, 1, 6), e, shape=(-2, 1, 6))
    builder.output(builder.op("concat", "tokens", (wide, source), (-2, 6, 6), e, axis=1))
    four = builder.op("expand", "four", (builder.constant(k),), (-4, 1, 6), e, shape=(-4, 1, 6))
    builder.output(four)
    check(builder.program(), share=0.0)


@EVERY_DTYPE
def test_concat_of_one_encoding_copies(e: Encoding | None) -> None:
    builder = Builder()
    a, b = builder.input("a", (B, 2, 4), e), builder.input("b", (B, 3, 4), e)
    builder.output(builder.op("concat", "cat", (a, b, a), (B, 7, 4), e, axis=1))
    check(builder.program(), share=0.0)


def test_concat_and_requantize_of_different_encodings() -> None:
    builder = Builder()
    a, b = builder.input("a", (B, 2, 4), U8), builder.input("b", (B, 3, 4), enc(low=-1.0, high=2.0))
    cat = builder.op("concat", "cat", (a, b), (B, 5, 4), enc(low=-3.0, high=4.0), axis=1)
    builder.output(builder.op("requantize", "cat.int8", (cat,), (B, 5, 4), S8))
    check(builder.program())
