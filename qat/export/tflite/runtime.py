"""LiteRT as the executor of exported models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qat.errors import ExportError
from qat.export.tflite.schema import interpreter

#: `reference`: the plain kernels that define the numerics; `default`: what an application gets, XNNPACK where it
#: can and optimized kernels elsewhere
Kernels = Literal["reference", "default"]

_RESOLVERS: Mapping[Kernels, str] = {"reference": "BUILTIN_REF", "default": "AUTO"}


def version() -> str:
    """Name and version of the runtime."""
    return f"LiteRT {metadata.version('ai-edge-litert')}"


class Runtime:
    """A model that is loaded and ready to run.

    Args:
        content: The bytes of the file.
        kernels: Which kernels run it.
        keep: Every tensor keeps its value, so that `tensor` can read it.

    Raises:
        ExportError: LiteRT is not installed, or refuses the model.
    """

    def __init__(self, content: bytes, kernels: Kernels = "reference", *, keep: bool = False) -> None:
        litert = interpreter()
        resolver = getattr(litert.OpResolverType, _RESOLVERS[kernels])
        try:
            self._interpreter: Any = litert.Interpreter(
                model_content=content,
                experimental_op_resolver_type=resolver,
                experimental_preserve_all_tensors=keep,
                num_threads=1,
            )
            self._interpreter.allocate_tensors()
        # LiteRT raises RuntimeError and ValueError with its log line as the message
        except (RuntimeError, ValueError) as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise ExportError(
                f"LiteRT refuses the model ({cause})", "report this model: it is a defect of qat"
            ) from error
        self._inputs = [entry["index"] for entry in self._interpreter.get_input_details()]
        self._outputs = [entry["index"] for entry in self._interpreter.get_output_details()]

    def run(self, inputs: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Run the model on inputs in the file's layout and types, and return its outputs in theirs."""
        for index, array in zip(self._inputs, inputs, strict=True):
            self._interpreter.set_tensor(index, np.ascontiguousarray(array))
        self._interpreter.invoke()
        return [self.tensor(index) for index in self._outputs]

    def tensor(self, number: int) -> npt.NDArray[Any]:
        """Value of a tensor by its number in the file."""
        found: npt.NDArray[Any] = self._interpreter.get_tensor(number)
        return found
