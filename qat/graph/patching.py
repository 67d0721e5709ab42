"""What a trace changes for its time: torch's module class, so that calls are seen, and the state of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from qat.graph.attention import multi_head_attention_module


class Tracer(Protocol):
    """What is told of calls and reads."""

    paused: bool

    def call_module(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], call: Callable[..., Any]
    ) -> Any:
        """Take over the call of a module; `call` is the original one."""

    def call_added_module(self, module: nn.Module, label: str, args: tuple[Any, ...], **kwargs: Any) -> Any:
        """Record the call of a module that is none of the user's tree."""

    def parameter(self, value: nn.Parameter) -> Any:
        """Take over the read of a parameter."""


class AutogradFunction(nn.Module):
    """Applies a user's `torch.autograd.Function`, with its own backward.

    Args:
        function: The class.
    """

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        """Apply the function."""
        return self.function.apply(*args)  # type: ignore[no-untyped-call]


@contextmanager
def patched(tracer: Tracer) -> Iterator[None]:
    """Let calls of modules and reads of parameters in this thread come to the tracer.

    torch.fx does the same; there is no other way to see a module being called.
    """
    thread = threading.get_ident()
    call, get, attend = nn.Module.__call__, nn.Module.__getattr__, nn.MultiheadAttention.forward
    apply = vars(torch.autograd.Function)["apply"]
    fast_path = torch.backends.mha.get_fastpath_enabled()

    def recording() -> bool:
        return not tracer.paused and threading.get_ident() == thread

    def patched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return tracer.call_module(module, args, kwargs, call) if recording() else call(module, *args, **kwargs)

    def patched_get(module: nn.Module, name: str) -> Any:
        value = get(module, name)
        return tracer.parameter(value) if recording() and type(value) is nn.Parameter else value

    def patched_attend(module: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        return (multi_head_attention_module if recording() else attend)(module, *args, **kwargs)

    def patched_apply(function: Any, *args: Any, **kwargs: Any) -> Any:
        if not recording() or function.__module__.startswith("torch."):
            return apply.__get__(None, function)(*args, **kwargs)
        # followed into its forward it would lose its own backward
        return tracer.call_added_module(AutogradFunction(function), function.__name__.lower(), args, **kwargs)

    nn.Module.__call__ = patched_call  # type: ignore[method-assign]
    nn.Module.__getattr__ = patched_get  # type: ignore[method-assign]
    nn.MultiheadAttention.forward = patched_attend  # type: ignore[method-assign, assignment]
    torch.autograd.Function.apply = classmethod(patched_apply)  # type: ignore[method-assign, assignment]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.__getattr__ = get  # type: ignore[method-assign]
        nn.MultiheadAttention.forward = attend  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undo what a forward does to its modules: attributes that it sets, buffers that it updates, training flags."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    states = [dict(module.__dict__) for module in modules]
    tables = [
        {name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")} for module in modules
    ]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    versions = [buffer._version for buffer, _ in values]
    try:
        yield
    finally:
        for module, state, table in zip(modules, states, tables, strict=True):
            module.__dict__.clear()
            module.__dict__.update(state)
            for name, entries in table.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(entries)
        with torch.no_grad():
            for (buffer, value), version in zip(values, versions, strict=True):
                if buffer._version != version:
                    buffer.copy_(value)
