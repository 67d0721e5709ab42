"""Native fake quantization of weights equals the PyTorch path to the bit, with the factor of a batch norm or not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import same_bits
from torch import Tensor, nn

from qat import native
from qat.encoding import Encoding
from qat.quantizers import QUANTIZE, WeightFakeQuantize, weight
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme


@st.composite
def cases(draw: st.DrawFn) -> tuple[WeightFakeQuantize, Tensor]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channel_axis = 1 if groups > 1 else draw(st.sampled_from([0, 0, 1]))
    spatial = draw(st.lists(st.integers(1, 5), max_size=3))
    if channel_axis == 1 and not spatial:
        spatial = [1]
    rows = draw(st.integers(1, 40)) * groups
    shape = (rows, draw(st.integers(1, 40)), *spatial)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(shape, generator=generator) * draw(st.sampled_from([1.0, 1e-30, 1e30]))
    if draw(st.booleans()):
        w.flatten()[:: draw(st.integers(1, 7))] = draw(st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 3.0]))
    w = w.permute(draw(st.permutations(range(w.dim())))).contiguous() if draw(st.booleans()) else w
    if w.shape[0] % groups:
        groups, channel_axis = 1, 0
    order = draw(st.permutations(range(w.dim())))
    if draw(st.booleans()):  # the same values in another order of memory
        back = [order.index(d) for d in range(w.dim())]
        w = w.permute(order).contiguous().permute(back)
    w = w.to(draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])))
    dtype = draw(st.sampled_from(["int8", "uint8", "int4", "int16"]))
    symmetric = draw(st.booleans())
    narrow = {} if dtype != "int8" else draw(st.sampled_from([{}, {"qmin": -127}, {"qmin": 0}, {"qmax": 0}]))
    axis = draw(st.integers(-w.dim(), w.dim() - 1))
    granularity = draw(st.sampled_from([PER_TENSOR, Granularity("per_channel", channel_axis)]))
    if draw(st.integers(0, 3)) == 0:
        granularity = Granularity("per_channel", axis)
    scheme = Scheme(dtype, symmetric=symmetric, granularity=granularity, power_of_two=draw(st.booleans()), **narrow)
    bn: nn.BatchNorm2d | None = None
    if draw(st.integers(0, 3)):
        bn = nn.BatchNorm2d(w.shape[channel_axis] * groups, affine=draw(st.booleans()), eps=1e-3)
        assert bn.running_var is not None
        bn.running_var.copy_(torch.rand(bn.num_features, generator=generator) * 4)
        if bn.affine:
            with torch.no_grad():
                bn.weight.copy_(torch.randn(bn.num_features, generator=generator))
                bn.weight[::3] = draw(st.sampled_from([0.0, -0.0, 1.0, -1e-30]))
    quantizer = WeightFakeQuantize(scheme, "w", w.shape, bn, channel_axis=channel_axis, groups=groups)
    quantizer.set_phase(QUANTIZE)
    return quantizer, w


def both(quantizer: WeightFakeQuantize, w: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Value and gradient, native and in PyTorch."""
    upstream = torch.arange(1.0, w.numel() + 1).reshape(w.shape).to(w.dtype)
    results = []
    for path in (weight.is_for_native, lambda *_, **__: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weight, "is_for_native", path)
            patch.setattr("qat.quantizers.static.is_for_native", path)
            leaf = w.detach().requires_grad_()
            y = quantizer(leaf)
            (gradient,) = torch.autograd.grad(y, leaf, upstream)
            results.append((y.detach(), gradient))
    return results


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_values_and_gradients_are_those_of_pytorch_to_the_bit(
    isa: str, case: tuple[WeightFakeQuantize, Tensor]
) -> None:
    quantizer, w = case
    (value, gradient), (expected, expected_gradient) = both(quantizer, w)
    assert same_bits(value, expected)
    assert same_bits(gradient, expected_gradient)


def test_a_grid_of_the_buffers_is_used_with_the_factor(isa: str) -> None:
    bn = nn.BatchNorm2d(6)
    nn.init.normal_(bn.weight)
    scheme = Scheme("int8", symmetric=True, granularity=Granularity("per_channel", 0)).with_(
        observer=ObserverSpec("percentile", {"percentile": 90.0})
    )
    w = torch.randn(6, 5, 3, 3)
    quantizer = WeightFakeQuantize(scheme, "w", w.shape, bn)
    quantizer.set_phase(QUANTIZE)
    quantizer.refresh(w)
    (value, gradient), (expected, expected_gradient) = both(quantizer, w)
    assert same_bits(value, expected)
    assert same_bits(gradient, expected_gradient)
    assert int((gradient == 0).sum()) > 10, "the percentile clips"


def test_large_weights_over_threads(isa: str) -> None:
    bn = nn.BatchNorm2d(300)
    nn.init.normal_(bn.weight)
    scheme = Scheme("int8", symmetric=True, granularity=Granularity("per_channel", 0))
    w = torch.randn(300, 70, 3, 3).to(memory_format=torch.channels_last)
    quantizer = WeightFakeQuantize(scheme, "w", w.shape, bn)
    quantizer.set_phase(QUANTIZE)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            (value, gradient), (expected, expected_gradient) = both(quantizer, w)
            assert same_bits(value, expected)
            assert same_bits(gradient, expected_gradient)
            assert value.stride() == w.stride()
    finally:
        torch.set_num_threads(before)


def test_only_bits_are_saved_and_gamma_gets_no_gradient(operators: None) -> None:
    bn = nn.BatchNorm2d(4)
    quantizer = WeightFakeQuantize(Scheme("int8", symmetric=True), "w", (4, 2, 3, 3), bn)
    quantizer.set_phase(QUANTIZE)
    w = torch.randn(4, 2, 3, 3, requires_grad=True)
    # a grid that does not follow the weight, and clamps some of it
    quantizer.load_encoding(Encoding.from_range(torch.tensor(-0.5), torch.tensor(0.5), quantizer.scheme))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = quantizer(w)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, 9)]
    y.sum().backward()
    assert w.grad is not None
    assert bn.weight.grad is None
    frozen = quantizer(w.detach())
    assert not frozen.requires_grad


def arguments(**changes: Any) -> tuple[Any, ...]:
    given: dict[str, Any] = {
        "weight": torch.randn(4, 3, 2, 2), "scale": None, "zero_point": None, "gamma": None, "var": None, "eps": 1e-5,
        "gamma_floor": 2.0**-20, "qmin": -127, "qmax": 127, "axis": 0, "symmetric": True, "middle": 0,
        "power_of_two": False, "channel_axis": 0, "groups": 1, "with_mask": True,
    }  # fmt: skip
    return tuple((given | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight": torch.randn(4, 3, requires_grad=True), "gamma": torch.ones(4), "var": torch.ones(4)},
        {"scale": torch.ones(4), "zero_point": torch.zeros(4), "with_mask": False},
        {"weight": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), "axis": -1, "var": torch.ones(4)},
        {"weight": torch.randn(4, 3, 2), "axis": 1, "var": torch.ones(6), "channel_axis": 1, "groups": 2},
    ],
)
def test_opcheck(operators: None, changes: dict[str, Any]) -> None:
    results = torch.library.opcheck(torch.ops.qat.fake_quantize_weight_forward.default, arguments(**changes))
    assert set(results.values()) == {"SUCCESS"}


def test_the_operator_has_the_gradient_of_the_function(operators: None) -> None:
    rule = native.GridRule(0, 3, None, symmetric=False, middle=0, power_of_two=False)
    finite = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(native.fake_quantize_weight(finite, rule).sum(), finite)
    y, _ = torch.ops.qat.fake_quantize_weight_forward(
        *arguments(weight=finite, qmin=0, qmax=3, axis=-1, symmetric=False)
    )
    assert torch.equal(torch.autograd.grad(y.sum(), finite)[0], gradient)
    assert gradient.tolist() == [[1.0, 1.0, 1.0]]
    y, _ = torch.ops.qat.fake_quantize_weight_forward(*arguments(weight=finite, with_mask=False))
    with pytest.raises(RuntimeError, match="with_mask"):
        y.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(operators: None, dynamic: bool) -> None:
    rule = native.GridRule(-127, 127, 0, symmetric=True, middle=0, power_of_two=False)
    factor = native.BatchNormFactor(torch.rand(5) + 0.5, torch.rand(5), 1e-5, 2.0**-20, 0, 1)

    def step(w: Tensor) -> Tensor:
        return native.fake_quantize_weight(w * 2, rule, factor)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for columns in (3, 8):
        results = []
        for function in (step, compiled):
            leaf = torch.linspace(-1, 1, 5 * columns).reshape(5, columns).requires_grad_()
            y = function(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(2, dtype=torch.int32)}, "weight is neither float32"),
        ({"axis": 4}, "axis 4 of a tensor of shape"),
        ({"qmin": 3, "qmax": 3, "symmetric": False}, "is empty or too wide"),
        ({"middle": 200}, r"middle 200 is outside \[-127, 127\]"),
        ({"scale": torch.ones(4)}, "one of scale and zero_point is missing"),
        ({"scale": torch.ones(3), "zero_point": torch.zeros(4)}, "3 values in scale for 4 channels"),
        ({"gamma": torch.ones(4)}, "gamma is given without var"),
        ({"var": torch.ones(5)}, "var is not float32 with 4 values"),
        ({"var": torch.ones(4).double()}, "var is not float32"),
        ({"var": torch.ones(4), "gamma": torch.ones(3)}, "gamma is not float32 with 4 values"),
        ({"var": torch.ones(4), "channel_axis": 4}, "channel_axis 4 of a weight"),
        ({"var": torch.ones(6), "channel_axis": 1, "groups": 3}, "3 groups do not fit"),
        ({"var": torch.ones(4), "groups": 0}, "0 groups do not fit"),
    ],
)
def test_bad_input_is_a_message(operators: None, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.fake_quantize_weight_forward(*arguments(**changes))


def test_a_grid_that_clamps_nothing_passes_the_gradient_on() -> None:
    weight = torch.randn(6, 5, 3, 3, requires_grad=True)
    quantizer = WeightFakeQuantize(Scheme(dtype="int8", symmetric=True), "w", tuple(weight.shape))
    quantizer.set_phase(QUANTIZE)
    grad = torch.randn(6, 5, 3, 3)
    (given,) = torch.autograd.grad(quantizer(weight), weight, grad)
    assert torch.equal(given, grad)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 40])
def test_whether_all_bits_are_set(operators: None, n: int) -> None:
    bits = torch.full(((n + 7) // 8,), 255, dtype=torch.uint8)
    assert torch.ops.qat._all_set(bits, n)
    for i in range(n):
        torn = bits.clone()
        torn[i // 8] &= 255 - (1 << i % 8)
        assert not torch.ops.qat._all_set(torn, n)
    with pytest.raises(RuntimeError, match="give what a forward pass returned"):
        torch.ops.qat._all_set(bits, n + 9)
