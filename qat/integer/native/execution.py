"""Runs a program on the native runner, segment by segment, with PyTorch between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.integer.native.builder import Value
from qat.integer.native.lowering import SegmentPlan, depends_on_batch, lower_segment
from qat.integer.native.planfile import Kind, Type
from qat.integer.native.profiling import OpTime, Placement
from qat.integer.native.segments import Segment, reasons, split
from qat.integer.program import Op, Program
from qat.native.runner import Network, Session

#: Sessions of other batch sizes or thread counts that are kept.
_KEPT_SESSIONS = 4

_DTYPES: Mapping[Type, torch.dtype] = {
    Type.U8: torch.uint8, Type.S8: torch.int8, Type.U16: torch.uint16, Type.S16: torch.int16, Type.F32: torch.float32
}  # fmt: skip

#: Operators that multiply and accumulate; what converts their results may have the same name.
_PRODUCTS = frozenset({Kind.CONV, Kind.MATMUL})

#: Runs one operator in PyTorch: (operator, values, batch size) to its outputs.
RunOp = Callable[[Op, dict[str, Tensor], int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Loaded:
    """A segment in the native library; its plan without the constants."""

    plan: SegmentPlan
    network: Network


class NativeProgram:
    """A program split for the native runner, with the sessions that were made of it.

    Args:
        program: The program.
        constants: Values of its constants; read when a plan is made, which is when it is first needed.
        active: False leaves everything in PyTorch.
        reason: Why, in one line.
        keep: Tensors that are results beside the program's outputs; nothing is fused then.
    """

    def __init__(
        self,
        program: Program,
        constants: Mapping[str, Tensor],
        *,
        active: bool = True,
        reason: str = "",
        keep: Collection[str] = (),
    ) -> None:
        self.program, self._constants = program, constants
        in_pytorch = reasons(program) if active else {op.outputs[0]: reason for op in program.ops}
        self.segments: Sequence[Segment] = split(program, in_pytorch, keep)
        self._results, self._fuse = dict.fromkeys((*program.outputs, *keep)), not keep
        parts = sum(segment.native for segment in self.segments)
        self.placement = Placement(active, reason, len(program.ops), parts, in_pytorch)
        self._last_read = {name: i for i, segment in enumerate(self.segments) for name in segment.inputs}
        self._loaded: dict[tuple[int, bool], Loaded] = {}
        self._idle: list[tuple[tuple[int, int], list[Session | None]]] = []
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Tensor], batch: int, run_op: RunOp) -> dict[str, Tensor]:
        """Run the program on CPU tensors and return its outputs by name."""
        return self._run(inputs, batch, run_op, None)

    def times(self, inputs: Mapping[str, Tensor], batch: int, run_op: RunOp, rounds: int) -> list[OpTime]:
        """Run the program so many times and return the shortest time of every operator, in execution order."""
        best: list[OpTime] = []
        for _ in range(rounds):
            found: list[OpTime] = []
            self._run(inputs, batch, run_op, found)
            best = [min(pair, key=lambda t: t.seconds) for pair in zip(best, found, strict=True)] if best else found
        return best

    def _run(
        self, inputs: Mapping[str, Tensor], batch: int, run_op: RunOp, found: list[OpTime] | None
    ) -> dict[str, Tensor]:
        key = (batch, torch.get_num_threads())
        sessions = self._take(key)
        values = dict(inputs)
        for number, (segment, session) in enumerate(zip(self.segments, sessions, strict=True)):
            if session is not None:
                self._run_native(number, segment, session, values, batch, found)
            else:
                self._run_pytorch(segment, values, batch, run_op, found)
            for name in segment.inputs:
                if self._last_read[name] == number and name not in self._results:
                    values.pop(name, None)
        with self._lock:
            self._idle = [(key, sessions), *self._idle][:_KEPT_SESSIONS]
        return {name: values[name] if name in values else self._constants[name] for name in self._results}

    def _take(self, key: tuple[int, int]) -> list[Session | None]:
        """Sessions for a batch size and thread count that nobody else uses meanwhile."""
        with self._lock:
            for i, (known, sessions) in enumerate(self._idle):
                if known == key:
                    del self._idle[i]
                    return sessions
            batch, threads = key
            return [
                Session(self._load(i, batch).network, batch, threads) if segment.native else None
                for i, segment in enumerate(self.segments)
            ]

    def _load(self, number: int, batch: int) -> Loaded:
        segment = self.segments[number]
        single = batch == 1 and depends_on_batch(self.program, segment.ops)
        if (number, single) not in self._loaded:
            plan = lower_segment(self.program, segment, self._constants, single=single, fuse=self._fuse)
            network = Network(plan.plan.to_bytes())
            # the library has the constants now
            self._loaded[number, single] = Loaded(replace(plan, plan=replace(plan.plan, constants=())), network)
        return self._loaded[number, single]

    def _run_native(
        self, number: int, segment: Segment, session: Session, values: dict[str, Tensor], batch: int,
        found: list[OpTime] | None,
    ) -> None:  # fmt: skip
        plan = self._load(number, batch).plan
        given = [_physical(values[name], value) for name, value in zip(segment.inputs, plan.inputs, strict=True)]
        results = {value.tensor: _empty(value, batch) for value in plan.outputs}
        wanted = [results[name] for name in plan.plan.outputs]
        times: list[float] = []
        if found is None:
            session.run(given, wanted)
        else:
            times = session.times(given, wanted)
        for name, value in zip(segment.outputs, plan.outputs, strict=True):
            values[name] = _logical(results[value.tensor], value)
        if found is not None:
            macs = {op.name: op.macs * batch for op in segment.ops if op.macs}
            found += [
                OpTime(
                    op.name,
                    op.kind.name.lower(),
                    "native",
                    seconds,
                    macs.get(op.name, 0) if op.kind in _PRODUCTS else 0,
                )
                for op, seconds in zip(plan.plan.ops, times, strict=True)
            ]

    def _run_pytorch(
        self, segment: Segment, values: dict[str, Tensor], batch: int, run_op: RunOp, found: list[OpTime] | None
    ) -> None:
        for op in segment.ops:
            start = time.perf_counter()
            values.update(zip(op.outputs, run_op(op, values, batch), strict=True))
            if found is not None:
                seconds = time.perf_counter() - start
                found.append(OpTime(op.name, op.kind, "pytorch", seconds, op.macs * batch))


def _physical(x: Tensor, value: Value) -> Tensor:
    """A tensor of the program as the runner reads it."""
    x = x.permute(value.order)
    if value.type == Type.U16:
        # conversions to uint16 are missing in places; the low 16 bits are the same
        return x.to(torch.int32).to(torch.int16).contiguous().view(torch.uint16)
    return x.to(_DTYPES[value.type]).contiguous()


def _empty(value: Value, batch: int) -> Tensor:
    return torch.empty([-size * batch if size < 0 else size for size in value.sizes], dtype=_DTYPES[value.type])


def _logical(x: Tensor, value: Value) -> Tensor:
    """What the runner wrote as PyTorch's operators read it: floats, or int32 codes."""
    if value.type == Type.U16:
        x = x.view(torch.int16).to(torch.int32) & 0xFFFF
    elif value.type != Type.F32:
        x = x.to(torch.int32)
    return x.permute([value.order.index(d) for d in range(len(value.order))])
