"""Integer and float types in ONNX: element types, packing of codes, and grids of another width."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto, numpy_helper

from qat.encoding import Encoding
from qat.scheme import int_type

#: ONNX element type of each integer type
ONNX_TYPES = {
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "uint16": TensorProto.UINT16,
    "int32": TensorProto.INT32,
}
#: ONNX element type of each torch dtype that a float (or index) tensor may have
FLOAT_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}
_NUMPY_TYPES: dict[str, npt.DTypeLike] = {
    name: np.dtype(name) for name in ("int8", "uint8", "int16", "uint16", "int32")
}


def integer_tensor(name: str, values: npt.NDArray[Any], dtype: str) -> TensorProto:
    """Return an initializer of integer codes; 4-bit ones are packed two a byte, the first in the low half."""
    if dtype not in ("int4", "uint4"):
        return numpy_helper.from_array(np.asarray(values, dtype=_NUMPY_TYPES[dtype], order="C"), name)
    halves = (values.astype(np.int64) & 0xF).astype(np.uint8).reshape(-1)
    if halves.size % 2:
        halves = np.append(halves, np.uint8(0))
    packed = halves[0::2] | (halves[1::2] << 4)
    return TensorProto(name=name, data_type=ONNX_TYPES[dtype], dims=values.shape, raw_data=packed.tobytes())


def whole(encoding: Encoding) -> Encoding:
    """The same grid with all codes of its type."""
    kind = int_type(encoding.dtype)
    return replace(encoding, qmin=kind.qmin, qmax=kind.qmax)


def eight_bits(encoding: Encoding) -> Encoding:
    """The same grid with all codes of the 8-bit type of the same sign."""
    return whole(replace(encoding, dtype="int8" if int_type(encoding.dtype).signed else "uint8"))
