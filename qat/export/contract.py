"""What an exported file promises of its inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.integer.program import Program


@dataclass(frozen=True)
class TensorContract:
    """An input or output of an exported file.

    Attributes:
        name: Name in the file.
        tensor: The user's tensor name.
        dtype: Element type as the file has it: `float32`, or the integer type of the codes.
        shape: Sizes as the file has them, in its order of dimensions; -k for k times an open batch size.
        order: Dimension d of the file is dimension order[d] of the user's tensor: `(0, 2, 3, 1)` for channels-last
            images.
        scale: Real value of one code, of float borders too; None for a tensor that is not quantized.
        zero_point: Code of 0.
        qmin: Smallest code.
        qmax: Largest code.
        code_dtype: Integer type of the codes; "" for a tensor that is not quantized.
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
    code_dtype: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        found: dict[str, Any] = {
            "name": self.name,
            "tensor": self.tensor,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "order": list(self.order),
        }
        if self.scale is not None:
            found |= {
                "scale": self.scale,
                "zero_point": self.zero_point,
                "qmin": self.qmin,
                "qmax": self.qmax,
                "code_dtype": self.code_dtype,
            }
        return found


def contract(
    name: str, tensor: str, encoding: Encoding | None, shape: tuple[int, ...], order: tuple[int, ...], *, codes: bool
) -> TensorContract:
    """Return the contract of a border.

    Args:
        name: Name in the file.
        tensor: The user's tensor name.
        encoding: How its codes are read, per tensor; None where it is not quantized.
        shape: Sizes in the file.
        order: See `TensorContract`.
        codes: The file takes or gives the codes.

    Raises:
        ExportError: Codes are asked of a tensor that has none, or whose codes no array type holds.
    """
    if encoding is None:
        if codes:
            raise ExportError(f"{tensor!r} is not quantized and has no codes", "give or take floats there")
        return TensorContract(name, tensor, "float32", shape, order)
    if codes and encoding.dtype in ("int4", "uint4"):
        raise ExportError(f"{tensor!r} has codes of 4 bits, which no application holds", "quantize it to 8 bits")
    return TensorContract(
        name,
        tensor,
        encoding.dtype if codes else "float32",
        shape,
        order,
        encoding.scale[0],
        encoding.zero_point[0],
        encoding.qmin,
        encoding.qmax,
        encoding.dtype,
    )


def input_encoding(program: Program, entry: str) -> Encoding | None:
    """Return what an input of a program is quantized to, or None where something reads it as float, or two ways.

    Args:
        program: The program.
        entry: One of its inputs.
    """
    readers = [op for op in program.ops if entry in op.inputs]
    if not readers or entry in program.outputs or any(op.kind != "quantize" for op in readers):
        return None
    found = [program.encoding_of(op.outputs[0]) for op in readers]
    first = found[0]
    return first if first and all(other and other.same_grid(first) for other in found) else None


def output_encoding(program: Program, entry: str) -> Encoding | None:
    """Return what an output of a program is dequantized from, or None for a float that is computed as such."""
    source = next((op.inputs[0] for op in program.ops if op.kind == "dequantize" and op.outputs[0] == entry), None)
    return None if source is None else program.encoding_of(source)
