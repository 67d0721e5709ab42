"""Random single operators with what the `onnx-arm64` profile says of them: for ONNX Runtime on ARM64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from kernels_ort import Graph, qdq, random_codes, random_integer, random_qparams
from torch import Tensor

from qat.integer.arm64 import elementwise, floats
from qat.integer.kernels import elementwise as x86
from qat.integer.kernels import layout, linear, normalize, pool, table
from qat.integer.kernels.qparams import QParams


@dataclass(frozen=True)
class Case:
    """A graph, the codes that the profile gives, and what it is called."""

    name: str
    graph: Graph
    expected: Tensor


#: shapes of two operands; vectors end in tails of every length that the kernels treat apart
PAIRS = [
    *[((1, n), (1, n)) for n in (1, 3, 8, 15, 16, 17, 31, 33, 100)],
    *[((2, 3, 5, 7), (2, 3, 1, 1)), ((2, 3, 1, 1), (2, 3, 5, 7)), ((2, 3, 5, 7), (7,)), ((1,), (2, 19)), ((2, 19), ())],
    *[((2, 1, 5), (3, 1)), ((30, 50, 20), (30, 50, 20)), ((4, 1, 60), (4, 80, 1))],
]


def additions_and_products(g: torch.Generator, dtype: str) -> Iterator[Case]:
    """QLinearAdd and QLinearMul: any scales, ties, and ratios of scales for which the addition computes in float."""
    for case, (left, right) in enumerate(PAIRS * 4):
        kind = ["Add", "Add", "Add", "Mul"][case % 4]
        a, b, y = (random_qparams(g, dtype) for _ in range(3))
        if case % 4 == 1:
            y = QParams(a.scale * 2.0 ** random_integer(g, -2, 1), y.zero_point, y.qmin, y.qmax)
            b = QParams(y.scale * random_integer(g, 1, 64) / 32, b.zero_point, b.qmin, b.qmax)
        if case % 4 == 2:
            y = QParams(a.scale * 2.0 ** random_integer(g, -9, 16), y.zero_point, y.qmin, y.qmax)
        codes = random_codes(g, left, a), random_codes(g, right, b)
        kernel = elementwise.add if kind == "Add" else elementwise.mul
        graph = qdq([(codes[0], a), (codes[1], b)], y, dtype, lambda graph, p, q, kind=kind: graph.op(kind, p, q))
        yield Case(f"{kind} {dtype} {left} {right}", graph, kernel(codes[0], a, codes[1], b, y))


def fused_floats(g: torch.Generator, dtype: str) -> Iterator[Case]:
    """Layer normalization, bilinear interpolation, hard sigmoid and hard swish."""
    low, high = (-14, -11) if "16" in dtype else (-6, -3)
    for length in (1, 2, 3, 7, 8, 9, 31, 64, 192, 197):
        x, y = random_qparams(g, dtype, low, high), random_qparams(g, dtype, low, high - 1)
        codes, weight = random_codes(g, (23, length), x), torch.randn(length, generator=g)
        bias = torch.randn(length, generator=g)

        def normalize_(graph: Graph, name: str, weight: Tensor = weight, bias: Tensor = bias) -> str:
            operands = [graph.constant(t, "float32") for t in (weight, bias)]
            return graph.op("LayerNormalization", name, *operands, axis=-1, epsilon=1e-5)

        expected = floats.layer_norm(codes, x, weight, bias, y)
        yield Case(f"LayerNormalization {dtype} {length}", qdq([(codes, x)], y, dtype, normalize_), expected)
    for case in range(12):
        x = random_qparams(g, dtype)
        y = x if case % 2 else random_qparams(g, dtype)
        codes = random_codes(g, (2, 3, random_integer(g, 1, 20), random_integer(g, 1, 20)), x)
        sizes, corners = [random_integer(g, 1, 40), random_integer(g, 1, 40)], case % 4 > 1

        def interpolate(graph: Graph, name: str, sizes: list[int] = sizes, corners: bool = corners) -> str:
            mode = "align_corners" if corners else "half_pixel"
            size = graph.constant([2, 3, *sizes], "int64")
            return graph.op("Resize", name, "", "", size, mode="linear", coordinate_transformation_mode=mode)

        expected = floats.resize_bilinear(codes, x, y, sizes, corners)
        yield Case(f"Resize {dtype} {sizes}", qdq([(codes, x)], y, dtype, interpolate), expected)
    for _ in range(3):
        x, y = random_qparams(g, dtype, low, high), random_qparams(g, dtype, low - 1, high - 1)
        codes = torch.arange(x.qmin, x.qmax + 1)
        for kind, function in (("HardSigmoid", floats.hard_sigmoid), ("HardSwish", floats.hard_swish)):
            constants = {"alpha": 1 / 6, "beta": 0.5} if kind == "HardSigmoid" else {}
            graph = qdq([(codes, x)], y, dtype, lambda graph, n, kind=kind, c=constants: graph.op(kind, n, **c))
            yield Case(f"{kind} {dtype}", graph, table.apply_table(codes, table.lookup_table(function, x, y), x))


def everything_else(g: torch.Generator) -> Iterator[Case]:
    """The integer operators that MLAS has a kernel of for every architecture, as the `onnx` profile has them."""
    for case in range(6):
        x, b, y = random_qparams(g, "uint8"), random_qparams(g, "uint8"), random_qparams(g, "uint8", -5, 0)
        image, rows = random_codes(g, (2, 8, 9, 9), x), random_codes(g, (7, 72), x)
        w = torch.randint(-127, 128, (16, 8 if case % 2 else 1, 3, 3), generator=g)
        groups, scale = (1 if case % 2 else 8), torch.rand(16, generator=g) * 0.01 + 1e-3
        bias = torch.randint(-20000, 20000, (16,), generator=g)

        def operands(graph: Graph, w: Tensor, scale: Tensor = scale, bias: Tensor = bias, x: QParams = x) -> list[str]:
            return [graph.weight(w, scale), graph.weight(bias, scale * x.scale, "int32")]

        full = torch.randint(-127, 128, (16, 72), generator=g)
        wide = QParams(2.0**-9, y.zero_point, 0, 255)
        right = random_codes(g, (72, 5), b)
        single: list[tuple[str, Tensor, QParams, Callable[..., str], Tensor]] = [
            ("Conv", image, y, lambda graph, n, w=w, k=groups, o=operands: graph.op("Conv", n, *o(graph, w), group=k),
             linear.conv(image, x, w, scale, bias, y, groups=groups)),
            ("Gemm", rows, y, lambda graph, n, w=full, o=operands: graph.op("Gemm", n, *o(graph, w), transB=1),
             linear.linear(rows, x, full, scale, bias, y)),
            ("AveragePool", image, y, lambda graph, n: graph.op("AveragePool", n, kernel_shape=[3, 2]),
             pool.avg_pool(image, x, y, [3, 2], [1, 1])),
            ("GlobalAveragePool", image, wide, lambda graph, n: graph.op("GlobalAveragePool", n),
             pool.global_avg_pool(image, x, wide)),
            ("Softmax", rows, normalize.PROBABILITY, lambda graph, n: graph.op("Softmax", n, axis=-1),
             normalize.softmax(rows, x, normalize.PROBABILITY)),
            ("Concat", rows, y, lambda graph, n: graph.op("Concat", n, axis=0), layout.concat([(rows, x)], y, 0)),
        ]  # fmt: skip
        for name, function in (("Sigmoid", "sigmoid"), ("LeakyRelu", "leaky_relu")):
            codes = table.apply_table(rows, table.lookup_table(table.function_of(function), x, y), x)
            single.append((name, rows, y, lambda graph, n, name=name: graph.op(name, n), codes))
        for name, given, result, build, expected in single:
            yield Case(name, qdq([(given, x)], result, "uint8", build), expected)
        for name, kernel in (("MatMul", linear.matmul), ("Sub", x86.sub), ("Div", x86.div)):
            other = right if name == "MatMul" else random_codes(g, (7, 72), b)
            graph = qdq([(rows, x), (other, b)], y, "uint8", lambda graph, p, q, name=name: graph.op(name, p, q))
            yield Case(name, graph, kernel(rows, x, other, b, y))
