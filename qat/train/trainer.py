"""A plain training loop for classifiers, float or prepared for quantization."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.errors import DataError, TrainError
from qat.train.data import Split
from qat.train.evaluate import check_scores, device_of, evaluation_mode
from qat.train.hooks import EpochRecord, Hook
from qat.train.progress import progress
from qat.train.settings import OptimizerSettings, ScheduleSettings, TrainSettings


@runtime_checkable
class Prepared(Protocol):
    """What the loop needs of a model that was prepared for quantization."""

    def set_phase(self, phase: str) -> Any:
        """Switch to `quantize` (ranges stand still) or `track` (ranges follow the data)."""

    def freeze_batch_norm(self) -> Any:
        """Let batch norm statistics stand still."""


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Split the trainable parameters into those with and without weight decay.

    Weights of two or more dimensions decay; biases, norms and scales (all of fewer dimensions) and the
    parameters of quantizers do not, unless `decay_all`.

    Raises:
        DataError: The model has no trainable parameter.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = parameter.ndim >= 2 and not name.startswith("quantizers.")
        (decayed if settings.decay_all or weight else others).append(parameter)
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, settings.weight_decay), (others, 0.0))
        if group
    ]
    if not groups:
        raise DataError("the model has no trainable parameter", "leave out the train stage, or unfreeze some")
    return groups


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Make the optimizer of a model's trainable parameters."""
    groups = parameter_groups(model, settings)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(groups, settings.lr, betas=settings.betas)


def rate_factor(settings: ScheduleSettings, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return what the learning rate is multiplied with at `step` (from 0)."""
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.name == "cosine":
        whole = max(1, epochs * steps_per_epoch - warmup)
        part = min(1.0, (step - warmup) / whole)
        return settings.final + (1.0 - settings.final) * 0.5 * (1.0 + math.cos(math.pi * part))
    if settings.name == "step":
        return float(settings.gamma ** (step // (settings.step_epochs * steps_per_epoch)))
    return 1.0


def classification_loss(
    scores: Tensor, y: Tensor, settings: TrainSettings, teacher_scores: Tensor | None = None
) -> Tensor:
    """Return the loss of a batch: cross-entropy, mixed with distillation where there is a teacher."""
    scores = scores.float()
    loss = functional.cross_entropy(scores, y, label_smoothing=settings.label_smoothing)
    if settings.distill is None or teacher_scores is None:
        return loss
    t = settings.distill.temperature
    soft = functional.kl_div(
        functional.log_softmax(scores / t, 1),
        functional.log_softmax(teacher_scores.float() / t, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1.0 - settings.distill.weight) * loss + settings.distill.weight * t * t * soft


def fit(
    model: nn.Module,
    split: Split,
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    hooks: Sequence[Hook] = (),
    quiet: bool = False,
    description: str = "train",
) -> list[EpochRecord]:
    """Train a classifier in place; it is left in evaluation mode.

    Args:
        model: Gives scores (N, classes) for images (N, C, H, W) float32. A model that has `set_phase` and
            `freeze_batch_norm` is trained with ranges that follow the data until `freeze_ranges_after`.
        split: Labelled training images.
        settings: How.
        teacher: The float model, where `settings.distill` is given; not changed.
        hooks: Called around every epoch, in order.
        quiet: No progress bar.
        description: Text of the progress bar.

    Raises:
        DataError: The split has no labels, or the scores do not fit them.
        TrainError: The loss is not finite; epoch and step are named.
    """
    if not split.labelled or split.steps == 0:
        raise DataError("the train split has no labelled images", "put the images in class folders or give labels")
    if settings.distill is not None and teacher is None:
        raise TrainError("distillation without a float model", "pass the teacher, or leave out distill")
    optimizer = make_optimizer(model, settings.optimizer)
    steps = split.steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(settings.schedule, step, steps, settings.epochs)
    )
    records = []
    model.train()
    if isinstance(model, Prepared):
        model.set_phase("track")
    for epoch in range(settings.epochs):
        if isinstance(model, Prepared):
            if epoch == settings.freeze_ranges_after:
                model.set_phase("quantize")
            if epoch == settings.freeze_bn_after:
                model.freeze_batch_norm()
        for hook in hooks:
            hook.epoch_start(model, epoch)
        start = time.perf_counter()
        bar = progress(
            split.batches(epoch),
            description=f"{description} {epoch + 1}/{settings.epochs}",
            total=steps,
            quiet=quiet,
        )
        with contextlib.nullcontext() if teacher is None else evaluation_mode(teacher):
            loss, top1, rate = _train_epoch(model, bar, settings, optimizer, scheduler, teacher, hooks, epoch)
        record = EpochRecord(epoch + 1, loss, top1, rate, time.perf_counter() - start)
        records.append(record)
        for hook in hooks:
            hook.epoch_end(model, record)
    if isinstance(model, Prepared):
        model.set_phase("quantize")
    model.eval()
    return records


def _train_epoch(
    model: nn.Module,
    batches: Any,
    settings: TrainSettings,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    teacher: nn.Module | None,
    hooks: Sequence[Hook],
    epoch: int,
) -> tuple[float, float, float]:
    """Train one epoch; return the mean loss, the share of right answers and the learning rate of the last step."""
    device = device_of(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = rate = 0.0
    right = n = 0
    for step, (x, y) in enumerate(batches):
        x, y = x.to(device), y.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast == "bf16"):
            scores = model(x)
        check_scores(scores, y, "train")
        loss = classification_loss(scores, y, settings, _teacher_scores(teacher, x, settings))
        for term in (hook.loss(model) for hook in hooks):
            if term is not None:
                loss = loss + term
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainError(
                f"the loss is {value} in epoch {epoch + 1}, step {step + 1}",
                "lower the learning rate, clip the gradient (clip_norm), or check the data",
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        for hook in hooks:
            hook.step_end(model)
        total += value * int(y.shape[0])
        n += int(y.shape[0])
        right += int((scores.detach().argmax(1) == y).sum())
        batches.set_postfix_str(f"loss {total / n:.4f}, top-1 {100 * right / n:.2f} %", refresh=False)
    if n == 0:
        raise DataError("the train split has no images", "give at least one")
    return total / n, right / n, rate


def _teacher_scores(teacher: nn.Module | None, x: Tensor, settings: TrainSettings) -> Tensor | None:
    if teacher is None or settings.distill is None:
        return None
    with torch.no_grad():
        scores: Tensor = teacher(x)
    return scores
