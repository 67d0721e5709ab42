"""Running a recipe: float training, calibration, quantization-aware training, export, the contract."""

from __future__ import annotations

import contextlib
import copy
import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qat
from qat.errors import CheckFailedError, OutputError
from qat.graph.prepared import PreparedModel
from qat.packages.kinds import by_kind
from qat.recipe import stages, training
from qat.recipe.folder import CHECKPOINTS, ENCODINGS, ONNX, PACKAGES, PLAN, TFLITE, RunFolder, RunState, StageRecord
from qat.recipe.report import check_expectations, results_table
from qat.recipe.schema import Recipe, Stage
from qat.recipe.session import Session
from qat.train import processes
from qat.train.board import summary_writer
from qat.train.checkpoint import load_checkpoint, load_state, save_checkpoint
from qat.train.evaluate import evaluate
from qat.train.parallel import check_batch_size


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        folder: Where its files are.
        state: Results, stages and details, as in `metrics.json`; of several processes only the first one's is whole.
    """

    folder: Path
    state: RunState


def _silent(line: str) -> None:
    """Say nothing."""


def _found(folder: RunFolder, resume: bool) -> tuple[bool, int, str | None]:
    """Return whether a run is resumed, how many of its stages are whole, and what is wrong with the next one."""
    if not (resume and folder.is_run()):
        return False, 0, None
    return True, *folder.sound_stages()


def run_recipe(
    recipe: Recipe,
    out: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    skip_bad: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = _silent,
    show: Callable[[str], None] | None = None,
) -> RunResult:
    """Do what a recipe says and leave everything in one folder.

    Started by torchrun, all processes train and calibrate together; the first one alone writes and says anything.

    Args:
        recipe: A validated recipe.
        out: The folder; None for `runs/<name>`.
        resume: Continue a run that is in the folder: finished stages are not done again.
        overwrite: Replace a run that is in the folder.
        skip_bad: Skip unreadable images.
        quiet: No progress bars.
        say: Gets every line that tells how the run goes.
        show: Gets the lines that tell what came of it: the table, the verification, the contract; None for `say`.

    Raises:
        QatError: Anything that is wrong with the recipe, the data, the model or the folder.
        VerificationError: The exported file differs from the simulation.
        ExpectationError: The contract does not hold; the folder is complete nevertheless.
        ProcessError: Of the processes that torchrun started with this one, another failed.
    """
    folder = RunFolder(out or Path("runs") / recipe.name)
    with processes.joined(stages.choose_device(recipe)):
        return _Run(recipe, folder, resume, overwrite, skip_bad, quiet, say, show or say).execute()


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        resume: bool,
        overwrite: bool,
        skip_bad: bool,
        quiet: bool,
        say: Callable[[str], None],
        show: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.first = processes.is_first()
        self.quiet = quiet or not self.first
        self._say, self._show = (say, show) if self.first else (_silent, _silent)
        # what can be wrong with recipe, data and model is found before the folder is touched
        if any(stage.train is not None for stage in recipe.stages):
            check_batch_size(recipe.data.batch_size, processes.size())
        resumed, sound, self._damage = json.loads(processes.text_of_first(lambda: json.dumps(_found(folder, resume))))
        self.session = Session(recipe, skip_bad=skip_bad, run=folder if resumed and self.first else None, stages=sound)
        self.recipe = self.session.recipe
        processes.text_of_first(lambda: str(folder.check(self.recipe, resume=resume, overwrite=overwrite)))
        self.model = self.session.model
        stages.check_model(self.model, self.session.data)
        if any(stage.train is not None and stage.train.tensorboard for stage in self.recipe.stages):
            summary_writer()
        self.qmodel: PreparedModel | None = None
        # nobody is behind when the first one begins to write
        processes.of_each(0)
        opened = processes.text_of_first(
            lambda: json.dumps(folder.open(self.recipe, resume=resume, overwrite=overwrite).to_json())
        )
        state = RunState.from_json(json.loads(opened), str(folder.path))
        self.state = replace(state, stages=state.stages[:sound])

    def say(self, line: str) -> None:
        self._say(line)
        self._log(line)

    def show(self, line: str) -> None:
        self._show(line)
        self._log(line)

    def _log(self, line: str) -> None:
        if self.first:
            self.folder.log(line)

    def execute(self) -> RunResult:
        try:
            self._execute()
        except BaseException as error:
            # an interrupted run stays `running`: it is not finished, and can be resumed
            if isinstance(error, Exception):
                # where the disk is full, the error to tell is the first one
                with contextlib.suppress(OutputError):
                    self._log(f"error: {error}")
                    self._keep(status="failed")
            raise
        return RunResult(self.folder.path, self.state)

    def _execute(self) -> None:
        start = time.perf_counter()
        what, target = f"{self.recipe.model.factory} on {self.recipe.data.name}", "+".join(self.recipe.target)
        self.say(f"{self.recipe.name}: {what} for {target}")
        before, now = self.state.details.get("versions", {}), versions()
        if self._damage is not None:
            self.say(f"warning: {self._damage}; going on from the stage before")
        for name in (n for n in now if before.get(n, now[n]) != now[n]):
            self.say(
                f"warning: the run was begun with {name} {before[name]} and goes on with {now[name]}:"
                " it may end with other bits than it would have"
            )
        count, earlier = processes.size(), self.state.details.get("processes", processes.size())
        if earlier != count:
            self.say(
                f"warning: the run was begun by {earlier} process{'es' * (earlier > 1)} and goes on with {count}:"
                " it may end with other bits than it would have"
            )
        self._keep(details={**self.state.details, "versions": now, "processes": count})
        done = len(self.state.stages)
        if done:
            self.say(f"resuming after {done} finished stage{'s' * (done > 1)}")
        for index, stage in enumerate(self.recipe.stages):
            if index < done:
                continue
            if not (stage.train and stage.train.phase == "float"):
                self._quantize()
            self._stage(index, stage)
        if self.recipe.stages and self.qmodel is None and any(s.label != "float" for s in self.state.stages):
            self._quantize()
        if "float" not in self.state.results:
            self._measure("float", self.model)
        for files in processes.text_of_each(json.dumps(self.session.data.skipped.files)):
            self.session.data.skipped.files.update(json.loads(files))
        if not self.first:
            return
        if self.recipe.export.onnx is not None:
            self._export()
        if self.recipe.export.tflite is not None:
            self._export_tflite()
        if self.recipe.export.packages is not None:
            self._package()
        skipped = self.session.data.skipped.summary()
        if skipped:
            self.show(skipped)
        seconds = time.perf_counter() - start
        self._keep(details={**self.state.details, "seconds": seconds})
        self.say(f"finished in {seconds:.1f} s: {self.folder.path}")
        self.show("\n" + results_table(self.state.results) + "\n")
        if "verified" in self.state.details:
            self.show(self.state.details["verified"])
        contract = self._contract()
        if contract:
            self.show(contract)
        self._keep(status="done")

    # -- steps

    def _stage(self, index: int, stage: Stage) -> None:
        start = time.perf_counter()
        # every stage begins from its own seed, so that one that is resumed draws what it would have drawn
        torch.manual_seed(self.recipe.seed + index + 1)
        if stage.train is not None and not self.first:
            # what dropout leaves out is not the same in every process
            torch.manual_seed((self.recipe.seed + index + 1) * 1_000_003 + processes.rank())
        epochs: list[dict[str, Any]] = []
        if stage.train is not None and stage.train.phase == "float":
            label, trained = "float", self.model
        else:
            assert self.qmodel is not None
            after_qat = stage.train is not None or any(s.label == "QAT" for s in self.state.stages)
            label, trained = ("QAT" if after_qat else "PTQ"), self.qmodel
        if stage.calibrate is not None and self.qmodel is not None:
            seen = stages.calibrate(self.qmodel, self.session.data.calibration, stage.calibrate, quiet=self.quiet)
            self.say(f"calibrated on {seen} images")
        elif stage.algorithm is not None and self.qmodel is not None:
            images, reference = self.session.data.calibration, self._float_reference(index)
            for line in stages.algorithm(
                self.qmodel, images, stage.kind, stage.algorithm, reference, seed=self.recipe.seed, quiet=self.quiet
            ):
                self.say(line)
        elif stage.train is not None:
            distill = stage.train.distill is not None
            teacher = copy.deepcopy(self.model) if distill else None
            self.say(f"training the {'float' if label == 'float' else 'quantized'} model")
            place = training.Place(self.folder.path, self.folder.path / CHECKPOINTS, index, label)
            records = training.train(
                trained, self.session.data, stage.train, place=place, teacher=teacher, say=self.say, quiet=self.quiet
            )
            epochs = [r.to_json() for r in records]
        processes.share_state(trained)
        name = f"{CHECKPOINTS}/{index}-{stage.kind}-{label.lower()}.safetensors"
        if self.first:
            save_checkpoint(self.folder.path / name, trained.state_dict(), {"stage": index, "label": label})
        # before the first calibration there are neither ranges nor a quantized result
        has_ranges = any(s.calibrate for s in self.recipe.stages[: index + 1])
        if self.first and self.qmodel is not None and has_ranges:
            self.qmodel.encodings().save(self.folder.path / ENCODINGS)
        record = StageRecord(index, stage.kind, label, name, time.perf_counter() - start, epochs)
        if has_ranges or label == "float":
            self._measure(label, trained)
        self._keep(stages=(*self.state.stages, record))
        # only now is nothing lost without them
        if self.first:
            shutil.rmtree(self.folder.path / CHECKPOINTS / training.UNFINISHED, ignore_errors=True)

    def _float_reference(self, index: int) -> nn.Module | None:
        """Return the float model that stage `index` aims at: as the last stage left it that is meant to change it.

        None: the model itself.
        """
        before = [s for s in self.state.stages if s.index < index]
        if all(self.recipe.stages[s.index].defines_float or s.kind == "calibrate" for s in before):
            return None
        assert self.qmodel is not None
        reference = copy.deepcopy(self.model)
        defining = [s for s in before if s.label != "float" and self.recipe.stages[s.index].defines_float]
        if defining and self.first:
            qmodel = copy.deepcopy(self.qmodel)
            place = self.folder.path / defining[-1].checkpoint
            load_state(qmodel, load_checkpoint(place).tensors, str(place))
            load_state(reference, qmodel.float_state_dict(), str(place))
        processes.share_state(reference)
        return reference

    def _quantize(self) -> None:
        """Make the prepared model, before the first stage that needs it."""
        if self.qmodel is not None:
            return
        if "float" not in self.state.results:
            self._measure("float", self.model)
        self.qmodel = self.session.prepare()
        plan = self.qmodel.plan
        if self.first:
            plan.save(self.folder.path / PLAN)
        self.say(plan.summary())
        self._keep(details={**self.state.details, "integer_macs": plan.integer_share})

    def _export(self) -> None:
        part = self.recipe.export.onnx
        assert part is not None
        assert self.qmodel is not None
        path = self.folder.path / ONNX
        result = stages.export_onnx(self.recipe, self.qmodel, path, self.session.data.calibration, part)
        assert result.verification is not None
        verified = stages.verified_line(result.verification)
        self._keep(
            details={
                **self.state.details,
                "verified": verified,
                "verification": result.verification.to_json(),
                "onnx_sha256": result.sha256,
            }
        )
        if self.session.data.test is not None:
            # the other processes are done
            self._measure("ONNX Runtime", stages.onnx_classifier(path), together=False)

    def _export_tflite(self) -> None:
        part = self.recipe.export.tflite
        assert part is not None
        assert self.qmodel is not None
        path = self.folder.path / TFLITE
        result = stages.export_tflite(self.recipe, self.qmodel, path, self.session.data.calibration, part)
        record = {
            "reference": None if result.verification is None else result.verification.to_json(),
            "default": None if result.default is None else result.default.to_json(),
            "sha256": result.sha256,
        }
        self._keep(details={**self.state.details, "tflite": record})
        self.say(str(result))

    def _package(self) -> None:
        part = self.recipe.export.packages
        assert part is not None
        assert self.qmodel is not None
        places = {names: self.folder.path / PACKAGES / kind.name for kind, names in by_kind(self.recipe.target).items()}
        for name in self.recipe.target:
            if not any(name in names for names in places):
                self.say(f"no package for {name}: there is none of that kind")
        # a run that is resumed makes them again
        made = stages.make_packages(
            self.recipe, self.qmodel, places, self.session.data.calibration, part, overwrite=True, say=self.say
        )
        record = {p.manifest.kind: p.manifest.to_json()["verification"] for p in made}
        self._keep(details={**self.state.details, "packages": record})

    def _measure(self, label: str, model: Callable[..., Any], *, together: bool = True) -> None:
        if self.session.data.test is None:
            return
        description = f"evaluate {label}"
        metrics = evaluate(model, self.session.test, quiet=self.quiet, description=description, together=together)
        self._keep(results={**self.state.results, label: metrics.to_json()})
        self.say(f"{label}: top-1 {100 * metrics.top1:.2f} % of {metrics.n} test images")

    def _contract(self) -> str:
        try:
            return check_expectations(self.recipe.expect, self.state.results, self.state.details.get("integer_macs"))
        except CheckFailedError:
            self._keep(details={**self.state.details, "contract": "broken"})
            raise

    def _keep(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        if self.first:
            self.folder.save(self.state)


def versions() -> dict[str, str]:
    """Return the versions of everything that a result may depend on."""
    import onnx
    import onnxruntime

    return {
        "qat": qat.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
