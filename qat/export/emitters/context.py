"""`Context`: the ONNX graph of a program under construction, and where every value of the program lives in it.

The spelling is QDQ: an operator computes on floats, each quantized value passes through QuantizeLinear and
DequantizeLinear, and runtimes fuse the three to an integer operator. A value `v` of the program appears as

- `v`: the float result of the operator (`v/raw` where the graph output of that name is the dequantized
value),
- `v/codes`: the output of QuantizeLinear,
- `v/dequantized`: the output of DequantizeLinear (`v` where that is a graph output).

A value whose integer range is narrower than its type is first quantized to the whole type (`v/wide/codes`) and
then clipped: Clip directly before QuantizeLinear would keep ONNX Runtime (1.31) from fusing the operator before
it. A 4-bit value likewise passes through 8 bits of the same scale and zero point, which changes no code: next to
a 4-bit QuantizeLinear, that runtime's optimizer drops a Relu that is needed, fails on a Clip, and makes a MaxPool
of a type that MaxPool does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from onnx import TensorProto, numpy_helper

from qat.encoding import Encoding
from qat.errors import ExportError
from qat.export.emitters.onnx_graph import OnnxGraph
from qat.export.emitters.types import FLOAT_TYPES, ONNX_TYPES, eight_bits, integer_tensor, whole
from qat.integer.program import Op, Program, TensorInfo
from qat.scheme import int_type

#: kinds that only move codes, so their results are in range whenever their operands are
MOVERS = frozenset({"reshape", "transpose", "slice", "expand", "identity", "concat", "max_pool", "rescale", "pad"})

#: kinds after which ONNX Runtime may drop a 4-bit QuantizeLinear and does it right
_COPIERS = frozenset({"reshape", "transpose", "slice", "expand", "identity", "concat"})

#: operators whose float weights ONNX Runtime may quantize
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm"})
#: operators that ONNX Runtime fuses with those, or moves a QuantizeLinear across
_PASSED = frozenset({
    "Relu", "Clip", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "Expand",
    "MaxPool", "Identity", "DepthToSpace", "SpaceToDepth",
})  # fmt: skip

#: `cast`: INT4 initializer, Cast to 8 bits, DequantizeLinear; `direct`: DequantizeLinear on the INT4 initializer
FourBitWeights = Literal["cast", "direct"]

Emitter = Callable[["Context", Op], None]


class Context(OnnxGraph):
    """The ONNX graph of a program under construction.

    Args:
        program: What is exported.
        opset: Version of the standard operators.
        batch: Fixed batch size, or None to leave it open (dimension `batch`).
        four_bit_weights: How 4-bit constants reach DequantizeLinear, see `FourBitWeights`.
    """

    def __init__(
        self, program: Program, opset: int, batch: int | None, four_bit_weights: FourBitWeights = "cast"
    ) -> None:
        public = {info.public_name for info in program.tensors.values()}
        super().__init__(opset, public | {f"{info.name}/codes" for info in program.tensors.values() if info.encoding})
        self.program = program
        self.four_bit_weights = four_bit_weights
        self.batch = batch
        self._quantization_parameters: dict[tuple[str, bytes, bytes, str], list[str]] = {}
        #: encodings of the outputs of DequantizeLinear on activations
        self._dequantized: dict[str, Encoding] = {}
        self._codes: dict[str, str] = {}
        self._floats: dict[str, str] = {}
        outputs = set(program.outputs)
        #: codes whose dequantized value is a graph output and so takes the user's name
        self._dequantized_outputs = {
            op.inputs[0]: op.outputs[0] for op in program.ops if op.kind == "dequantize" and op.outputs[0] in outputs
        }

    # shapes -----------------------------------------------------------------------------------------------

    def info(self, name: str) -> TensorInfo:
        """The shape and encoding of a tensor or constant."""
        constant = self.program.constants.get(name)
        if constant is not None:
            return TensorInfo(name, tuple(constant.value.shape), constant.encoding, constant.value.dtype)
        return self.program.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor or constant; those that depend on the batch are -k where it is open."""
        return tuple(d * -self.batch if d < 0 and self.batch is not None else d for d in self.info(name).shape)

    def dimensions(self, name: str) -> list[int | str]:
        """Sizes for a ValueInfo: numbers, `batch`, or `k*batch`."""
        return [d if d >= 0 else "batch" if d == -1 else f"{-d}*batch" for d in self.shape(name)]

    def shape_tensor(self, sizes: Sequence[int], where: str) -> str:
        """Return an int64 vector of `sizes`, computed from a graph input where some are -k."""
        if all(d >= 0 for d in sizes):
            return self.constant(np.array(sizes, dtype=np.int64), f"{where}/shape")
        for source in self.program.inputs:
            for axis, size in enumerate(self.shape(source)):
                if size < 0:
                    return self._dynamic_shape(sizes, where, source, axis, -size)
        raise ExportError(
            f"operator {where!r} needs the batch size, but no input of the model depends on it",
            "export with dynamic_batch=False",
        )

    def _dynamic_shape(self, sizes: Sequence[int], where: str, source: str, axis: int, unit: int) -> str:
        batch = self.node("Shape", [self.value(source)], where=f"{where}/batch", start=axis, end=axis + 1)
        if unit != 1:
            batch = self.node("Div", [batch, self.constant(np.array([unit]), "size")], where=f"{where}/batch")
        parts: list[str] = []
        for size in sizes:
            if size >= 0:
                parts.append(self.constant(np.array([size]), "size"))
            elif size == -1:
                parts.append(batch)
            else:
                parts.append(self.node("Mul", [batch, self.constant(np.array([-size]), "size")], where=f"{where}/size"))
        return parts[0] if len(parts) == 1 else self.node("Concat", parts, where=f"{where}/shape", axis=0)

    # values of the program --------------------------------------------------------------------------------

    def value(self, name: str) -> str:
        """The float value of a tensor or constant, dequantized if need be; "" for an absent operand."""
        if not name:
            return ""
        if name not in self._floats:
            if name in self.program.constants:
                self._floats[name] = self._constant_value(name)
            else:
                encoding = self.info(name).encoding
                if encoding is None or name not in self._codes:
                    raise ExportError(
                        f"tensor {name!r} is read before it is computed", "order the operators of the program"
                    )
                output = self._dequantized_outputs.get(name)
                wanted = self.info(output).public_name if output else ""
                if not wanted or wanted in self.written:
                    wanted = self.fresh(f"{name}/dequantized")
                self._floats[name] = self._dequantize(self._codes[name], encoding, wanted, name)
                self.declare(wanted, TensorProto.FLOAT, self.dimensions(name))
        return self._floats[name]

    def float_constant(self, name: str, shape: Sequence[int]) -> str:
        """A constant in another shape, as ONNX wants it for PRelu slopes and the like; dequantized from its codes."""
        constant = self.program.constants[name]
        unique = name if not self.is_used(name) else f"{name}/reshaped"
        if constant.encoding is None:
            return self.constant(constant.value.detach().to(torch.float32).numpy().reshape(tuple(shape)), unique)
        unique = self.fresh(unique)
        array = constant.value.detach().cpu().numpy().reshape(tuple(shape))
        codes = self.add_initializer(integer_tensor(self.fresh(f"{unique}/codes"), array, constant.encoding.dtype))
        return self._dequantize(codes, constant.encoding, unique, unique, tuple(shape))

    def codes(self, name: str) -> str:
        """The codes of a quantized tensor."""
        return self._codes[name]

    def result(self, name: str) -> str:
        """The name under which an operator writes its float result for tensor `name` (then call `finish`)."""
        info = self.info(name)
        if info.encoding is not None and name in self._dequantized_outputs:
            return self.fresh(f"{info.public_name}/raw")
        return info.public_name

    def finish(self, name: str, onnx_name: str, op: Op) -> None:
        """Record `onnx_name` as the float result of `op` for tensor `name`; quantize it if it has codes."""
        info = self.info(name)
        element = FLOAT_TYPES.get(info.dtype, TensorProto.FLOAT) if info.encoding is None else TensorProto.FLOAT
        self.declare(onnx_name, element, self.dimensions(name))
        if info.encoding is None:
            self._floats[name] = onnx_name
            return
        if self._needs_clip(op, info.encoding):
            onnx_name = self._clip(name, onnx_name, info.encoding)
        if int_type(info.encoding.dtype).bits == 4 and op.kind not in _COPIERS:
            onnx_name = self.through(onnx_name, eight_bits(info.encoding), f"{name}/wide", self.dimensions(name))
        codes = self._quantize(onnx_name, info.encoding, f"{name}/codes", name)
        self.declare(codes, ONNX_TYPES[info.encoding.dtype], self.dimensions(name))
        self._codes[name] = codes

    def alias(self, name: str, source: str) -> None:
        """Let tensor `name` share the codes (or the float value) of `source`.

        Where the encodings differ (rescale) `name` still gets its own DequantizeLinear.
        """
        mine, theirs = self.info(name).encoding, self.info(source).encoding
        if theirs is None:
            self._floats[name] = self.value(source)
            return
        if source in self.program.constants:
            self.value(source)
        self._codes[name] = self._codes[source]
        if mine is not None and mine.same_grid(theirs) and name not in self._dequantized_outputs:
            self._floats[name] = self.value(source)

    def bind(self, name: str, onnx_name: str) -> None:
        """Record that float tensor `name` is the existing value `onnx_name`."""
        self._floats[name] = onnx_name
        self.written.add(onnx_name)

    def through(self, raw: str, encoding: Encoding | None, base: str, sizes: Sequence[int | str]) -> str:
        """Quantize and dequantize an intermediate float, so that the operators around it can be fused."""
        if encoding is None:
            return raw
        codes = self._quantize(raw, encoding, self.fresh(f"{base}/codes"), base)
        value = self._dequantize(codes, encoding, self.fresh(f"{base}/dequantized"), base)
        self.declare(value, TensorProto.FLOAT, sizes)
        return value

    # quantization -----------------------------------------------------------------------------------------

    def _constant_value(self, name: str) -> str:
        constant = self.program.constants[name]
        values = constant.value.detach().cpu().contiguous()
        if constant.encoding is None:
            if values.dtype not in FLOAT_TYPES:
                raise ExportError(f"constant {name!r} has dtype {values.dtype}", "convert it to float32")
            unique = self.fresh(name)
            return self.add_initializer(numpy_helper.from_array(values.numpy(), unique))
        unique = self.fresh(name)
        codes = self.add_initializer(
            integer_tensor(self.fresh(f"{unique}/codes"), values.numpy(), constant.encoding.dtype)
        )
        encoding = constant.encoding
        four_bits = int_type(encoding.dtype).bits == 4
        if four_bits and self.four_bit_weights == "cast" and encoding.granularity.size is None:
            # folded when the model is loaded: the file holds 4 bits, and the operator is fused like any 8-bit one
            encoding = eight_bits(encoding)
            wide = self.fresh(f"{unique}/codes8")
            codes = self.node("Cast", [codes], [wide], where=unique, to=ONNX_TYPES[encoding.dtype])
            self.declare(codes, ONNX_TYPES[encoding.dtype], list(values.shape))
        self._codes[name] = codes
        return self._dequantize(codes, encoding, unique, unique, tuple(values.shape))

    def _parameters_of(
        self, encoding: Encoding, base: str, shape: Sequence[int] | None
    ) -> tuple[list[str], dict[str, int | None]]:
        scales = np.array(encoding.scale, dtype=np.float32)
        zeros = np.array(encoding.zero_point, dtype=np.int64)
        granularity = encoding.granularity
        attributes: dict[str, int | None] = {}
        if encoding.per_tensor:
            scales, zeros = scales.reshape(()), zeros.reshape(())
        else:
            attributes["axis"] = granularity.axis
            if granularity.size is not None:
                if shape is None:
                    raise ExportError(
                        f"tensor {base!r} is an activation with per-group scales", "use per-tensor scales"
                    )
                grouped = list(shape)
                grouped[granularity.axis] = -(-grouped[granularity.axis] // granularity.size)
                scales, zeros = scales.reshape(grouped), zeros.reshape(grouped)
                attributes["block_size"] = granularity.size
        # shared between the QuantizeLinear and the DequantizeLinear of one tensor only: a tensor's numbers
        # bear its name
        key = (base, scales.tobytes(), zeros.tobytes(), encoding.dtype)
        names = self._quantization_parameters.get(key)
        if names is None:
            scale = self.fresh(f"{base}/scale")
            names = [self.add_initializer(numpy_helper.from_array(scales, scale))]
            if encoding.dtype != "int32":
                zero = self.fresh(f"{base}/zero_point")
                names.append(self.add_initializer(integer_tensor(zero, zeros, encoding.dtype)))
            elif zeros.any():
                raise ExportError(f"tensor {base!r} has int32 codes with a zero point", "use zero point 0 for int32")
            self._quantization_parameters[key] = names
        return names, attributes

    def _quantize(self, source: str, encoding: Encoding, codes: str, base: str) -> str:
        source = self._guarded(source, encoding, base)
        names, attributes = self._parameters_of(encoding, base, None)
        return self.node("QuantizeLinear", [source, *names], [codes], where=base, **attributes)

    def _guarded(self, source: str, encoding: Encoding, base: str) -> str:
        """Keep apart two QuantizeLinear of one 8-bit type that follow each other.

        ONNX Runtime merges Q-DQ-Q-DQ to one pair on a third grid, made of the intersection of the two ranges. A
        Max with the smallest value that the second can represent computes nothing and keeps the two.
        """
        before = self._dequantized.get(source)
        if (
            before is None
            or before.dtype not in ("int8", "uint8")
            or before.dtype != encoding.dtype
            or before.same_grid(encoding)
        ):
            return source
        return self._guard(source, encoding, base)

    def _guard(self, source: str, encoding: Encoding, base: str) -> str:
        """A Max that changes no code of `encoding`, and that the runtime moves nothing across."""
        low = self._lowest(encoding, base)
        return self.node("Max", [source, low], [self.fresh(f"{base}/guarded")], where=base)

    def _lowest(self, encoding: Encoding, base: str) -> str:
        """The smallest value of `encoding`, dequantized from its code: Hexagon computes with no float constant."""
        if int_type(encoding.dtype).bits < 8 or not encoding.per_tensor:
            return self.scalar(whole(encoding).representable()[0], f"{base}/lowest")
        code = np.array(int_type(encoding.dtype).qmin)
        codes = self.add_initializer(integer_tensor(self.fresh(f"{base}/lowest/codes"), code, encoding.dtype))
        return self._dequantize(codes, encoding, self.fresh(f"{base}/lowest"), base, ())

    def shielded(self, source: str, name: str) -> str:
        """Return the float `source` of quantized tensor `name`, so that the layer behind it stays a float layer.

        ONNX Runtime quantizes the float weight of a product between DequantizeLinear and QuantizeLinear on its own,
        also where a Relu or operators that only move values are in between. That layer was kept float on purpose.
        """
        encoding = self.info(name).encoding
        assert encoding is not None
        producers = {result: node for node in self.nodes for result in node.output}
        node = producers.get(source)
        while node is not None and node.op_type in _PASSED:
            node = producers.get(node.input[0])
        if node is None or node.op_type not in _PRODUCTS:
            return source
        return self._guard(source, encoding, name)

    def _dequantize(
        self, codes: str, encoding: Encoding, value: str, base: str, shape: Sequence[int] | None = None
    ) -> str:
        names, attributes = self._parameters_of(encoding, base, shape)
        if shape is None:
            self._dequantized[value] = encoding
        return self.node("DequantizeLinear", [codes, *names], [value], where=base, **attributes)

    def _needs_clip(self, op: Op, encoding: Encoding) -> bool:
        kind = int_type(encoding.dtype)
        if (encoding.qmin, encoding.qmax) == (kind.qmin, kind.qmax):
            return False
        if op.kind == "pad" and op.attrs["mode"] == "constant" and op.attrs["value"]:
            return True
        operands = [self.info(name).encoding for name in op.inputs if name]
        in_range = all(
            e is not None and e.same_grid(encoding) and e.qmin >= encoding.qmin and e.qmax <= encoding.qmax
            for e in operands
        )
        return not (op.kind in MOVERS and in_range)

    def _clip(self, name: str, onnx_name: str, encoding: Encoding) -> str:
        if not encoding.per_tensor:
            raise ExportError(
                f"tensor {name!r} has per-channel scales and a range narrower than its type",
                "use per-tensor scales for activations, or the whole integer range",
            )
        wide = eight_bits(encoding) if int_type(encoding.dtype).bits == 4 else whole(encoding)
        value = self.through(onnx_name, wide, f"{name}/wide", self.dimensions(name))
        low, high = encoding.representable()
        bounds = [self.scalar(low, f"{name}/low"), self.scalar(high, f"{name}/high")]
        return self.node("Clip", [value, *bounds], [self.fresh(f"{name}/clipped")], where=name)
