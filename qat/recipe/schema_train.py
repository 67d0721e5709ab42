"""The schema of a training stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qat.recipe.schema_base import NAME_SHORT, NotNegative, Part, Positive, Share

#: a time in epochs, which may be a fraction
Epochs = Annotated[float, Field(ge=0.0)]


class OptimizerPart(Part):
    """Which optimizer, and its options."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0.0)] = 0.01
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    nesterov: bool = False
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [0.9, 0.999])
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    decay_all: bool = Field(default=False, description="weight decay also on biases, norms and quantizer parameters")


class SchedulePart(Part):
    """How the learning rate changes."""

    name: Literal["constant", "cosine", "step"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    step_epochs: Positive = 1
    gamma: Annotated[float, Field(gt=0.0)] = 0.1
    final: Share = Field(default=0.0, description="share of the learning rate that cosine ends at")


class DistillPart(Part):
    """Learning from the float model beside the labels."""

    from_: Literal["float"] = Field(default="float", alias="from")
    weight: Share = 0.5
    temperature: Annotated[float, Field(gt=0.0)] = 4.0
    features: list[str] = Field(default_factory=list, description="module paths whose outputs are learned too")
    feature_loss: Literal["mse", "cosine"] = "mse"
    feature_weight: Annotated[float, Field(ge=0.0)] = 1.0


class GuardPart(Part):
    """What is done when training diverges."""

    retries: NotNegative = Field(default=3, description="returns to the last good state before it is an error")
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.5, description="what the learning rate is multiplied with each time"
    )
    blow_up: Annotated[float, Field(gt=1.0)] = Field(
        default=5.0, description="how many times its lowest average the loss may become"
    )


class CheckpointPart(Part):
    """When training writes down where it is, besides after every epoch."""

    every_steps: Positive | None = None
    every_seconds: Annotated[float, Field(gt=0.0)] | None = None
    keep: Positive = Field(default=3, description="newest checkpoints that are kept while training")


class OscillationPart(Part):
    """What is done about weights whose codes flip back and forth (docs/quantizers.md)."""

    enabled: bool | Literal["auto"] = Field(default="auto", description="auto: where weights have fewer than 8 bits")
    momentum: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    dampen: Annotated[float, Field(ge=0.0)] = 0.0
    dampen_schedule: Literal["constant", "cosine"] = "cosine"
    freeze: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.1
    freeze_final: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.01


class TrainPart(Part):
    """Train the float model (phase float, before the first calibrate) or the quantized one (after it)."""

    phase: Literal["float", "quantized"] = "quantized"
    epochs: Positive
    optimizer: Annotated[OptimizerPart, NAME_SHORT[0], NAME_SHORT[1]] = Field(default_factory=OptimizerPart)
    schedule: Annotated[SchedulePart, NAME_SHORT[0], NAME_SHORT[1]] = Field(default_factory=SchedulePart)
    quantizer_lr: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0, description="learning rate of what quantizers learn, as a multiple of the others'"
    )
    accumulate: Positive = Field(default=1, description="batches whose gradients make one step")
    clip_norm: Annotated[float, Field(gt=0.0)] | None = None
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    quantize_after: Epochs = Field(default=0.0, description="epochs in which ranges are only observed")
    freeze_ranges_after: Epochs | None = Field(default=None, description="epochs after which ranges stand still")
    freeze_bn_after: Epochs | None = Field(default=None, description="epochs after which batch norms stand still")
    reestimate_bn: Positive | None = Field(
        default=None, description="images on which batch norm statistics are taken anew after training"
    )
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None, description="decay of a moving average of the weights, which is validated and kept"
    )
    distill: DistillPart | None = None
    autocast: Literal["bf16"] | None = None
    patience: Positive | None = Field(
        default=None, description="epochs without a better one after which training ends; the best one is kept"
    )
    guard: GuardPart = Field(default_factory=GuardPart)
    checkpoint: CheckpointPart = Field(default_factory=CheckpointPart)
    oscillation: OscillationPart = Field(default_factory=OscillationPart)
    log_every: Positive = Field(default=50, description="steps between two lines of metrics.jsonl")
    tensorboard: bool = Field(default=False, description="also write event files for TensorBoard")
