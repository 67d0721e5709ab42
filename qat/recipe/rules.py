"""What must hold between the keys of a recipe."""

from __future__ import annotations

from qat.packages.kinds import KINDS, by_kind
from qat.recipe.schema import Recipe, Stage
from qat.recipe.schema_ptq import AlgorithmPart
from qat.recipe.schema_train import TrainPart

#: keys of a training stage that speak of fake quantization or of the float model
_OF_QUANTIZED = (
    "quantizer_lr",
    "quantize_after",
    "freeze_ranges_after",
    "freeze_bn_after",
    "reestimate_bn",
    "distill",
)


def broken_rules(recipe: Recipe) -> list[str]:
    """Return what contradicts itself in a recipe whose keys and types are right, one line each.

    The order of stages: `train: {phase: float}` stages come first; then what scales the float model (`equalize`,
    `absorb_high_bias`); then at least one `calibrate`; then any mixture of `calibrate`, `train` of the quantized model
    and the other algorithms.
    """
    problems: list[str] = []
    calibrated = quantized = False
    for index, stage in enumerate(recipe.stages):
        where = f"stages[{index}]"
        if len(stage.model_fields_set) != 1:
            given = ", ".join(sorted(stage.model_fields_set)) or "nothing"
            legal = list(Stage.model_fields)
            problems.append(f"{where} has {given}; a stage has exactly one key: {', '.join(legal[:-1])} or {legal[-1]}")
            continue
        if stage.calibrate is not None:
            calibrated = True
        if stage.train is not None:
            problems += _train_rules(f"{where}.train", stage.train, calibrated)
        if stage.algorithm is not None:
            problems += _algorithm_rules(f"{where}.{stage.kind}", stage.algorithm, calibrated)
            quantized = True
        elif stage.train is not None and stage.train.phase == "float" and quantized:
            problems.append(f"{where}.train.phase is float after an algorithm; train the float model before it")
    if recipe.export.onnx is not None and not calibrated:
        problems.append("export.onnx needs ranges; add a calibrate stage")
    if recipe.export.tflite is not None and not calibrated:
        problems.append("export.tflite needs ranges; add a calibrate stage")
    if recipe.export.packages is not None:
        if not calibrated:
            problems.append("export.packages needs ranges; add a calibrate stage")
        if not by_kind(recipe.target):
            known = ", ".join(name for kind in KINDS for name in kind.targets)
            problems.append(f"export.packages: no target of the recipe has a package; those that have one: {known}")
    expect = recipe.expect
    if not calibrated and (expect.top1 is not None or expect.max_drop is not None):
        problems.append("expect.top1 and expect.max_drop speak of the quantized model; add a calibrate stage")
    return problems


def _algorithm_rules(where: str, part: AlgorithmPart, calibrated: bool) -> list[str]:
    if part.needs_ranges and not calibrated:
        return [f"{where} needs ranges; put a calibrate stage before it"]
    if not part.needs_ranges and calibrated:
        return [f"{where} would make the ranges wrong; put it before the calibrate stages"]
    return []


def _train_rules(where: str, train: TrainPart, calibrated: bool) -> list[str]:
    problems = []
    if train.phase == "float":
        if calibrated:
            problems.append(f"{where}.phase is float after a calibrate stage; train the float model before it")
        problems += [
            f"{where}.{key} has no meaning for the float model; remove it"
            for key in _OF_QUANTIZED
            if getattr(train, key) != TrainPart.model_fields[key].default
        ]
    elif not calibrated:
        problems.append(f"{where} comes before any calibrate stage; put one before it, or set phase: float")
    if train.phase == "quantized" and train.quantize_after >= train.epochs:
        problems.append(
            f"{where}.quantize_after is {train.quantize_after:g} of {train.epochs} epochs; give less, or nothing is"
            " trained with fake quantization"
        )
    return problems
