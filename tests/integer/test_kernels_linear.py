from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernels_ort import (
    DTYPES,
    Graph,
    generator,
    operators,
    random_codes,
    random_integer,
    random_qparams,
    run_qdq,
    unequal,
)

from qat.encoding import Encoding
from qat.integer.kernels.linear import (
    conv,
    conv_transpose,
    linear,
    linear_per_group,
    matmul,
    subpixel_weights,
)
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import quantize
from qat.scheme import Granularity


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution_is_qlinearconv(dims: int, tmp_path: Path) -> None:
    g = generator(dims)
    for case in range(24 if dims < 3 else 8):
        x, y = random_qparams(g, "uint8"), random_qparams(g, "uint8", -2, 1)
        groups = [1, 1, 2, 4, 8][case % 5]
        kernel, dilation, stride = ([random_integer(g, 1, n) for _ in range(dims)] for n in (3, 2, 2))
        padding = [random_integer(g, 0, 2) for _ in range(2 * dims)]
        w = torch.randint(-127, 128, (16, 8 // groups, *kernel), generator=g)
        scale = torch.rand(16, generator=g) * 0.01 + 1e-3 if case % 2 else torch.tensor(2.0**-7)
        bias = torch.randint(-20000, 20000, (16,), generator=g) if case % 3 else None
        codes = random_codes(g, (2, 8, *[9] * dims), x)

        def build(
            graph: Graph, name: str, w=w, scale=scale, bias=bias, x=x, rest=(stride, padding, dilation, groups)
        ) -> str:
            operands = [name, graph.weight(w, scale)]
            if bias is not None:
                operands.append(graph.weight(bias, scale * x.scale, "int32"))
            strides, pads, dilations, group = rest
            return graph.op("Conv", *operands, strides=strides, pads=pads, dilations=dilations, group=group)

        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(codes, x)], y, "uint8", build, path)
        assert "QLinearConv" in operators(path)
        result = conv(codes, x, w, scale, bias, y, stride, padding, dilation, groups)
        assert torch.equal(runtime, result.long())


def test_convolution_with_huge_accumulators_and_multipliers_above_one(tmp_path: Path) -> None:
    g = generator()
    for case in range(12):
        zero = 0 if case % 3 else 255
        x = QParams([0.5, 3e-4][case % 2], zero, 0, 255)
        depth = [600, 3000, 7000][case % 3]
        w = torch.randint(-128, 128, (12, depth, 1, 1), generator=g)
        w[:3], w[3:5] = 127, -128
        scale = torch.rand(12, generator=g) * 0.01 + 1e-3
        bias = torch.randint(-(2**28), 2**28, (12,), generator=g)
        y = QParams(x.scale * [600.0, 0.0003, 1500.0][case // 2 % 3], random_integer(g, 0, 255), 0, 255)
        codes = random_codes(g, (2, depth, 3, 3), x)
        codes[0] = 255

        def build(graph: Graph, name: str, w=w, scale=scale, bias=bias, x=x) -> str:
            return graph.op("Conv", name, graph.weight(w, scale), graph.weight(bias, scale * x.scale, "int32"))

        runtime = run_qdq([(codes, x)], y, "uint8", build, str(tmp_path / "model.onnx"))
        assert torch.equal(runtime, conv(codes, x, w, scale, bias, y).long())


def test_fully_connected_is_qgemm(tmp_path: Path) -> None:
    g = generator()
    for case in range(24):
        x, y = random_qparams(g, "uint8"), random_qparams(g, "uint8", -2, 2)
        n, k = random_integer(g, 1, 40), random_integer(g, 1, 300)
        w = torch.randint(-127, 128, (n, k), generator=g)
        scale = torch.rand(n, generator=g) * 0.01 + 1e-3 if case % 2 else torch.tensor(0.004)
        bias = torch.randint(-20000, 20000, (n,), generator=g) if case % 3 else None
        codes = random_codes(g, (random_integer(g, 1, 20), k), x)

        def build(graph: Graph, name: str, w=w, scale=scale, bias=bias, x=x) -> str:
            operands = [name, graph.weight(w, scale)]
            if bias is not None:
                operands.append(graph.weight(bias, scale * x.scale, "int32"))
            return graph.op("Gemm", *operands, transB=1)

        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(codes, x)], y, "uint8", build, path)
        assert operators(path) == ["QGemm"]
        result = linear(codes, x, w, scale, bias, y)
        assert torch.equal(runtime, result.long())
        assert torch.equal(linear(codes[None, :, None], x, w, scale, bias, y)[0, :, 0], result)


def test_product_of_two_activations_is_qlinearmatmul(tmp_path: Path) -> None:
    g = generator()
    for case in range(24):
        a, b, y = random_qparams(g, "uint8"), random_qparams(g, "uint8"), random_qparams(g, "uint8", -3, 2)
        m, k, n = random_integer(g, 1, 20), random_integer(g, 1, 200), random_integer(g, 1, 20)
        left = random_codes(g, (2, 3, m, k), a)
        right = random_codes(g, (2, 3, k, n) if case % 2 else (3, k, n), b)
        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(left, a), (right, b)], y, "uint8", lambda graph, p, q: graph.op("MatMul", p, q), path)
        assert operators(path) == ["QLinearMatMul"]
        assert torch.equal(runtime, matmul(left, a, right, b, y).long())


@pytest.mark.parametrize("dtype", ["uint16", "int16"])
def test_sixteen_bits_are_within_one_code_of_the_runtimes_float_arithmetic(dtype: str) -> None:
    g = generator()
    wrong = total = 0
    for _ in range(8):
        x, y = random_qparams(g, dtype, -14, -10), random_qparams(g, dtype, -9, -7)
        scale, bias = torch.rand(16, generator=g) * 0.01 + 1e-3, torch.randint(-2000, 2000, (16,), generator=g)
        w = torch.randint(-127, 128, (16, 64, 3, 3), generator=g)
        image, rows = random_codes(g, (1, 64, 9, 9), x), random_codes(g, (20, 576), x)
        b = random_qparams(g, dtype, -14, -10)
        right = random_codes(g, (576, 9), b)

        def operands(graph: Graph, w=w, scale=scale, bias=bias, x=x) -> list[str]:
            return [graph.weight(w, scale), graph.weight(bias, scale * x.scale, "int32")]

        def build_conv(graph: Graph, name: str, operands=operands) -> str:
            return graph.op("Conv", name, *operands(graph))

        def build_gemm(graph: Graph, name: str, operands=operands, w=w) -> str:
            return graph.op("Gemm", name, *operands(graph, w.flatten(1)), transB=1)

        pairs = [
            (run_qdq([(image, x)], y, dtype, build_conv), conv(image, x, w, scale, bias, y)),
            (run_qdq([(rows, x)], y, dtype, build_gemm), linear(rows, x, w.flatten(1), scale, bias, y)),
            (
                run_qdq([(rows, x), (right, b)], y, dtype, lambda graph, p, q: graph.op("MatMul", p, q)),
                matmul(rows, x, right, b, y),
            ),
        ]
        for runtime, result in pairs:
            count, size, largest = unequal(runtime, result)
            assert largest <= 1
            wrong, total = wrong + count, total + size
    assert wrong < 0.01 * total


def _transposed_case(g: torch.Generator, case: int, dtype: str) -> dict:
    k, stride = [(2, 2), (4, 2), (3, 2), (3, 1), (5, 3)][case % 5]
    groups = 1 + case % 2
    x = random_qparams(g, dtype)
    return {
        "k": k, "stride": stride, "groups": groups, "padding": 0 if k == 2 else case % 2, "x": x,
        "w": torch.randint(-127, 128, (8, 6 // groups, k, k), generator=g),
        "scale": torch.rand(6, generator=g) * 0.01 + 1e-3,
        "bias": torch.randint(-2000, 2000, (6,), generator=g),
        "y": random_qparams(g, dtype, -2, 1),
        "codes": random_codes(g, (2, 8, 7, 7), x),
    }  # fmt: skip


def test_transposed_convolution_in_float_is_the_runtimes() -> None:
    g = generator()
    wrong = total = 0
    for case in range(20):
        c = _transposed_case(g, case, "uint8")
        if c["groups"] == 2:
            c["scale"] = torch.tensor(0.004)  # per-channel scales run along C_out / groups in ONNX

        def build(graph: Graph, name: str, c=c) -> str:
            return graph.op(
                "ConvTranspose",
                name,
                graph.weight(c["w"], c["scale"], axis=1),
                graph.weight(c["bias"], c["scale"] * c["x"].scale, "int32"),
                strides=[c["stride"]] * 2,
                pads=[c["padding"]] * 4,
                output_padding=[c["stride"] - 1] * 2,
                group=c["groups"],
            )

        runtime = run_qdq([(c["codes"], c["x"])], c["y"], "uint8", build)
        result = conv_transpose(
            c["codes"], c["x"], c["w"], c["scale"], c["bias"], c["y"],
            c["stride"], c["padding"], c["stride"] - 1, 1, c["groups"],
        )  # fmt: skip
        count, size, largest = unequal(runtime, result)
        assert largest <= 1
        wrong, total = wrong + count, total + size
    assert wrong <= 1e-4 * total


def test_transposed_convolution_as_subpixel_convolution_is_exact(tmp_path: Path) -> None:
    g = generator()
    for case in range(20):
        c = _transposed_case(g, case, "uint8")
        k, s, p, y = c["k"], c["stride"], c["padding"], c["y"]
        taps = -(-k // s)
        size = 6 * s + k - 2 * p

        def build(graph: Graph, name: str, c=c, s=s, p=p, y=y, taps=taps, size=size) -> str:
            def between(value: str) -> str:
                return graph.dequantize(graph.quantize(value, y, "uint8"), y, "uint8")

            w = subpixel_weights(c["w"], [s, s], c["groups"])
            scale, bias = c["scale"].repeat_interleave(s * s), c["bias"].repeat_interleave(s * s)
            h = graph.op(
                "Conv",
                name,
                graph.weight(w, scale),
                graph.weight(bias, scale * c["x"].scale, "int32"),
                pads=[taps - 1] * 4,
                group=c["groups"],
            )
            h = graph.op("DepthToSpace", between(h), blocksize=s, mode="CRD") if s > 1 else h
            ends = graph.constant([p + size, p + size], "int64")
            return graph.op("Slice", between(h), graph.constant([p, p], "int64"), ends, graph.constant([2, 3], "int64"))

        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(c["codes"], c["x"])], y, "uint8", build, path)
        assert operators(path).count("QLinearConv") == 1
        assert "DequantizeLinear" not in operators(path)
        result = conv_transpose(
            c["codes"], c["x"], c["w"], c["scale"], c["bias"], y, s, p, 0, 1, c["groups"], in_float=False
        )
        assert torch.equal(runtime, result.long())


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_one_scale_a_group_of_input_features(dtype: str) -> None:
    g = generator()
    wrong = total = 0
    for case in range(15):
        n, k, size = random_integer(g, 1, 30), [64, 128, 96][case % 3], 32
        x, y = random_qparams(g, dtype), random_qparams(g, dtype, -2, 1)
        w, scale = torch.randint(-8, 8, (n, k), generator=g), torch.rand(n, k // size, generator=g) * 0.1 + 0.01
        encoding = Encoding(
            "int4", tuple(scale.flatten().tolist()), (0,) * scale.numel(), -8, 7,
            granularity=Granularity("per_group", 1, size),
        )  # fmt: skip
        codes = random_codes(g, (11, k), x)

        def build(graph: Graph, name: str, w=w, scale=scale, size=size) -> str:
            zero = graph.constant(torch.zeros_like(scale), "int8")
            operands = [graph.constant(w, "int8"), graph.constant(scale, "float32"), zero]
            return graph.op("Gemm", name, graph.op("DequantizeLinear", *operands, axis=1, block_size=size), transB=1)

        runtime = run_qdq([(codes, x)], y, dtype, build)
        count, total_codes, largest = unequal(runtime, quantize(linear_per_group(codes, x, w, encoding), y))
        assert largest <= 1
        wrong, total = wrong + count, total + total_codes
    assert wrong <= 5e-3 * total


def test_groups_that_do_not_divide_the_features_are_padded() -> None:
    g = generator()
    x = QParams(0.5, 3, *DTYPES["uint8"])
    codes, w = random_codes(g, (4, 10), x), torch.randint(-8, 8, (3, 10), generator=g)
    scale, zero = (0.5, 1.0, 2.0) * 3, (1, 0, -1) * 3
    encoding = Encoding("int4", scale, zero, -8, 7, granularity=Granularity("per_group", 1, 4))
    spread = torch.tensor(scale).reshape(3, 3).repeat_interleave(4, 1)[:, :10]
    centred = w - torch.tensor(zero).reshape(3, 3).repeat_interleave(4, 1)[:, :10]
    expected = ((codes - 3) * 0.5) @ (centred * spread).t()
    assert torch.equal(linear_per_group(codes, x, w, encoding), expected)
