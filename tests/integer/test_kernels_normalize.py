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

from qat.integer.kernels.layer_norm import layer_norm
from qat.integer.kernels.normalize import PROBABILITY, qlinear_softmax, softmax
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import dequantize


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_softmax_is_qlinearsoftmax_whatever_the_encoding(dtype: str, tmp_path: Path) -> None:
    g = generator()
    low, high = DTYPES[dtype]
    for case in range(40):
        x = random_qparams(g, dtype, -8, 0)
        fixed = [QParams(1 / 256, low, low, high), QParams(1 / 255, low, low, high), QParams(1 / 256, 0, low, high)]
        y = [*fixed, random_qparams(g, dtype, -9, -7)][case % 4]
        # length 1 too, where the runtime overflows
        codes = random_codes(g, (2, random_integer(g, 1, 6), random_integer(g, 1, 30), random_integer(g, 1, 200)), x)
        if case % 5 == 0:
            codes = torch.full_like(codes, x.qmin).index_fill(-1, torch.tensor(0), x.qmax)
        axis = [-1, 1, 2][case % 3]
        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(codes, x)], y, dtype, lambda graph, n, a=axis: graph.op("Softmax", n, axis=a), path)
        assert operators(path) == ["QLinearSoftmax"]
        assert torch.equal(runtime, qlinear_softmax(codes, x, y, axis).long())


def test_softmax_to_another_encoding_goes_through_probabilities(tmp_path: Path) -> None:
    g = generator()
    for y in (QParams(1 / 255, 0, 0, 255), PROBABILITY, QParams(1 / 200, 3, 0, 255)):
        x = random_qparams(g, "uint8", -7, -2)
        codes = random_codes(g, (20, 8, 50), x)

        def build(graph: Graph, name: str) -> str:
            h = graph.quantize(graph.op("Softmax", name, axis=-1), PROBABILITY, "uint8")
            # a Concat of one keeps the two pairs of QuantizeLinear and DequantizeLinear apart
            return graph.op("Concat", graph.dequantize(h, PROBABILITY, "uint8"), axis=0)

        path = str(tmp_path / "model.onnx")
        runtime = run_qdq([(codes, x)], y, "uint8", build, path)
        assert operators(path) == ["QLinearSoftmax", "QLinearConcat"]
        assert torch.equal(runtime, softmax(codes, x, y).long())


def test_softmax_is_close_to_the_real_one() -> None:
    g = generator()
    x = QParams(0.06, 120, 0, 255)
    codes = random_codes(g, (50, 30), x)
    expected = torch.softmax(dequantize(codes, x), -1)
    assert float((dequantize(softmax(codes, x, PROBABILITY), PROBABILITY) - expected).abs().max()) <= 0.5 / 256 + 1e-6


@pytest.mark.parametrize("dtype", ["uint16", "int16"])
def test_softmax_of_sixteen_bits_is_within_one_code(dtype: str) -> None:
    g = generator()
    low, high = DTYPES[dtype]
    x, y = QParams(0.0005, 0, low, high), QParams(1 / 65536, low, low, high)
    codes = random_codes(g, (100, 40), x)
    runtime = run_qdq([(codes, x)], y, dtype, lambda graph, name: graph.op("Softmax", name, axis=-1))
    count, size, largest = unequal(runtime, softmax(codes, x, y))
    assert largest <= 1
    assert count <= 5e-3 * size


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm_is_within_one_code(dtype: str, affine: bool) -> None:
    g = generator()
    wide = "16" in dtype
    wrong = total = 0
    for _ in range(10):
        x = random_qparams(g, dtype, -14 if wide else -6, -11 if wide else -3)
        y = random_qparams(g, dtype, -14 if wide else -6, -12 if wide else -4)
        codes, weight, bias = random_codes(g, (2, 17, 4, 16), x), torch.randn(4, 16, generator=g), None
        if affine:
            bias = torch.randn(4, 16, generator=g)
        else:
            weight = torch.ones(4, 16)

        def build(graph: Graph, name: str, weight=weight, bias=bias) -> str:
            operands = [graph.constant(t, "float32") for t in (weight, bias) if t is not None]
            return graph.op("LayerNormalization", name, *operands, axis=-2, epsilon=1e-5)

        runtime = run_qdq([(codes, x)], y, dtype, build)
        result = layer_norm(codes, x, weight if affine else None, bias, y, 2, 1e-5)
        count, size, largest = unequal(runtime, result)
        assert largest <= 1
        wrong, total = wrong + count, total + size
    assert wrong <= (2e-3 if wide else 1e-4) * total


def test_layer_norm_does_not_cancel() -> None:
    # a large mean with a tiny spread: sums of squares in float32 would lose the variance
    x, y = QParams(1.0, 0, 0, 65535), QParams(2.0**-10, 0, -32768, 32767)
    codes = torch.tensor([[60000, 60001, 60002, 60001]])
    assert layer_norm(codes, x, None, None, y).tolist() == [[-1448, 0, 1448, 0]]
