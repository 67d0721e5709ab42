"""Lowering: a calibrated `PreparedModel` becomes a `Program`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qat.encoding import Encoding
from qat.graph.fusions import Fusion, find_fusions
from qat.graph.operators import ParamRef, ScalarConst
from qat.graph.opgraph import GraphOp
from qat.graph.plan import PlanEntry
from qat.graph.prepared import PreparedModel
from qat.graph.structure import Structure
from qat.graph.subgraph import cut, node_values
from qat.integer.draft import Draft
from qat.integer.movements import emit_chain, emit_movement, emit_stack, open_batch
from qat.integer.program import FLOAT_SUFFIX, Constant, Op, Program
from qat.integer.weights import (
    Affine,
    folded,
    norm_affine,
    parameter,
    quantize_affine,
    quantize_parameters,
    storage,
)
from qat.scheme import Granularity, Scheme

_WEIGHTED = frozenset({"conv", "conv_transpose", "linear"})


@dataclass(frozen=True)
class PackOutputs:
    """Puts a flat list of output tensors into the structure that the user's model returns.

    Attributes:
        structure: The structure.
        slots: For each of its leaves the number of the tensor, or None for a leaf that is none.
    """

    structure: Structure
    slots: tuple[int | None, ...]

    def __call__(self, flat: list[Any]) -> Any:
        """Return the structure filled with `flat`."""
        return self.structure.pack([None if slot is None else flat[slot] for slot in self.slots])


def lower(prepared: PreparedModel) -> Program:
    """Turn a calibrated model into a program of integer operators.

    Weights and biases become codes with batch norm folded in, derived encodings are resolved, fused operators become
    one, and floats are converted where a float and an integer operator meet.

    Raises:
        StateError: A tensor was not calibrated; it is named.
        ExportError: A weight or bias cannot be expressed; the operator is named.
    """
    with torch.no_grad():
        return _Lowering(prepared).run()


class _Lowering:
    """The state of one lowering; `run` is its result."""

    def __init__(self, prepared: PreparedModel) -> None:
        self.prepared = prepared
        self.graph, self.plan = prepared.opgraph, prepared.plan
        self.encodings = prepared.encodings()
        self.fx_nodes = {node.name: node for node in prepared.graph.nodes}
        self.fx_values = node_values(prepared)
        self.draft = Draft(prepared, self.encodings)

    def run(self) -> Program:
        inputs = tuple(self._input(name) for name in self.graph.inputs)
        for end, fusion in find_fusions(self.graph).items():
            if end not in self.draft.constant_names:
                self._fusion(self.plan[end], fusion)
        outputs = tuple(self.draft.floats(name) for name in self.graph.outputs)
        return Program(
            inputs=inputs,
            outputs=outputs,
            ops=tuple(self.draft.ops),
            tensors=self.draft.tensors,
            constants=self.draft.constants,
            pack_outputs=self._pack_outputs(),
            numerics=self.plan.numerics,
        )

    def _pack_outputs(self) -> PackOutputs:
        structure = self.prepared.structure
        output = next(node for node in reversed(self.prepared.graph.nodes) if node.op == "output")
        numbers = iter(range(len(self.graph.outputs)))
        leaves = structure.flatten(output.args[0])
        return PackOutputs(structure, tuple(next(numbers) if leaf in self.fx_values else None for leaf in leaves))

    # -- values

    def _input(self, name: str) -> str:
        dtype = self._dtype(name)
        entry = self.plan.entries.get(name)
        if entry is None or entry.decision == "float":
            self.draft.tensor(name, name, None, dtype)
            return name
        twin = name + FLOAT_SUFFIX
        self.draft.tensor(twin, name, None, dtype)
        self.draft.emit("quantize", name, (twin,), self.draft.tensor(name, name, self.encodings[name]))
        return twin

    def _dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self.fx_nodes[self.graph.nodes[name]].meta.get("dtype", torch.float32)
        return dtype

    # -- operators

    def _fusion(self, entry: PlanEntry, fusion: Fusion) -> None:
        op = fusion.ops[0]
        if entry.computed:
            self._integer(entry, fusion)
        elif op.kind == "island":
            self._island(op)
            self._quantize_result(entry)
        else:
            self._float(entry, fusion)
            self._quantize_result(entry)

    def _quantize_result(self, entry: PlanEntry) -> None:
        """Quantize what a float operator gave, where integer operators read it."""
        if entry.decision == "integer":
            name = entry.name
            self.draft.emit(
                "quantize", name, (name + FLOAT_SUFFIX,), self.draft.tensor(name, name, self.encodings[name])
            )

    def _result(self, entry: PlanEntry) -> str:
        """Name of the float result of a float operator."""
        name = entry.name + FLOAT_SUFFIX if entry.decision == "integer" else entry.name
        return self.draft.tensor(name, entry.name, None, self._dtype(entry.name))

    def _island(self, op: GraphOp) -> None:
        node = self.fx_nodes[op.node]
        call, names = cut(self.prepared, node, self.fx_values)
        outputs = (self._result(self.plan[op.name]),)
        inputs = tuple(self.draft.floats(n) for n in names)
        self.draft.ops.append(
            Op("island", op.name, inputs, outputs, {"cause": op.attrs.get("cause", "")}, call, op.macs)
        )

    def _integer(self, entry: PlanEntry, fusion: Fusion) -> None:
        op, end = fusion.ops[0], entry.name
        encoding = self.encodings[end]
        bounds = _clamp_codes(fusion.clamp, encoding) if fusion.clamp is not None else None
        result = end if bounds is None else op.name
        self.draft.tensor(result, op.name, encoding if result == end else encoding.derived(f"clamped into {end}"))
        self._compute(op, fusion, result, encoding)
        if fusion.clamp is not None and bounds is None:
            self.draft.ops[-1] = replace(self.draft.ops[-1], saturates=dict(fusion.clamp.attrs))
        if bounds is not None:
            self.draft.tensor(end, end, encoding)
            assert fusion.clamp is not None
            self.draft.emit("clamp", end, (result,), end, fusion.clamp.attrs)

    def _compute(self, op: GraphOp, fusion: Fusion, result: str, encoding: Encoding) -> None:
        """Emit the integer operator `op`, whose codes go to the tensor `result`."""
        if op.kind in _WEIGHTED:
            self._weighted(op, folded(self.prepared, fusion), result, encoding)
        elif op.kind == "batch_norm":
            self._batch_norm(op, result, encoding)
        elif op.kind in ("layer_norm", "prelu"):
            parameters = self._parameters(op)
            self.draft.emit(op.kind, op.name, (self.draft.codes(op.tensors[0]), *parameters), result, op.attrs)
        elif op.kind == "identity":
            del self.draft.tensors[result]
            self.draft.alias[op.name] = self.draft.codes(op.tensors[0])
        elif op.kind == "softmax" and self.graph.shapes[op.tensors[0]][op.attrs["axis"]] == 1:
            # one, whatever the input: ONNX Runtime's integer softmax over a single element overflows to zero
            self.draft.emit("clamp", op.name, (self.draft.codes(op.tensors[0]),), result, {"low": 1.0, "high": 1.0})
        elif op.kind == "concat":
            inputs = tuple(self.draft.requantized(self.draft.codes(t), encoding) for t in op.tensors)
            self.draft.emit("concat", op.name, inputs, result, op.attrs)
        elif op.kind == "stack":
            emit_stack(self.draft, op, result, encoding)
        elif op.kind == "chain":
            emit_chain(self.draft, op, self.draft.codes(op.tensors[0]), result)
        elif op.kind == "pad" and not self._same_grid(op.tensors[0], encoding):
            source = self.draft.requantized(self.draft.codes(op.tensors[0]), encoding)
            self.draft.emit("pad", op.name, (source,), result, op.attrs)
        else:
            inputs = tuple(self._operand(op, i, scalar) for i, scalar in enumerate(op.inputs))
            apart = op.kind == "table" and op.attrs["function"] in self.plan.constraints.apart
            attrs = {**op.attrs, "apart": True} if apart else op.attrs
            self.draft.emit(op.kind, op.name, inputs, result, attrs, op.macs)

    def _same_grid(self, name: str, encoding: Encoding) -> bool:
        held = self.draft.tensors[self.draft.codes(name)].encoding
        return held is not None and held.same_grid(encoding)

    def _operand(self, op: GraphOp, position: int, item: str | ParamRef | ScalarConst | None) -> str:
        if isinstance(item, str):
            return self.draft.codes(item)
        if isinstance(item, ScalarConst):
            key = f"{op.name}.scalar{position}"
            dtype = self.encodings[self.plan[op.name].source_tensor or self._end(op.name)].dtype
            encoding, codes = _scalar(item.value, dtype)
            return self.draft.constant(key, codes, encoding)
        return ""

    def _end(self, name: str) -> str:
        return name if name in self.encodings else str(self.plan[name].source_tensor)

    def _float_parameter(self, item: str | ParamRef | ScalarConst | None) -> str:
        if not isinstance(item, ParamRef):
            return ""
        if item.key not in self.draft.constants:
            self.draft.constant(item.key, parameter(self.prepared, item)[0].float(), None)
        return item.key

    def _parameters(self, op: GraphOp) -> tuple[str, ...]:
        """Names of the slopes, or of factor and offset, of an integer operator: floats, or codes of their own."""
        if op.kind not in self.plan.constraints.quantized_parameters:
            return tuple(self._float_parameter(i) for i in op.inputs[1:])
        held = self.draft.held(self.draft.codes(op.tensors[0]))
        assert held is not None
        refs = [i if isinstance(i, ParamRef) else None for i in op.inputs[1:]]
        values = [parameter(self.prepared, i)[0].float() if i else None for i in refs]
        # another input scale asks for another offset
        keys = [f"{i.key}#{op.name}" if i and i.key in self.draft.constants else i.key if i else "" for i in refs]
        if op.kind == "layer_norm" and values[0] is None:
            # the factor of a layer norm is no optional operand of runtimes, and theirs would be floats
            sizes = self.graph.shapes[op.name][-op.attrs["axes_count"] :]
            keys[0], values[0] = f"{op.name}.weight", torch.ones(sizes)
        made = quantize_parameters(op.name, tuple(keys), tuple(values), held)
        self.draft.constants.update({constant.name: constant for constant in made})
        return tuple(keys)

    # -- operators with weights

    def _weighted(self, op: GraphOp, affine: Affine, result: str, encoding: Encoding) -> None:
        assert op.weight is not None
        source = self.draft.codes(op.tensors[0])
        held, scheme = self.draft.held(source), self.plan[op.weight.key].scheme
        assert held is not None
        assert scheme is not None
        weight_key, bias_key = op.weight.key, _bias_key(op)
        if weight_key in self.draft.constants:
            # a reused module: another input scale asks for another bias
            weight_key, bias_key = f"{weight_key}#{op.name}", f"{bias_key}#{op.name}"
        weight, bias = quantize_affine(op.name, (weight_key, bias_key), affine, scheme, held, encoding)
        self._emit_weighted(op, source, weight, bias, result, op.attrs)

    def _emit_weighted(
        self, op: GraphOp, source: str, weight: Constant, bias: Constant | None, result: str, attrs: Mapping[str, Any],
        kind: str | None = None,
    ) -> None:  # fmt: skip
        self.draft.constants[weight.name] = weight
        if bias is not None:
            self.draft.constants[bias.name] = bias
        inputs = (source, weight.name, bias.name if bias is not None else "")
        self.draft.emit(kind or op.kind, op.name, inputs, result, attrs, op.macs)

    def _batch_norm(self, op: GraphOp, result: str, encoding: Encoding) -> None:
        """A batch norm that could not be folded is a depthwise convolution with kernel 1."""
        source = self.draft.codes(op.tensors[0])
        held = self.draft.held(source)
        assert held is not None
        factor, shift = norm_affine(self.prepared, op)
        shape = self.draft.tensors[result].shape
        spatial = max(len(shape) - 2, 1)
        weight_value = factor.float().reshape(-1, 1, *([1] * spatial))
        affine = Affine(weight_value, shift, 0, None, weight_value)
        scheme = Scheme(dtype="int8", symmetric=True, granularity=Granularity("per_channel", 0), qmin=-127)
        keys = (f"{op.name}.weight", f"{op.name}.bias")
        weight, bias = quantize_affine(op.name, keys, affine, scheme, held, encoding)
        attrs = {
            "stride": (1,) * spatial, "padding": ((0, 0),) * spatial, "dilation": (1,) * spatial,
            "groups": factor.numel(),
        }  # fmt: skip
        if len(shape) > 2:
            self._emit_weighted(op, source, weight, bias, result, attrs, "conv")
            return
        columns = (*shape, 1)
        before = self.draft.new(f"{op.name}:columns", columns, held.derived(f"reshape of {source}"))
        self.draft.emit("reshape", before, (source,), before, {"shape": open_batch(columns)})
        after = self.draft.new(f"{op.name}:normalized", columns, self.draft.tensors[result].encoding)
        self._emit_weighted(op, before, weight, bias, after, attrs, "conv")
        self.draft.emit("reshape", op.name, (after,), result, {"shape": open_batch(shape)})

    # -- float operators

    def _float(self, entry: PlanEntry, fusion: Fusion) -> None:
        op = fusion.ops[0]
        result = self._result(entry)
        first = result if fusion.clamp is None else self.draft.tensor(op.name + FLOAT_SUFFIX, op.name, None)
        if op.kind in _WEIGHTED:
            affine = folded(self.prepared, fusion)
            assert op.weight is not None
            key, bias_key = op.weight.key, ""
            self.draft.constant(key, affine.weight, None)
            if affine.bias is not None:
                bias_key = self.draft.constant(_bias_key(op), affine.bias.float(), None)
            self.draft.emit(
                op.kind, op.name, (self.draft.floats(op.tensors[0]), key, bias_key), first, op.attrs, op.macs
            )
        elif op.kind == "batch_norm":
            self._float_batch_norm(op, first)
        elif op.kind == "chain":
            emit_chain(self.draft, op, self.draft.floats(op.tensors[0]), first)
        elif op.kind == "roll":
            emit_movement(self.draft, op.name, op.kind, op.attrs, self.draft.floats(op.tensors[0]), first)
        elif op.kind == "stack":
            emit_stack(self.draft, op, first, None)
        else:
            inputs = tuple(self._float_operand(op, number, item) for number, item in enumerate(op.inputs))
            self.draft.emit(op.kind, op.name, inputs, first, op.attrs, op.macs)
        if fusion.clamp is not None:
            self.draft.emit("clamp", entry.name, (first,), result, fusion.clamp.attrs)

    def _float_operand(self, op: GraphOp, position: int, item: str | ParamRef | ScalarConst | None) -> str:
        if isinstance(item, str):
            return self.draft.floats(item)
        if isinstance(item, ScalarConst):
            return self.draft.constant(f"{op.name}.scalar{position}", torch.tensor(item.value), None)
        return self._float_parameter(item)

    def _float_batch_norm(self, op: GraphOp, result: str) -> None:
        factor, shift = norm_affine(self.prepared, op)
        shape = [-1 if d == 1 else 1 for d in range(len(self.graph.shapes[op.name]))]
        scale = self.draft.constant(f"{op.name}.scale", factor.float().reshape(shape), None)
        offset = self.draft.constant(f"{op.name}.shift", shift.float().reshape(shape), None)
        scaled = self.draft.new(f"{op.name}:scaled", self.graph.shapes[op.name], None)
        self.draft.emit("mul", scaled, (self.draft.floats(op.tensors[0]), scale), scaled)
        self.draft.emit("add", op.name, (scaled, offset), result)


def _bias_key(op: GraphOp) -> str:
    reference = op.inputs[2] if len(op.inputs) > 2 else None
    if isinstance(reference, ParamRef):
        return reference.key
    assert op.weight is not None
    prefix = op.weight.key.rpartition(".")[0]
    return f"{prefix}.bias" if prefix else "bias"


def _clamp_codes(clamp: GraphOp, encoding: Encoding) -> tuple[int, int] | None:
    """Codes that a clamp leaves, or None where every code of the encoding is left."""
    low, high = clamp.attrs["low"], clamp.attrs["high"]
    first = encoding.qmin if low is None else int(encoding.quantize(torch.tensor(float(low))))
    last = encoding.qmax if high is None else int(encoding.quantize(torch.tensor(float(high))))
    return None if (first, last) == (encoding.qmin, encoding.qmax) else (first, last)


def _scalar(value: float, dtype: str) -> tuple[Encoding, Tensor]:
    """Return an encoding that holds one number (to float32 rounding) and its code."""
    encoding = Encoding.from_range(
        min(value, 0.0), max(value, 0.0), Scheme(dtype=dtype), provenance="fixed", method="scalar"
    )
    return encoding, storage(encoding.quantize(torch.tensor(value)), dtype)
