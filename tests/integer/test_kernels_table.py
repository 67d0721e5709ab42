from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels_ort import Graph, generator, operators, random_codes, random_qparams, run_qdq, unequal

from qat.errors import PlanError
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.table import FUNCTIONS, apply_table, function_of, lookup_table, prelu


def node(kind: str, *constants: float, **attributes: Any) -> Callable[[Graph, str], str]:
    def build(graph: Graph, name: str) -> str:
        return graph.op(kind, name, *(graph.constant(c, "float32") for c in constants), **attributes)

    return build


def silu(graph: Graph, name: str) -> str:
    return graph.op("Mul", name, graph.op("Sigmoid", name))


def rsqrt(graph: Graph, name: str) -> str:
    return graph.op("Reciprocal", graph.op("Sqrt", name))


def softplus(graph: Graph, name: str) -> str:
    factor = graph.constant(2.5, "float32")
    scaled = graph.op("Mul", name, factor)
    linear = graph.op("Greater", scaled, graph.constant(3.0, "float32"))
    return graph.op("Where", linear, name, graph.op("Div", graph.op("Softplus", scaled), factor))


#: name, parameters, ONNX spelling, whether the arithmetic is the runtime's bit by bit (so 16 bits are exact too)
CASES: list[tuple[str, dict[str, Any], Callable[[Graph, str], str], bool]] = [
    ("relu", {}, node("Relu"), True),
    ("relu6", {}, node("Clip", 0.0, 6.0), True),
    ("clamp", {"low": -0.3, "high": 0.7}, node("Clip", -0.3, 0.7), True),
    ("leaky_relu", {"negative_slope": 0.1}, node("LeakyRelu", alpha=0.1), True),
    ("hardsigmoid", {}, node("HardSigmoid", alpha=1 / 6, beta=0.5), True),
    ("hardswish", {}, node("HardSwish"), True),
    ("abs", {}, node("Abs"), True),
    ("neg", {}, node("Neg"), True),
    ("reciprocal", {}, node("Reciprocal"), True),
    ("pow", {"exponent": 2.0}, node("Pow", 2.0), True),
    ("pow", {"exponent": 3.0}, node("Pow", 3.0), False),
    ("sqrt", {}, node("Sqrt"), False),
    ("rsqrt", {}, rsqrt, False),
    ("sigmoid", {}, node("Sigmoid"), False),
    ("silu", {}, silu, False),
    ("tanh", {}, node("Tanh"), False),
    ("gelu", {}, node("Gelu"), False),
    ("gelu", {"approximate": "tanh"}, node("Gelu", approximate="tanh"), False),
    ("elu", {"alpha": 0.7}, node("Elu", alpha=0.7), False),
    ("softplus", {}, node("Softplus"), False),
    ("softplus", {"beta": 2.5, "threshold": 3.0}, softplus, False),
    ("mish", {}, node("Mish"), False),
    ("exp", {}, node("Exp"), False),
    ("log", {}, node("Log"), False),
    ("erf", {}, node("Erf"), False),
    ("sin", {}, node("Sin"), False),
    ("cos", {}, node("Cos"), False),
]
IDS = [name + "".join(f"-{v}" for v in params.values()) for name, params, _, _ in CASES]


@pytest.mark.parametrize(("name", "params", "build", "exact"), CASES, ids=IDS)
def test_every_code_of_eight_and_sixteen_bits(
    name: str, params: dict[str, Any], build: Callable[[Graph, str], str], exact: bool
) -> None:
    g = generator()
    wrong = total = 0
    for case in range(12):
        dtype = ["uint8", "int8", "uint16"][case % 3]
        wide = dtype == "uint16"
        x = random_qparams(g, dtype, -15 if wide else -8, -11 if wide else -4)
        y = random_qparams(g, dtype, -16 if wide else -9, -12 if wide else -4)
        codes = torch.arange(x.qmin, x.qmax + 1)
        result = apply_table(codes, lookup_table(function_of(name, params), x, y), x)
        count, size, largest = unequal(run_qdq([(codes, x)], y, dtype, build), result)
        if wide and not exact:
            assert largest <= 1
            wrong, total = wrong + count, total + size
        else:
            assert count == 0
    assert wrong <= 2e-3 * total


@pytest.mark.parametrize("kind", ["LeakyRelu", "Sigmoid"])
def test_these_functions_have_integer_kernels(kind: str, tmp_path: Path) -> None:
    q, path = QParams(0.05, 100, 0, 255), str(tmp_path / "model.onnx")
    run_qdq([(torch.arange(256), q)], q, "uint8", node(kind), path)
    assert operators(path) == [f"QLinear{kind}"]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16"])
def test_prelu_with_one_slope_and_with_one_a_channel(dtype: str) -> None:
    g = generator()
    for case in range(10):
        x, y = random_qparams(g, dtype), random_qparams(g, dtype)
        slope = torch.randn(1 if case % 2 else 6, generator=g) * 0.3
        codes = random_codes(g, (2, 6, 9, 9), x)

        def build(graph: Graph, name: str, slope=slope) -> str:
            shaped = slope if slope.numel() == 1 else slope.reshape(-1, 1, 1)
            return graph.op("PRelu", name, graph.constant(shaped, "float32"))

        assert torch.equal(run_qdq([(codes, x)], y, dtype, build), prelu(codes, x, slope, y).long())


def test_tables_of_narrow_ranges_start_at_the_smallest_code() -> None:
    x, y = QParams(0.5, 0, -3, 4), QParams(0.25, 1, 0, 7)
    table = lookup_table(function_of("relu"), x, y)
    assert table.tolist() == [1, 1, 1, 1, 3, 5, 7, 7]
    assert apply_table(torch.tensor([[-3, 4], [1, 2]], dtype=torch.int8), table, x).tolist() == [[1, 7], [3, 5]]


def test_functions_default_to_pytorchs_parameters() -> None:
    x = torch.linspace(-30, 30, 101)
    for name, reference in {
        "leaky_relu": torch.nn.functional.leaky_relu,
        "elu": torch.nn.functional.elu,
        "softplus": torch.nn.functional.softplus,
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
        "mish": torch.nn.functional.mish,
        "hardswish": torch.nn.functional.hardswish,
        "hardsigmoid": torch.nn.functional.hardsigmoid,
        "relu6": torch.nn.functional.relu6,
    }.items():
        torch.testing.assert_close(function_of(name)(x), reference(x), rtol=1e-5, atol=1e-6)


def test_unknown_functions_and_parameters_are_named() -> None:
    with pytest.raises(PlanError, match="no unary function 'gulp'"):
        function_of("gulp")
    with pytest.raises(PlanError, match="beta"):
        function_of("elu", {"beta": 1.0})
    with pytest.raises(PlanError, match="alpha"):
        function_of("relu", {"alpha": 1.0})
    assert all(callable(f) for f in FUNCTIONS.values())
