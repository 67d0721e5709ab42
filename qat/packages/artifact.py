"""What a package promises of one file that a runtime executes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qat.export.contract import TensorContract

__all__ = ["Artifact", "Format", "TensorContract"]

#: formats of artifacts: ONNX (QDQ), TFLite, a plan of the native runner, a QNN context binary in its ONNX wrapper, a
#: .tflite that NeuroPilot has compiled for one SoC, float ONNX with a file of encodings beside it
Format = Literal["onnx", "tflite", "plan", "qnn-context", "neuron", "onnx-encodings"]


@dataclass(frozen=True)
class Artifact:
    """A file of a package that a runtime executes.

    Attributes:
        path: Path below the package's folder, with `/`.
        format: What it is.
        numerics: Numerics profile of the simulation that it is compared with, `onnx` or `tflite`.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
        options: What it was made for, such as `{"htp_arch": "73"}`.
        also_simulated: Other profiles that the golden outputs were simulated in, for the runtimes that compute so.
    """

    path: str
    format: Format
    numerics: str
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]
    options: tuple[tuple[str, str], ...] = ()
    also_simulated: tuple[str, ...] = ()
