"""What must hold between the keys of a recipe."""

from __future__ import annotations

from qat.recipe.schema import Recipe, Stage, TrainPart


def broken_rules(recipe: Recipe) -> list[str]:
    """Return what contradicts itself in a recipe whose keys and types are right, one line each.

    The order of stages: `train: {phase: float}` stages come first; then at least one `calibrate`; then any mixture of
    `calibrate` and `train` of the quantized model.
    """
    problems: list[str] = []
    calibrated = False
    for index, stage in enumerate(recipe.stages):
        where = f"stages[{index}]"
        if len(stage.model_fields_set) != 1:
            given = ", ".join(sorted(stage.model_fields_set)) or "nothing"
            problems.append(f"{where} has {given}; a stage has exactly one key: {' or '.join(Stage.model_fields)}")
            continue
        if stage.calibrate is not None:
            calibrated = True
        if stage.train is not None:
            problems += _train_rules(f"{where}.train", stage.train, calibrated)
    if recipe.export.onnx is not None and not calibrated:
        problems.append("export.onnx needs ranges; add a calibrate stage")
    expect = recipe.expect
    if not calibrated and (expect.top1 is not None or expect.max_drop is not None):
        problems.append("expect.top1 and expect.max_drop speak of the quantized model; add a calibrate stage")
    return problems


def _train_rules(where: str, train: TrainPart, calibrated: bool) -> list[str]:
    problems = []
    if train.phase == "float":
        if calibrated:
            problems.append(f"{where}.phase is float after a calibrate stage; train the float model before it")
        problems += [
            f"{where}.{key} has no meaning for the float model; remove it"
            for key in ("freeze_ranges_after", "freeze_bn_after", "distill")
            if getattr(train, key) is not None
        ]
    elif not calibrated:
        problems.append(f"{where} comes before any calibrate stage; put one before it, or set phase: float")
    return problems
