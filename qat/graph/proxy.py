"""What a model computes with while it is traced.

`TracedTensor` is a tensor to every check, in Python and in C++, but has no data: each use of it is recorded as a node.
Sizes that depend on the batch are `TracedInt` (`TracedFloat`, `TracedBool` for what is computed from them); all other
sizes are plain numbers. Each value has hints: what the same computation gives on fake tensors for each of the hinted
batch sizes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from qat.errors import TraceError


class UntraceableError(TraceError):
    """Something in a forward that cannot be recorded; the message is the cause."""


class BatchShapeError(UntraceableError):
    """A size that depends on the batch but is no multiple of it, so that only a fixed batch can be traced."""


class Recorder(Protocol):
    """What traced values need of the tracer."""

    paused: bool

    def emit(self, op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Record a node and return its traced value, or the plain value where no tensor and no batch is in it."""

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Record a call of a torch function or tensor method."""


class TracedTensor(Tensor):
    """A tensor without data whose every use is recorded.

    Attributes:
        recorder: The tracer.
        fx_node: Its node; an in-place operation moves the tensor on to a new node.
    """

    recorder: Recorder
    fx_node: fx.Node

    @staticmethod
    def make(recorder: Recorder, node: fx.Node, hint: Tensor, *, parameter: bool = False) -> TracedTensor:
        """Make the traced value of a node that looks like the hint from outside."""
        made: TracedTensor = Tensor._make_wrapper_subclass(
            TracedTensor, hint.shape, dtype=hint.dtype, device=hint.device
        )
        made.recorder = recorder
        made.fx_node = node
        if parameter:
            made._is_param = True  # isinstance(made, nn.Parameter) looks at this
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        found = next(traced_in((args, kwargs or {})))
        return found.recorder.call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # reached only by code that goes around torch's functions, which nothing can record
        del types, args, kwargs
        raise UntraceableError(f"compiled code calls {func} on a traced tensor")


class _NoSymbol:
    """Stands where a symbolic integer has its symbol; any use of it is a use of the unknown number."""

    def __getattr__(self, name: str) -> NoReturn:
        raise UntraceableError("compiled code reads a number that depends on the batch size")


class _Scalar:
    """What the traced numbers share: arithmetic is recorded, conversion to a Python number is not possible."""

    recorder: Recorder
    fx_node: fx.Node

    def __init__(self, recorder: Recorder, node: fx.Node) -> None:
        super().__init__(_NoSymbol())  # type: ignore[call-arg]
        self.recorder = recorder
        self.fx_node = node

    def __repr__(self) -> str:
        return f"<traced {type(self).__name__} {self.fx_node.name}>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        raise UntraceableError("control flow on the batch size")

    def _no_number(self, *_: Any) -> NoReturn:
        raise UntraceableError("the batch size is used as a Python number (as in range, len, math or an index)")

    __int__ = __index__ = __float__ = __round__ = __trunc__ = _no_number

    def __ceil__(self) -> Any:
        return self.recorder.emit("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.recorder.emit("call_function", math.floor, (self,), {})


def _binary(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        return self.recorder.emit("call_function", function, (self, other), {})

    return method


def _reflected(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        return self.recorder.emit("call_function", function, (other, self), {})

    return method


def _unary(function: Callable[..., Any]) -> Callable[[Any], Any]:
    def method(self: Any) -> Any:
        return self.recorder.emit("call_function", function, (self,), {})

    return method


def _arithmetic() -> dict[str, Callable[..., Any]]:
    both = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
    methods: dict[str, Callable[..., Any]] = {}
    for name in both:
        function = getattr(operator, f"__{name}__")
        methods[f"__{name}__"] = _binary(function)
        methods[f"__r{name}__"] = _reflected(function)
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        methods[f"__{name}__"] = _binary(getattr(operator, name))
    for name in ("neg", "pos", "abs", "invert"):
        methods[f"__{name}__"] = _unary(getattr(operator, name))
    return methods


class TracedInt(_Scalar, torch.SymInt):
    """A whole number that depends on the batch size. It is a `SymInt` so that torch accepts it as a size."""

    __hash__ = _Scalar.__hash__

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return int  # user code asks isinstance(size, int)


class TracedFloat(_Scalar, torch.SymFloat):
    """A fraction that depends on the batch size."""

    __hash__ = _Scalar.__hash__


class TracedBool(_Scalar, torch.SymBool):
    """A comparison whose result depends on the batch size."""

    __hash__ = _Scalar.__hash__


for _name, _method in _arithmetic().items():
    for _kind in (TracedInt, TracedFloat, TracedBool):
        setattr(_kind, _name, _method)

TRACED_SCALARS: Mapping[type, Any] = {int: TracedInt, float: TracedFloat, bool: TracedBool}
_TRACED = (TracedTensor, TracedInt, TracedFloat, TracedBool)


class TracedSize(tuple):  # type: ignore[type-arg]
    """A shape some of whose sizes depend on the batch size."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return TracedSize(found) if isinstance(index, slice) else found

    def numel(self) -> Any:
        """Product of all sizes."""
        return math.prod(self)


def is_traced(value: Any) -> bool:
    """Whether a value is recorded (`type` and not `isinstance`, for traced values pretend to be others)."""
    return type(value) in _TRACED


def traced_in(value: Any) -> Iterator[Any]:
    """Yield the traced values in nested arguments."""
    kind = type(value)
    if kind in _TRACED:
        yield value
    elif issubclass(kind, tuple | list):
        for item in value:
            yield from traced_in(item)
    elif issubclass(kind, Mapping):
        for item in value.values():
            yield from traced_in(item)
    elif kind is slice:
        yield from traced_in((value.start, value.stop, value.step))


class RecordingMode(TorchFunctionMode):
    """Sends calls that involve a traced value to the tracer, also where torch itself would not look for one."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Record the call, or make it if nothing in it is traced."""
        del types
        kwargs = kwargs or {}
        if self.recorder.paused or next(traced_in((args, kwargs)), None) is None:
            return func(*args, **kwargs)
        return self.recorder.call(func, args, kwargs)
