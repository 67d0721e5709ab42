"""The schema of a recipe, version 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer

from qat.recipe.schema_base import NAME_SHORT as _NAME_SHORT
from qat.recipe.schema_base import NotNegative, Part, Positive, Share
from qat.recipe.schema_base import shorter as _or
from qat.recipe.schema_ptq import (
    ALIASES,
    AbsorbPart,
    AdaRoundPart,
    AlgorithmPart,
    BatchNormPart,
    CorrectBiasPart,
    EqualizePart,
    GPTQPart,
    NUQPart,
    ReconstructPart,
)
from qat.recipe.schema_train import TrainPart

VERSION = 1


_SIZE_SHORT = _or("integer", lambda v: [v, v] if isinstance(v, int) else v)
#: (height, width), or one number for both
Size = Annotated[list[Positive], Field(min_length=2, max_length=2), _SIZE_SHORT[0], _SIZE_SHORT[1]]
_LIST_SHORT = _or("string", lambda v: [v] if isinstance(v, str) else v)
_FLOAT_SHORT = _or("string", lambda v: {"float": True} if v == "float" else v)


class ModelPart(Part):
    """Where the float model comes from."""

    factory: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] = Field(
        description="`package.module:callable`, called with kwargs"
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the factory")
    weights: str | None = Field(default=None, description="safetensors file or saved state_dict; ${VAR} is expanded")


class InputPart(Part):
    """How an image becomes the model's input: (pixels * scale / 255 - mean) / std."""

    size: Size | None = Field(default=None, description="height and width that the model takes")
    format: Literal["RGB", "BGR", "GRAY"] | None = None
    resize: Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="length of the shorter side, or exact height and width"
    )
    crop: Size | None = Field(default=None, description="height and width of the central crop")
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    scale: Literal[1, 255] = Field(default=1, description="what the brightest pixel becomes before mean and std")
    mean: list[float] | None = None
    std: list[float] | None = None


class AugmentPart(Part):
    """How training images are varied."""

    flip: bool = False
    crop_padding: NotNegative = 0
    random_area: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None


class LimitPart(Part):
    """Largest number of images of each split."""

    train: Positive | None = None
    calibration: Positive | None = None
    test: Positive | None = None


class DataPart(Part):
    """Where images come from and how they are fed."""

    name: Literal["digits", "fashion_mnist", "cifar10", "image_folder"]
    root: str | None = Field(default=None, description="folder; ${VAR} is expanded")
    batch_size: Positive = 64
    input: InputPart = Field(default_factory=InputPart)
    augment: AugmentPart = Field(default_factory=AugmentPart)
    limit: LimitPart = Field(default_factory=LimitPart)
    validation: NotNegative = Field(default=0, description="training images held out to watch training by")
    last_batch: Literal["drop", "keep"] = Field(
        default="drop", description="whether a smaller last batch of a training epoch is trained on"
    )
    skip_bad: bool = Field(default=False, description="skip unreadable files, and count them")
    workers: NotNegative = Field(default=1, description="threads that decode images")
    train: str | None = Field(default="train", description="sub-folder of training images (image_folder)")
    calibration: str | None = Field(
        default=None, description="sub-folder of calibration images; null for the training images"
    )
    test: str | None = Field(default="val", description="sub-folder of test images (image_folder)")
    labels: str | None = Field(default=None, description="labels file, below root or absolute; ${VAR} is expanded")


class ObserverPart(BaseModel):
    """An observer by name; every further key is one of its options."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str


class QuantizerPart(BaseModel):
    """A fake quantizer by name; every further key is one of its options."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str


class TensorPart(Part):
    """Changes to a target's default scheme."""

    dtype: Literal["int4", "uint4", "int8", "uint8", "int16", "uint16"] | None = None
    symmetric: bool | None = None
    granularity: Literal["per_tensor", "per_channel", "per_group"] | None = None
    group_size: Positive | None = None
    observer: Annotated[ObserverPart | None, _NAME_SHORT[0], _NAME_SHORT[1]] = None
    quantizer: Annotated[QuantizerPart | None, _NAME_SHORT[0], _NAME_SHORT[1]] = None
    qmin: int | None = None
    qmax: int | None = None
    power_of_two: bool | None = None
    feature_clamp_value: Positive | None = Field(default=None, description="MNN's name: v for qmin -v and qmax v")
    weight_clamp_value: Positive | None = Field(default=None, description="likewise")


class LayerPart(Part):
    """What the layers whose name matches a pattern get instead."""

    activations: TensorPart | None = None
    weights: TensorPart | None = None
    float_: bool = Field(default=False, alias="float", description="the layers stay float; written `pattern: float`")


class SchemePart(Part):
    """How tensors are quantized, where that differs from the target's defaults."""

    activations: TensorPart = Field(default_factory=TensorPart)
    weights: TensorPart = Field(default_factory=TensorPart)
    layers: dict[str, Annotated[LayerPart, _FLOAT_SHORT[0], _FLOAT_SHORT[1]]] = Field(
        default_factory=dict, description="by name or pattern; the later one wins"
    )


class CalibratePart(Part):
    """Choose ranges from data."""

    images: Positive = 512
    only: Literal["all", "missing"] = Field(default="all", description="`missing` keeps the ranges that are set")


def _stage(value: Any) -> Any:
    """Let a stage without options be written as its name alone, or with nothing behind the colon, or by AMCT's name."""
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict):
        return value
    stages = {}
    for key, options in value.items():
        name, given = ALIASES.get(key, (key, {}))
        stages[name] = {**given, **options} if isinstance(options, dict) else given if options is None else options
    return stages


class Stage(Part):
    """One stage: a mapping with a single key."""

    calibrate: CalibratePart | None = None
    train: TrainPart | None = None
    equalize: EqualizePart | None = None
    absorb_high_bias: AbsorbPart | None = None
    correct_bias: CorrectBiasPart | None = None
    reestimate_batch_norm: BatchNormPart | None = None
    adaround: AdaRoundPart | None = None
    reconstruct: ReconstructPart | None = None
    gptq: GPTQPart | None = None
    nuq: NUQPart | None = None

    @property
    def kind(self) -> str:
        """Name of the stage."""
        return next(iter(self.model_fields_set))

    @property
    def algorithm(self) -> AlgorithmPart | None:
        """The part of a post-training algorithm."""
        part = getattr(self, self.kind)
        return part if isinstance(part, AlgorithmPart) else None

    @property
    def defines_float(self) -> bool:
        """Whether later stages aim at the float model that this one leaves."""
        return self.train is not None or (self.algorithm is not None and self.algorithm.defines_float)

    @model_serializer(mode="wrap")
    def _only(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if v is not None}


_STAGE_SHORT = _or("string", _stage)


class IoPart(Part):
    """What a file takes and gives."""

    inputs: Literal["float", "codes"] = "float"
    outputs: Literal["float", "codes"] = "float"


_IO_SHORT = _or("string", lambda v: {"inputs": v, "outputs": v} if isinstance(v, str) else v)
Io = Annotated[IoPart, _IO_SHORT[0], _IO_SHORT[1]]


class OnnxPart(Part):
    """The ONNX file."""

    opset: Annotated[int, Field(ge=13)] = 21
    verify: Literal["outputs", "layers"] = "outputs"
    samples: Positive = Field(default=64, description="images that are executed and compared")
    bound: Annotated[float, Field(ge=0.0)] = Field(default=1.0, description="largest difference in codes of an output")
    unequal_share: Share = Field(default=0.01, description="largest share of an output's codes that may differ")


class TflitePart(Part):
    """The `.tflite` file, int8; needs `pip install 'qat[litert]'`."""

    io: Io = Field(default_factory=IoPart, description="what the file takes and gives; one word for both ends")
    batch_size: Positive = Field(default=1, description="the file's batch size, which is fixed")
    verify: Literal["outputs", "layers"] = "outputs"
    samples: Positive = Field(default=16, description="images that are executed and compared")


class PackagesPart(Part):
    """One package for each family of devices among the targets, in `packages/`."""

    golden: Positive = Field(default=4, description="golden samples, which every runtime executes")
    io: Io = Field(default_factory=IoPart, description="what the artifacts take and give; one word for both ends")


_PACKAGES_SHORT = _or("boolean", lambda v: ({} if v else None) if isinstance(v, bool) else v)


class ExportPart(Part):
    """What is written and verified."""

    onnx: OnnxPart | None = None
    tflite: TflitePart | None = None
    packages: Annotated[PackagesPart | None, _PACKAGES_SHORT[0], _PACKAGES_SHORT[1]] = None


class ExpectPart(Part):
    """The recipe's contract; a run that does not meet it fails."""

    top1: Share | None = Field(
        default=None, description="top-1 of the last quantized result (ONNX Runtime where exported)"
    )
    tolerance: Share = Field(default=0.0, description="by how much top-1 may stay below")
    max_drop: Annotated[float, Field(ge=-1.0, le=1.0)] | None = Field(
        default=None, description="largest top-1 of the float model less that of the last quantized result"
    )
    integer_macs: Share | None = Field(default=None, description="smallest share of integer multiply-accumulates")


class Recipe(Part):
    """A validated recipe."""

    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: NotNegative = 0
    threads: Positive | None = Field(default=None, description="CPU threads; null for torch's choice")
    device: Literal["cpu", "cuda", "auto"] = Field(default="cpu", description="where is trained and calibrated")
    model: ModelPart
    data: DataPart
    target: Annotated[list[str], Field(min_length=1), _LIST_SHORT[0], _LIST_SHORT[1]] = Field(
        default_factory=lambda: ["onnxruntime-cpu"], description="one target or several (their intersection)"
    )
    scheme: SchemePart = Field(default_factory=SchemePart)
    stages: list[Annotated[Stage, _STAGE_SHORT[0], _STAGE_SHORT[1]]] = Field(default_factory=list)
    export: ExportPart = Field(default_factory=ExportPart)
    expect: ExpectPart = Field(default_factory=ExpectPart)

    def to_data(self) -> dict[str, Any]:
        """Return the plain data of the recipe, defaults included, as it may be written in YAML."""
        data = self.model_dump(by_alias=True)
        data["scheme"] = self.scheme_data()
        return data

    def scheme_data(self) -> dict[str, Any]:
        """Return the scheme as `qat.plan` and `qat.prepare` take it: given values only."""
        scheme = self.scheme
        return {
            "activations": scheme.activations.model_dump(exclude_none=True),
            "weights": scheme.weights.model_dump(exclude_none=True),
            "layers": {
                pattern: "float" if part.float_ else part.model_dump(exclude_none=True, exclude={"float_"})
                for pattern, part in scheme.layers.items()
            },
        }


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes."""
    return Recipe.model_json_schema(by_alias=True)
