"""Float islands: operators without a canonical kind, exported by PyTorch and inlined in the graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx
import onnx.inliner
import torch
from onnx import version_converter
from torch import Tensor, nn

from qat.errors import ExportError
from qat.export.emitters.context import Context, Emitter
from qat.integer.program import Op

#: batch size of the example that is traced: torch.export specialises 0 and 1, and equal sizes could be taken
#: for each other
_EXAMPLE_BATCH = 3


class _Island(nn.Module):
    """An island as a module, so that the exporter sees its parameters."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> Any:
        """Call the island."""
        return self.call(*inputs)


def island(ctx: Context, op: Op) -> None:
    """Inline the ONNX graph of a float island; its inner names begin with the operator's name.

    Raises:
        ExportError: PyTorch cannot export the island; the message names it and the cause.
    """
    model = _export(ctx, op)
    if len(model.graph.output) != len(op.outputs):
        raise ExportError(
            f"float island {op.name!r} exports {len(model.graph.output)} tensors, not {len(op.outputs)}",
            "return only tensors from it",
        )
    for entry in model.opset_import:
        if ctx.opset_imports.setdefault(entry.domain, entry.version) != entry.version:
            raise ExportError(
                f"float island {op.name!r} needs version {entry.version} of {entry.domain or 'ai.onnx'!r}",
                f"export with opset={entry.version}",
            )
    _inline(ctx, op, model.graph)


def _example(ctx: Context, name: str) -> Tensor:
    info = ctx.info(name)
    shape = [-d * _EXAMPLE_BATCH if d < 0 else d for d in ctx.shape(name)]
    dtype = torch.float32 if info.encoding is not None else info.dtype
    if dtype.is_floating_point:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(shape, generator=generator).to(dtype)
    return torch.zeros(shape, dtype=dtype)


def _export(ctx: Context, op: Op) -> onnx.ModelProto:
    if op.call is None:
        raise ExportError(f"float island {op.name!r} has no callable", "give Op.call")
    names = [name for name in op.inputs if name]
    examples = tuple(_example(ctx, name) for name in names)
    open_sizes = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(ctx.shape(name)) if size < 0} for name in names
    )
    module = _Island(op.call).eval()
    try:
        with torch.no_grad(), _quiet():
            exported = torch.onnx.export(
                module,
                examples,
                dynamo=True,
                opset_version=ctx.opset,
                dynamic_shapes={"inputs": open_sizes} if any(open_sizes) else None,
                verbose=False,
                external_data=False,
            )
        if exported is None:
            raise ExportError(f"float island {op.name!r}: PyTorch returned no model", "make it traceable")
        model = onnx.inliner.inline_local_functions(exported.model_proto)
        if any(e.domain == "" and e.version != ctx.opset for e in model.opset_import):
            model = version_converter.convert_version(model, ctx.opset)
    except ExportError:
        raise
    # whatever PyTorch's exporter raises (its own kinds, and those of the user's code) means the same here
    except Exception as error:
        raise ExportError(
            f"float island {op.name!r} cannot be exported to ONNX ({_cause(error)})",
            "rewrite it with exportable operators, or cut the model there",
        ) from error
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and deprecation warnings from the user's terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _cause(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _inline(ctx: Context, op: Op, graph: onnx.GraphProto) -> None:
    operands = [name for name in op.inputs if name]
    names = {value.name: ctx.value(name) for value, name in zip(graph.input, operands, strict=True)}
    inner = set(names)
    results = [ctx.result(name) for name in op.outputs]
    produced = {name for node in graph.node for name in node.output}
    copies: list[tuple[str, str]] = []
    for value, result in zip(graph.output, results, strict=True):
        # an output that is an input, a constant or a second name of another output needs a copy
        if value.name in produced and value.name not in inner:
            names[value.name] = result
            inner.add(value.name)
        else:
            copies.append((value.name, result))
    for tensor in graph.initializer:
        names.setdefault(tensor.name, ctx.fresh(f"{op.name}/{tensor.name}"))
        kept = onnx.TensorProto()
        kept.CopyFrom(tensor)
        kept.name = names[tensor.name]
        kept.doc_string = ""
        kept.ClearField("metadata_props")
        ctx.add_initializer(kept)
    ctx.nodes.extend(_renamed(ctx, op.name, graph.node, names))
    for source, result in copies:
        ctx.node("Identity", [names[source]], [result], where=op.name)
    for name, result in zip(op.outputs, results, strict=True):
        ctx.finish(name, result, op)


def _renamed(ctx: Context, prefix: str, nodes: Sequence[onnx.NodeProto], names: dict[str, str]) -> list[onnx.NodeProto]:
    """Copies of `nodes` with every name mapped, the bodies of control flow included."""
    result = []
    for index, node in enumerate(nodes):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = ctx.fresh_node(f"{prefix}/{node.name or f'{node.op_type}_{index}'}")
        # they hold stack traces with paths of the exporting machine
        copy.ClearField("metadata_props")
        copy.ClearField("doc_string")
        for name in node.output:
            if name and name not in names:
                names[name] = ctx.fresh(f"{prefix}/{name}")
        copy.input[:] = [names[name] if name else "" for name in node.input]
        copy.output[:] = [names[name] if name else "" for name in node.output]
        for attribute in copy.attribute:
            for body in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                _rename_body(ctx, prefix, body, dict(names))
        result.append(copy)
    return result


def _rename_body(ctx: Context, prefix: str, body: onnx.GraphProto, names: dict[str, str]) -> None:
    for value in [*body.input, *body.initializer]:
        names[value.name] = ctx.fresh(f"{prefix}/{value.name}")
        value.name = names[value.name]
    nodes = _renamed(ctx, prefix, body.node, names)
    del body.node[:]
    body.node.extend(nodes)
    for value in body.output:
        value.name = names[value.name]
    del body.value_info[:]


EMITTERS: dict[str, Emitter] = {"island": island}
