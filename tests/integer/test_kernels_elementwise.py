from __future__ import annotations

import platform
from collections.abc import Callable
from fractions import Fraction
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
)
from torch import Tensor

from qat.integer.kernels import elementwise
from qat.integer.kernels.linear import conv
from qat.integer.kernels.qparams import QParams

SHAPES = [
    ((2, 3, 5, 7), (2, 3, 5, 7)),
    ((2, 3, 5, 7), (2, 3, 1, 1)),
    ((2, 3, 1, 1), (2, 3, 5, 7)),
    ((3, 1, 1), (2, 3, 5, 7)),
    ((2, 3, 5, 7), (7,)),
    ((1,), (2, 3)),
    ((2, 3), ()),
    ((1, 1), (1,)),
    ((2, 1, 5), (3, 1)),
    ((30, 50, 60), (30, 50, 60)),
    ((30, 50, 60), (50, 60)),
    ((4, 1, 600), (4, 80, 1)),
]

OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": elementwise.add,
    "Sub": elementwise.sub,
    "Mul": elementwise.mul,
    "Div": elementwise.div,
}

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="QLinearAdd of x86")


@x86
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("kind", sorted(OPERATORS))
def test_two_tensors_of_any_shapes(kind: str, dtype: str, tmp_path: Path) -> None:
    g = generator()
    fused = kind in ("Add", "Mul") and "16" not in dtype
    for case in range(len(SHAPES) * (2 if fused else 1)):
        a, b, y = (random_qparams(g, dtype) for _ in range(3))
        if case % 2:
            # scales that are ratios of small integers: many exact ties
            y = QParams(a.scale * [1.0, 2.0, 0.5, 0.25][random_integer(g, 0, 3)], y.zero_point, y.qmin, y.qmax)
            b = QParams(y.scale * random_integer(g, 1, 64) / 32, b.zero_point, b.qmin, b.qmax)
        left, right = (random_codes(g, s, q) for s, q in zip(SHAPES[case % len(SHAPES)], (a, b), strict=True))
        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(left, a), (right, b)], y, dtype, lambda graph, p, q: graph.op(kind, p, q), path)
        assert (operators(path) == [f"QLinear{kind}"]) == fused
        assert torch.equal(runtime, OPERATORS[kind](left, a, right, b, y).long())


@x86
def test_every_pair_of_codes_added() -> None:
    g = generator(1)
    for _ in range(5):
        a, b, y = (random_qparams(g, "uint8") for _ in range(3))
        left, right = torch.arange(256)[:, None].expand(256, 256), torch.arange(256).expand(256, 256)
        runtime = run_qdq([(left, a), (right, b)], y, "uint8", lambda graph, p, q: graph.op("Add", p, q))
        assert torch.equal(runtime, elementwise.add(left, a, right, b, y).long())


@pytest.mark.parametrize("kind", ["Add", "Mul"])
def test_a_constant_operand_is_fused_too(kind: str, tmp_path: Path) -> None:
    g = generator(2)
    for case in range(8):
        a, y = random_qparams(g, "uint8"), random_qparams(g, "uint8", -6, -2)
        b = QParams(0.02, random_integer(g, 0, 255), 0, 255)
        left, right = random_codes(g, (2, 4, 8, 8), a), random_codes(g, [(1, 4, 1, 1), (4, 1, 1), (1,)][case % 3], b)

        def build(graph: Graph, name: str, right=right, b=b) -> str:
            return graph.op(kind, name, graph.dequantize(graph.constant(right, "uint8"), b, "uint8"))

        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(left, a)], y, "uint8", build, path)
        assert operators(path) == [f"QLinear{kind}"]
        assert torch.equal(runtime, OPERATORS[kind](left, a, right, b, y).long())


@x86
def test_addition_between_convolutions_keeps_its_codes_in_channels_last(tmp_path: Path) -> None:
    g = generator(3)
    weight, scale = 100 * torch.eye(8, dtype=torch.int64).reshape(8, 8, 1, 1), torch.tensor(0.01)
    for _ in range(6):
        x, b = random_qparams(g, "uint8", -6, -5), random_qparams(g, "uint8", -7, -3)
        y = random_qparams(g, "uint8", -5, -3)
        image, vector = random_codes(g, (2, 8, 30, 30), x), random_codes(g, (2, 8, 1, 1), b)

        def build(graph: Graph, image: str, vector: str, x=x, y=y) -> str:
            def between(value: str, q: QParams) -> str:
                return graph.dequantize(graph.quantize(value, q, "uint8"), q, "uint8")

            h = between(graph.op("Conv", image, graph.weight(weight, scale)), x)
            h = between(graph.op("Add", h, vector), y)
            return graph.op("Conv", h, graph.weight(weight, scale))

        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(image, x), (vector, b)], y, "uint8", build, path)
        assert operators(path).count("QLinearConv") == 2
        result = elementwise.add(conv(image, x, weight, scale, None, x), x, vector, b, y)
        assert torch.equal(runtime, conv(result, y, weight, scale, None, y).long())


def test_a_narrow_range_clamps() -> None:
    q, y = QParams(1.0, 0, 0, 255), QParams(1.0, 2, 2, 9)
    codes = torch.arange(6)
    assert elementwise.add(codes, q, codes, q, y).tolist() == [2, 4, 6, 8, 9, 9]
    assert elementwise.mul(codes, q, codes, q, y).tolist() == [2, 3, 6, 9, 9, 9]
    assert elementwise.sub(codes, q, codes, q, y).tolist() == [2] * 6


def test_fused_multiply_add_rounds_once() -> None:
    g = generator(4)
    a, b, c = (torch.randn(4000, generator=g) * 2.0 ** torch.randint(-30, 30, (4000,), generator=g) for _ in range(3))
    # sums whose float64 rounding lands on a tie of float32: rounding twice would go the wrong way
    a = torch.cat([a, torch.tensor([1.0, 1.0])])
    b = torch.cat([b, torch.tensor([1.0 + 2.0**-23, 1.0 + 2.0**-23])])
    c = torch.cat([c, torch.tensor([2.0**-24 * (1 + 2.0**-23), 2.0**-24 + 2.0**-47])])
    result = elementwise.fma(a, b, c)
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), result.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        value = torch.tensor(r, dtype=torch.float32)
        below, above = (torch.nextafter(value, torch.tensor(s)).item() for s in (-torch.inf, torch.inf))
        error = abs(Fraction(r) - exact)
        assert error <= abs(Fraction(below) - exact)
        assert error <= abs(Fraction(above) - exact)
