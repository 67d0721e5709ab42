from __future__ import annotations

import pytest
import torch
from kernels_ort import DTYPES, Graph, generator, random_codes, random_qparams, run_qdq

from qat.errors import EncodingError
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import dequantize, multiplier, quantize, requantize, requantize_codes


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_quantize_is_the_runtimes(dtype: str) -> None:
    g = generator()
    special = [float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3e38, -3e38, 1e-45]
    for _ in range(20):
        y = random_qparams(g, dtype)
        ties = (torch.arange(-600, 600) + 0.5) * y.scale
        x = torch.cat([torch.randn(400, generator=g) * y.scale * 100, ties, torch.tensor(special)])
        graph = Graph()
        graph.output(graph.quantize(graph.input(x, "float32"), y, dtype), dtype)
        assert torch.equal(graph.run()[0], quantize(x, y).long())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_code_from_one_encoding_to_another(dtype: str) -> None:
    g = generator()
    for _ in range(20):
        x, y = random_qparams(g, dtype), random_qparams(g, dtype)
        codes = random_codes(g, (2000,), x)
        runtime = run_qdq([(codes, x)], y, dtype, lambda graph, name: name)
        assert torch.equal(runtime, requantize_codes(codes, x, y).long())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_dequantized_codes_quantize_to_themselves(dtype: str) -> None:
    g = generator()
    for _ in range(6):
        x = random_qparams(g, dtype, -100, 100)
        codes = torch.arange(x.qmin, x.qmax + 1, dtype=torch.int32)
        assert torch.equal(quantize(dequantize(codes, x), x), codes)
        assert torch.equal(requantize_codes(codes, x, x), codes)


def test_requantization_rounds_to_even_and_clamps_to_the_narrow_range() -> None:
    y = QParams(1.0, 3, 0, 10)
    acc = torch.tensor([-100, -7, -5, -3, -1, 1, 3, 5, 100], dtype=torch.int32)
    assert requantize(acc, torch.tensor(0.5), y).tolist() == [0, 0, 1, 1, 3, 3, 5, 5, 10]


def test_requantization_per_channel_and_above_one() -> None:
    y = QParams(1.0, 0, -32768, 32767)
    acc = torch.arange(-3, 3, dtype=torch.int32).reshape(1, 3, 2)
    result = requantize(acc, torch.tensor([1.0, 2.5, 1000.0]), y, channel_axis=1)
    assert result.tolist() == [[[-3, -2], [-2, 0], [1000, 2000]]]


def test_accumulators_above_24_bits_are_rounded_to_float32_first() -> None:
    acc = torch.tensor([2**24 + 1, 2**24 + 3, 2**30 + 65], dtype=torch.int32)
    y = QParams(1.0, 0, -(2**15), 2**15 - 1)
    # 2**24 + 1 becomes 2**24, exactly a tie after the division by 2**25
    assert requantize(acc, torch.tensor(2.0**-25), y).tolist() == [0, 1, 32]


def test_the_multiplier_is_rounded_after_every_operation() -> None:
    a, y = 0.1, 0.3
    b = torch.tensor([0.7, 0.9])
    expected = torch.tensor(a) * b / torch.tensor(y)
    assert torch.equal(multiplier(a, b, y), expected)
    assert multiplier(a, 0.7, y).shape == ()


def test_scales_are_float32() -> None:
    assert QParams(0.1, 0, 0, 255).scale == float(torch.tensor(0.1))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0.0, 0, 0, 255), "scale"),
        ((-1.0, 0, 0, 255), "scale"),
        ((float("nan"), 0, 0, 255), "scale"),
        ((1e39, 0, 0, 255), "scale"),
        ((1e-60, 0, 0, 255), "scale"),
        ((1.0, 256, 0, 255), "zero point"),
        ((1.0, 0, 1, 0), "zero point"),
    ],
)
def test_parameters_that_cannot_be_are_refused(arguments: tuple[float, int, int, int], word: str) -> None:
    with pytest.raises(EncodingError, match=word):
        QParams(*arguments)


def test_which_codes_need_more_than_eight_bits() -> None:
    assert not QParams(1.0, 0, 0, 255).wide
    assert not QParams(1.0, 0, -8, 7).wide
    assert QParams(1.0, 0, 0, 300).wide
    assert QParams(1.0, 0, -128, 255).wide
