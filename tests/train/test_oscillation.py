"""Oscillations: what is counted, frozen and dampened, against the paper's formulas step by step."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.errors import CheckpointError, StateError
from qat.graph.prepared import PreparedModel
from qat.train.oscillation import OscillationTracker, prepared_model
from qat.train.oscillation_settings import OscillationSettings

TARGET = qat.load_target("onnxruntime-cpu")
X = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def net(weights: dict[str, Any] | None = None, **scheme: Any) -> PreparedModel:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(96, 4)
    )
    model.train()
    with torch.no_grad():
        for _ in range(10):
            model(X)
    scheme = {"weights": weights or {"dtype": "int4", "quantizer": "lsq"}, **scheme}
    qmodel = qat.prepare(model, X[:2], target=TARGET, scheme=scheme)
    qat.calibrate(qmodel, [X], progress=False)
    qmodel.train()
    qmodel.set_phase("track")
    return qmodel


def codes(qmodel: PreparedModel) -> dict[str, Tensor]:
    return {key: q.codes(weight)[0] for key, q, weight in qmodel.weight_quantizers()}


def write(qmodel: PreparedModel, key: str, element: int, code: float) -> None:
    """Give one element of a weight the value of a code."""
    for name, quantizer, weight in qmodel.weight_quantizers():
        if name == key:
            _, step, zero_point = quantizer.steps(weight)
            with torch.no_grad():
                weight.view(-1)[element] = ((code - zero_point) * step).view(-1)[element]


def train(qmodel: PreparedModel, tracker: OscillationTracker, steps: int, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=lr, momentum=0.9)
    y = torch.arange(32) % 4
    for _ in range(steps):
        loss = F.cross_entropy(qmodel(X), y)
        dampening = tracker.loss(qmodel)
        optimizer.zero_grad()
        (loss if dampening is None else loss + dampening).backward()
        optimizer.step()
        tracker.step_end(qmodel)


SCHEMES = {
    "lsq": {"dtype": "int4", "quantizer": "lsq"},
    "follows": {"dtype": "int4", "observer": "minmax"},
    "kept": {"dtype": "int4", "observer": "histogram"},
    "dorefa": {"dtype": "int4", "quantizer": "dorefa", "observer": "minmax"},
    "per tensor": {"dtype": "int4", "quantizer": "tqt", "granularity": "per_tensor"},
}


def test_frequency_and_average_by_the_equations() -> None:
    qmodel = net()
    key, m = "0.weight", 0.25
    tracker = OscillationTracker(qmodel, weights=[key], momentum=m)
    tracker.step_end(qmodel)
    start = int(codes(qmodel)[key].view(-1)[5])
    path = [start + d for d in (1, 1, 0, 1, 2, 1, 1, 0)]
    # up; stays; down against up; up against down; up as before; down; stays; down as before
    expected, average, frequency = [0, 0, 1, 1, 0, 1, 0, 0], float(start), 0.0
    for code, oscillates in zip(path, expected, strict=True):
        write(qmodel, key, 5, code)
        tracker.step_end(qmodel)
        average = m * code + (1 - m) * average
        frequency = m * oscillates + (1 - m) * frequency
        state = tracker.state_dict()
        assert float(state[f"{key}.average"].view(-1)[5]) == pytest.approx(average, rel=1e-5)
        assert float(state[f"{key}.frequency"].view(-1)[5]) == pytest.approx(frequency, rel=1e-5)
        assert int(state[f"{key}.codes"].view(-1)[5]) == code
    other = tracker.state_dict()[f"{key}.frequency"].view(-1)
    assert int((other > 0).sum()) == 1
    assert tracker.metrics() == {"oscillating": pytest.approx(1 / other.numel())}
    assert tracker.rates() == {key: pytest.approx(1 / other.numel())}


@pytest.mark.parametrize("start", [1, -7])
def test_a_weight_above_the_threshold_keeps_the_code_that_is_nearer_to_its_average(start: int) -> None:
    """Also where the average still remembers where the weight came from, outside of the two codes."""
    qmodel = net()
    key = "0.weight"
    write(qmodel, key, 7, start)
    tracker = OscillationTracker(qmodel, weights=[key], momentum=0.1, freeze=0.25)
    tracker.step_end(qmodel)
    for step in range(12):
        write(qmodel, key, 7, 2 if step % 4 == 3 else 1)
        tracker.step_end(qmodel)
        if tracker.state_dict()[f"{key}.frozen"].view(-1)[7]:
            break
    state = tracker.state_dict()
    assert step > 3
    assert int(state[f"{key}.frozen"].sum()) == 1
    held = int(state[f"{key}.held"].view(-1)[7])
    average = float(state[f"{key}.average"].view(-1)[7])
    assert (round(average) in (1, 2)) == (start == 1)
    assert held == min((1, 2), key=lambda code: abs(code - average))
    assert int(codes(qmodel)[key].view(-1)[7]) == held
    # the scale and the batch norm move, the optimizer writes what it likes: the code stays
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        with torch.no_grad():
            for _, p in qmodel.named_parameters():
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=generator))
            qmodel.get_submodule("1").running_var.mul_(1.3)  # type: ignore[operator,union-attr]
        write(qmodel, key, 7, -5)
        tracker.step_end(qmodel)
        assert int(codes(qmodel)[key].view(-1)[7]) == held
    assert tracker.metrics()["frozen"] == pytest.approx(float(tracker.state_dict()[f"{key}.frozen"].float().mean()))


@pytest.mark.parametrize("name", SCHEMES)
def test_frozen_weights_do_not_grow_with_the_statistics_of_a_batch_norm(name: str) -> None:
    """The statistics are those of the weight's own results: what grows with them runs away."""
    qmodel = net(SCHEMES[name])
    tracker = OscillationTracker(qmodel, weights=["0.weight"], momentum=0.1, freeze=0.05)
    train(qmodel, tracker, 12, lr=0.3)
    frozen = tracker.state_dict()["0.weight.frozen"].bool()
    module, norm = qmodel.get_submodule("0"), qmodel.get_submodule("1")
    _, quantizer, weight = next(iter(qmodel.weight_quantizers()))
    assert int(frozen.sum()) > 10
    with torch.no_grad():
        before = module.weight.clone()
        norm.running_var.mul_(4.0)  # type: ignore[operator,union-attr]
        for _ in range(3):
            tracker.step_end(qmodel)
        _, step, _ = quantizer.steps(weight)
        away = (module.weight - before).abs() / step
    # without a grid that follows, the value is rounded to another one
    limit = 0.51 if name in ("kept", "per tensor") else 1e-4
    assert float(away[frozen].max()) < limit


@pytest.mark.parametrize("name", SCHEMES)
def test_frozen_codes_stay_through_training(name: str) -> None:
    qmodel = net(SCHEMES[name])
    # a rate at which many weights cross borders, and a threshold that one oscillation is enough for
    tracker = OscillationTracker(qmodel, momentum=0.1, freeze=0.05)
    train(qmodel, tracker, 12, lr=0.3)
    frozen = {k: tracker.state_dict()[f"{k}.frozen"].clone() for k in tracker.weights}
    share = tracker.metrics()["frozen"]
    assert 0.0 < share < 1.0
    before, values = codes(qmodel), {key: w.detach().clone() for key, _, w in qmodel.weight_quantizers()}
    train(qmodel, tracker, 6, lr=0.3)
    after, weights = codes(qmodel), {key: w for key, _, w in qmodel.weight_quantizers()}
    for key, held in frozen.items():
        if name in ("kept", "per tensor") and key == "0.weight":
            # the statistics of the batch norm behind it move a grid that they are no part of: the value stays
            assert torch.equal(values[key][held], weights[key][held])
        else:
            assert torch.equal(before[key][held], after[key][held]), key
        assert torch.equal(after[key].to(torch.int16), tracker.state_dict()[f"{key}.codes"])
    assert any(not torch.equal(before[key], after[key]) for key in frozen)
    # and what is exported has them
    assert all(bool(torch.isfinite(p).all()) for p in qmodel.parameters())
    program = qat.convert(qmodel.eval())
    assert torch.isfinite(program(X)).all()


@pytest.mark.parametrize("name", ["lsq", "follows", "dorefa"])
def test_parts_of_a_weight_are_taken_in_as_the_whole_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for elements in (1 << 15, 7):
        monkeypatch.setattr("qat.train.oscillation_step._IN_CACHE", elements)
        qmodel = net(SCHEMES[name])
        tracker = OscillationTracker(qmodel, momentum=0.3, freeze=0.1)
        train(qmodel, tracker, 6, lr=0.5)
        found.append([*tracker.state_dict().values(), *qmodel.parameters()])
    assert any(bool(t.any()) for t in found[0] if t.dtype == torch.bool)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_happens_where_nothing_is_quantized() -> None:
    qmodel = net()
    qmodel.set_phase("float")
    tracker = OscillationTracker(qmodel, dampen=1.0, freeze=0.1)
    before = copy.deepcopy(dict(qmodel.named_parameters()))
    assert tracker.loss(qmodel) is None
    tracker.step_end(qmodel)
    assert tracker.metrics() == {}
    assert tracker.rates() == {}
    assert all(torch.equal(p, before[n]) for n, p in qmodel.named_parameters())


def test_the_dampening_loss_by_its_equation() -> None:
    qmodel = net()
    tracker = OscillationTracker(qmodel, weights=["0.weight"], dampen=0.5)
    (quantizer, weight) = next((q, w) for k, q, w in qmodel.weight_quantizers() if k == "0.weight")
    with torch.no_grad():
        weight[0] *= 3  # some are clipped
    loss = tracker.loss(qmodel)
    assert loss is not None
    q, encoding = quantizer.codes(weight)
    f = quantizer.factor().double().view(-1, 1, 1, 1)
    s = torch.tensor(encoding.scale, dtype=torch.float64).view(-1, 1, 1, 1)
    latent = weight.detach().double().requires_grad_()
    value = 0.5 * ((q.double() * s - torch.clamp(latent * f, -7 * s, 7 * s)) / f).square().sum()
    assert float(loss.detach()) == pytest.approx(float(value.detach()), rel=1e-5)
    (mine,) = torch.autograd.grad(loss, weight)
    (theirs,) = torch.autograd.grad(value, latent)
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)
    assert (mine == 0).any()


def test_dampening_pulls_weights_to_their_codes() -> None:
    distances = []
    for dampen in (0.0, 5.0):
        qmodel = net()
        tracker = OscillationTracker(qmodel, dampen=dampen)
        train(qmodel, tracker, 25, lr=0.02)
        steps = [q.steps(w)[0] for _, q, w in qmodel.weight_quantizers()]
        distances.append(sum(float((u - u.round()).abs().mean()) for u in steps))
    assert distances[1] < 0.75 * distances[0]


def test_schedules_are_cosines_over_all_steps() -> None:
    qmodel = net()
    tracker = OscillationTracker(
        qmodel, total_steps=5, dampen=0.4, dampen_schedule="cosine", freeze=0.1, freeze_final=0.02
    )
    seen = []
    for _ in range(6):
        seen.append((tracker.dampening, tracker.threshold))
        tracker.step_end(qmodel)
    shares = [0.5 * (1 - math.cos(math.pi * min(i, 4) / 4)) for i in range(6)]
    assert [d for d, _ in seen] == pytest.approx([0.4 * s for s in shares])
    assert [t for _, t in seen] == pytest.approx([0.1 - 0.08 * s for s in shares])
    constant = OscillationTracker(qmodel, dampen=0.4, freeze=0.1)
    assert (constant.dampening, constant.threshold) == (0.4, 0.1)


def test_state_goes_on_where_it_was() -> None:
    qmodel = net()
    tracker = OscillationTracker(qmodel, momentum=0.1, freeze=0.05)
    train(qmodel, tracker, 8, lr=0.3)
    buffer = io.BytesIO()
    torch.save(dict(tracker.state_dict()), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(qmodel)
    other = OscillationTracker(twin, momentum=0.1, freeze=0.05)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for model, which in ((qmodel, tracker), (twin, other)):
        train(model, which, 4, lr=0.3)
    assert all(torch.equal(a, b) for a, b in zip(qmodel.parameters(), twin.parameters(), strict=True))
    mine, theirs = tracker.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    fresh = OscillationTracker(net(), momentum=0.1)
    fresh.load_state_dict(OscillationTracker(net()).state_dict())
    assert fresh.step == 0


def test_bad_state_is_named_and_changes_nothing() -> None:
    qmodel = net()
    tracker = OscillationTracker(qmodel)
    tracker.step_end(qmodel)
    state = dict(tracker.state_dict())
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({k: v for k, v in state.items() if k != "step"}, "lacks 'step'"),
        ({k: v for k, v in state.items() if k != "0.weight.held"}, r"lacks '0\.weight\.held'"),
        ({**state, "9.weight.codes": torch.zeros(1)}, r"unknown entry '9\.weight\.codes'"),
        ({**state, "0.weight.codes": torch.zeros(2, dtype=torch.int16)}, r"'0\.weight\.codes'.*of shape \(2,\)"),
        (
            {**state, "0.weight.average": state["0.weight.average"].double()},
            r"average' of the oscillation state is .*64",
        ),
    ]
    for bad, message in cases:
        other = OscillationTracker(qmodel)
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict(bad)
        assert other.metrics() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.0}, r"oscillation.momentum is 0.0; give a number in \(0, 1\]"),
        ({"dampen": -1.0}, "oscillation.dampen is -1.0"),
        ({"dampen": float("nan")}, "oscillation.dampen is nan"),
        ({"dampen_schedule": "linear"}, "oscillation.dampen_schedule is 'linear'"),
        ({"freeze": 0.0}, "oscillation.freeze is 0.0"),
        ({"freeze": 0.1, "freeze_final": 2.0}, "oscillation.freeze_final is 2.0"),
        ({"freeze": 0.1, "freeze_final": 0.01}, "no length; give total_steps"),
        ({"dampen": 0.1, "dampen_schedule": "cosine"}, "no length; give total_steps"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"weights": ["0.wieght"]}, "no quantized weight '0.wieght'; did you mean '0.weight'"),
        ({"weights": []}, "no weight is to be tracked"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StateError, match=message):
        OscillationTracker(net(), **options)


def test_on_by_default_below_8_bits() -> None:
    mixed = net(layers={"0": {"weights": {"dtype": "int8"}}})
    tracker = OscillationTracker.for_model(mixed, total_steps=100)
    assert tracker is not None
    assert list(tracker.weights) == ["3.weight", "5.weight"]
    assert tracker.settings == OscillationSettings(True)
    eight = net({"dtype": "int8"})
    assert OscillationTracker.for_model(eight, total_steps=100) is None
    assert OscillationTracker.for_model(nn.Linear(2, 2), total_steps=100) is None
    assert OscillationTracker.for_model(mixed, OscillationSettings(enabled=False)) is None
    with pytest.raises(StateError, match="no weight of the model is below 8 bits"):
        OscillationTracker.for_model(eight, OscillationSettings(enabled=True), total_steps=100)
    assert list(OscillationTracker(eight, weights=["0.weight"]).weights) == ["0.weight"]
    with pytest.raises(StateError, match=r"oscillation\.enabled is 'yes'"):
        OscillationSettings(enabled="yes")  # type: ignore[arg-type]


def test_the_model_is_found_within_wrappers() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    qmodel = net()
    assert prepared_model(Wrapper(qmodel)) is qmodel
    assert prepared_model(torch.compile(qmodel, backend="eager")) is qmodel
    with pytest.raises(StateError, match="a Linear has no quantized weights"):
        prepared_model(nn.Linear(2, 2))
