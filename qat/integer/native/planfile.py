"""The plan file of `docs/plan_format.md`: plain records, and the bytes that the native runner loads."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from qat.errors import ExportError

_MAGIC = b"QATPLAN\0"
_VERSION = 1
_HEADER = 64
_ALIGNMENT = 64


class Type(IntEnum):
    """Type of the elements of a tensor or constant."""

    U8 = 1
    S8 = 2
    U16 = 3
    S16 = 4
    S32 = 5
    F32 = 6
    S4 = 7

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return {1: 8, 2: 8, 3: 16, 4: 16, 5: 32, 6: 32, 7: 4}[int(self)]


class Kind(IntEnum):
    """Operators of the runner."""

    QUANTIZE = 1
    DEQUANTIZE = 2
    REQUANTIZE = 3
    CONV = 4
    MATMUL = 5
    ADD = 6
    SUB = 7
    MUL = 8
    DIV = 9
    CONCAT = 10
    MAX_POOL = 11
    AVG_POOL = 12
    MEAN = 13
    RESIZE_NEAREST = 14
    RESIZE_LINEAR = 15
    PAD = 16
    TRANSPOSE = 17
    SLICE = 18
    EXPAND = 19
    ROLL = 20
    SOFTMAX = 21
    LAYER_NORM = 22
    TABLE = 23
    PRELU = 24
    RESHAPE = 25


@dataclass(frozen=True)
class Grid:
    """How codes are read: `real = scale * (code - zero_point)`, `qmin <= code <= qmax`.

    Attributes:
        scale: Real value of one step.
        zero_point: Code of 0.
        qmin: Smallest code.
        qmax: Largest code.
        wide: What reads or writes the codes is computed in float (`QParams.wide`).
    """

    scale: float = 0.0
    zero_point: int = 0
    qmin: int = 0
    qmax: int = 0
    wide: bool = False


#: of floats and of plain integers
NO_GRID = Grid()


@dataclass(frozen=True)
class PlanTensor:
    """A tensor of the plan; sizes are physical, and -k is k times the batch size."""

    name: str
    type: Type
    sizes: tuple[int, ...]
    grid: Grid = NO_GRID


@dataclass(frozen=True)
class PlanConstant:
    """A constant; `data` holds its elements in their physical order."""

    name: str
    type: Type
    sizes: tuple[int, ...]
    data: bytes
    grid: Grid = NO_GRID


@dataclass(frozen=True)
class PlanOp:
    """One operator; inputs are names of tensors and constants, "" where one is absent."""

    kind: Kind
    name: str
    inputs: tuple[str, ...]
    output: str
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()


@dataclass(frozen=True)
class PlanFile:
    """A whole plan.

    Attributes:
        tensors: In any order.
        constants: In any order; their names differ from those of tensors.
        ops: In execution order.
        inputs: Names of the tensors that the caller gives.
        outputs: Names of the tensors that the caller gets.
    """

    tensors: tuple[PlanTensor, ...]
    constants: tuple[PlanConstant, ...]
    ops: tuple[PlanOp, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """Return the file.

        Raises:
            ExportError: The parts contradict each other, such as a tensor that is read before it is written; the name
                of the operator, tensor or constant is given.
        """
        numbers = self._numbers()
        self._check_flow(numbers)
        data, offsets = _data_section(self.constants)
        records = b"".join(
            [
                *(_tensor(t) for t in self.tensors),
                *(_constant(c, offset) for c, offset in zip(self.constants, offsets, strict=True)),
                *(_operator(op, numbers) for op in self.ops),
                *(struct.pack("<I", numbers[name]) for name in (*self.inputs, *self.outputs)),
            ]
        )
        start = _aligned(_HEADER + len(records))
        body = records + bytes(start - _HEADER - len(records)) + data
        counts = (len(self.tensors), len(self.constants), len(self.ops), len(self.inputs), len(self.outputs))
        tail = struct.pack("<QQIIIIIIQ", start + len(data), start, 0, *counts, 0) + body
        return _MAGIC + struct.pack("<II", _VERSION, zlib.crc32(tail)) + tail

    def _numbers(self) -> dict[str, int]:
        items: list[PlanTensor | PlanConstant] = [*self.tensors, *self.constants]
        names = [item.name for item in items]
        numbers = {name: number for number, name in enumerate(names)}
        if len(numbers) != len(names) or "" in numbers:
            twice = next(name for name in names if not name or names.count(name) > 1)
            raise ExportError(f"{twice!r} names two things of a plan, or is no name", "give each a name of its own")
        for item in items:
            if item.type == Type.S4 and isinstance(item, PlanTensor):
                raise ExportError(f"tensor {item.name!r} of a plan has 4 bits", "only constants may")
            if isinstance(item, PlanConstant) and (
                any(size < 0 for size in item.sizes) or len(item.data) != _bytes(item.type, item.sizes)
            ):
                raise ExportError(f"constant {item.name!r} of a plan has {len(item.data)} bytes for {item.sizes}")
        return numbers

    def _check_flow(self, numbers: dict[str, int]) -> None:
        first_constant = len(self.tensors)
        written = set(self.inputs)
        for op in self.ops:
            for name in op.inputs:
                if name and (name not in numbers or (numbers[name] < first_constant and name not in written)):
                    raise ExportError(f"{op.name}: reads {name!r}, which nothing has written")
            if numbers.get(op.output, first_constant) >= first_constant or op.output in written:
                raise ExportError(f"{op.name}: writes {op.output!r}, which is no tensor, or was written before")
            written.add(op.output)
        for name in (*self.inputs, *self.outputs):
            if name not in written or numbers.get(name, first_constant) >= first_constant:
                raise ExportError(f"the plan gives or takes {name!r}, which is no tensor that was written")


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes(kind: Type, sizes: Iterable[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return -(-count * kind.bits // 8)


def _data_section(constants: Sequence[PlanConstant]) -> tuple[bytes, list[int]]:
    parts: list[bytes] = []
    offsets: list[int] = []
    end = 0
    for constant in constants:
        offsets.append(end)
        size = _aligned(len(constant.data))
        parts.append(constant.data + bytes(size - len(constant.data)))
        end += size
    return b"".join(parts), offsets


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def _shape(kind: Type, sizes: Sequence[int]) -> bytes:
    return struct.pack(f"<BB{len(sizes)}q", kind, len(sizes), *sizes)


def _grid(grid: Grid) -> bytes:
    return struct.pack("<fiiiB", grid.scale, grid.zero_point, grid.qmin, grid.qmax, grid.wide)


def _tensor(tensor: PlanTensor) -> bytes:
    return _string(tensor.name) + _shape(tensor.type, tensor.sizes) + _grid(tensor.grid)


def _constant(constant: PlanConstant, offset: int) -> bytes:
    head = _string(constant.name) + _shape(constant.type, constant.sizes) + _grid(constant.grid)
    return head + struct.pack("<QQ", offset, len(constant.data))


def _operator(op: PlanOp, numbers: dict[str, int]) -> bytes:
    inputs = [numbers[name] if name else -1 for name in op.inputs]
    return b"".join(
        [
            struct.pack("<H", op.kind),
            _string(op.name),
            struct.pack(f"<H{len(inputs)}ii", len(inputs), *inputs, numbers[op.output]),
            struct.pack(f"<H{len(op.ints)}q", len(op.ints), *op.ints),
            struct.pack(f"<H{len(op.floats)}f", len(op.floats), *op.floats),
        ]
    )
