"""How calls of torch functions and tensor methods on traced values are recorded.

One spelling for one operation: operators and the methods behind them become functions of `operator`, in-place
operations become their out-of-place equivalents, transposing properties become methods, sizes become numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qat.graph import attention
from qat.graph.proxy import Recorder, RecordingMode, TracedInt, TracedTensor, UntraceableError, is_traced, traced_in

_METHOD_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "true_divide": operator.truediv, "matmul": operator.matmul, "pow": operator.pow, "neg": operator.neg,
    "floor_divide": operator.floordiv, "remainder": operator.mod,
    "gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le, "eq": operator.eq, "ne": operator.ne,
    "__and__": operator.and_, "__or__": operator.or_, "__xor__": operator.xor, "__invert__": operator.invert,
    "__getitem__": operator.getitem, "__eq__": operator.eq, "__ne__": operator.ne, "__floordiv__": operator.floordiv,
    "__mod__": operator.mod, "__pow__": operator.pow, "__pos__": operator.pos,
}  # fmt: skip
_REFLECTED_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "__radd__": operator.add, "__rsub__": operator.sub, "__rmul__": operator.mul, "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv, "__rpow__": operator.pow, "__rfloordiv__": operator.floordiv,
    "__rmod__": operator.mod, "__rmatmul__": operator.matmul, "__rand__": operator.and_, "__ror__": operator.or_,
    "__rxor__": operator.xor,
}  # fmt: skip
_ONE_OPERAND = frozenset({"neg", "__invert__", "__pos__"})

_READS_VALUES = frozenset({
    "__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__", "__contains__", "item", "tolist",
    "numpy", "__reduce_ex__", "__dlpack__",
})  # fmt: skip
_STATIC_FACTORIES = frozenset({
    "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zeros_like", "ones_like", "full_like",
    "empty_like",
})  # fmt: skip

DROPOUTS: Mapping[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
    torch.dropout: nn.Dropout,
}


class GraphRecorder(Recorder, Protocol):
    """Recorder with all that recording a call needs."""

    def size(self, tensor: Any) -> Any:
        """Sizes of a tensor: numbers, and traced ones where they depend on the batch."""

    def rebind(self, old: fx.Node, new: fx.Node) -> None:
        """Let every holder of a value continue with what was written."""

    def retire(self, tensor: Tensor) -> None:
        """Forbid further use of a real tensor into which a traced value was written."""

    def call_added_module(self, module: nn.Module, label: str, args: tuple[Any, ...], **kwargs: Any) -> Any:
        """Record the call of a module that is none of the user's tree."""


def write(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """Return a copy of a tensor in which the elements at an index have another value."""
    written = tensor.clone()
    written[index] = value
    return written


def record_call(
    recorder: GraphRecorder, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Record a call of a torch function or tensor method that involves a traced value.

    Returns:
        A traced value; a plain one for what is the same whatever the batch.

    Raises:
        UntraceableError: The call reads values, or writes where the writing cannot be followed.
    """
    kwargs = dict(kwargs)
    if isinstance(func, torch._C.ScriptMethod | torch._C.ScriptFunction):
        raise UntraceableError("a TorchScript function is called")
    if func in DROPOUTS:
        return _dropout(recorder, func, args, kwargs)
    if func is F.scaled_dot_product_attention:
        with RecordingMode(recorder):
            return attention.scaled_dot_product_attention(*args, **kwargs)
    if func is F.multi_head_attention_forward:
        with RecordingMode(recorder):
            return attention.multi_head_attention_forward(*args, **kwargs)
    if func is torch._assert:
        return None
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return _property(recorder, func.__self__.__name__, args[0])  # type: ignore[attr-defined]
    if name == "__set__":
        raise UntraceableError(f"the attribute {func.__self__.__name__!r} of a tensor is set")  # type: ignore[attr-defined]
    if kwargs.get("out") is not None:
        raise UntraceableError(f"{name} writes into `out`")
    in_place = bool(kwargs.pop("inplace", False))
    if _is_method(func, name):
        return record_method(recorder, name, args, kwargs)
    if name.endswith("_") and not name.endswith("__"):
        func, in_place = _out_of_place_function(name), True
    if name in _STATIC_FACTORIES:
        made = _static_factory(recorder, func, args, kwargs)
        if made is not None:
            return made
    result = recorder.emit("call_function", func, args, kwargs)
    if in_place:
        return _overwrite(recorder, args[0], result)
    return result


def record_method(recorder: GraphRecorder, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Record a call of a tensor method by its name."""
    if name in _READS_VALUES:
        raise UntraceableError("control flow or a Python value depends on the values of a tensor")
    if name in _SPECIAL_METHODS:
        return _SPECIAL_METHODS[name](recorder, *args, **kwargs)
    if name.endswith("_") and not name.endswith("__"):
        return _overwrite(recorder, args[0], _out_of_place_method(recorder, name, args, kwargs))
    if not kwargs and len(args) == (1 if name in _ONE_OPERAND else 2):
        if name in _METHOD_OPERATORS:
            return recorder.emit("call_function", _METHOD_OPERATORS[name], args, {})
        if name in _REFLECTED_OPERATORS:
            return recorder.emit("call_function", _REFLECTED_OPERATORS[name], args[::-1], {})
    if name in _STATIC_FACTORIES:
        made = _static_factory(recorder, getattr(Tensor, name), args, kwargs)
        if made is not None:
            return made
    return recorder.emit("call_method", name, args, kwargs)


def _is_method(func: Callable[..., Any], name: str) -> bool:
    qualified = getattr(func, "__qualname__", "")
    return qualified.startswith(("Tensor.", "TensorBase.", "_TensorBase.")) or getattr(Tensor, name, None) is func


# -- dropout


def _dropout(recorder: GraphRecorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def bind(
        input: Any,  # noqa: A002 - torch's own name
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        train: bool | None = None,
    ) -> tuple[Any, float, bool, bool]:
        return input, p, training if train is None else train, inplace

    tensor, p, training, inplace = bind(*args, **kwargs)
    if training:
        # traced in evaluation, so the user asked for dropout that never stops
        result = recorder.emit("call_function", func, (tensor, p, True), {})
    elif p == 0:
        return tensor
    else:
        result = recorder.call_added_module(DROPOUTS[func](p), "dropout", (tensor,))
    return _overwrite(recorder, tensor, result) if inplace else result


# -- constants of a fixed shape


def _static_factory(
    recorder: GraphRecorder, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Make a real tensor where neither its shape nor its filling depends on traced values."""
    like = args[0]
    if not isinstance(like, TracedTensor) or next(traced_in((args[1:], kwargs)), None) is not None:
        return None
    a, b = like.fx_node.meta["vals"]
    if func.__name__.endswith("_like") and a.shape != b.shape:
        return None
    template = torch.empty(a.shape if func.__name__.endswith("_like") else (), dtype=a.dtype, device=a.device)
    made: Tensor = func(template, *args[1:], **kwargs)
    return made


# -- writing in place


def _overwrite(recorder: GraphRecorder, target: Any, result: Any) -> Any:
    """Let an in-place operation's target, and whoever else holds it, continue as the result."""
    if not isinstance(target, TracedTensor):
        if isinstance(target, Tensor):
            recorder.retire(target)
        return result
    before = target.fx_node.meta["vals"][0]
    if result.fx_node.meta["vals"][0].dtype != before.dtype:
        result = recorder.emit("call_method", "to", (result, before.dtype), {})
    recorder.rebind(target.fx_node, result.fx_node)
    return target


def _out_of_place_method(recorder: GraphRecorder, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if name in ("copy_", "fill_", "zero_"):
        value = args[1] if len(args) > 1 else kwargs.get("src", kwargs.get("value", 0))
        return recorder.emit("call_function", write, (args[0], ..., value), {})
    plain = name.rstrip("_")
    if not hasattr(Tensor, plain):
        raise UntraceableError(f"the in-place method {name} has no out-of-place form")
    return record_method(recorder, plain, args, kwargs)


def _out_of_place_function(name: str) -> Callable[..., Any]:
    for place in (F, torch):
        found: Callable[..., Any] | None = getattr(place, name.rstrip("_"), None)
        if found is not None:
            return found
    raise UntraceableError(f"the in-place function {name} has no out-of-place form")


def _set_item(recorder: GraphRecorder, target: Any, index: Any, value: Any) -> None:
    if not isinstance(target, TracedTensor):
        raise UntraceableError("a computed value is written into a constant tensor")
    result = recorder.emit("call_function", write, (target, index, value), {})
    _overwrite(recorder, target, result)


# -- sizes and properties


def _size(recorder: GraphRecorder, tensor: Any, dim: int | None = None) -> Any:
    return recorder.size(tensor) if dim is None else recorder.size(tensor)[dim]


def _length(recorder: GraphRecorder, tensor: Any) -> int:
    found = recorder.size(tensor)
    if not found:
        raise TypeError("len() of a 0-d tensor")
    if is_traced(found[0]):
        raise UntraceableError("len() of a batch")
    return int(found[0])


def _iterate(recorder: GraphRecorder, tensor: Any) -> Any:
    found = recorder.size(tensor)
    if not found:
        raise TypeError("iteration over a 0-d tensor")
    if type(found[0]) is TracedInt:
        raise UntraceableError("iteration over the samples of a batch")
    return iter(recorder.emit("call_method", "unbind", (tensor, 0), {}))


def _describe(recorder: GraphRecorder, tensor: Any, *_: Any, **__: Any) -> str:
    del recorder
    return f"<traced tensor {tensor.fx_node.name}>" if isinstance(tensor, TracedTensor) else "<tensor>"


def _itself(recorder: GraphRecorder, tensor: Any, *_: Any, **__: Any) -> Any:
    del recorder
    return tensor


def _no_hook(recorder: GraphRecorder, *_: Any, **__: Any) -> Any:
    del recorder
    raise UntraceableError("a hook is put on a tensor")


def _deepcopy(recorder: GraphRecorder, tensor: Any, *_: Any) -> Any:
    return recorder.emit("call_method", "clone", (tensor,), {})


_SPECIAL_METHODS: Mapping[str, Callable[..., Any]] = {
    "size": _size,
    "__len__": _length,
    "__iter__": _iterate,
    "__setitem__": _set_item,
    "__repr__": _describe,
    "__str__": _describe,
    "__format__": _describe,
    "__deepcopy__": _deepcopy,
    "requires_grad_": _itself,
    "register_hook": _no_hook,
}


def _property(recorder: GraphRecorder, name: str, tensor: Any) -> Any:
    dims = tensor.fx_node.meta["vals"][0].dim()
    if name == "shape":
        return recorder.size(tensor)
    if name == "grad":
        return None
    if name == "data":
        return recorder.emit("call_method", "detach", (tensor,), {})
    if not tensor.fx_node.meta["vals"][0].is_complex():
        if name in ("mT", "mH"):
            return recorder.emit("call_method", "transpose", (tensor, -2, -1), {})
        if name in ("T", "H") and dims == 2:
            return recorder.emit("call_method", "transpose", (tensor, 0, 1), {})
        if name == "T" and dims > 2:
            return recorder.emit("call_method", "permute", (tensor, *reversed(range(dims))), {})
        if name in ("T", "real"):
            return tensor
    return recorder.emit("call_function", getattr, (tensor, name), {})
