"""Products of two activations on the HTP: the second factor is rounded to signed codes of 8 bits, column by column.

No document says so; it is measured on Qualcomm's emulator (onnxruntime-qnn 2.7.0, v68, v73, v79; docs/hexagon.md).
The HTP multiplies by weights of 8 signed bits, symmetric around 0. The second factor of a `MatMul` becomes such weights
when the network runs: `x = code - zero_point` has 9 bits unless the zero point is 128, so that every column j (what is
summed over) is scaled by

    r_j = min(1, 127 / max(x_j), 128 / -min(x_j))

rounded half up to integers, and multiplied exactly; the multiplier of the result has 1 / r_j in it. A column within
-128 ... 127 stays what it is, hence a factor with zero point 128. That is of uint8 codes: those of int8 are multiplied
as they are, and what becomes of 16 bits is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qat.export.onnx import model_bytes
from qat.export.runtime import session

_SECOND = "qat:second_factor"


def signed_columns(x: NDArray[Any]) -> NDArray[np.float64]:
    """Round the second factor of a product as the HTP does.

    Args:
        x: Codes less their zero point, (..., K, N) or (K,); the sum of the product runs over K.

    Returns:
        What takes part in the product, in the same unit; at most half of `1 / r_j` from `x`.
    """
    codes = np.asarray(x, np.float64)
    axis = -2 if codes.ndim > 1 else -1
    above = np.maximum(codes.max(axis, keepdims=True), 127)
    below = np.maximum(-codes.min(axis, keepdims=True), 128)
    ratio = np.minimum(127 / above, 128 / below)
    rounded: NDArray[np.float64] = np.floor(codes * ratio + 0.5) / ratio
    return rounded


def product_codes(model: onnx.ModelProto, given: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8] | None:
    """Compute the codes of an operator as the HTP's product does.

    Args:
        model: One operator, cut out of a QDQ model (`qat.export.cuts`).
        given: Its inputs by name.

    Returns:
        What it gives, but for the last rounding of the HTP; None where it is no product of two activations of uint8.
    """
    found = _second_factor(model)
    if found is None:
        return None
    product, scale = found
    factor = product.input[1]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.append(helper.make_tensor_value_info(factor, TensorProto.FLOAT, None))
    (values,) = session(model_bytes(probe)).run(None, dict(given))
    rounded = (signed_columns(np.rint(values.astype(np.float64) / scale)) * scale).astype(np.float32)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.input.append(helper.make_tensor_value_info(_SECOND, TensorProto.FLOAT, rounded.shape))
    next(node for node in changed.graph.node if node.op_type == "MatMul").input[1] = _SECOND
    codes: NDArray[np.uint8]
    (codes,) = session(model_bytes(changed)).run(None, {**given, _SECOND: rounded})
    return codes


def _second_factor(model: onnx.ModelProto) -> tuple[onnx.NodeProto, float] | None:
    """The product, and the scale of its second factor."""
    graph = model.graph
    products = [node for node in graph.node if node.op_type == "MatMul"]
    if len(products) != 1 or graph.output[0].type.tensor_type.elem_type != TensorProto.UINT8:
        return None
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] == products[0].input[1]:
            scale, zero_point = (numpy_helper.to_array(initializers[name]) for name in node.input[1:3])
            if zero_point.dtype == np.uint8 and scale.size == 1:
                return products[0], float(scale.reshape(-1)[0])
    return None
