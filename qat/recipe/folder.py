"""The folder of a run: what is in it, what of it is finished, and who may write to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from qat.errors import CheckpointError, OutputError, RecipeError
from qat.files import atomic_write_text
from qat.recipe.load import parse_recipe
from qat.recipe.schema import Recipe
from qat.recipe.text import dump_yaml, parse_yaml
from qat.train.checkpoint import load_checkpoint

RECIPE = "recipe.resolved.yaml"
METRICS = "metrics.json"
ENCODINGS = "encodings.json"
PLAN = "plan.json"
ONNX = "model.onnx"
TFLITE = "model.tflite"
PACKAGES = "packages"
LOG = "log.txt"
TRAINING_LOG = "metrics.jsonl"
CURVES = "train.png"
BOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
SCHEMA_VERSION = 1

Status = Literal["running", "done", "failed"]


@dataclass(frozen=True)
class StageRecord:
    """A finished stage.

    Attributes:
        index: Position in the recipe.
        kind: Name of the stage: `train`, `calibrate`, or an algorithm.
        label: Row of the results table that it made: `float`, `PTQ` or `QAT`.
        checkpoint: File below the folder; for the quantized model the state of the prepared model.
        seconds: Wall time.
        epochs: One entry an epoch of training.
    """

    index: int
    kind: str
    label: str
    checkpoint: str
    seconds: float
    epochs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class RunState:
    """What a run has come to; `metrics.json`.

    Attributes:
        name: Name of the recipe.
        status: `running` also after a run was killed.
        stages: Finished stages, in order.
        results: Top-1, top-5, loss and number of images by row of the results table.
        details: Plan, verification and versions.
    """

    name: str
    status: Status = "running"
    stages: tuple[StageRecord, ...] = ()
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "schema": "qat-run",
            "version": SCHEMA_VERSION,
            "name": self.name,
            "status": self.status,
            "results": {k: dict(v) for k, v in self.results.items()},
            "stages": [asdict(stage) for stage in self.stages],
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, data: object, source: str) -> RunState:
        """Read the JSON document.

        Raises:
            CheckpointError: It is not the metrics file of a run, or of a newer version.
        """
        if not isinstance(data, dict) or data.get("schema") != "qat-run":
            raise CheckpointError(f"{source} is not the metrics file of a run", "give the folder of a run")
        if data.get("version") != SCHEMA_VERSION:
            raise CheckpointError(f"{source} has version {data.get('version')!r}", f"this qat reads {SCHEMA_VERSION}")
        try:
            return cls(
                name=data["name"],
                status=data["status"],
                stages=tuple(StageRecord(**stage) for stage in data["stages"]),
                results=data["results"],
                details=data["details"],
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{source} is damaged ({error})", "start the run again with --overwrite") from None


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Attributes:
        path: Where it is.
    """

    path: Path

    # -- reading

    def is_run(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / METRICS).is_file() and (self.path / RECIPE).is_file()

    def state(self) -> RunState:
        """Read what the run has come to.

        Raises:
            CheckpointError: It is no run, or its metrics file is damaged.
        """
        try:
            data = json.loads((self.path / METRICS).read_text(encoding="utf-8"))
        except OSError:
            raise CheckpointError(
                f"{self.path} is not the folder of a run", "give a folder that `qat run` wrote"
            ) from None
        except ValueError as error:
            raise CheckpointError(
                f"{self.path / METRICS} is damaged ({error})", "start again with --overwrite"
            ) from None
        return RunState.from_json(data, str(self.path / METRICS))

    def sound_stages(self) -> tuple[int, str | None]:
        """Return how many finished stages, from the first, have whole checkpoints, and what is wrong with the next.

        Raises:
            CheckpointError: The folder is no run, or its metrics file is damaged.
        """
        stages = self.state().stages
        for number, stage in enumerate(stages):
            try:
                load_checkpoint(self.path / stage.checkpoint)
            except CheckpointError as error:
                return number, str(error)
        return len(stages), None

    def recipe(self) -> Recipe:
        """Read the resolved recipe.

        Raises:
            CheckpointError: The folder is no run.
            RecipeError: The file was changed to something that is not valid.
        """
        path = self.path / RECIPE
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            raise CheckpointError(
                f"{self.path} is not the folder of a run", "give a folder that `qat run` wrote"
            ) from None
        return parse_recipe(parse_yaml(text, str(path)), str(path))

    # -- writing

    def check(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> RunState | None:
        """Check that a run of `recipe` may use the folder, touching nothing, and return the run that is in it.

        Raises:
            OutputError: The folder holds something else, or a run that would be lost.
            RecipeError: `resume` with another recipe than the run was started with; the first key is named.
        """
        existing = self._existing()
        if existing is not None and resume:
            _check_same_recipe(self.recipe(), recipe, self.path)
        elif existing is not None and (existing.stages or self._has_checkpoints()) and not overwrite:
            what = "a finished run" if existing.status == "done" else "an unfinished run"
            raise OutputError(
                f"{self.path} holds {what}",
                "add --resume to continue it, --overwrite to replace it, or --out for another folder",
            )
        return existing

    def open(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> RunState:
        """Make the folder ready for a run of `recipe` and return what is finished already.

        Raises:
            OutputError: The folder holds something else, a run that would be lost, or cannot be written.
            RecipeError: `resume` with another recipe than the run was started with; the first key is named.
        """
        existing = self.check(recipe, resume=resume, overwrite=overwrite)
        if existing is not None and resume:
            state = replace(existing, status="running")
            # what a process that was killed had begun to write
            for part in self.path.rglob(".*.part"):
                part.unlink(missing_ok=True)
            self.save(state)
            return state
        if existing is not None:
            self._clear()
        state = RunState(recipe.name)
        try:
            (self.path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.path} ({error.strerror})", "choose a writable folder") from None
        self.save(state)
        atomic_write_text(self.path / RECIPE, dump_yaml(recipe.to_data()))
        return state

    def save(self, state: RunState) -> None:
        """Write what the run has come to.

        Raises:
            OutputError: The file cannot be written.
        """
        atomic_write_text(self.path / METRICS, json.dumps(state.to_json(), indent=1) + "\n")

    def log(self, line: str) -> None:
        """Append a line, with the time, to the log.

        Raises:
            OutputError: The file cannot be written.
        """
        stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
        try:
            with (self.path / LOG).open("a", encoding="utf-8") as file:
                file.write("".join(f"{stamp}  {part}\n" for part in line.splitlines()))
        except OSError as error:
            raise OutputError(f"cannot write {self.path / LOG} ({error.strerror})", "free some space") from None

    def _existing(self) -> RunState | None:
        """The run that is in the folder; None where the folder is new or empty."""
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise OutputError(f"{self.path} is a file", "choose another folder with --out")
        if self.is_run():
            return self.state()
        # a run that was stopped before its recipe was written has nothing to lose
        if any(p.name not in {CHECKPOINTS, METRICS, LOG} and not p.name.startswith(".") for p in self.path.iterdir()):
            raise OutputError(f"{self.path} exists and is not the folder of a run", "choose another folder with --out")
        return None

    def _has_checkpoints(self) -> bool:
        """Whether there is anything to lose: also within its first stage a training writes checkpoints."""
        return any((self.path / CHECKPOINTS).rglob("*.safetensors"))

    def _clear(self) -> None:
        try:
            for name in (RECIPE, METRICS, ENCODINGS, PLAN, ONNX, TFLITE, LOG, TRAINING_LOG, CURVES):
                (self.path / name).unlink(missing_ok=True)
            for name in (CHECKPOINTS, BOARD):
                shutil.rmtree(self.path / name, ignore_errors=True)
        except OSError as error:
            raise OutputError(f"cannot replace the run in {self.path} ({error.strerror})", "remove it") from None


def _check_same_recipe(before: Recipe, now: Recipe, path: Path) -> None:
    difference = first_difference(before.to_data(), now.to_data())
    if difference is not None:
        raise RecipeError(
            f"{path} is a run of another recipe: {difference}", "resume with the same recipe, or start with --overwrite"
        )


def first_difference(left: Any, right: Any, key: str = "") -> str | None:
    """Return the first key in which two plain values differ, with both values; None where they are equal."""
    if isinstance(left, dict) and isinstance(right, dict):
        for name in dict.fromkeys([*left, *right]):
            path = f"{key}.{name}" if key else str(name)
            if name not in left or name not in right:
                return f"{path} is only in {'the run' if name in left else 'the recipe'}"
            found = first_difference(left[name], right[name], path)
            if found:
                return found
        return None
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return next((d for i, (a, b) in pairs if (d := first_difference(a, b, f"{key}[{i}]"))), None)
    return None if left == right and type(left) is type(right) else f"{key} was {left!r} and is {right!r}"
