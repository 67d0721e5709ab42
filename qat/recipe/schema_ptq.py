"""The stages of a recipe that change a model after training: one part for each algorithm, with its own option names."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, Field

from qat.recipe.schema_base import Part, Positive, Share

_Rate = Annotated[float, Field(gt=0.0)]


class AlgorithmPart(Part):
    """What all have in common.

    Attributes:
        needs_ranges: The model must be calibrated before; else it must not be.
        defines_float: What the stage leaves is the float model that later stages aim at.
    """

    needs_ranges: ClassVar[bool] = True
    defines_float: ClassVar[bool] = False

    images: Positive = Field(default=256, description="calibration images that are used")

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of the algorithm, `images` apart."""
        return self.model_dump(exclude={"images"})


class EqualizePart(AlgorithmPart):
    """Scale channels so that quantization loses less; before the first calibrate."""

    needs_ranges: ClassVar[bool] = False
    defines_float: ClassVar[bool] = True

    method: Literal["noise", "weights", "activations"] = "noise"
    strength: Share = Field(
        default=0.5,
        validation_alias=AliasChoices("strength", "migration_strength"),
        description="of `activations`: how much of the range goes into the weights (AMCT: migration_strength)",
    )


class AbsorbPart(AlgorithmPart):
    """Move biases that a ReLU always lets through into the layers behind it; before the first calibrate."""

    needs_ranges: ClassVar[bool] = False
    defines_float: ClassVar[bool] = True


class CorrectBiasPart(AlgorithmPart):
    """Take the mean error of each channel off the biases."""

    method: Literal["empirical", "analytic"] = "empirical"


class BatchNormPart(AlgorithmPart):
    """Set the statistics of batch norms to what quantized layers give them."""


class LearnedRoundingPart(AlgorithmPart):
    """Rounding that is learned."""

    iterations: Positive = Field(
        default=500,
        validation_alias=AliasChoices("iterations", "num_iteration"),
        description="steps a layer or block (AMCT: num_iteration)",
    )
    batch_size: Positive = 32
    learning_rate: _Rate = 1e-2
    reg_param: Annotated[float, Field(ge=0.0)] = 0.01
    warm_start: Share = 0.2
    correct: bool = Field(default=False, description="let weights make up for the error of what their layer reads")


class AdaRoundPart(LearnedRoundingPart):
    """Learn to round each weight up or down, layer by layer."""


class ReconstructPart(LearnedRoundingPart):
    """Learn the rounding block by block (BRECQ), with dropped quantization (QDrop)."""

    blocks: Literal["residual"] | list[str] = Field(default="residual", description="residual, or module paths")
    drop: Share = Field(default=0.5, description="share of activations that stay float while it learns")
    scale_rate: Annotated[float, Field(ge=0.0)] = Field(default=0.0, description="learning rate of activation scales")


class GPTQPart(AlgorithmPart):
    """Round one weight after the other and make up for it with those that follow."""

    damping: _Rate = 0.01
    block_size: Positive = 128
    order: Literal["activation", "natural"] = "activation"
    correct: bool = Field(default=True, description="let weights make up for the error of what their layer reads")
    fit_scales: bool = Field(default=True, description="choose the scale of each output channel too")
    passes: Annotated[int, Field(ge=0)] = Field(default=4, description="how often each code moves once more")


class NUQPart(AlgorithmPart):
    """Restrict weights to a few of the 8-bit values."""

    steps: Literal[16, 32] = Field(
        default=32,
        validation_alias=AliasChoices("steps", "num_steps"),
        description="values that are left (AMCT: num_steps)",
    )
    iterations: Positive = Field(
        default=1,
        validation_alias=AliasChoices("iterations", "num_of_iteration"),
        description="rounds of clustering (AMCT: num_of_iteration)",
    )
    damping: _Rate = 0.01


#: AMCT's names of stages, with the options that they stand for
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ada_quantize": ("adaround", {}),
    "nuq_quantize": ("nuq", {}),
    "dmq_balancer": ("equalize", {"method": "activations"}),
}
#: every algorithm's part by the name of its stage
ALGORITHMS: dict[str, type[AlgorithmPart]] = {
    "equalize": EqualizePart,
    "absorb_high_bias": AbsorbPart,
    "correct_bias": CorrectBiasPart,
    "reestimate_batch_norm": BatchNormPart,
    "adaround": AdaRoundPart,
    "reconstruct": ReconstructPart,
    "gptq": GPTQPart,
    "nuq": NUQPart,
}
