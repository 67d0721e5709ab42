"""What changes while training: phases, averages, accumulated gradients, distilled features, early stops, returns."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from training_cases import FakePrepared, Learned, blobs, same_state, small

import qat
from qat.errors import CheckpointError, DataError, TrainError
from qat.train.data import DataSpec, Split, load_data
from qat.train.ema import WeightAverage
from qat.train.evaluate import evaluate
from qat.train.guard import Guard
from qat.train.hooks import Hook
from qat.train.log import TrainingLog, read_log
from qat.train.objective import feature_loss
from qat.train.schedule import norms_frozen_at, phase_at
from qat.train.settings import (
    CheckpointSettings,
    DistillSettings,
    GuardSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
)
from qat.train.store import TrainingCheckpoints
from qat.train.trainer import fit

SGD = OptimizerSettings(lr=0.1, momentum=0.0)
CONSTANT = ScheduleSettings("constant")


# -- phases


def test_phases_by_step() -> None:
    settings = TrainSettings(epochs=4, quantize_after=0.5, freeze_ranges_after=2, freeze_bn_after=3)
    assert [phase_at(settings, s, 10) for s in (0, 4, 5, 19, 20, 39)] == [
        "follow", "follow", "track", "track", "quantize", "quantize",
    ]  # fmt: skip
    assert [norms_frozen_at(settings, s, 10) for s in (0, 29, 30, 39)] == [False, False, True, True]
    assert phase_at(TrainSettings(), 0, 10) == "track"
    assert not norms_frozen_at(TrainSettings(), 10**6, 10)


def test_phases_change_within_an_epoch() -> None:
    model = FakePrepared()
    fit(model, blobs(), TrainSettings(epochs=2, quantize_after=0.5, freeze_ranges_after=1.5, freeze_bn_after=0.5))
    assert model.events == ["follow", "track", "freeze", "quantize", "quantize"]


def test_before_quantization_ranges_follow_and_values_stay_float() -> None:
    x, _ = next(iter(blobs()))
    model = small()
    qmodel = qat.prepare(model, x, target=qat.load_target("onnxruntime-cpu"))
    qmodel.set_phase("follow")
    qmodel.train()
    torch.testing.assert_close(qmodel(x), copy.deepcopy(model).train()(x))
    table = qmodel.encodings()
    assert {e.provenance for name, e in table.items() if "weight" not in name} <= {"qat", "derived"}
    assert (table["x"].min, table["x"].max) == ((float(x.min()),), (float(x.max()),)) if "x" in table else True


def test_training_without_calibration_observes_first() -> None:
    x, _ = next(iter(blobs()))
    qmodel = qat.prepare(small(), x, target=qat.load_target("onnxruntime-cpu"))
    fit(qmodel, blobs(), TrainSettings(epochs=8, optimizer=SGD, quantize_after=2))
    assert all(e.provenance in ("qat", "derived", "ptq") for e in qmodel.encodings().values())
    assert evaluate(qmodel, blobs()).top1 > 0.95


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs of a training is 0; give 1 or more"),
        ({"optimizer": OptimizerSettings(lr=0.0)}, r"optimizer\.lr of a training is 0\.0; give a positive number"),
        ({"quantizer_lr": -1.0}, r"quantizer_lr of a training is -1\.0"),
        ({"accumulate": 0}, "accumulate of a training is 0; give 1 or more"),
        ({"clip_norm": 0.0}, r"clip_norm of a training is 0\.0"),
        ({"ema": 1.0}, r"ema of a training is 1\.0; give a number between 0 and 1"),
        ({"patience": 0}, "patience of a training is 0"),
        ({"guard": GuardSettings(retries=-1)}, r"guard\.retries of a training is -1"),
        ({"guard": GuardSettings(factor=1.0)}, r"guard\.factor of a training is 1\.0"),
        ({"guard": GuardSettings(blow_up=1.0)}, r"guard\.blow_up of a training is 1\.0; give more than 1"),
        ({"checkpoint": CheckpointSettings(keep=0)}, r"checkpoint\.keep of a training is 0"),
        ({"checkpoint": CheckpointSettings(every_steps=0)}, r"checkpoint\.every_steps of a training is 0"),
        ({"checkpoint": CheckpointSettings(every_seconds=0)}, r"checkpoint\.every_seconds of a training is 0"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        TrainSettings(**settings)


# -- rates


def test_what_quantizers_learn_has_its_own_rate() -> None:
    rates = []

    class Watch(Hook):
        def loss(self, model: nn.Module) -> Tensor:
            # the gradient of every parameter of both is one
            return sum(p.sum() for p in model.parameters() if p.requires_grad)  # type: ignore[return-value]

        def step_end(self, model: nn.Module) -> None:
            rates.append([float(p.detach().mean()) for p in (model[0].bias, model[1].step_size)])  # type: ignore[index]

    model = nn.Sequential(nn.Conv2d(4, 3, 1), Learned(), nn.Flatten())
    model[0].weight.requires_grad_(False).zero_()
    nn.init.zeros_(model[0].bias)
    before = [0.0, 1.0]
    settings = TrainSettings(optimizer=SGD, schedule=CONSTANT, quantizer_lr=0.1)
    fit(model, Split("train", 4, 4, lambda e: iter([(torch.zeros(4, 4, 1, 1), torch.tensor([0, 1, 2, 0]))])), settings,
        hooks=[Watch()])  # fmt: skip
    moved = [b - a for a, b in zip(before, rates[0], strict=True)]
    assert moved[0] == pytest.approx(-0.1, abs=0.01)
    assert moved[1] == pytest.approx(-0.01, abs=0.001)


# -- accumulated gradients


@pytest.mark.parametrize("sizes", [(8, 8), (8, 3), (5, 2, 1)])
def test_accumulated_gradients_are_those_of_one_large_batch(sizes: tuple[int, ...]) -> None:
    n = sum(sizes)
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(n, 4, 1, 1, generator=generator), torch.arange(n) % 3
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    results = []
    for batches, accumulate in (([(x, y)], 1), (parts, len(parts))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        split = Split("train", n, -(-n // len(batches)), lambda epoch, batches=batches: iter(batches))
        fit(model, split, TrainSettings(optimizer=SGD, schedule=CONSTANT, accumulate=accumulate, clip_norm=0.5))
        results.append(model)
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_epoch_that_does_not_divide_ends_with_a_shorter_step() -> None:
    steps = []

    class Count(Hook):
        def step_end(self, model: nn.Module) -> None:
            steps.append(1)

    fit(small(), blobs(), TrainSettings(epochs=2, accumulate=4), hooks=[Count()])
    assert len(steps) == 4  # of 4 and 2 batches, twice


# -- the average of the weights


def test_the_average_is_the_stated_one() -> None:
    model = small()
    average = WeightAverage(model, 0.5)
    expected = model[4].weight.detach().double().clone()
    for step, decay in enumerate((0.1, 2 / 11, 0.25, 4 / 13, 5 / 14, 0.4, 7 / 16, 8 / 17, 0.5, 0.5)):
        with torch.no_grad():
            model[4].weight.add_(step + 1.0)
            model[1].running_mean.add_(1.0)
        average.update()
        expected = decay * expected + (1 - decay) * model[4].weight.detach().double()
    state = average.state_dict()
    torch.testing.assert_close(state["4.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    assert int(state["updates"]) == 10
    own = {k: v.clone() for k, v in model.state_dict().items()}
    with average.in_place():
        assert torch.equal(model[4].weight, state["4.weight"])
        assert torch.equal(model[1].running_mean, state["1.running_mean"])
        assert torch.equal(model[1].num_batches_tracked, own["1.num_batches_tracked"])
    assert all(torch.equal(own[k], v) for k, v in model.state_dict().items())
    other = WeightAverage(model, 0.5)
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["4.weight"], state["4.weight"])
    with pytest.raises(CheckpointError, match="of another model"):
        other.load_state_dict({"a": torch.zeros(1)})


def test_the_average_is_what_is_validated_and_kept() -> None:
    seen: list[dict[str, Tensor]] = []

    class Watched(Split):
        pass

    model = small()

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        yield from blobs(24).batches(0)

    last: list[dict[str, Tensor]] = []

    class Last(Hook):
        def step_end(self, model: nn.Module) -> None:
            last[:] = [{k: v.clone() for k, v in model.state_dict().items()}]

    validation = Split("validation", 24, 16, batches)
    fit(model, blobs(), TrainSettings(epochs=2, optimizer=SGD, ema=0.99), validation=validation, hooks=[Last()])
    final = model.state_dict()
    assert torch.equal(seen[-1]["4.weight"], final["4.weight"])
    assert not torch.equal(last[0]["4.weight"], final["4.weight"])
    assert torch.equal(last[0]["1.num_batches_tracked"], final["1.num_batches_tracked"])


# -- distillation of features


@given(st.integers(1, 4), st.floats(0.1, 10.0))
def test_feature_losses(n: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(n)
    theirs = torch.randn(n, 3, 2, 2, generator=generator)
    mse, cosine = DistillSettings(feature_loss="mse"), DistillSettings(feature_loss="cosine")
    assert float(feature_loss(theirs, theirs, mse)) == 0.0
    assert float(feature_loss(factor * theirs, theirs, cosine)) == pytest.approx(0.0, abs=1e-5)
    assert float(feature_loss(-theirs, theirs, cosine)) == pytest.approx(2.0, abs=1e-5)
    assert float(feature_loss(factor * theirs, theirs, mse)) == pytest.approx((factor - 1) ** 2, rel=1e-4, abs=1e-6)
    # relative: what both are multiplied with does not matter
    other = theirs + 0.1
    a, b = (float(feature_loss(s * other, s * theirs, mse)) for s in (1.0, factor))
    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_features_pull_towards_the_teacher(kind: str) -> None:
    teacher = small()
    x, _ = next(iter(blobs()))
    apart = []
    for weight in (0.0, 5.0):
        student = small()
        torch.manual_seed(5)
        for parameter in student.parameters():
            nn.init.normal_(parameter, 0.0, 0.3)
        distill = DistillSettings(0.0, features=("0", "2"), feature_loss=kind, feature_weight=weight)  # type: ignore[arg-type]
        settings = TrainSettings(epochs=10, optimizer=OptimizerSettings("adam", lr=0.02), distill=distill)
        fit(student, blobs(), settings, teacher=teacher)
        with torch.no_grad():
            apart.append(float(feature_loss(student[0](x), teacher[0](x), distill)))
        assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())
    assert apart[1] < 0.3 * apart[0]


def test_a_prepared_model_learns_features_of_its_float_model() -> None:
    x, _ = next(iter(blobs()))
    model = small()
    qmodel = qat.prepare(model, x, target=qat.load_target("onnxruntime-cpu"))
    for parameter in (
        qmodel[0].parameters() if hasattr(qmodel, "__getitem__") else qmodel.get_submodule("0").parameters()
    ):
        nn.init.normal_(parameter, 0.0, 0.5)
    settings = TrainSettings(
        epochs=6, optimizer=OptimizerSettings("adam", lr=0.05), distill=DistillSettings(features=("1",))
    )
    records = fit(qmodel, blobs(), settings, teacher=model)
    assert records[-1].loss < 0.7 * records[0].loss


def test_features_that_there_are_not() -> None:
    with pytest.raises(TrainError, match=r"the model has no module 'nine' \(distill\.features\)"):
        fit(small(), blobs(), TrainSettings(distill=DistillSettings(features=("nine",))), teacher=small())
    model = small()
    model.add_module("extra", nn.Identity())
    with pytest.raises(TrainError, match="the float model has no module 'extra'"):
        fit(model, blobs(), TrainSettings(distill=DistillSettings(features=("extra",))), teacher=small())
    assert not any(m._forward_hooks for m in model.modules())

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.spare = small(), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

    with pytest.raises(TrainError, match="module 'spare' of the model gives no tensor"):
        fit(Unused(), blobs(), TrainSettings(distill=DistillSettings(features=("spare",))), teacher=Unused())


# -- early stop


def test_training_ends_where_it_gets_no_better_and_the_best_is_kept(tmp_path: Path) -> None:
    states: list[dict[str, Tensor]] = []

    class Keep(Hook):
        def epoch_end(self, model: nn.Module, record: object) -> None:
            states.append({k: v.clone() for k, v in model.state_dict().items()})

    said: list[str] = []
    model = small()
    # everything is right after few epochs, and cannot be more so
    settings = TrainSettings(epochs=30, optimizer=SGD, schedule=CONSTANT, patience=2)
    store = TrainingCheckpoints(tmp_path / "c")
    validation = blobs(24, name="validation")
    records = fit(model, blobs(), settings, validation=validation, hooks=[Keep()], say=said.append, store=store)
    best = max(range(len(records)), key=lambda i: (records[i].validation_top1 or 0, -i))
    assert len(records) == best + 3 < 30
    assert all(torch.equal(v, states[best][k]) for k, v in model.state_dict().items())
    assert said[-2:] == [
        f"  no better epoch than {best + 1} in 2: training ends after epoch {len(records)}",
        f"  the model of epoch {best + 1} is kept",
    ]
    again = small()
    told: list[str] = []
    assert fit(again, blobs(), settings, validation=validation, store=store, say=told.append) == records
    assert told[0] == "  resuming after the last epoch"
    assert same_state(again, model)


def test_without_validation_images_the_loss_of_training_counts() -> None:
    wild = TrainSettings(epochs=12, optimizer=OptimizerSettings(lr=0.0001, momentum=0.0), schedule=CONSTANT, patience=1)

    class Worse(Hook):
        def __init__(self) -> None:
            self.epoch = 0

        def epoch_start(self, model: nn.Module, epoch: int) -> None:
            self.epoch = epoch

        def loss(self, model: nn.Module) -> Tensor:
            return torch.tensor(0.5 * abs(self.epoch - 2))

    records = fit(small(), blobs(), wild, hooks=[Worse()])
    assert len(records) == 4


# -- divergence


def test_the_guard_sees_blow_ups_only() -> None:
    guard = Guard(GuardSettings(blow_up=5.0))
    assert [guard.see(v) for v in [2.3] * 50 + [2.6, 3.5, 9.0, 2.0] + [0.5] * 50 + [1.4] * 50] == [None] * 154
    causes = [guard.see(20.0) for _ in range(20)]
    assert not guard.calm
    assert any(cause is not None and cause.startswith("the loss rose to") for cause in causes)
    assert guard.see(math.nan) == "the loss is nan"
    assert guard.see(-math.inf) == "the loss is -inf"
    early = Guard(GuardSettings(blow_up=5.0))
    assert [early.see(v) is None for v in (2.3, 1e6)] == [True, False]
    # small losses may vary by much more
    low = Guard(GuardSettings(blow_up=5.0))
    assert [low.see(v) for v in [0.001] * 20 + [0.5] * 20] == [None] * 40
    assert (guard.step_back(), guard.step_back(), guard.step_back(), guard.step_back()) == (True, True, True, False)
    assert (guard.rate, guard.returns) == (0.125, 3)
    other = Guard(GuardSettings())
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == guard.state_dict()
    fresh = Guard(GuardSettings())
    fresh.load_state_dict(Guard(GuardSettings()).state_dict())
    assert fresh.calm


class Bomb(Hook):
    """Makes the loss of some step explode while the rate is above a limit."""

    name = "bomb"

    def __init__(self, step: int, value: float, times: int) -> None:
        self.steps, self.step, self.value, self.times = 0, step, value, times

    def loss(self, model: nn.Module) -> Tensor | None:
        self.steps += 1
        if self.steps >= self.step and self.times > 0:
            self.times -= 1
            return torch.tensor(self.value)
        return None


def test_training_goes_back_to_the_last_good_state(tmp_path: Path) -> None:
    said: list[str] = []
    log = TrainingLog(tmp_path / "log.jsonl", every=1)
    settings = TrainSettings(epochs=4, optimizer=SGD, schedule=CONSTANT)
    model = small()
    records = fit(model, blobs(), settings, hooks=[Bomb(15, math.nan, 2)], say=said.append, log=log)
    # the 15th step is the third of the third epoch; after a return its first step explodes again
    assert said == [
        "  the loss is nan in epoch 3, step 3: back to epoch 3, step 1, with 0.5 of the learning rate (1 of 3)",
        "  the loss is nan in epoch 3, step 1: back to epoch 3, step 1, with 0.25 of the learning rate (2 of 3)",
    ]
    assert [r.lr for r in records] == pytest.approx([0.1, 0.1, 0.025, 0.025])
    lines = read_log(tmp_path / "log.jsonl")
    returns = [r for r in lines if r["kind"] == "return"]
    assert [(r["epoch"], r["step"], r["rate"], r["cause"]) for r in returns] == [(3, 12, 0.25, "the loss is nan")]
    assert [r["step"] for r in lines if r["kind"] == "step"] == list(range(1, 25))
    assert evaluate(model, blobs()).top1 > 0.95


def test_a_blow_up_that_stays_is_an_error_with_epoch_and_step() -> None:
    settings = TrainSettings(epochs=4, optimizer=SGD, guard=GuardSettings(retries=2, factor=0.1))
    message = (
        r"the loss is inf in epoch 3, step 1, also after 2 returns with rates down to 0\.01 of the asked one; lower"
    )
    with pytest.raises(TrainError, match=message):
        fit(small(), blobs(), settings, hooks=[Bomb(13, math.inf, 99)])
    with pytest.raises(TrainError, match=r"the loss is nan in epoch 1, step 2; lower the learning rate"):
        fit(small(), blobs(), TrainSettings(guard=GuardSettings(retries=0)), hooks=[Bomb(2, math.nan, 9)])


def test_a_gradient_that_is_not_finite_is_noticed_before_the_step() -> None:
    class Steep(Hook):
        def loss(self, model: nn.Module) -> Tensor:
            p = next(model.parameters())
            return (p - p.detach()).abs().sum().sqrt()  # value 0, gradient nan

    with pytest.raises(TrainError, match="the norm of the gradient is nan in epoch 1, step 1"):
        fit(small(), blobs(), TrainSettings(clip_norm=1.0, guard=GuardSettings(retries=0)), hooks=[Steep()])


def test_a_real_divergence_is_mended_by_lower_rates() -> None:
    said: list[str] = []
    settings = TrainSettings(epochs=6, optimizer=OptimizerSettings(lr=1e6, momentum=0.0), schedule=CONSTANT,
                             guard=GuardSettings(retries=8, factor=0.1))  # fmt: skip
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 3))
    records = fit(model, blobs(), settings, say=said.append)
    assert said
    assert all("back to epoch" in line for line in said)
    assert math.isfinite(records[-1].loss)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_are_not_finite_are_named(value: float) -> None:
    split = blobs()

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(split.batches(epoch)):
            yield (x * value if (epoch, i) == (1, 2) else x), y

    with pytest.raises(DataError, match="images of epoch 2, step 3 hold nan or inf; check the data"):
        fit(small(), Split("train", split.n, split.batch_size, batches), TrainSettings(epochs=3))


# -- batches that do not divide


def test_a_last_batch_of_one_image_is_left_out_where_norms_are_trained() -> None:
    split, said = blobs(33, 16), list[str]()
    (record,) = fit(small(), split, TrainSettings(), say=said.append)
    assert said == ["  batches of one image are left out: batch norms cannot be trained on them"]
    assert math.isfinite(record.loss)
    said.clear()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    fit(plain, split, TrainSettings(), say=said.append)
    assert said == []
    with pytest.raises(DataError, match=r"batches of one image cannot train batch norms; give a larger"):
        fit(small(), blobs(3, 1), TrainSettings())


@pytest.mark.parametrize(("last", "steps"), [("drop", 2), ("keep", 3)])
def test_a_batch_size_that_does_not_divide(last: str, steps: int) -> None:
    split = load_data(DataSpec("digits", batch_size=32, limit={"train": 80}, last_batch=last)).train  # type: ignore[arg-type]
    assert split is not None
    sizes = [x.shape[0] for x, _ in split.batches(0)]
    assert len(sizes) == split.steps == steps
    assert sum(sizes) == (80 if last == "keep" else 64)
    said: list[str] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    fit(model, split, TrainSettings(), say=said.append)
    expected = ["  16 of 80 training images, others in each epoch, make no whole batch of 32 and are left out"]
    assert [line.split(" (")[0] for line in said] == (expected if last == "drop" else [])


def test_validation_images_are_held_out_of_everything_else() -> None:
    plain = load_data(DataSpec("digits", batch_size=10, limit={"train": 200}))
    data = load_data(DataSpec("digits", batch_size=10, limit={"train": 200}, validation=50))
    assert data.validation is not None
    assert data.train is not None
    assert plain.validation is None
    assert (data.train.n, data.validation.n, data.calibration.n) == (150, 50, 150)

    def rows(split: Split) -> set[bytes]:
        return {image.numpy().tobytes() for x in split.images() for image in x}

    assert plain.train is not None
    assert rows(data.validation) | rows(data.calibration) == rows(plain.train)
    assert len(rows(data.validation) & rows(data.calibration)) <= 1  # scans may be the same
    with pytest.raises(DataError, match=r"data\.validation holds out 200 of 200 training images"):
        load_data(DataSpec("digits", limit={"train": 200}, validation=200))


def test_checkpoints_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    real = TrainingCheckpoints.save

    def save(self: TrainingCheckpoints, snapshot: object) -> None:
        real(self, snapshot)  # type: ignore[arg-type]
        saved.append(max(p.name for p in self.folder.iterdir()))

    monkeypatch.setattr(TrainingCheckpoints, "save", save)
    settings = TrainSettings(checkpoint=CheckpointSettings(every_seconds=1e-9, keep=1))
    fit(small(), blobs(), settings, store=TrainingCheckpoints(tmp_path, 1))
    assert saved == [
        *(f"epoch-0000-step-00000{i}.safetensors" for i in range(1, 6)),
        "epoch-0001-step-000000.safetensors",
    ]
    assert len(list(tmp_path.iterdir())) == 1
