"""Tracing: from a model and example inputs to a torch.fx graph of calls, sizes and names known.

The model's own Python runs once, on values that record what is done with them. Python control flow on sizes, types and
attributes is followed; control flow on the batch size or on values is not, and the innermost submodule that does it
becomes a float island. The model is traced in evaluation: branches on `self.training` are taken as in evaluation.
Dropout and other modules that act only in training stay calls of modules, so they act again in training. Parameters
stay parameters; what is computed from buffers alone is computed once and becomes a constant.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.errors import TraceError
from qat.graph.hints import HINTED_BATCHES, Hints, cause_of, with_batch
from qat.graph.naming import assign_names
from qat.graph.patching import patched, restored
from qat.graph.proxy import BatchShapeError, RecordingMode, TracedTensor, UntraceableError, is_traced
from qat.graph.recorder import GraphRecorder
from qat.graph.source import source_of
from qat.graph.structure import Structure, describe

#: torch's modules that are traced through: containers, and layers made of layers
_THROUGH = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
#: classes of other libraries that act only in training; tracing through them in evaluation would lose them
_TRAINING_ONLY = frozenset({"StochasticDepth", "DropPath"})
_HARMLESS_OVERRIDES = frozenset({"forward", "extra_repr", "reset_parameters", "_init_weights"})


@dataclass(frozen=True)
class Island:
    """A submodule that could not be traced and runs as it is, in float.

    Attributes:
        path: Path of the submodule.
        source: `file:line` of the line that could not be traced.
        cause: Why, in one line.
    """

    path: str
    source: str
    cause: str


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Every node's `meta` has `name` (tensor name, unique), `vals` (fake values for the two batch sizes of `batches`),
    `shape` (sizes, -k is k times the batch; None for what is no tensor), `source` (`file:line`), `scope` (path of the
    module in whose forward it stands) and `constant` (whether it depends on parameters and constants only).

    Attributes:
        graph: The calls. Its output holds plain tuples, lists and dicts, see `structure`.
        root: The model that the graph runs on, with `_constant0`, ... (buffers that are not saved) and
            `_dropout0`, ... added.
        islands: What could not be traced.
        structure: Turns the graph's output into what the user's model returns.
        batches: Batch sizes of the hints; equal where the batch is fixed.
        static_batch: Why the graph holds for the example's batch size only; None where it holds for all.
    """

    graph: fx.Graph
    root: nn.Module
    islands: tuple[Island, ...]
    structure: Structure
    batches: tuple[int, int]
    static_batch: str | None = None


def trace(model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]) -> Traced:
    """Trace a model.

    Args:
        model: A private copy of the user's model: buffers for constants and modules for functional dropout are added to
            it, and in-place activations are made out-of-place. Training flags are left as they are.
        example_inputs: A tensor, positional arguments or keyword arguments. The first dimension of each tensor is the
            batch; a tensor whose first size is not that of the first one is not batched. Arguments that are not tensors
            are taken as constants and are no inputs of the graph.

    Returns:
        The graph. It holds for every batch size if the model allows that, else for the example's, see
        `Traced.static_batch`.

    Raises:
        TraceError: The root's own forward cannot be traced, or the example inputs do not fit.
    """
    args, kwargs = _arguments(example_inputs)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > 0]
    batch = tensors[0].shape[0] if tensors else None
    reason: str | None = "no example input has a batch dimension"
    if batch is not None:
        try:
            return _trace(model, args, kwargs, batch, HINTED_BATCHES, None)
        except TraceError as error:
            reason = str(error).removesuffix(f"; {error.mend}")
    return _trace(model, args, kwargs, batch, (batch or 1, batch or 1), reason)


def traced_forward(traced: Traced) -> Callable[..., Any]:
    """Make a function that runs the graph: arguments as the model's, results of the model's types."""
    code = traced.graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<traced>", "exec"), names)  # noqa: S102 - source that torch.fx has just generated

    def forward(*args: Any, **kwargs: Any) -> Any:
        return traced.structure.restore(names["forward"](traced.root, *args, **kwargs))

    return forward


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TraceError(
        f"example inputs of type {type(example_inputs).__name__}",
        "give a tensor, a tuple of arguments or a mapping of keyword arguments",
    )


def _trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch: int | None,
    batches: tuple[int, int],
    static_batch: str | None,
) -> Traced:
    with restored(model):
        model.eval()
        tracer = _Tracer(model, Hints(batches), batch)
        structure = tracer.run(args, kwargs)
    _install(tracer)
    _remove_dead_code(tracer.graph)
    _drop_unused(tracer)
    for node in tracer.graph.nodes:
        inputs = node.all_input_nodes
        node.meta["constant"] = node.op == "get_attr" or (
            node.op != "output" and bool(inputs) and all(n.meta["constant"] for n in inputs)
        )
        if node.op == "call_module" and getattr(tracer.module(node.target), "inplace", False) is True:
            tracer.module(node.target).inplace = False  # type: ignore[assignment]
    assign_names(tracer.graph)
    tracer.graph.lint()
    in_use = {str(node.target) for node in tracer.graph.nodes if node.op == "call_module"}
    islands = tuple(island for path, island in tracer.islands.items() if path in in_use)
    return Traced(tracer.graph, model, islands, structure, batches, static_batch)


class _Tracer(GraphRecorder):
    """Records a whole model: what its modules do when they are called."""

    def __init__(self, root: nn.Module, hints: Hints, example_batch: int | None) -> None:
        super().__init__(root, hints, _Tracer.run.__code__)
        self.islands: dict[str, Island] = {}
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._example_batch = example_batch
        self._inputs: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Structure:
        """Run the root's forward and record its output."""
        try:
            bound = inspect.signature(self.root.forward).bind(*args, **kwargs)
        except TypeError as error:
            name = type(self.root).__name__
            raise TraceError(f"the example inputs do not fit {name}.forward: {error}", "correct them") from error
        for name, value in bound.arguments.items():
            bound.arguments[name] = self._bind(name, value, bound.signature.parameters[name].kind)
        call = nn.Module.__call__
        try:
            with patched(self), RecordingMode(self), torch.no_grad():
                result = call(self.root, *bound.args, **bound.kwargs)
                structure, plain = describe(result, is_leaf=lambda v: is_traced(v) or isinstance(v, Tensor))
                output = self.graph.output(self.lower(plain))
        except Exception as error:
            where = source_of(error)
            name = type(self.root).__name__
            raise TraceError(
                f"cannot trace {name}{f' at {where}' if where else ''}: {cause_of(error)}",
                "move the code that cannot be traced into a submodule, which then stays float",
            ) from error
        output.meta.update(vals=(None, None), shape=None, scope="", label=None, source="")
        return structure

    def _bind(self, name: str, value: Any, kind: Any) -> Any:
        if kind is inspect.Parameter.VAR_POSITIONAL:
            return tuple(self._input(f"{name}_{i}", item) for i, item in enumerate(value))
        if kind is inspect.Parameter.VAR_KEYWORD:
            return {key: self._input(key, item) for key, item in value.items()}
        return self._input(name, value)

    def _input(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            described, _ = describe(value, is_leaf=lambda v: isinstance(v, Tensor))
            if described.count:
                raise TraceError(
                    f"the argument {name!r} is a {type(value).__name__} of tensors", "pass each tensor as an argument"
                )
            return value
        vals = []
        for batch, real in zip(self.hints.batches, self._inputs, strict=True):
            real[name] = with_batch(value, batch, self._example_batch)
            vals.append(self.hints.fake(real[name]))
        node = self.graph.placeholder(name)
        both = (vals[0], vals[1])
        node.meta.update(vals=both, shape=self.hints.shape(both), scope="", label=None, source=self.source(), name=None)
        node.meta["constant"] = False
        return self.traced(node)

    # -- modules

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], call: Any) -> Any:
        """Record the call of a leaf, or follow the forward of any other module."""
        path = self._paths.get(id(module))
        if path is None:
            return self._call_stray(module, args, kwargs, call)
        if path and is_leaf(module):
            return self._call_leaf(path, module, args, kwargs)
        scope, self.scope = self.scope, path
        mark = self.mark()
        try:
            return call(module, *args, **kwargs)
        except BatchShapeError:
            raise
        except Exception as error:
            if not path:
                raise
            self.scope = scope
            self.roll_back(mark)
            return self._call_island(path, args, kwargs, error)
        finally:
            self.scope = scope

    def _call_leaf(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        in_place = getattr(module, "inplace", False) is True
        if not in_place:
            return self.emit("call_module", path, args, kwargs)
        module.inplace = False  # type: ignore[assignment]
        try:
            result = self.emit("call_module", path, args, kwargs)
        finally:
            module.inplace = True  # type: ignore[assignment]
        target = args[0] if args else next(iter(kwargs.values()))
        if type(target) is TracedTensor and type(result) is TracedTensor:
            self.rebind(target.fx_node, result.fx_node)
            return target
        if isinstance(target, Tensor):
            self.retire(target)
        return result

    def _call_stray(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], call: Any) -> Any:
        """Call a module that was made in a forward and belongs to no tree."""
        if not is_leaf(module):
            return call(module, *args, **kwargs)
        if next(module.parameters(), None) is not None:
            raise UntraceableError(f"a {type(module).__name__} with parameters is made in a forward")
        return self.call_added_module(module, type(module).__name__.lower(), args, **kwargs)

    def _call_island(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> Any:
        source, cause = source_of(error), cause_of(error)
        try:
            result = self.emit("call_module", path, args, kwargs)
        except BatchShapeError:
            raise
        except Exception:  # noqa: BLE001 - whatever a user's forward raises on values that are not there
            try:
                result = self._emit_really(path, args, kwargs)
            except BatchShapeError:
                raise
            except Exception:  # noqa: BLE001 - the first cause is the one to tell
                raise error from None
        self.islands[path] = Island(path, source, cause)
        return result

    def _emit_really(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Record the call of a module that runs on real values only."""
        lowered, lowered_kwargs = self.lower(args), self.lower(dict(kwargs))
        probe = self.graph.call_module(path, lowered, lowered_kwargs)
        self.paused = True
        try:
            with torch.no_grad():
                vals = [self.real_values([probe], inputs)[probe] for inputs in self._inputs]
        finally:
            self.paused = False
            self.graph.erase_node(probe)
        both = (self.hints.fake(vals[0]), self.hints.fake(vals[1]))
        return self.record(both, None, "call_module", path, lowered, lowered_kwargs)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operator: torch's own layers, unless a subclass changes what they do."""
    if any(c.__name__ in _TRAINING_ONLY for c in type(module).__mro__):
        return True
    below: set[str] = set()
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn.") and not kind.__name__.startswith("Parametrized"):
            changed = {n for n in below if hasattr(kind, n) and not n.startswith("__")}
            return not issubclass(kind, _THROUGH) and kind is not nn.Module and not changed - _HARMLESS_OVERRIDES
        below.update(vars(kind))
        if "forward" in vars(kind):
            return False
    return False


# -- before and after


def _install(tracer: _Tracer) -> None:
    for name, tensor in tracer.constants.items():
        tracer.root.register_buffer(name, tensor, persistent=False)
    for name, module in tracer.added_modules.items():
        tracer.root.add_module(name, module.train(tracer.root.training))


def _remove_dead_code(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _drop_unused(tracer: _Tracer) -> None:
    used = {str(node.target) for node in tracer.graph.nodes if node.op in ("get_attr", "call_module")}
    for name in (*tracer.constants, *tracer.added_modules):
        if name not in used:
            delattr(tracer.root, name)
