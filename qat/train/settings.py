"""How a model is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, and its options.

    Attributes:
        name: `sgd`, `adam` or `adamw`.
        lr: Learning rate at the end of the warm-up.
        momentum: Of sgd.
        nesterov: Of sgd.
        betas: Of adam and adamw.
        weight_decay: Of the weights; biases, norms and quantizer parameters only with `decay_all`.
        decay_all: Weight decay on every parameter.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    decay_all: bool = False


@dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate changes, step by step.

    Attributes:
        name: `constant`, `cosine` (to `final` of the rate) or `step` (times `gamma` after every
            `step_epochs`).
        warmup_epochs: Linear rise from nearly 0, in epochs (may be a fraction).
        step_epochs: See `name`.
        gamma: See `name`.
        final: See `name`.
    """

    name: Literal["constant", "cosine", "step"] = "cosine"
    warmup_epochs: float = 0.0
    step_epochs: int = 1
    gamma: float = 0.1
    final: float = 0.0


@dataclass(frozen=True)
class DistillSettings:
    """Learning from the float model's scores beside the labels (Hinton, Vinyals, Dean 2015).

    Attributes:
        weight: Share of the distillation loss in the whole, 0 to 1.
        temperature: Divides the scores of both before the softmax; the loss is multiplied by its square.
    """

    weight: float = 0.5
    temperature: float = 4.0


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained.

    Attributes:
        epochs: Times the training images are gone through.
        optimizer: Which optimizer.
        schedule: How the learning rate changes.
        clip_norm: Largest norm of the gradient of all parameters, or None.
        label_smoothing: Share of the target that is spread over all classes.
        freeze_ranges_after: Epochs after which activation ranges stand still, or None for never.
        freeze_bn_after: Epochs after which batch norm statistics stand still, or None for never.
        distill: Learning from the float model, or None.
        autocast: `bf16` to run the forward pass under bfloat16 autocast, or None.
    """

    epochs: int = 1
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    freeze_ranges_after: int | None = None
    freeze_bn_after: int | None = None
    distill: DistillSettings | None = None
    autocast: Literal["bf16"] | None = None
