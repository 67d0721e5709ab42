"""`OnnxGraph`: nodes, initializers and names of an ONNX graph while it is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper


class OnnxGraph:
    """What has been written so far, in the order of execution.

    Args:
        opset: Version of the standard operators.
        reserved: Names that no value but the one they are for may have.

    Attributes:
        nodes: Nodes.
        initializers: Constants, by name.
        value_infos: Types and shapes of values, by name.
        opset_imports: Versions of operators, by domain.
        written: Names of values that exist: inputs, and outputs of nodes.
    """

    def __init__(self, opset: int, reserved: Iterable[str] = ()) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.value_infos: dict[str, onnx.ValueInfoProto] = {}
        self.opset_imports: dict[str, int] = {"": opset}
        self.written: set[str] = set()
        self._used: set[str] = set(reserved)
        self._node_names: dict[str, int] = {}
        self._constants_by_content: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def is_used(self, name: str) -> bool:
        """Whether a name is reserved."""
        return name in self._used

    def fresh(self, wanted: str) -> str:
        """Reserve `wanted`, or the first of `wanted~2`, `wanted~3`, ... that is free."""
        name, count = wanted, 1
        while name in self._used:
            count += 1
            name = f"{wanted}~{count}"
        self._used.add(name)
        return name

    def fresh_node(self, wanted: str) -> str:
        """Return `wanted` as the name of a node, numbered from its second use on."""
        count = self._node_names[wanted] = self._node_names.get(wanted, 0) + 1
        return wanted if count == 1 else f"{wanted}~{count}"

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        *,
        where: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node; return the name of its first output.

        Args:
            op_type: Standard ONNX operator.
            inputs: Names; trailing empty ones are dropped.
            outputs: Names, or None for a new one made of `where`.
            where: Base of the node's name (default: the first output).
            **attributes: Attributes; None is left out.
        """
        kept = list(inputs)
        while kept and not kept[-1]:
            kept.pop()
        results = [self.fresh(f"{where}/{op_type.lower()}")] if outputs is None else list(outputs)
        given = {key: value for key, value in attributes.items() if value is not None}
        name = self.fresh_node(f"{where or results[0]}/{op_type}")
        self.written.update(results)
        self.nodes.append(helper.make_node(op_type, kept, results, name=name, **given))
        return results[0]

    def constant(self, values: npt.NDArray[Any], wanted: str) -> str:
        """Return the name of an initializer with these values; equal ones are shared."""
        key = (str(values.dtype), values.shape, values.tobytes())
        name = self._constants_by_content.get(key)
        if name is None:
            name = self.fresh(wanted)
            self._constants_by_content[key] = name
            self.initializers[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name

    def integers(self, values: Sequence[int], wanted: str) -> str:
        """Return the name of an int64 vector."""
        return self.constant(np.array(values, dtype=np.int64), wanted)

    def scalar(self, value: float, wanted: str) -> str:
        """Return the name of a float32 scalar."""
        return self.constant(np.array(value, dtype=np.float32), wanted)

    def add_initializer(self, tensor: TensorProto) -> str:
        """Add an initializer under its own, already reserved, name."""
        self.initializers[tensor.name] = tensor
        return tensor.name

    def declare(self, onnx_name: str, element_type: int, dimensions: Sequence[int | str]) -> None:
        """Record type and shape of a value."""
        self.value_infos[onnx_name] = helper.make_tensor_value_info(onnx_name, element_type, list(dimensions))
