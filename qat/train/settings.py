"""How a model is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qat.errors import TrainError
from qat.train.oscillation_settings import OscillationSettings


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
    """Learning from the float model beside the labels: its scores (Hinton, Vinyals, Dean 2015) and inner activations.

    Attributes:
        weight: Share of the distillation loss of the scores in the loss of the scores, 0 to 1.
        temperature: Divides the scores of both before the softmax; the loss is multiplied by its square.
        features: Module paths whose outputs the model shall have as the float model has them
            (Romero et al., "FitNets", 2015).
        feature_loss: `mse`, the mean squared difference over the mean square of the float model's; or `cosine`, one
            minus the cosine between both, each image's output being one vector.
        feature_weight: What the mean of the feature losses is multiplied with before it is added.
    """

    weight: float = 0.5
    temperature: float = 4.0
    features: tuple[str, ...] = ()
    feature_loss: Literal["mse", "cosine"] = "mse"
    feature_weight: float = 1.0


@dataclass(frozen=True)
class GuardSettings:
    """What is done when training diverges: back to the last good state, with a lower rate.

    Attributes:
        retries: How often before it is an error; 0 for at once.
        factor: What the learning rate is multiplied with each time.
        blow_up: The loss has blown up where its moving average is that many times its lowest so far, and at least one
            nat above it.
    """

    retries: int = 3
    factor: float = 0.5
    blow_up: float = 5.0


@dataclass(frozen=True)
class CheckpointSettings:
    """When a training writes down where it is, besides after every epoch.

    Attributes:
        every_steps: After so many batches of an epoch, or None.
        every_seconds: After so much time, or None.
        keep: Newest checkpoints that are kept; the one of the best epoch is kept besides.
    """

    every_steps: int | None = None
    every_seconds: float | None = None
    keep: int = 3


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained. Times in epochs may be fractions.

    Attributes:
        epochs: Times the training images are gone through.
        optimizer: Which optimizer.
        schedule: How the learning rate changes.
        quantizer_lr: Learning rate of what quantizers learn (scales, clipping values), as a multiple of the others'.
        accumulate: Batches whose gradients make one step of the optimizer.
        clip_norm: Largest norm of the gradient of all parameters, or None.
        label_smoothing: Share of the target that is spread over all classes.
        quantize_after: Epochs in which ranges follow the activations, but nothing is fake-quantized yet.
        freeze_ranges_after: Epochs after which activation ranges stand still, or None for never.
        freeze_bn_after: Epochs after which batch norm statistics stand still, or None for never.
        ema: Decay of a moving average of the weights after each step, or None. Early on it is
            `(1 + steps) / (10 + steps)` where that is less. The average is what is validated and kept.
        distill: Learning from the float model, or None.
        autocast: `bf16` to run the forward pass under bfloat16 autocast, or None.
        patience: Epochs without a better result (top-1 of the validation images; without these the loss of training)
            after which training ends; the model of the best epoch is kept. None for never.
        guard: What is done when training diverges.
        checkpoint: When a training that has somewhere to write writes down where it is.
        oscillation: What is done about weights of few bits whose codes flip back and forth.

    Raises:
        TrainError: A number is outside of what it may be; it is named.
    """

    epochs: int = 1
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    quantizer_lr: float = 1.0
    accumulate: int = 1
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    quantize_after: float = 0.0
    freeze_ranges_after: float | None = None
    freeze_bn_after: float | None = None
    ema: float | None = None
    distill: DistillSettings | None = None
    autocast: Literal["bf16"] | None = None
    patience: int | None = None
    guard: GuardSettings = field(default_factory=GuardSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    oscillation: OscillationSettings = field(default_factory=OscillationSettings)

    def __post_init__(self) -> None:
        every, seconds = self.checkpoint.every_steps, self.checkpoint.every_seconds
        for name, value, fits, legal in (
            ("epochs", self.epochs, self.epochs >= 1, "1 or more"),
            ("optimizer.lr", self.optimizer.lr, self.optimizer.lr > 0, "a positive number"),
            ("quantizer_lr", self.quantizer_lr, self.quantizer_lr > 0, "a positive number"),
            ("accumulate", self.accumulate, self.accumulate >= 1, "1 or more"),
            ("clip_norm", self.clip_norm, self.clip_norm is None or self.clip_norm > 0, "a positive number"),
            ("ema", self.ema, self.ema is None or 0 < self.ema < 1, "a number between 0 and 1"),
            ("patience", self.patience, self.patience is None or self.patience >= 1, "1 or more"),
            ("guard.retries", self.guard.retries, self.guard.retries >= 0, "0 or more"),
            ("guard.factor", self.guard.factor, 0 < self.guard.factor < 1, "a number between 0 and 1"),
            ("guard.blow_up", self.guard.blow_up, self.guard.blow_up > 1, "more than 1"),
            ("checkpoint.keep", self.checkpoint.keep, self.checkpoint.keep >= 1, "1 or more"),
            ("checkpoint.every_steps", every, every is None or every >= 1, "1 or more"),
            ("checkpoint.every_seconds", seconds, seconds is None or seconds > 0, "a positive number"),
        ):
            if not fits:
                raise TrainError(f"{name} of a training is {value}", f"give {legal}")
