"""How far single codes, added up along a network, may carry its outputs.

Every operator of the HTP is a code off now and then, each on its own proven to be no more. What that comes to at the
outputs is a property of the network: next to nothing where convolutions average it, dozens of codes where a dozen
layer norms divide by small deviations. So it is measured on the network itself, in ONNX Runtime: each operator's result
is disturbed at random as the HTP disturbs it, and the outputs are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qat.export.cuts import cut_layers
from qat.export.onnx import model_bytes
from qat.export.runtime import session
from qat.packages.executor import Sample

#: share of the codes that are one off, of either sign: what the emulator has at most (92 to 99 % of an operator's codes
#: are equal; docs/hexagon.md)
RATE = 0.08
DRAWS = 4


def spread(file: Path, sample: Sample) -> float:
    """Return the largest difference at the outputs, in codes of 8 bits, when each operator is randomly a code off.

    Args:
        file: A QDQ model of static shapes.
        sample: Its inputs by name.

    Raises:
        ExportError: A quantized tensor has no static shape.
    """
    model = onnx.load(str(file))
    plain = session(model_bytes(model)).run(None, dict(sample))
    steps = [_step(model, value.name, codes) for value, codes in zip(model.graph.output, plain, strict=True)]
    noise = _disturb(model)
    disturbed = session(model_bytes(model))
    rng = np.random.default_rng(0)
    largest = 0.0
    for _ in range(DRAWS):
        draw = {name: _off(rng, shape, scale) for name, (shape, scale) in noise.items()}
        for step, want, have in zip(steps, plain, disturbed.run(None, {**sample, **draw}), strict=True):
            apart = np.abs(have.astype(np.float64) - want.astype(np.float64)).max(initial=0.0)
            largest = max(largest, float(apart) / step)
    return largest


def _off(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> NDArray[np.float32]:
    chance = rng.random(shape, np.float32)
    off: NDArray[np.float32] = (chance < RATE / 2).astype(np.float32) - (chance > 1 - RATE / 2).astype(np.float32)
    return off * np.float32(scale)


def _disturb(model: onnx.ModelProto) -> dict[str, tuple[tuple[int, ...], float]]:
    """Add an input to every operator before it is quantized; return their shapes, and what one code of 8 bits is."""
    scales = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = {layer.codes: layer for layer in cut_layers(model)}
    noise = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        layer = layers.get(node.output[0])
        if layer is not None and node.op_type == "QuantizeLinear":
            kind = layer.model.graph.output[0].type.tensor_type
            name = f"{layer.codes}:off"
            shape = tuple(d.dim_value for d in kind.shape.dim)
            scale = float(numpy_helper.to_array(scales[node.input[1]]).reshape(-1)[0])
            noise[name] = shape, scale * _fineness(kind.elem_type)
            model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
            nodes.append(helper.make_node("Add", [node.input[0], name], [f"{name}:sum"]))
            node.input[0] = f"{name}:sum"
        nodes.append(node)
    # a copy: what is cleared would be lost
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return noise


def _step(model: onnx.ModelProto, output: str, values: NDArray[Any]) -> float:
    """One code of 8 bits of an output; of a float without codes, one 255th of its largest magnitude."""
    if values.dtype != np.float32:
        return float(1 << (8 * values.dtype.itemsize - 8))
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and output in node.output:
            scale, zero_point = held[node.input[1]], held[node.input[2]]
            return float(scale.reshape(-1)[0]) * (1 << (8 * zero_point.dtype.itemsize - 8))
    return float(np.abs(values).max(initial=0.0)) / 255 or 1.0


def _fineness(kind: int) -> int:
    return 256 if kind in (TensorProto.UINT16, TensorProto.INT16) else 1
