"""The step of the tracking of oscillations: the bits of the PyTorch path, every rule, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat import native
from qat.native import OscillationState
from qat.quantizers import TRACK, WeightFakeQuantize
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, QuantizerSpec, Scheme
from qat.train.oscillation_step import OscillationRule, first_state, start, take_in

RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def quantizer_of(weight: Tensor, kind: str, normed: bool, seed: int) -> WeightFakeQuantize:
    """A quantizer whose grid follows the weight, is kept, or is learned; by channel or one for the whole."""
    name = kind.split(maxsplit=1)[0]
    scheme = Scheme(
        "int4",
        symmetric=name != "lsq_plus",
        granularity=PER_TENSOR if kind.endswith("per tensor") else Granularity("per_channel", 0),
        observer=ObserverSpec("minmax" if name == "follows" else "histogram"),
        quantizer=QuantizerSpec(name if name.startswith("lsq") else "static"),
    )
    bn = nn.BatchNorm2d(len(weight)) if normed else None
    if bn is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            bn.weight.copy_(torch.randn(len(weight), generator=generator))
            bn.running_var.copy_(torch.rand(len(weight), generator=generator) + 0.1)  # type: ignore[union-attr]
    quantizer = WeightFakeQuantize(scheme, "w", weight.shape, bn)
    quantizer.refresh(weight)
    quantizer.set_phase(TRACK)
    return quantizer


def trained(
    weight: Tensor, quantizer: WeightFakeQuantize, rule: OscillationRule, seed: int, fused: bool
) -> list[Tensor]:
    """Weight and state after some steps, native or in PyTorch."""
    generator = torch.Generator().manual_seed(seed)
    weight = weight.clone(memory_format=torch.preserve_format)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if not fused:
            patch.setattr(native, "runs_on", lambda _: False)
        state = start(quantizer, weight)
        for step in range(8):
            noise = torch.randn(weight.shape, generator=generator) * 0.3
            weight.add_(noise if step % 2 else -noise)
            state = take_in(quantizer, weight, state, rule)
    return [weight, *state]


@RELAXED
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 5), st.integers(1, 600)),
        st.tuples(st.integers(1, 70), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    ),
    kind=st.sampled_from(["follows", "kept", "kept per tensor", "lsq", "lsq per tensor", "lsq_plus"]),
    normed=st.booleans(),
    channels_last=st.booleans(),
    threshold=st.sampled_from([None, 0.0, 0.1, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_native_equals_pytorch(
    isa: str,
    shape: tuple[int, ...],
    kind: str,
    normed: bool,
    channels_last: bool,
    threshold: float | None,
    seed: int,
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if channels_last and weight.dim() == 4:
        weight = weight.to(memory_format=torch.channels_last)
    quantizer = quantizer_of(weight, kind, normed, seed)
    ours, theirs = (trained(weight, quantizer, OscillationRule(0.2, threshold), seed, fused) for fused in (True, False))
    for name, a, b in zip(("weight", *OscillationState._fields), ours, theirs, strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == b.dtype


def test_it_is_called_and_freezes(operators: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    step = native.oscillation_step
    monkeypatch.setattr(native, "oscillation_step", lambda *a: (calls.append(a), step(*a))[1])
    weight = torch.randn(16, 8, 3, 3)
    made = trained(weight, quantizer_of(weight, "lsq", True, 0), OscillationRule(0.3, 0.2), 0, True)
    state = OscillationState(*made[1:])
    assert len(calls) == 8
    assert 0 < int(state.frozen.sum()) < weight.numel()
    assert int((state.direction != 0).sum()) > weight.numel() // 2


@pytest.mark.parametrize("case", ["transposed", "bfloat16", "sliced"])
def test_what_it_does_not_have_is_left_to_pytorch(operators: None, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "oscillation_step", lambda *_: pytest.fail("not for this weight"))
    weight = torch.randn(4, 6, 3, 3)
    if case == "bfloat16":
        weight = weight.bfloat16()
    if case == "sliced":
        weight = torch.randn(4, 6, 3, 6)[..., ::2]
    if case == "transposed":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    quantizer = quantizer_of(weight, "kept", False, 0)
    state = start(quantizer, weight)
    before = weight.clone()
    with torch.no_grad():
        weight.add_(torch.ones(()))
        after = take_in(quantizer, weight, state, OscillationRule(0.1, None))
    assert int((after.direction == 1).sum()) > 0
    assert not torch.equal(weight, before)


def test_a_loaded_state_is_brought_into_the_order_of_the_weight(operators: None) -> None:
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    quantizer = quantizer_of(weight, "kept", False, 0)
    rule = OscillationRule(0.3, 0.1)
    results = []
    with torch.no_grad():
        for loaded in (False, True):
            w = weight.clone(memory_format=torch.preserve_format)
            state = start(quantizer, w)
            if loaded:
                state = OscillationState(*(value.contiguous() for value in state))
            for sign in (1, -1, 1, -1):
                w.add_(0.4 * sign)
                state = take_in(quantizer, w, state, rule)
            results.append([w, *state])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(value.stride() == weight.stride() for value in results[1])


def test_autograd_sees_that_the_weight_was_written(operators: None) -> None:
    weight = nn.Parameter(torch.randn(4, 5))
    quantizer = quantizer_of(weight.detach(), "kept", False, 0)
    y = (weight * weight).sum()
    with torch.no_grad():
        take_in(quantizer, weight, start(quantizer, weight), OscillationRule(0.1, 0.1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def arguments(weight: Tensor) -> list[Any]:
    scale, zero_point = torch.full((len(weight),), 0.1), torch.zeros(len(weight))
    return [
        weight,
        *first_state(torch.zeros_like(weight)),
        scale,
        zero_point,
        None,
        None,
        0.0,
        0.0,
        -8,
        7,
        0.1,
        0.2,
        False,
        False,
    ]


def test_opcheck(operators: None) -> None:
    operator = torch.ops.qat.oscillation_step.default
    checks = ("test_schema", "test_faketensor")
    found = torch.library.opcheck(operator, tuple(arguments(torch.randn(4, 3))), test_utils=checks)
    assert set(found.values()) == {"SUCCESS"}
    empty = arguments(torch.zeros(4, 0))
    operator(*empty)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(4, 3).double(), "weight is not float32"),
        (0, torch.randn(3, 4).t(), "not dense with one output channel after the other"),
        (0, torch.tensor(1.0), "not dense with one output channel after the other"),
        (1, torch.zeros(4, 3), "codes does not fit a weight of shape"),
        (3, torch.zeros(3, 4), "average does not fit a weight of shape"),
        (5, torch.zeros(3, 4, dtype=torch.bool).t(), "frozen does not fit a weight of shape"),
        (7, torch.ones(3), "3 values in scale for 4 channels"),
        (8, torch.zeros(2), "2 values in zero_point for 4 channels"),
        (9, torch.ones(4), "gamma is given without var"),
        (10, torch.ones(3), "var is not float32 with 4 values"),
        (13, -40000, "codes beyond 16 bits"),
        (14, -8, "is empty or too wide"),
    ],
)
def test_bad_input_is_a_message_and_changes_nothing(operators: None, place: int, value: Any, message: str) -> None:
    given = arguments(torch.randn(4, 3))
    before = given[0].clone()
    bad = [*given[:place], value, *given[place + 1 :]]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qat.oscillation_step(*bad)
    assert torch.equal(given[0], before)
