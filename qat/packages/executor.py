"""What executes the artifacts of a package: runtimes that this project did not write, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qat.packages.artifact import Artifact

#: what came of an execution
Status = Literal["passed", "failed", "recorded", "not run"]
Array = npt.NDArray[np.generic]
#: one sample: arrays as an artifact takes or gives them (its types, its layout), by name
Sample = Mapping[str, Array]


@dataclass(frozen=True)
class Missing:
    """Why an executor cannot run here.

    Attributes:
        what: The runtime or tool, and for what.
        mend: The command that installs it, or what else has to be done.
    """

    what: str
    mend: str


#: `(file, artifact, inputs of each sample) -> (outputs of each sample, notes for the record)`; a QatError says that the
#: runtime refuses the artifact. Arrays are as the artifact takes and gives them.
Run = Callable[[Path, Artifact, Sequence[Sample]], tuple[Sequence[Sample], tuple[str, ...]]]


@dataclass(frozen=True)
class Executor:
    """One way to execute artifacts.

    Attributes:
        name: Unique, such as `onnxruntime-arm64`.
        accepts: Whether it is for an artifact.
        runtime: Name, version and machine of the runtime, `onnxruntime 1.31.1, x86_64`; called only where nothing is
            missing.
        missing: What it needs and has not, or None.
        run: Executes an artifact.
        numerics: Numerics profile of the simulation that it is compared with; "" for that of the artifact.
        bound: Largest difference from the simulation in codes of 8 bits that an output may have, or a function that
            says it of a file; for other widths it scales with the number of codes.
        samples: Most samples that it is given, for emulators are slow; 0 for all.
        role: `proof` is compared and counts; `record` is compared and written down, for runtimes that round otherwise;
            `inspection` executes nothing: `run` gets no samples, gives no outputs, and raises where what it looks at
            does not hold.
        optional: A package is verified without it; where it is here, it has to hold.
    """

    name: str
    accepts: Callable[[Artifact], bool]
    runtime: Callable[[], str]
    missing: Callable[[], Missing | None]
    run: Run
    numerics: str = ""
    bound: float | Callable[[Path], float] = 0.0
    samples: int = 0
    role: Literal["proof", "record", "inspection"] = "proof"
    optional: bool = False


@dataclass(frozen=True)
class OutputDifference:
    """How far one output is from what was expected.

    Attributes:
        name: Name of the output.
        max_difference: Largest difference in codes.
        equal_share: Share of equal codes, 0 to 1.
    """

    name: str
    max_difference: float
    equal_share: float

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {"name": self.name, "max_difference": self.max_difference, "equal_share": self.equal_share}


@dataclass(frozen=True)
class Check:
    """What came of executing one artifact by one executor.

    Attributes:
        artifact: Path of the artifact.
        executor: Name of the executor.
        runtime: What ran it, or "" where it did not run.
        status: `passed` within the bound, `failed` outside of it or refused by the runtime, `recorded` for executors
            whose difference is no condition and for inspections, `not run` where something is missing.
        outputs: The differences.
        samples: Number of samples executed.
        bound: What was allowed.
        notes: What else is to be known; the cause where it failed or did not run.
        optional: A package is verified without it.
    """

    artifact: str
    executor: str
    runtime: str
    status: Status
    outputs: tuple[OutputDifference, ...] = ()
    samples: int = 0
    bound: float = 0.0
    notes: tuple[str, ...] = ()
    optional: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {
            "artifact": self.artifact,
            "executor": self.executor,
            "runtime": self.runtime,
            "status": self.status,
            "outputs": [output.to_json() for output in self.outputs],
            "samples": self.samples,
            "bound": self.bound,
            "notes": list(self.notes),
            "optional": self.optional,
        }
