"""How far what a runtime gave is from what was expected, in codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qat.errors import VerificationError
from qat.export.contract import TensorContract
from qat.packages.executor import Array, OutputDifference, Sample

#: a float without codes is compared on a grid of so many steps over the largest expected magnitude
_FLOAT_STEPS = 255.0
_BITS = {"int16": 16, "uint16": 16}


def fineness(contract: TensorContract) -> int:
    """Return how many codes of a tensor are one code of 8 bits."""
    return 1 << (_BITS.get(contract.code_dtype, 8) - 8)


def differences(
    contracts: Sequence[TensorContract], found: Sequence[Sample], expected: Sequence[Sample]
) -> tuple[OutputDifference, ...]:
    """Compare outputs over all samples.

    Args:
        contracts: The outputs.
        found: What the runtime gave, one mapping a sample.
        expected: What the simulation gave, just so.

    Raises:
        VerificationError: An output is missing or has another shape or type.
    """
    return tuple(_difference(contract, found, expected) for contract in contracts)


def _difference(contract: TensorContract, found: Sequence[Sample], expected: Sequence[Sample]) -> OutputDifference:
    worst, equal, count = 0.0, 0, 0
    for have, want in zip(found, expected, strict=True):
        a, b = have.get(contract.name), want[contract.name]
        if a is None:
            raise VerificationError(f"the runtime gave no output {contract.name!r}", "report this artifact")
        if a.shape != b.shape or a.dtype != b.dtype:
            raise VerificationError(
                f"output {contract.name!r} is {a.dtype} {a.shape} in the runtime and {b.dtype} {b.shape} in the "
                "simulation",
                "report this artifact",
            )
        apart = np.abs(_codes(contract, a, b) - _codes(contract, b, b))
        # what is no number in one of them only is as far apart as can be
        apart = np.where(np.isnan(apart), np.inf, apart)
        worst = max(worst, float(apart.max(initial=0.0)))
        equal += int((apart < 0.5).sum())
        count += a.size
    return OutputDifference(contract.name, worst, equal / count if count else 1.0)


def _codes(contract: TensorContract, values: Array, expected: Array) -> npt.NDArray[np.float64]:
    """Return codes as float64; floats without codes in steps of the expected tensor's largest magnitude."""
    if contract.dtype != "float32":
        return values.astype(np.float64)
    if contract.scale is not None:
        steps: npt.NDArray[np.float64] = np.rint(values.astype(np.float64) / contract.scale)
        return steps
    step = float(np.abs(expected.astype(np.float64)).max(initial=0.0)) / _FLOAT_STEPS
    return values.astype(np.float64) / (step or 1.0)
