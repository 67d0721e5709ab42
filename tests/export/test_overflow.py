"""The proof that no accumulator overflows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from export_programs import B, Builder, enc, residual_network, single

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.export.overflow import LayerBound, prove_no_overflow
from qat.integer.program import Constant
from qat.scheme import Granularity

U8 = Encoding("uint8", (0.1,), (10,), 0, 255)
W8 = Encoding("int8", (0.1,), (0,), -128, 127)
CONV: dict[str, Any] = {"stride": (1,), "padding": ((0, 0),), "dilation": (1,), "groups": 1}


def codes(values: Any, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def bias(values: list[int]) -> Constant:
    return Constant("b", codes(values, torch.int32), Encoding("int32", (0.01,), (0,), -(2**31), 2**31 - 1))


def test_the_bound_is_the_worst_sum_that_an_input_can_make() -> None:
    w = Constant("w", codes([[3, -2], [1, 1]]), W8)
    report = prove_no_overflow(single("linear", (B, 2), (B, 2), U8, enc(), (w, bias([-7, 5]))))
    # channel 0: 3 * 245 - 2 * -10 = 755, with the bias against it; channel 1: 2 * 245 + 5 = 495
    assert report.layers == (LayerBound("block.y", "linear", 755, 0, 2**31 - 1),)
    assert report.layers[0].bits == 11


def test_a_narrow_input_range_is_used() -> None:
    x = Encoding("uint8", (0.1,), (10,), 0, 20)
    w = Constant("w", codes([[3, -2]]), W8)
    assert prove_no_overflow(single("linear", (B, 2), (B, 1), x, enc(), (w,))).layers[0].bound == 50


@pytest.mark.parametrize("sign", [1, -1])
def test_a_bias_at_the_edge_decides_in_either_direction(sign: int) -> None:
    """245 * 4 = 980 above, -10 * 4 = -40 below."""
    room = 980 if sign > 0 else 40
    edge = 2**31 - 1 - room

    def program(value: int) -> Any:
        w = Constant("features.0.weight", codes([[[1]], [[4]]]), W8)
        return single("conv", (B, 1, 4), (B, 2, 4), U8, enc(), (w, bias([0, sign * value])), **CONV)

    layer = prove_no_overflow(program(edge)).layers[0]
    assert (layer.bound, layer.channel, layer.bits) == (2**31 - 1, 1, 32)
    with pytest.raises(ExportError, match=rf"layer 'block\.y'.*output channel 1 may reach {2**31} > .*narrower"):
        prove_no_overflow(program(edge + 1))


def test_sixteen_bit_activations_have_sixty_four_bits() -> None:
    x = Encoding("int16", (0.1,), (0,), -(2**15), 2**15 - 1)
    w = Constant("w", codes([[127] * 1024]), W8)
    layer = prove_no_overflow(single("linear", (B, 1024), (B, 1), x, enc("int16"), (w,))).layers[0]
    assert layer.bound == 1024 * 127 * 2**15
    assert layer.limit == 2**63 - 1


def test_the_zero_point_of_a_weight_is_subtracted() -> None:
    per_tensor = Encoding("uint8", (0.1,), (100,), 0, 255)
    w = Constant("w", codes([[100, 101]], torch.uint8), per_tensor)
    assert prove_no_overflow(single("linear", (B, 2), (B, 1), U8, enc(), (w,))).layers[0].bound == 245
    per_channel = Encoding("uint8", (0.1, 0.1), (100, 98), 0, 255, granularity=Granularity("per_channel", 0))
    w = Constant("w", codes([[100], [100]], torch.uint8), per_channel)
    layer = prove_no_overflow(single("linear", (B, 1), (B, 2), U8, enc(), (w,))).layers[0]
    assert (layer.bound, layer.channel) == (490, 1)


def test_a_transposed_convolution_sums_over_its_own_axis() -> None:
    # (C_in = 4, C_out / groups = 1, 1), two groups: the outputs sum inputs 0, 1 and inputs 2, 3
    w = Constant("w", codes([[[1]], [[2]], [[3]], [[5]]]), W8)
    attrs = {**CONV, "groups": 2, "output_padding": (0,)}
    layer = prove_no_overflow(single("conv_transpose", (B, 4, 3), (B, 2, 3), U8, enc(), (w,), **attrs)).layers[0]
    assert (layer.bound, layer.channel) == (8 * 245, 1)


def test_matrix_products_of_activations_and_of_a_constant() -> None:
    b = Builder()
    left, right = b.input("q", (B, 3, 6), U8), b.input("k", (B, 6, 2), Encoding("uint8", (0.1,), (250,), 0, 255))
    b.op("matmul", "scores", (left, right), (B, 3, 2), enc())
    k = b.constant(Constant("table", codes([[1, 0], [0, 2], [0, 0], [0, 3], [0, 0], [0, 0]]), W8))
    b.op("matmul", "lookup", (left, k), (B, 3, 2), enc())
    scores, lookup = prove_no_overflow(b.program()).layers
    assert scores.bound == 6 * 245 * 250
    assert (lookup.bound, lookup.channel) == (5 * 245, 1)


def test_float_layers_have_no_accumulator() -> None:
    program = single("linear", (B, 2), (B, 2), None, None, (Constant("w", torch.randn(2, 2)),))
    assert prove_no_overflow(program).layers == ()
    assert prove_no_overflow(program).worst is None


def test_the_report_names_every_layer_and_the_worst() -> None:
    report = prove_no_overflow(residual_network())
    assert [layer.name for layer in report.layers] == ["features.0", "features.1.conv", "classifier"]
    assert report.worst is not None
    assert report.worst.bound == max(layer.bound for layer in report.layers)
    assert str(report).splitlines()[1].split()[:2] == ["features.0", "conv"]
