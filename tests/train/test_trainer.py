"""The training loop and the measuring of classifiers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from training_cases import FakePrepared, Learned, blobs, small

from qat.errors import DataError, TrainError
from qat.train.data import Split
from qat.train.evaluate import evaluate, evaluation_mode
from qat.train.hooks import EpochRecord, Hook
from qat.train.objective import classification_loss
from qat.train.optimizer import parameter_groups
from qat.train.schedule import rate_factor
from qat.train.settings import DistillSettings, OptimizerSettings, ScheduleSettings, TrainSettings
from qat.train.trainer import fit


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_fit_learns(name: str, schedule: str) -> None:
    model, split = small(), blobs()
    before = evaluate(model, split)
    settings = TrainSettings(
        epochs=6,
        optimizer=OptimizerSettings(name=name, lr=0.05, weight_decay=1e-4),  # type: ignore[arg-type]
        schedule=ScheduleSettings(schedule, warmup_epochs=0.5, step_epochs=3),  # type: ignore[arg-type]
        clip_norm=1.0,
        label_smoothing=0.05,
    )
    records = fit(model, split, settings)
    after = evaluate(model, split)
    assert [r.epoch for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1].loss < records[0].loss
    assert after.top1 > max(0.95, before.top1)
    assert not model.training


def test_fit_is_reproducible() -> None:
    results = []
    for _ in range(2):
        model = small()
        torch.manual_seed(7)
        fit(model, blobs(), TrainSettings(epochs=2))
        results.append(model.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_bf16_autocast_trains() -> None:
    model = small()
    fit(model, blobs(), TrainSettings(epochs=6, optimizer=OptimizerSettings(lr=0.05), autocast="bf16"))
    assert evaluate(model, blobs()).top1 > 0.95
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_phases_and_frozen_norms_follow_the_settings() -> None:
    model = FakePrepared()
    order = []

    class Watch(Hook):
        def epoch_start(self, model: nn.Module, epoch: int) -> None:
            order.append((epoch, list(model.events)))  # type: ignore[arg-type]

    settings = TrainSettings(epochs=3, freeze_ranges_after=1, freeze_bn_after=2)
    fit(model, blobs(), settings, hooks=[Watch()])
    assert order == [
        (0, ["track"]),
        (1, ["track", "quantize"]),
        (2, ["track", "quantize", "freeze"]),
    ]
    assert model.events[-1] == "quantize"


def test_hooks_get_every_record() -> None:
    seen: list[EpochRecord] = []

    class Keep(Hook):
        def epoch_end(self, model: nn.Module, record: EpochRecord) -> None:
            seen.append(record)

    assert fit(small(), blobs(), TrainSettings(epochs=2), hooks=[Keep()]) == seen
    assert seen[0].to_json()["epoch"] == 1
    # six steps an epoch: the last one of the first epoch is the sixth of twelve on the cosine
    assert seen[0].lr == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 5 / 12)))


def test_distillation_pulls_towards_the_teacher_and_leaves_it_alone() -> None:
    teacher = small()
    fit(teacher, blobs(), TrainSettings(epochs=4, optimizer=OptimizerSettings(lr=0.05)))
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    student = small()
    for parameter in student.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    x, _ = next(iter(blobs()))
    with evaluation_mode(teacher), evaluation_mode(student), torch.no_grad():
        apart = (student(x) - teacher(x)).abs().mean()
    settings = TrainSettings(
        epochs=25,
        optimizer=OptimizerSettings("adam", lr=0.02),
        distill=DistillSettings(weight=1.0, temperature=2.0),
    )
    fit(student, blobs(), settings, teacher=teacher)
    with evaluation_mode(teacher), evaluation_mode(student), torch.no_grad():
        near = (student(x).softmax(1) - teacher(x).softmax(1)).abs().max()
    assert near < 0.1 < apart
    assert teacher.training
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_distillation_without_a_teacher_is_an_error() -> None:
    with pytest.raises(TrainError, match="distillation without a float model"):
        fit(small(), blobs(), TrainSettings(distill=DistillSettings()))


def test_loss_is_the_stated_mixture() -> None:
    scores, teacher = torch.randn(4, 3), torch.randn(4, 3)
    y = torch.tensor([0, 1, 2, 0])
    settings = TrainSettings(distill=DistillSettings(weight=0.25, temperature=3.0))
    p, q = (teacher / 3).softmax(1), (scores / 3).softmax(1)
    soft = (p * (p.log() - q.log())).sum(1).mean() * 9
    hard = -scores.log_softmax(1)[torch.arange(4), y].mean()
    torch.testing.assert_close(classification_loss(scores, y, settings, teacher), 0.75 * hard + 0.25 * soft)
    torch.testing.assert_close(classification_loss(scores, y, TrainSettings()), hard)


def test_weight_decay_spares_norms_biases_and_quantizers() -> None:
    model = small()
    model.add_module("learned", Learned())
    decayed, others, scales = parameter_groups(model, OptimizerSettings(weight_decay=0.1), quantizer_lr=0.25)
    assert {tuple(p.shape) for p in decayed["params"]} == {(8, 4, 1, 1), (3, 8)}
    assert [g["weight_decay"] for g in (decayed, others, scales)] == [0.1, 0.0, 0.0]
    assert [g["lr_share"] for g in (decayed, others, scales)] == [1.0, 1.0, 0.25]
    assert len(others["params"]) == 4
    assert [tuple(p.shape) for p in scales["params"]] == [(2, 2)]
    everything = parameter_groups(model, OptimizerSettings(weight_decay=0.1, decay_all=True))
    assert [(len(g["params"]), g["weight_decay"]) for g in everything] == [(6, 0.1), (1, 0.1)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(DataError, match="no trainable parameter"):
        parameter_groups(model, OptimizerSettings())


def test_schedules() -> None:
    cosine = ScheduleSettings("cosine", warmup_epochs=1, final=0.1)
    rates = [rate_factor(cosine, s, 10, 5) for s in range(51)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == pytest.approx(1.0)
    assert rates[30] == pytest.approx(0.55)
    assert rates[50] == pytest.approx(0.1)
    step = ScheduleSettings("step", step_epochs=2, gamma=0.5)
    assert [rate_factor(step, 10 * e, 10, 6) for e in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert rate_factor(ScheduleSettings("constant"), 99, 10, 5) == 1.0


def test_evaluate_counts_and_gives_modes_back() -> None:
    scores = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    y = torch.tensor([0, 4, 0])
    split = Split("test", 3, 3, lambda _: iter([(torch.zeros(3, 1, 1, 1), y)]))
    metrics = evaluate(lambda x: scores, split)
    assert (metrics.top1, metrics.top5, metrics.n) == (1 / 3, 2 / 3, 3)
    assert metrics.loss == pytest.approx(float(nn.functional.cross_entropy(scores, y)))
    assert metrics.to_json()["n"] == 3
    model = small()
    model[1].eval()
    evaluate(model, blobs())
    assert model.training
    assert not model[1].training


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small(2), "class 2 but the model has 2 classes"),
        (nn.Conv2d(4, 3, 1), r"gives \(16, 3, 1, 1\) for 16 images"),
        (lambda x: (x, x), "gives tuple for 16 images"),
    ],
)
def test_scores_that_do_not_fit_are_named(model: nn.Module, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(model, blobs())


def test_unlabelled_and_empty_splits_are_refused() -> None:
    unlabelled = Split("test", 1, 1, lambda _: iter([]), labelled=False)
    with pytest.raises(DataError, match="test split has no labels"):
        evaluate(small(), unlabelled)
    with pytest.raises(DataError, match="no labelled images"):
        fit(small(), unlabelled, TrainSettings())
    empty = Split("test", 0, 1, lambda _: iter([]))
    with pytest.raises(DataError, match="no images"):
        evaluate(small(), empty)


def test_a_hook_adds_to_the_loss_and_works_after_every_step() -> None:
    steps: list[float] = []

    class Pull(Hook):
        def loss(self, model: nn.Module) -> Tensor:
            return 100.0 * sum((p**2).sum() for p in model.parameters())  # type: ignore[return-value]

        def step_end(self, model: nn.Module) -> None:
            steps.append(float(sum((p.detach() ** 2).sum() for p in model.parameters())))

    settings = TrainSettings(optimizer=OptimizerSettings(lr=1e-3, momentum=0.0))
    (record,) = fit(small(), blobs(), settings, hooks=[Pull()])
    assert len(steps) == 6
    assert steps[-1] < 0.5 * steps[0]
    assert record.loss > 100.0 * steps[-1]
