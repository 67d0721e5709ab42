"""8-bit tensors as TFLite has them: int8 with all codes, weights with zero point 0.

uint8 codes become int8 ones by subtracting 128 from codes and zero point, which changes no value.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.integer.program import Constant
from qat.numerics import SCALE_FLOOR

_OFFSET = 128


def signed(name: str, encoding: Encoding) -> Encoding:
    """Return the int8 encoding of an activation's values.

    Args:
        name: Name of the tensor, for messages.
        encoding: Of int8 or uint8, with one scale and all codes of its type.

    Raises:
        ExportError: Another one; the tensor is named.
    """
    if encoding.dtype not in ("int8", "uint8"):
        raise ExportError(
            f"tensor {name!r} is {encoding.dtype}, and activations of TFLite's integer operators are int8",
            "give it an 8-bit scheme",
        )
    if not encoding.per_tensor:
        raise ExportError(f"tensor {name!r} has {len(encoding.scale)} scales", "give it a per-tensor scheme")
    if encoding.qmax - encoding.qmin != 255:
        raise ExportError(
            f"tensor {name!r} uses the codes {encoding.qmin} to {encoding.qmax}, and TFLite's operators saturate at "
            "the ends of int8",
            "leave qmin and qmax of its scheme open",
        )
    return _shifted(encoding)


def _shifted(encoding: Encoding) -> Encoding:
    if encoding.dtype != "uint8":
        return encoding
    return replace(
        encoding,
        dtype="int8",
        zero_point=tuple(z - _OFFSET for z in encoding.zero_point),
        qmin=encoding.qmin - _OFFSET,
        qmax=encoding.qmax - _OFFSET,
    )


def signed_constant(constant: Constant) -> Constant:
    """Return an activation-like constant (a mask, an embedding, a scalar) as int8.

    Raises:
        ExportError: It cannot be one; it is named.
    """
    assert constant.encoding is not None
    encoding = signed(constant.name, constant.encoding)
    return Constant(constant.name, _codes(constant), encoding)


def signed_weight(constant: Constant, operator: str) -> Constant:
    """Return a weight as int8 codes with zero point 0; a 4-bit one keeps its codes.

    Args:
        constant: The weight.
        operator: Name of the operator that reads it, for messages.

    Raises:
        ExportError: It cannot be one; it and the operator are named.
    """
    encoding = constant.encoding
    where = f"weight {constant.name!r} of operator {operator!r}"
    if encoding is None:
        raise ExportError(f"{where} is float", "let the target quantize it")
    if encoding.dtype not in ("int8", "uint8", "int4"):
        raise ExportError(f"{where} is {encoding.dtype}, and TFLite's weights are int8", "give it an 8-bit scheme")
    if encoding.granularity.kind == "per_group":
        raise ExportError(f"{where} has a scale for each group", "give it a per-channel scheme")
    shifted = _shifted(encoding)
    if any(shifted.zero_point):
        raise ExportError(f"{where} has zero points, and TFLite's weights have none", "give it a symmetric scheme")
    return Constant(constant.name, _codes(constant), shifted)


def signed_slope(constant: Constant, shape: tuple[int, ...]) -> Constant:
    """Return the float slopes of a PReLU as int8 with one scale, in a shape that broadcasts.

    Args:
        constant: float32 slopes.
        shape: Shape of the result.
    """
    slopes = constant.value.detach().to("cpu", torch.float32).reshape(shape)
    scale = max(float(slopes.abs().max()) / 127.0, SCALE_FLOOR)
    encoding = Encoding("int8", (scale,), (0,), -128, 127, True, provenance="derived", method="slopes")
    return Constant(f"{constant.name}/int8", encoding.quantize(slopes).to(torch.int8), encoding)


def _codes(constant: Constant) -> torch.Tensor:
    assert constant.encoding is not None
    offset = _OFFSET if constant.encoding.dtype == "uint8" else 0
    return (constant.value.to(torch.int32) - offset).to(torch.int8)
