"""What a package promises of one file that a runtime executes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

#: formats of artifacts: ONNX (QDQ), TFLite, a plan of the native runner, a QNN context binary in its ONNX wrapper
Format = Literal["onnx", "tflite", "plan", "qnn-context"]


@dataclass(frozen=True)
class TensorContract:
    """An input or output of an artifact.

    Attributes:
        name: Name in the artifact.
        tensor: The user's tensor name.
        dtype: Element type as the artifact has it: `float32`, or the integer type of the codes.
        shape: Sizes as the artifact has them, in its layout; -1 for an open batch size.
        order: Dimension d of the artifact is dimension order[d] of the user's tensor: `(0, 2, 3, 1)` for
            channels-last images.
        scale: Real value of one code; None for a tensor that is not quantized. Float borders have it too.
        zero_point: Code of 0.
        qmin: Smallest code.
        qmax: Largest code.
    """

    name: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    scale: float | None = None
    zero_point: int = 0
    qmin: int = 0
    qmax: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        quantization = (
            {}
            if self.scale is None
            else {"scale": self.scale, "zero_point": self.zero_point, "qmin": self.qmin, "qmax": self.qmax}
        )
        return {
            "name": self.name,
            "tensor": self.tensor,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "order": list(self.order),
            **quantization,
        }


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
    """

    path: str
    format: Format
    numerics: str
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]
    options: tuple[tuple[str, str], ...] = ()
