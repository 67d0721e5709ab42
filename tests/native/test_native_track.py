"""Tracking in one native operator equals the moving average and the fake quantization in PyTorch, buffer by buffer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import make, same_bits
from torch import Tensor

from qat import native
from qat.quantizers import TRACK, FakeQuantize, activation
from qat.scheme import Granularity, Scheme

BUFFERS = ("min_val", "max_val", "scale", "zero_point", "tracked")


@st.composite
def cases(draw: st.DrawFn) -> tuple[FakeQuantize, list[Tensor]]:
    shape = draw(
        st.one_of(
            st.tuples(st.integers(1, 4), st.integers(1, 9)),
            st.tuples(st.integers(1, 3), st.sampled_from([3, 8, 17]), st.integers(1, 9), st.integers(1, 9)),
        )
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    seed = draw(st.integers(0, 2**31))
    layout = draw(st.sampled_from(["contiguous", "permuted", "strided"]))
    batches = [
        make(shape, layout, dtype, seed + i, draw(st.sampled_from([0.0, 0.0, 0.05])))
        for i in range(draw(st.integers(1, 4)))
    ]
    axis = draw(st.sampled_from([None, 1, -1, 0]))
    scheme = Scheme(
        draw(st.sampled_from(["uint8", "int8", "uint16"])),
        symmetric=draw(st.booleans()),
        granularity=Granularity() if axis is None else Granularity("per_channel", axis),
        power_of_two=draw(st.booleans()),
    )
    momentum = draw(st.sampled_from([0.01, 0.3, 1.0]))
    quantizer = FakeQuantize(scheme, "x", None if axis is None else shape[axis], momentum=momentum)
    quantizer.set_phase(TRACK)
    return quantizer, batches


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_values_gradients_and_buffers_are_those_of_pytorch(isa: str, case: tuple[FakeQuantize, list[Tensor]]) -> None:
    quantizer, batches = case
    reference = copy.deepcopy(quantizer)
    for x in batches:
        upstream = torch.arange(1.0, x.numel() + 1).reshape(x.shape).to(x.dtype)
        results = []
        for one, path in ((quantizer, activation.is_for_native), (reference, lambda *_, **__: False)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(activation, "is_for_native", path)
                leaf = x.detach().requires_grad_()
                y = one(leaf)
                results.append((y.detach(), torch.autograd.grad(y, leaf, upstream)[0]))
        assert same_bits(results[0][0], results[1][0])
        assert same_bits(results[0][1], results[1][1])
        for name in BUFFERS:
            assert torch.equal(getattr(quantizer, name), getattr(reference, name)), name


def test_threads_change_no_bit(isa: str) -> None:
    x = make((3, 33, 65, 31), "permuted", torch.float32, 0, 0.0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            quantizer = FakeQuantize(Scheme(granularity=Granularity("per_channel", 1)), "x", 33)
            quantizer.set_phase(TRACK)
            results.append([quantizer(x), *(getattr(quantizer, name) for name in BUFFERS)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_operator_does_it_all_in_eager_mode(operators: None) -> None:
    quantizer = FakeQuantize(Scheme(), "x")
    quantizer.set_phase(TRACK)
    x = torch.randn(4, 5, requires_grad=True)
    with torch.profiler.profile() as profile:
        quantizer(x)
    calls = {event.key for event in profile.key_averages() if event.key.startswith("qat::")}
    assert calls == {"qat::fake_quantize_track_forward", "qat::_all_set"}


def test_compiled_training_keeps_to_pytorch_without_a_graph_break(operators: None) -> None:
    eager, compiled = (FakeQuantize(Scheme(), "x", momentum=0.5) for _ in range(2))
    for quantizer in (eager, compiled):
        quantizer.set_phase(TRACK)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = make((5, 7), "contiguous", torch.float32, seed, 0.0)
        assert torch.equal(run(x), eager(x))
    for name in BUFFERS:
        assert torch.equal(getattr(eager, name), getattr(compiled, name))


def arguments(**changes: Any) -> tuple[Any, ...]:
    given: dict[str, Any] = {
        "x": torch.randn(2, 3), "low": torch.full((3,), math.inf), "high": torch.full((3,), -math.inf),
        "scale": torch.ones(3), "zero_point": torch.zeros(3, dtype=torch.int32),
        "tracked": torch.zeros((), dtype=torch.int64), "momentum": 0.1, "qmin": 0, "qmax": 255, "axis": 1,
        "symmetric": False, "middle": 0, "power_of_two": False, "with_mask": True,
    }  # fmt: skip
    return tuple((given | changes).values())


def test_opcheck(operators: None) -> None:
    for changes in ({}, {"with_mask": False}, {"x": torch.zeros(0, 3)}):
        results = torch.library.opcheck(torch.ops.qat.fake_quantize_track_forward.default, arguments(**changes))
        assert set(results.values()) == {"SUCCESS"}


def test_compiled_operator(operators: None) -> None:
    rule = native.GridRule(0, 255, 1, symmetric=False, middle=0, power_of_two=False)

    def step(x: Tensor, *state: Tensor) -> Tensor:
        return native.fake_quantize_track(x * 2, state, 0.1, rule)  # type: ignore[arg-type]

    states = [[t.clone() for t in arguments()[1:6]] for _ in range(2)]
    x = torch.randn(2, 3)
    y = step(x, *states[0])
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x, *states[1]), y)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 3).double()}, "x is neither float32"),
        ({"axis": 2}, "axis 2 of a tensor of shape"),
        ({"low": torch.ones(2)}, "low is not a contiguous tensor of 3 float32"),
        ({"high": torch.ones(3).double()}, "high is not"),
        ({"scale": torch.ones(6)[::2]}, "scale is not a contiguous"),
        ({"zero_point": torch.zeros(3)}, "zero_point is not a contiguous tensor of 3 int32"),
        ({"tracked": torch.zeros(2, dtype=torch.int64)}, "tracked is not"),
        ({"qmin": 300}, "is empty or too wide"),
        ({"symmetric": True, "middle": -1}, "middle -1 is outside"),
    ],
)
def test_bad_input_is_a_message(operators: None, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.fake_quantize_track_forward(*arguments(**changes))
