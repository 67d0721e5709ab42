"""Golden samples: inputs of an artifact and the outputs that the simulation has for them.

They are kept as the artifact takes and gives them, so that a device's answer is compared byte by byte:
`golden/<artifact>/<sample>/input_<k>.npy` and `output_<k>.npy`, numbered in the artifact's order. Outputs of another
numerics profile than the artifact's are in `golden/<artifact>/<sample>/<profile>/`, for the samples where they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat import numerics
from qat.errors import DataError
from qat.export.contract import TensorContract
from qat.integer.model import IntegerModel
from qat.packages.artifact import Artifact
from qat.packages.executor import Array, Sample

FOLDER = "golden"


def golden_samples(
    imodel: IntegerModel, artifact: Artifact, batches: Sequence[tuple[Tensor, ...]]
) -> tuple[list[Sample], list[Sample]]:
    """Return inputs and expected outputs, as an artifact takes and gives them.

    Args:
        imodel: The simulation, of the artifact's numerics profile.
        artifact: What the inputs are for.
        batches: The model's float inputs, of the artifact's batch size.
    """
    inputs: list[Sample] = []
    outputs: list[Sample] = []
    with torch.no_grad():
        for batch in batches:
            inputs.append({c.name: _laid(c, x, artifact.numerics) for c, x in zip(artifact.inputs, batch, strict=True)})
            wanted = imodel.run(batch, set(imodel.program.outputs))
            found = [wanted[name] for name in imodel.program.outputs]
            outputs.append(
                {c.name: _laid(c, y, artifact.numerics) for c, y in zip(artifact.outputs, found, strict=True)}
            )
    return inputs, outputs


def _laid(contract: TensorContract, x: Tensor, profile: str) -> Array:
    """A float tensor in a border's order of dimensions and type."""
    x = x.detach().cpu().permute(contract.order)
    if contract.dtype != "float32":
        assert contract.scale is not None
        # away from zero where the model is one of TFLite's; a dequantized output has its own code either way
        x = numerics.quantize(
            x,
            torch.tensor([contract.scale]),
            torch.tensor([contract.zero_point]),
            contract.qmin,
            contract.qmax,
            rounding="half_away" if profile == "tflite" else "half_even",
        ).to(getattr(torch, contract.dtype))
    array: Array = x.contiguous().numpy()
    return array


def sample_folder(root: Path, artifact: Artifact, sample: int) -> Path:
    """Return the folder of a sample of an artifact, below a package's folder."""
    return root / FOLDER / artifact.path.replace("/", "_") / f"{sample:03d}"


def write_golden(root: Path, artifact: Artifact, inputs: Sequence[Sample], outputs: Sequence[Sample]) -> None:
    """Write the samples of an artifact below a package's folder."""
    for number, (given, expected) in enumerate(zip(inputs, outputs, strict=True)):
        folder = sample_folder(root, artifact, number)
        _write(folder, "input", artifact.inputs, given)
        _write(folder, "output", artifact.outputs, expected)


def write_outputs(
    root: Path, artifact: Artifact, outputs: Sequence[Sample], profile: str, own: Sequence[Sample]
) -> None:
    """Write the outputs of another profile where they differ from those of the artifact's own."""
    for number, (expected, known) in enumerate(zip(outputs, own, strict=True)):
        if any(expected[c.name].tobytes() != known[c.name].tobytes() for c in artifact.outputs):
            _write(sample_folder(root, artifact, number) / profile, "output", artifact.outputs, expected)


def _write(folder: Path, kind: str, contracts: Sequence[TensorContract], arrays: Sample) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, contract in enumerate(contracts):
        np.save(folder / f"{kind}_{index}.npy", arrays[contract.name], allow_pickle=False)


def read_golden(
    root: Path, artifact: Artifact, count: int, profile: str | None = None
) -> tuple[list[Sample], list[Sample]]:
    """Read the samples of an artifact.

    Args:
        root: The package's folder.
        artifact: The artifact.
        count: Number of samples.
        profile: Numerics profile of the outputs, the artifact's own or one that it was `also_simulated` in.

    Raises:
        DataError: A file is missing, no array, or not what the artifact's contract says; it is named.
    """
    inputs: list[Sample] = []
    outputs: list[Sample] = []
    for number in range(count):
        folder = sample_folder(root, artifact, number)
        inputs.append({c.name: _read(folder / f"input_{k}.npy", c) for k, c in enumerate(artifact.inputs)})
        other = folder / profile if profile else folder
        place = other if other.is_dir() else folder
        outputs.append({c.name: _read(place / f"output_{k}.npy", c) for k, c in enumerate(artifact.outputs)})
    return inputs, outputs


def _read(file: Path, contract: TensorContract) -> Array:
    try:
        array: Array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read the golden sample {file} ({error})", "make the package again") from None
    sizes_fit = len(array.shape) == len(contract.shape) and all(
        size == wanted or wanted < 0 for size, wanted in zip(array.shape, contract.shape, strict=True)
    )
    if array.dtype != np.dtype(contract.dtype) or not sizes_fit:
        raise DataError(
            f"the golden sample {file} is {array.dtype} {array.shape} where the package says {contract.dtype} "
            f"{contract.shape}",
            "make the package again",
        )
    return array
