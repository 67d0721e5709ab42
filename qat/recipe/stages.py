"""The steps of a run, each one call of the library."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qat
from qat.algorithms.absorb import Absorption
from qat.algorithms.bias import BiasCorrection
from qat.algorithms.equalize import Equalization
from qat.algorithms.nuq import NonUniform
from qat.algorithms.rounding import Rounding
from qat.errors import CheckpointError, DataError, QatError, QuantizationWarning, RecipeError, VerificationError
from qat.export.difference import Level, Verification
from qat.export.io_mode import IoMode
from qat.export.model import execute
from qat.export.tflite.verify import TfliteResult
from qat.export.verify import ExportResult, session
from qat.export.verify import verify_onnx as verify_file
from qat.graph.plan import Plan
from qat.graph.prepared import PreparedModel
from qat.packages.verify import describe
from qat.recipe.schema import CalibratePart, ModelPart, OnnxPart, PackagesPart, Recipe, TflitePart
from qat.recipe.schema_ptq import AlgorithmPart
from qat.targets import Target
from qat.torchvision import import_torchvision
from qat.train import processes
from qat.train.checkpoint import load_weights
from qat.train.data import Data, Share, Split, input_shape
from qat.train.data.spec import DataSpec
from qat.train.evaluate import device_of, evaluation_mode
from qat.train.processes import place_by_environment


def choose_device(recipe: Recipe) -> torch.device:
    """Return the device that a recipe asks for; of several processes on a machine each has a GPU of its own.

    Raises:
        RecipeError: It asks for a GPU and there is none, or there are fewer than processes.
        ProcessError: The variables of torchrun are incomplete.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device is 'cuda' and torch finds no GPU", "set device: cpu, or auto to take a GPU if any")
    place = place_by_environment()
    if recipe.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if place.size == 1:
        return torch.device("cuda")
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise RecipeError(
            f"device is {recipe.device!r}, this machine has {count} GPU{'s' * (count > 1)} and process"
            f" {place.local_rank} of it has none",
            f"start at most {count} processes on it (--nproc-per-node), or set device: cpu",
        )
    return torch.device("cuda", place.local_rank)


def find_factory(name: str) -> Callable[..., Any]:
    """Import `package.module:callable`; modules in the working directory are found too.

    Raises:
        RecipeError: There is no such module or callable.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        if module_name.split(".")[0] == "torchvision":
            module = import_torchvision(module_name.partition(".")[2])
        else:
            module = importlib.import_module(module_name)
    except QatError as error:
        raise RecipeError(f"model.factory {name!r}: {error}") from None
    except Exception as error:  # noqa: BLE001 - a user's module may fail in any way
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"model.factory {name!r}: cannot import {module_name} ({cause})", "correct it") from None
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise RecipeError(f"model.factory {name!r}: {module_name} has no callable {attribute!r}", "correct it")
    found: Callable[..., Any] = factory
    return found


def build_model(part: ModelPart, seed: int) -> nn.Module:
    """Make the float model, with the weights that the recipe names.

    Raises:
        RecipeError: The factory cannot be imported, refuses its arguments, or gives no module.
        CheckpointError: The weights cannot be read or are of another model.
    """
    factory = find_factory(part.factory)
    torch.manual_seed(seed)
    try:
        model = factory(**part.kwargs)
    except QatError:
        raise
    except Exception as error:  # noqa: BLE001 - a user's factory may fail in any way
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"model.factory {part.factory!r} failed ({cause})", "correct model.kwargs") from None
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model.factory {part.factory!r} gives a {type(model).__name__}", "it must give an nn.Module")
    if part.weights is not None:
        load_weights(model, Path(part.weights).expanduser())
    return model.eval()


def check_model(model: nn.Module, data: Data) -> None:
    """Run the float model on one image, so that a mismatch is named before anything long begins.

    Raises:
        DataError: The model does not take the data's images.
    """
    x = data.calibration.sample(1).to(device_of(model))
    with evaluation_mode(model), torch.no_grad():
        try:
            scores = model(x)
        except QatError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises on input that does not fit
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"the model does not take images of shape {tuple(x.shape[1:])} ({cause})",
                "correct data.input or the arguments of the model",
            ) from None
    if data.num_classes and isinstance(scores, Tensor) and scores.ndim == 2 and scores.shape[1] < data.num_classes:
        raise DataError(
            f"the model has {scores.shape[1]} classes and the data {data.num_classes}",
            "correct the number of classes in model.kwargs",
        )


def example_inputs(spec: DataSpec, data: Data | None = None) -> Tensor:
    """Return two images that the model can be traced with: real ones, or, without data, black ones of the right shape.

    Raises:
        DataError: Without data the shape cannot be told.
    """
    if data is not None:
        x = data.calibration.sample(2)
        return x if x.shape[0] > 1 else torch.cat([x, x])
    shape = input_shape(spec)
    if shape is None:
        raise DataError("the shape of the images is not known", "give data.input.size")
    return torch.zeros(2, *shape)


def find_target(recipe: Recipe) -> Target:
    """Load the target, or the intersection of the targets, of a recipe."""
    return qat.load_target(*recipe.target)


def make_plan(recipe: Recipe, model: nn.Module, example: Tensor) -> Plan:
    """Plan the quantization of the float model."""
    return qat.plan(model, example, target=find_target(recipe), scheme=recipe.scheme_data())


def prepare(recipe: Recipe, model: nn.Module, example: Tensor) -> PreparedModel:
    """Prepare the float model for quantization."""
    return qat.prepare(model, example, target=find_target(recipe), scheme=recipe.scheme_data())


def calibrate(qmodel: PreparedModel, split: Split, part: CalibratePart, *, quiet: bool) -> int:
    """Choose ranges from calibration images; return how many were seen, by all processes.

    Raises:
        DataError: There is no image, or a tensor is not finite; it is named.
    """
    own = split.sharded(Share(processes.rank(), processes.size(), "batch"))
    seen = qat.calibrate(
        qmodel, own.images(part.images), samples=part.images, only=part.only, progress=False if quiet else None
    )
    return int(processes.summed([seen])[0])


def algorithm(
    qmodel: PreparedModel,
    split: Split,
    kind: str,
    part: AlgorithmPart,
    reference: nn.Module | None,
    *,
    seed: int,
    quiet: bool,
) -> Iterator[str]:
    """Run a post-training algorithm of `qat` on calibration images; yield lines that tell what came of it.

    Args:
        qmodel: The model, which is changed.
        split: Calibration images.
        kind: Name of the stage and of the function.
        part: Its options.
        reference: The float model to aim at, where `qmodel` is not as it was any more.
        seed: For what draws random numbers.
        quiet: No progress bar.

    Raises:
        QatError: What the algorithm refuses.
    """
    function: Callable[..., Any] = getattr(qat, kind)
    known = inspect.signature(function).parameters
    extra = {"float_model": reference, "seed": seed}
    options = part.options() | {key: value for key, value in extra.items() if key in known}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QuantizationWarning)
        result = function(
            qmodel, split.images(part.images), samples=part.images, progress=False if quiet else None, **options
        )
    for warning in caught:
        yield f"warning: {warning.message}"
    yield f"{kind}: {summary(result)}"


def summary(result: object) -> str:
    """Return one line about the result of an algorithm."""
    if isinstance(result, NonUniform):
        result = result.rounding
    if isinstance(result, Equalization):
        noise = "" if result.noise_before is None else f", noise {result.noise_before:.3g} to {result.noise_after:.3g}"
        return result.undone or f"{result.channels} channels scaled by up to {result.largest:.3g}{noise}"
    if isinstance(result, Absorption):
        return result.undone or f"{result.channels} channels of {len(result.layers)} layers"
    if isinstance(result, BiasCorrection):
        return f"{len(result.corrected)} layers corrected, {len(result.kept)} left, {len(result.skipped)} skipped"
    if isinstance(result, Rounding):
        kept = sum(unit.kept for unit in result.units)
        return f"{len(result.units)} units on {result.samples} samples, {kept} left as they were"
    assert isinstance(result, tuple)
    return f"{len(result)} batch norms"


def export_onnx(recipe: Recipe, qmodel: PreparedModel, path: Path, split: Split, part: OnnxPart) -> ExportResult:
    """Write, execute and compare the ONNX file.

    Raises:
        VerificationError: ONNX Runtime's result differs by more than the bounds; no file is left.
    """
    return qat.export_onnx(
        qmodel,
        path,
        samples=list(split.images(part.samples)),
        verify=part.verify,
        bound=part.bound,
        unequal_share=part.unequal_share,
        opset=part.opset,
        dynamic_batch=find_target(recipe).dynamic_batch,
        name=recipe.name,
        metadata={"recipe": recipe.name},
    )


def export_tflite(recipe: Recipe, qmodel: PreparedModel, path: Path, split: Split, part: TflitePart) -> TfliteResult:
    """Write, execute and compare the `.tflite` file.

    Raises:
        ExportError: The model has no int8 form in TFLite, or ai-edge-litert is not installed.
        VerificationError: LiteRT's reference kernels give another code; no file is left.
    """
    return qat.export_tflite(
        qmodel,
        path,
        samples=list(split.images(part.samples)),
        io=IoMode(part.io.inputs, part.io.outputs),
        verify=part.verify,
        batch_size=part.batch_size,
        name=recipe.name,
        metadata={"recipe": recipe.name},
    )


def make_packages(
    recipe: Recipe,
    qmodel: PreparedModel,
    places: Mapping[tuple[str, ...], Path],
    split: Split,
    part: PackagesPart,
    *,
    overwrite: bool = False,
    say: Callable[[str], None],
) -> list[qat.Package]:
    """Make packages.

    Args:
        recipe: The recipe.
        qmodel: The calibrated or trained model.
        places: Folder of each package by the names of its targets.
        split: Images for the golden samples.
        part: Options.
        overwrite: Replace packages that are there.
        say: Gets one line for every execution.

    Raises:
        TargetError: The model was not prepared for one of the targets.
        VerificationError: A runtime's result differs by more than its bound.
    """
    samples = list(split.images(part.golden))
    made = []
    for names, place in places.items():
        made.append(
            qat.package(
                qmodel,
                names,
                place,
                samples=samples,
                golden=part.golden,
                io=IoMode(part.io.inputs, part.io.outputs),
                name=recipe.name,
                preprocessing=recipe.data.input.model_dump(exclude_none=True),
                overwrite=overwrite,
                say=lambda check: say(f"  {describe(check)}"),
            )
        )
        say(f"{place}: package for {', '.join(names)}, {made[-1].manifest.standing}")
    return made


def verify_onnx(
    qmodel: PreparedModel, path: Path, split: Split, part: OnnxPart, level: Level
) -> tuple[Verification, int]:
    """Execute an exported file and compare it with the simulation; also return how many tensors are outputs.

    Raises:
        ExportError: The file is no ONNX model of this network.
    """
    imodel = qat.convert(qmodel).to(torch.device("cpu"))
    samples = list(split.images(part.samples))
    verification = verify_file(path, imodel.program, samples, execute(imodel), level=level)
    return verification, len(imodel.program.outputs)


def require_equal(verification: Verification, outputs: int, path: Path, part: OnnxPart) -> None:
    """Check that the outputs, the first tensors of a verification, are within a recipe's bounds.

    Raises:
        VerificationError: They are not; the worst is named.
    """
    record = dataclasses.replace(verification, tensors=verification.tensors[:outputs])
    failures = record.failures(part.bound, part.unequal_share)
    if failures:
        worst = failures[0]
        raise VerificationError(
            f"output {worst.name!r} of {path} differs from the simulation by up to {worst.max_difference:g} codes,"
            f" {100 * worst.unequal_share:.4g} % unequal (allowed: {part.bound:g} codes,"
            f" {100 * part.unequal_share:g} %)",
            "export the file again",
        )


def verified_line(verification: Verification) -> str:
    """Return one line that says what was compared, and how far it was apart."""
    worst, count = verification.worst, len(verification.tensors)
    return (
        f"verified: {verification.runtime}, {verification.samples} images, {count} tensor{'s' * (count > 1)} compared,"
        f" largest difference {worst.max_difference:g} codes, {100 * worst.unequal_share:.4g} % unequal ({worst.name})"
    )


def onnx_classifier(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a classifier that executes an ONNX file in ONNX Runtime on the CPU.

    Raises:
        CheckpointError: The file cannot be opened.
    """
    if not path.is_file():
        raise CheckpointError(f"cannot read {path} (no such file)", "export it first")
    try:
        runtime = session(os.fspath(path))
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no public base
        raise CheckpointError(
            f"ONNX Runtime cannot open {path} ({str(error).splitlines()[0]})", "export again"
        ) from None
    given = runtime.get_inputs()[0]
    batch = given.shape[0] if given.shape and isinstance(given.shape[0], int) else None

    def parts(x: Tensor) -> Iterator[Tensor]:
        yield from torch.split(x, batch) if batch else (x,)

    def classify(x: Tensor) -> Tensor:
        results = [torch.from_numpy(runtime.run(None, {given.name: p.contiguous().numpy()})[0]) for p in parts(x)]
        return torch.cat(results)

    return classify
