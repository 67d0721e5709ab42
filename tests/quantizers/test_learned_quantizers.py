"""The life of a learned quantizer: where its parameters start, learning, freezing, state, casts."""

from __future__ import annotations

import copy
import io

import pytest
import quantizer_cases as cases
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from qat.errors import CheckpointError, EncodingError, SchemeError, StateError
from qat.quantizers import (
    FLOAT,
    FOLLOW,
    OBSERVE,
    QUANTIZE,
    QUANTIZER_ALIASES,
    TRACK,
    FakeQuantize,
    Quantizer,
    WeightFakeQuantize,
    fused,
)
from qat.quantizers import activation as activation_module
from qat.quantizers import base as base_module
from qat.scheme import Scheme

X = torch.linspace(-0.7, 2.4, 60).reshape(5, 12)
W = torch.linspace(-1.3, 0.9, 48).reshape(4, 12)


def calibrated(name: str, scheme: Scheme = cases.UINT4) -> FakeQuantize:
    q = FakeQuantize(cases.with_quantizer(scheme, name), "x").train()
    q.set_phase(OBSERVE)
    q(X)
    q.finish()
    return q


def made(role: str, name: str) -> tuple[Quantizer, Tensor]:
    """A quantizer in training, and what it is for."""
    if role == "activation":
        q: Quantizer = calibrated(name)
        q.set_phase(TRACK)
        return q, X
    return cases.weight(cases.CHANNELS, name, W), W


def learn(q: Quantizer, x: Tensor, steps: int = 4) -> None:
    optimizer = torch.optim.SGD(q.parameters(), lr=1.0 if q.method.name == "tqt" else 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (q(x) - 0.6 * x).square().sum().backward()
        optimizer.step()


def encoding_of(q: Quantizer) -> object:
    return q.encoding() if isinstance(q, FakeQuantize) else q.codes(W)[1]


BOTH = [("activation", n) for n in cases.LEARNED] + [("weight", n) for n in cases.LEARNED_WEIGHTS]


@pytest.mark.parametrize("name", [*cases.LEARNED, "static", "dorefa"])
def test_learning_starts_from_the_calibrated_grid(name: str) -> None:
    q, static = calibrated(name), calibrated("static")
    q.set_phase(QUANTIZE)
    before = q(X)
    if name != "tqt":
        assert torch.equal(q.scale, static.scale)
        assert torch.equal(q.zero_point, static.zero_point)
    q.set_phase(TRACK)
    scale, zero_point = q.grid()
    assert torch.equal(scale, q.scale)
    assert torch.equal(zero_point, q.zero_point)
    q.eval()
    assert torch.equal(q(X), before)
    encoding = q.encoding()
    assert (encoding.provenance, encoding.method) == ("ptq", "minmax")
    assert encoding.samples == 5


@pytest.mark.parametrize(("role", "name"), BOTH)
def test_nothing_moves_before_calibration(role: str, name: str) -> None:
    scheme = cases.with_quantizer(cases.UINT4 if role == "activation" else cases.CHANNELS, name)
    q = FakeQuantize(scheme, "x") if role == "activation" else WeightFakeQuantize(scheme, "w", W.shape)
    shapes = {key: p.shape for key, p in q.named_parameters()}
    q.train()
    q.set_phase(TRACK)
    with pytest.raises(StateError, match="has no range yet"):
        q(X if role == "activation" else W)
    with pytest.raises(StateError, match="has no range yet"):
        encoding_of(q)
    q.set_phase(FLOAT)
    assert q(W).requires_grad is False
    if role == "activation":
        q.set_phase(OBSERVE)
        q(X)
        q.finish()
    else:
        q.refresh(W)
    assert {key: p.shape for key, p in q.named_parameters()} == shapes


@pytest.mark.parametrize(("role", "name"), BOTH)
def test_the_encoding_is_the_grid_of_the_forward_pass(role: str, name: str) -> None:
    q, x = made(role, name)
    before = encoding_of(q)
    learn(q, x)
    encoding = encoding_of(q)
    assert encoding != before
    assert (encoding.provenance, encoding.method) == ("qat", name)
    assert torch.equal(q(x), encoding.dequantize(encoding.quantize(x)))
    # asking changes nothing
    assert torch.equal(q.scale.reshape(-1), torch.tensor(before.scale))


@pytest.mark.parametrize(("role", "name"), BOTH)
def test_a_grid_that_was_asked_for_does_not_move(role: str, name: str) -> None:
    q, x = made(role, name)
    scale, zero_point = q.grid()
    before = scale.clone(), zero_point.clone()
    learn(q, x)
    assert torch.equal(scale, before[0])
    assert torch.equal(zero_point, before[1])
    assert not torch.equal(q.grid()[0], before[0])


@pytest.mark.parametrize(("role", "name"), BOTH)
def test_freezing_keeps_the_grid_and_gives_no_gradient(role: str, name: str) -> None:
    q, x = made(role, name)
    learn(q, x)
    learned, parameters = encoding_of(q), [p.detach().clone() for p in q.parameters()]
    optimizer = torch.optim.Adam(q.parameters(), lr=0.1)
    q.set_phase(QUANTIZE)
    leaf = x.clone().requires_grad_()
    for _ in range(3):
        optimizer.zero_grad()
        q(leaf).square().sum().backward()
        optimizer.step()
    assert leaf.grad is not None
    assert all(p.requires_grad and p.grad is None for p in q.parameters())
    assert encoding_of(q) == learned
    assert torch.equal(q(x), learned.dequantize(learned.quantize(x)))
    q.set_phase(TRACK)
    assert all(torch.equal(mine.detach(), before) for mine, before in zip(q.parameters(), parameters, strict=True))
    assert encoding_of(q).scale == pytest.approx(learned.scale, rel=1e-6)
    assert encoding_of(q).zero_point == learned.zero_point
    learn(q, x, 1)
    assert not all(torch.equal(mine.detach(), before) for mine, before in zip(q.parameters(), parameters, strict=True))


@pytest.mark.parametrize(("role", "name"), BOTH)
def test_where_processes_train_frozen_parameters_get_zeros_and_come_back(
    role: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, x = made(role, name)
    optimizer = torch.optim.SGD(q.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (q(x) - 0.6 * x).square().sum().backward()
        optimizer.step()
    learned = encoding_of(q)
    for module in (base_module, activation_module, fused):
        monkeypatch.setattr(module, "is_distributed", lambda: True)
    for phase in (FLOAT, QUANTIZE):
        q.set_phase(phase)
        optimizer.zero_grad()
        y = q(x)
        y.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in q.parameters())
        optimizer.step()  # momentum moves what nobody uses
        assert encoding_of(q) == learned
    q.set_phase(TRACK)
    assert encoding_of(q).scale == learned.scale


@pytest.mark.parametrize("role", ["activation", "weight"])
@pytest.mark.parametrize("processes", [False, True])
def test_a_delayed_start_leaves_the_grid_as_calibrated(
    role: str, processes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, x = made(role, "lsq")
    before = encoding_of(q)
    monkeypatch.setattr(base_module, "is_distributed", lambda: processes)
    q.set_phase(FOLLOW)
    leaf = x.clone().requires_grad_()
    y = q(leaf)
    assert torch.equal(y, x)
    y.sum().backward()
    gradients = [p.grad for p in q.parameters()]
    assert all(g is not None and not g.any() for g in gradients) if processes else gradients == [None]
    assert encoding_of(q) == before
    q.set_phase(TRACK)
    assert encoding_of(q) == before
    learn(q, x, 1)
    assert encoding_of(q) != before


@pytest.mark.parametrize(("role", "name"), BOTH)
@pytest.mark.parametrize("phase", [TRACK, QUANTIZE])
def test_state_survives(role: str, name: str, phase: object) -> None:
    q, x = made(role, name)
    learn(q, x)
    q.set_phase(phase)
    buffer = io.BytesIO()
    torch.save(q.state_dict(), buffer)
    buffer.seek(0)
    states = [torch.load(buffer, weights_only=True), load(save({k: v.clone() for k, v in q.state_dict().items()}))]
    for state in states:
        fresh, _ = made(role, name)
        fresh.set_phase(FLOAT)
        fresh.load_state_dict(state)
        assert fresh.phase == phase
        assert encoding_of(fresh) == encoding_of(q)
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), q.parameters(), strict=True))
        assert torch.equal(fresh(x), q(x))
    other = copy.deepcopy(q)
    q.set_phase(TRACK)
    learn(q, x, 1)
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(q.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("role", "name"), BOTH)
def test_casts_leave_the_grid_alone(role: str, name: str) -> None:
    q, x = made(role, name)
    learn(q, x)
    encoding = encoding_of(q)
    for cast in (torch.float16, torch.bfloat16, torch.float64):
        q.to(cast)
        assert {t.dtype for t in [*q.parameters(), q.scale, q.min_val]} == {torch.float32}
        assert encoding_of(q) == encoding
    y = q(x.bfloat16().requires_grad_())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in q.parameters())


@pytest.mark.parametrize("name", cases.LEARNED)
def test_a_loaded_encoding_is_where_learning_starts(name: str) -> None:
    q = FakeQuantize(cases.with_quantizer(cases.UINT4, name), "x").train()
    encoding = cases.encoding(cases.UINT4, 0.125, 3)
    q.load_encoding(encoding)
    q.set_phase(TRACK)
    assert q.encoding() == encoding
    learn(q, X)
    assert q.encoding() != encoding
    q.load_encoding(encoding)
    assert q.encoding() == encoding


def test_a_scale_that_tqt_cannot_have_is_refused() -> None:
    q = FakeQuantize(cases.with_quantizer(cases.UINT4, "tqt"), "layer.0").train()
    with pytest.raises(EncodingError, match=r"'layer\.0' is not for tqt: a scale is no power of two"):
        q.load_encoding(cases.encoding(cases.UINT4, 0.3, 3))
    assert not q.ready


def test_tqt_keeps_the_threshold_within_the_bin() -> None:
    q = calibrated("tqt")
    width = float(q.max_val - q.min_val)
    assert float(q.log2_threshold.detach()) == pytest.approx(torch.log2(torch.tensor(width)).item(), abs=1e-6)
    assert float(q.scale) == 2.0 ** int(torch.ceil(q.log2_threshold.detach())) / 16


@pytest.mark.parametrize("name", cases.LEARNED)
def test_a_range_that_calibration_chose_again_is_learned_from(name: str) -> None:
    q = calibrated(name)
    q.set_phase(TRACK)
    learn(q, X)
    q.set_phase(FLOAT)
    q.set_range(torch.tensor(-1.0), torch.tensor(1.0), "mine")
    kept = q.encoding()
    assert (kept.provenance, kept.method) == ("ptq", "mine")
    q.set_phase(TRACK)
    assert q.encoding() == kept


def test_a_checkpoint_of_another_quantizer_is_refused() -> None:
    with pytest.raises(RuntimeError, match="step"):
        calibrated("lsq").load_state_dict(calibrated("static").state_dict())
    with pytest.raises(CheckpointError, match="prepare the model with the scheme"):
        calibrated("lsq").load_state_dict(calibrated("lsq", Scheme("uint8")).state_dict())


def test_codes_can_be_set_on_a_learned_grid_but_not_through_tanh() -> None:
    q, _ = made("weight", "lsq")
    learn(q, W)
    w = nn.Parameter(W.clone())
    codes = torch.arange(48).reshape(4, 12) % 15 - 7
    q.set_codes(w, codes, "mine")
    assert torch.equal(q.codes(w)[0], codes.int())
    q.set_phase(QUANTIZE)
    assert torch.equal(q.codes(w)[0], codes.int())
    dorefa, _ = made("weight", "dorefa")
    with pytest.raises(EncodingError, match="'w' cannot be given codes, since dorefa transforms it"):
        dorefa.set_codes(w, codes, "mine")


# -- names and options


@pytest.mark.parametrize(
    ("role", "name", "options", "message"),
    [
        ("activation", "lsd", {}, r"'t': unknown quantizer 'lsd'; did you mean 'lsq'"),
        ("activation", "quantum", {}, r"choose one of static, lsq, lsq_plus, pact, dorefa, tqt, ulq"),
        ("weight", "pact", {}, r"pact is not for a weight; choose one of static, lsq, lsq_plus, dorefa, tqt, ulq"),
        ("activation", "lsq", {"dorp": 0.5}, r"lsq of an activation has no option 'dorp'; did you mean 'drop'"),
        ("weight", "lsq", {"drop": 0.5}, r"lsq of a weight has no option 'drop'"),
        ("weight", "static", {"init": "mean"}, r"has no option 'init'; leave the options out"),
        ("activation", "pact", {"decay": -1.0}, r"option decay of quantizer pact is -1.0; give a number in \[0, 1\]"),
        ("activation", "lsq", {"drop": 1.5}, r"option drop of quantizer lsq is 1.5; give a number in \[0, 1\]"),
        ("weight", "lsq", {"init": "median"}, r"option init .* is 'median'; give one of range, mean"),
        ("activation", "lsq", {"init": "mean"}, r"init mean of quantizer lsq is for symmetric weights"),
        ("activation", "ulq", {"fixed_min": 1}, r"option fixed_min .* is 1; give true or false"),
    ],
)  # fmt: skip
def test_bad_names_and_options(role: str, name: str, options: dict[str, object], message: str) -> None:
    scheme = cases.with_quantizer(cases.UINT4 if role == "activation" else cases.CHANNELS, name, **options)
    with pytest.raises(SchemeError, match=message):
        FakeQuantize(scheme, "t") if role == "activation" else WeightFakeQuantize(scheme, "t", W.shape)


@pytest.mark.parametrize("name", [n for n in cases.LEARNED if n != "tqt"])
def test_powers_of_two_are_not_learned_by_others(name: str) -> None:
    scheme = cases.with_quantizer(cases.UINT4, name).with_(power_of_two=True)
    with pytest.raises(SchemeError, match=f"'t': quantizer {name} learns any scale.*choose tqt or static"):
        FakeQuantize(scheme, "t")


def test_papers_initializations_are_not_for_groups() -> None:
    with pytest.raises(SchemeError, match="per tensor or per channel"):
        WeightFakeQuantize(cases.with_quantizer(cases.GROUPS, "lsq", init="mean"), "w", W.shape)


def test_other_names() -> None:
    names = {"lsq+": "lsq_plus", "qdrop": "static", "ulq_quantize": "ulq", "ulq_retrain": "ulq"}
    assert set(names) == set(QUANTIZER_ALIASES)
    for alias, name in names.items():
        q = FakeQuantize(cases.with_quantizer(cases.UINT4, alias), "x")
        assert q.scheme.quantizer.name == q.method.name == name
    assert FakeQuantize(cases.with_quantizer(cases.UINT4, "qdrop"), "x").method.drop == 0.5
    assert FakeQuantize(cases.with_quantizer(cases.UINT4, "qdrop", drop=0.1), "x").method.drop == 0.1
