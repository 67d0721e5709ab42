"""The runner of integer networks, the C API of `csrc/runtime/qat_runtime.h`: `Network` is a plan, `Session` runs it.

Both free what they hold in the library when they are freed themselves.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.errors import StateError
from qat.native import loading

#: The QAT_RUNTIME_VERSION of csrc/runtime/qat_runtime.h that this file declares.
_VERSION = 1


class _Options(ctypes.Structure):
    """`qat_options`."""

    _fields_ = (
        ("isa", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
        ("parallel_context", ctypes.c_void_p),
        ("memory_limit", ctypes.c_int64),
    )


class _TensorInfo(ctypes.Structure):
    """`qat_tensor_info`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 8),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
        ("qmin", ctypes.c_int32),
        ("qmax", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Border:
    """An input or output of a network.

    Attributes:
        name: Its name in the plan.
        dtype: Type of its elements.
        sizes: Physical sizes; -k is k times the batch size.
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[int, ...]

    def sizes_for(self, batch: int) -> list[int]:
        """Sizes for a batch size."""
        return [-size * batch if size < 0 else size for size in self.sizes]


#: by qat_type
_DTYPES = {1: torch.uint8, 2: torch.int8, 3: torch.uint16, 4: torch.int16, 5: torch.int32, 6: torch.float32}
_POINTER = ctypes.c_void_p
_INFO = (ctypes.c_int, (_POINTER, ctypes.c_int32, ctypes.POINTER(_TensorInfo)))
#: result and arguments of each function
_PROTOTYPES = {
    "qat_last_error": (ctypes.c_char_p, ()),
    "qat_status_name": (ctypes.c_char_p, (ctypes.c_int,)),
    "qat_runtime_version": (ctypes.c_int, ()),
    "qat_find_isa": (ctypes.c_char_p, (ctypes.c_char_p,)),
    "qat_plan_load": (ctypes.c_int, (ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(_POINTER))),
    "qat_plan_free": (None, (_POINTER,)),
    "qat_plan_inputs": (ctypes.c_int32, (_POINTER,)),
    "qat_plan_outputs": (ctypes.c_int32, (_POINTER,)),
    "qat_plan_input": _INFO,
    "qat_plan_output": _INFO,
    "qat_plan_operators": (ctypes.c_int32, (_POINTER,)),
    "qat_session_create": (
        ctypes.c_int, (_POINTER, ctypes.c_int64, ctypes.POINTER(_Options), ctypes.POINTER(_POINTER))
    ),
    "qat_session_free": (None, (_POINTER,)),
    "qat_session_run": (ctypes.c_int, (_POINTER, ctypes.POINTER(_POINTER), ctypes.POINTER(_POINTER))),
    "qat_session_arena_bytes": (ctypes.c_int64, (_POINTER,)),
    "qat_session_profile": (ctypes.c_int, (_POINTER, ctypes.c_int)),
    "qat_session_times": (ctypes.c_int, (_POINTER, ctypes.POINTER(ctypes.c_int64))),
}  # fmt: skip


@functools.cache
def status() -> loading.Status:
    """Return whether the runner can be used, and why not; the first call loads the library."""
    known = loading.status()
    if not known.active:
        return known
    try:
        version = int(_library().qat_runtime_version())
    except (AttributeError, OSError) as error:
        return loading.Status(False, f"the library has no runner: {error}", path=known.path)
    if version != _VERSION:
        reason = f"the library was built from other sources (runner {version}, not {_VERSION})"
        return loading.Status(False, reason, path=known.path)
    return known


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(loading.status().path))
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _check(code: int) -> None:
    if code != 0:
        library = _library()
        name, message = library.qat_status_name(code), library.qat_last_error()
        raise StateError(f"native runner: {message.decode(errors='replace')} ({name.decode()})")


def isa() -> str:
    """Return the instruction set of sessions: that of `QAT_NATIVE_ISA` if the runner has it, else the best."""
    wanted = os.environ.get("QAT_NATIVE_ISA", "").encode()
    found = _library().qat_find_isa(wanted) or _library().qat_find_isa(None)
    return str(found.decode())


class Network:
    """A plan in the library, with its packed weights.

    Args:
        plan: The plan file.

    Raises:
        StateError: The library refuses the plan; its message says why.
    """

    def __init__(self, plan: bytes) -> None:
        library = _library()
        handle = _POINTER()
        _check(library.qat_plan_load(plan, len(plan), ctypes.byref(handle)))
        self._handle = handle
        weakref.finalize(self, library.qat_plan_free, handle)
        self.inputs = int(library.qat_plan_inputs(handle))
        self.outputs = int(library.qat_plan_outputs(handle))
        self.operators = int(library.qat_plan_operators(handle))

    def borders(self) -> tuple[tuple[Border, ...], tuple[Border, ...]]:
        """Return the inputs and the outputs."""
        library = _library()

        def read(function: Any, index: int) -> Border:
            info = _TensorInfo()
            _check(function(self._handle, index, ctypes.byref(info)))
            return Border(info.name.decode(), _DTYPES[info.type], tuple(info.sizes[: info.rank]))

        return (
            tuple(read(library.qat_plan_input, i) for i in range(self.inputs)),
            tuple(read(library.qat_plan_output, i) for i in range(self.outputs)),
        )


class Session:
    """Runs a network for one batch size, on torch's own threads. One thread at a time may use it.

    Args:
        network: What to run.
        batch: Batch size, at least 1.
        threads: Into how many parts work is cut; no bit of the result depends on it.

    Raises:
        StateError: The library cannot; its message says why.
    """

    def __init__(self, network: Network, batch: int, threads: int) -> None:
        library = _library()
        self.network = network
        parallel = ctypes.cast(library.qat_torch_parallel, ctypes.c_void_p)
        options = _Options(isa().encode(), threads, 0, parallel, None, 0)
        handle = _POINTER()
        _check(library.qat_session_create(network._handle, batch, ctypes.byref(options), ctypes.byref(handle)))
        self._handle = handle
        weakref.finalize(self, library.qat_session_free, handle)

    @property
    def arena_bytes(self) -> int:
        """Bytes for intermediate tensors."""
        return int(_library().qat_session_arena_bytes(self._handle))

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Run the network.

        Args:
            inputs: Contiguous CPU tensors of the types and physical sizes of the plan's inputs.
            outputs: The same of its outputs; written.
        """
        if len(inputs) != self.network.inputs or len(outputs) != self.network.outputs:
            raise StateError(f"{len(inputs)} inputs and {len(outputs)} outputs for another plan")
        _check(_library().qat_session_run(self._handle, _pointers(inputs), _pointers(outputs)))

    def times(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[float]:
        """Run the network and return the seconds that each operator of the plan took."""
        library = _library()
        _check(library.qat_session_profile(self._handle, 1))
        try:
            self.run(inputs, outputs)
            nanoseconds = (ctypes.c_int64 * self.network.operators)()
            _check(library.qat_session_times(self._handle, nanoseconds))
        finally:
            _check(library.qat_session_profile(self._handle, 0))
        return [value * 1e-9 for value in nanoseconds]


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (_POINTER * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
