"""Plans written by hand after docs/plan_format.md, and the C API of csrc/runtime by ctypes."""

from __future__ import annotations

import ctypes
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat import native
from qat.integer.kernels.qparams import QParams

KINDS = [
    "quantize",
    "dequantize",
    "requantize",
    "conv",
    "matmul",
    "add",
    "sub",
    "mul",
    "div",
    "concat",
    "max_pool",
    "avg_pool",
    "mean",
    "resize_nearest",
    "resize_linear",
    "pad",
    "transpose",
    "slice",
    "expand",
    "roll",
    "softmax",
    "layer_norm",
    "table",
    "prelu",
    "reshape",
]
TYPES = {"u8": 1, "s8": 2, "u16": 3, "s16": 4, "s32": 5, "f32": 6, "s4": 7}
DTYPES = {"u8": torch.uint8, "s8": torch.int8, "s16": torch.int16, "s32": torch.int32, "f32": torch.float32}
STATUSES = [
    "QAT_OK",
    "QAT_INVALID_ARGUMENT",
    "QAT_NOT_A_PLAN",
    "QAT_UNSUPPORTED_VERSION",
    "QAT_TRUNCATED",
    "QAT_CORRUPT",
    "QAT_INVALID_PLAN",
    "QAT_OUT_OF_MEMORY",
    "QAT_INTERNAL",
]


def _string(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


def _grid(q: QParams | None) -> bytes:
    if q is None:
        return struct.pack("<fiiiB", 0.0, 0, 0, 0, 0)
    return struct.pack("<fiiiB", q.scale, q.zero_point, q.qmin, q.qmax, q.wide)


@dataclass
class PlanWriter:
    """Collects records; tensors and constants are named."""

    profile: int = 0
    tensors: dict[str, bytes] = field(default_factory=dict)
    constants: dict[str, bytes] = field(default_factory=dict)
    ops: list[tuple[str, list[str | None], str, Sequence[int], Sequence[float]]] = field(default_factory=list)
    data: bytes = b""

    def tensor(self, name: str, kind: str, sizes: Sequence[int], q: QParams | None = None) -> str:
        self.tensors[name] = self._array(name, kind, sizes, q)
        return name

    def constant(self, name: str, kind: str, values: Tensor, q: QParams | None = None) -> str:
        if kind == "s4":
            flat = torch.nn.functional.pad(values.flatten(), (0, values.numel() % 2)).to(torch.int32) & 15
            raw = (flat[::2] | flat[1::2] << 4).to(torch.uint8).numpy().tobytes()
        else:
            raw = values.to(DTYPES[kind]).contiguous().numpy().tobytes()
        place = struct.pack("<QQ", len(self.data), len(raw))
        self.constants[name] = self._array(name, kind, values.shape, q) + place
        self.data += raw + bytes(-len(raw) % 64)
        return name

    def op(
        self,
        kind: str,
        inputs: Sequence[str | None],
        output: str,
        ints: Sequence[int] = (),
        floats: Sequence[float] = (),
    ) -> None:
        self.ops.append((kind, list(inputs), output, ints, floats))

    def conv(
        self,
        name: str,
        inputs: dict[str, str],
        output: str,
        own: tuple[str, QParams],
        *,
        stride: tuple[int, int] = (1, 1),
        pads: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        transposed: bool = False,
        residual_first: bool = False,
    ) -> None:
        names = ["x", "weight", "zero_points", "scales", "bias", "multipliers", "shifts", "residual", "table"]
        kind, q = own
        ints = [*stride, *pads, *dilation, groups, transposed, residual_first, TYPES[kind]]
        self.op(
            "conv", [inputs.get(n) for n in names], output, [*ints, q.zero_point, q.qmin, q.qmax, q.wide], [q.scale]
        )

    def to_bytes(self, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
        numbers = {name: i for i, name in enumerate([*self.tensors, *self.constants])}
        records = b"".join([*self.tensors.values(), *self.constants.values()])
        for i, (kind, names, output, ints, floats) in enumerate(self.ops):
            given = [-1 if n is None else numbers[n] for n in names]
            records += struct.pack("<H", KINDS.index(kind) + 1) + _string(f"{kind}.{i}")
            records += struct.pack(f"<H{len(given)}ii", len(given), *given, numbers[output])
            records += struct.pack(f"<H{len(ints)}q", len(ints), *(int(v) for v in ints))
            records += struct.pack(f"<H{len(floats)}f", len(floats), *floats)
        records += b"".join(struct.pack("<I", numbers[n]) for n in [*inputs, *outputs])
        start = -(-(64 + len(records)) // 64) * 64
        counts = (len(self.tensors), len(self.constants), len(self.ops), len(inputs), len(outputs))
        tail = struct.pack("<QQIIIIIIQ", start + len(self.data), start, self.profile, *counts, 0)
        return sealed(b"QATPLAN\0" + struct.pack("<II", 1, 0) + tail + records.ljust(start - 64, b"\0") + self.data)

    @staticmethod
    def _array(name: str, kind: str, sizes: Sequence[int], q: QParams | None) -> bytes:
        return _string(name) + struct.pack(f"<BB{len(sizes)}q", TYPES[kind], len(sizes), *sizes) + _grid(q)


def sealed(plan: bytes) -> bytes:
    """The plan with the checksum that its bytes have."""
    return plan[:12] + struct.pack("<I", zlib.crc32(plan[16:])) + plan[16:]


class RunnerError(Exception):
    """A status other than QAT_OK, and its message."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class _Info(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 8),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
        ("qmin", ctypes.c_int32),
        ("qmax", ctypes.c_int32),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        ("isa", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
        ("parallel_context", ctypes.c_void_p),
        ("memory_limit", ctypes.c_int64),
    ]


def library() -> ctypes.CDLL:
    """The library of the extension, with the types of what does not take only pointers."""
    lib = ctypes.CDLL(str(Path(native.__file__).with_name("_C.abi3.so")))
    for name in ("last_error", "status_name", "find_isa", "plan_operator_name", "plan_operator_kind"):
        getattr(lib, f"qat_{name}").restype = ctypes.c_char_p
    lib.qat_session_arena_bytes.restype = ctypes.c_int64
    lib.qat_plan_load.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
    lib.qat_session_create.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    for name in ("plan_free", "plan_inputs", "plan_outputs", "plan_operators", "session_free", "session_arena_bytes"):
        getattr(lib, f"qat_{name}").argtypes = [ctypes.c_void_p]
    for name in ("plan_operator_name", "plan_operator_kind"):
        getattr(lib, f"qat_{name}").argtypes = [ctypes.c_void_p, ctypes.c_int32]
    for name in ("plan_input", "plan_output"):
        getattr(lib, f"qat_{name}").argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
    lib.qat_session_run.argtypes = [ctypes.c_void_p] * 3
    lib.qat_session_profile.argtypes = [ctypes.c_void_p, ctypes.c_int]
    lib.qat_session_times.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return lib


class Plan:
    """A loaded plan."""

    def __init__(self, plan: bytes) -> None:
        self.lib = library()
        self.handle = ctypes.c_void_p()
        self.check(self.lib.qat_plan_load(plan, len(plan), ctypes.byref(self.handle)))

    def check(self, status: int) -> None:
        if status != 0:
            raise RunnerError(self.lib.qat_status_name(status).decode(), self.lib.qat_last_error().decode())

    def close(self) -> None:
        self.lib.qat_plan_free(self.handle)
        self.handle = ctypes.c_void_p()

    def __del__(self) -> None:
        self.close()

    def border(self, side: str, index: int) -> dict[str, Any]:
        """What an input or output is."""
        info = _Info()
        self.check(getattr(self.lib, f"qat_plan_{side}")(self.handle, index, ctypes.byref(info)))
        return {
            "name": info.name.decode(),
            "type": next(k for k, v in TYPES.items() if v == info.type),
            "sizes": list(info.sizes[: info.rank]),
            "grid": (info.scale, info.zero_point, info.qmin, info.qmax),
        }

    def outputs(self, batch: int) -> list[Tensor]:
        """Memory for the outputs, filled with a pattern."""
        tensors = []
        for i in range(self.lib.qat_plan_outputs(self.handle)):
            info = self.border("output", i)
            sizes = [-s * batch if s < 0 else s for s in info["sizes"]]
            tensors.append(torch.full(sizes, 77, dtype=torch.int32).to(DTYPES[info["type"]]))
        return tensors


class Session:
    """A plan for one batch size; the memory for intermediate tensors is poisoned before every run."""

    def __init__(
        self,
        plan: Plan,
        batch: int,
        isa: str = "",
        threads: int = 1,
        parallel: Callable[..., Any] | None = None,
        flags: int = 1,
        memory_limit: int = 0,
    ) -> None:
        self.plan, self.batch, self.lib = plan, batch, plan.lib
        self.handle = ctypes.c_void_p()
        function = None if parallel is None else ctypes.cast(parallel, ctypes.c_void_p)  # type: ignore[arg-type]
        options = _Options(isa.encode(), threads, flags, function, None, memory_limit)
        plan.check(self.lib.qat_session_create(plan.handle, batch, ctypes.byref(options), ctypes.byref(self.handle)))

    def __del__(self) -> None:
        self.lib.qat_session_free(self.handle)

    def run(self, *inputs: Tensor, outputs: list[Tensor] | None = None) -> list[Tensor]:
        if outputs is None:
            outputs = self.plan.outputs(self.batch)
        given = (ctypes.c_void_p * max(len(inputs), 1))(*(t.data_ptr() for t in inputs))
        taken = (ctypes.c_void_p * max(len(outputs), 1))(*(t.data_ptr() for t in outputs))
        self.plan.check(self.lib.qat_session_run(self.handle, given, taken))
        return outputs

    @property
    def arena_bytes(self) -> int:
        return int(self.lib.qat_session_arena_bytes(self.handle))

    def profile(self, on: bool) -> None:
        self.plan.check(self.lib.qat_session_profile(self.handle, on))

    def times(self) -> dict[str, int]:
        """Nanoseconds of every operator."""
        count = self.lib.qat_plan_operators(self.plan.handle)
        times = (ctypes.c_int64 * count)()
        self.plan.check(self.lib.qat_session_times(self.handle, times))
        names = [self.lib.qat_plan_operator_name(self.plan.handle, i).decode() for i in range(count)]
        return dict(zip(names, times, strict=True))
