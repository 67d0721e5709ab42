"""From the parts of a recipe to the settings that the library takes."""

from __future__ import annotations

from pathlib import Path

from qat.recipe.schema import InputPart, Recipe
from qat.recipe.schema_train import DistillPart, TrainPart
from qat.train.data import AugmentSpec, DataSpec, InputSpec
from qat.train.oscillation_settings import OscillationSettings
from qat.train.settings import (
    CheckpointSettings,
    DistillSettings,
    GuardSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
)


def data_spec(recipe: Recipe, *, skip_bad: bool = False) -> DataSpec:
    """Return what a recipe says of its data.

    Args:
        recipe: The recipe, variables expanded.
        skip_bad: Skip unreadable files even where the recipe does not say so.
    """
    data = recipe.data
    area = data.augment.random_area
    return DataSpec(
        name=data.name,
        root=None if data.root is None else Path(data.root).expanduser(),
        batch_size=data.batch_size,
        input=_input_spec(data.input),
        augment=AugmentSpec(
            flip=data.augment.flip,
            crop_padding=data.augment.crop_padding,
            random_area=None if area is None else (area[0], area[1]),
        ),
        seed=recipe.seed,
        limit=data.limit.model_dump(exclude_none=True),
        validation=data.validation,
        last_batch=data.last_batch,
        skip_bad=data.skip_bad or skip_bad,
        workers=data.workers,
        train=data.train,
        calibration=data.calibration,
        test=data.test,
        labels=data.labels,
    )


def _input_spec(part: InputPart) -> InputSpec:
    resize = part.resize
    return InputSpec(
        size=_pair(part.size),
        format=part.format,
        resize=resize if isinstance(resize, int) else _pair(resize),
        crop=_pair(part.crop),
        interpolation=part.interpolation,
        scale=part.scale,
        mean=None if part.mean is None else tuple(part.mean),
        std=None if part.std is None else tuple(part.std),
    )


def _pair(values: list[int] | None) -> tuple[int, int] | None:
    return None if values is None else (values[0], values[1])


def train_settings(part: TrainPart) -> TrainSettings:
    """Return how a train stage trains."""
    optimizer, schedule, distill = part.optimizer, part.schedule, part.distill
    return TrainSettings(
        epochs=part.epochs,
        optimizer=OptimizerSettings(
            name=optimizer.name,
            lr=optimizer.lr,
            momentum=optimizer.momentum,
            nesterov=optimizer.nesterov,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            weight_decay=optimizer.weight_decay,
            decay_all=optimizer.decay_all,
        ),
        schedule=ScheduleSettings(
            name=schedule.name,
            warmup_epochs=schedule.warmup_epochs,
            step_epochs=schedule.step_epochs,
            gamma=schedule.gamma,
            final=schedule.final,
        ),
        quantizer_lr=part.quantizer_lr,
        accumulate=part.accumulate,
        clip_norm=part.clip_norm,
        label_smoothing=part.label_smoothing,
        quantize_after=part.quantize_after,
        freeze_ranges_after=part.freeze_ranges_after,
        freeze_bn_after=part.freeze_bn_after,
        ema=part.ema,
        distill=None if distill is None else _distill_settings(distill),
        autocast=part.autocast,
        patience=part.patience,
        guard=GuardSettings(part.guard.retries, part.guard.factor, part.guard.blow_up),
        checkpoint=CheckpointSettings(part.checkpoint.every_steps, part.checkpoint.every_seconds, part.checkpoint.keep),
        oscillation=OscillationSettings(**part.oscillation.model_dump()),
    )


def _distill_settings(part: DistillPart) -> DistillSettings:
    return DistillSettings(
        weight=part.weight,
        temperature=part.temperature,
        features=tuple(part.features),
        feature_loss=part.feature_loss,
        feature_weight=part.feature_weight,
    )
