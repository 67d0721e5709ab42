"""A plan while it is written: tensors and constants in their physical order, and copies to another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.integer.kernels.qparams import QParams
from qat.integer.native.order import Order, extended, logical, permutation, same_memory, sizes_in
from qat.integer.native.planfile import NO_GRID, Grid, Kind, PlanConstant, PlanFile, PlanOp, PlanTensor, Type
from qat.integer.native.support import TYPES, grid_of
from qat.integer.program import Program

_ARRAYS = {Type.S32: torch.int32, Type.F32: torch.float32}


@dataclass(frozen=True)
class Value:
    """Where a tensor of the program is in the plan.

    Attributes:
        tensor: Name of the plan's tensor or constant.
        shape: Logical sizes.
        order: Physical order.
        type: Type of the elements.
        grid: How the codes are read.
    """

    tensor: str
    shape: tuple[int, ...]
    order: Order
    type: Type
    grid: Grid

    @property
    def sizes(self) -> tuple[int, ...]:
        """Physical sizes."""
        return sizes_in(self.shape, self.order)

    @property
    def params(self) -> QParams:
        """The grid for PyTorch's kernels."""
        return QParams(self.grid.scale, self.grid.zero_point, self.grid.qmin, self.grid.qmax)

    def axis(self, dimension: int) -> int:
        """The physical dimension of a logical one, which may be negative."""
        return self.order.index(dimension % len(self.shape))


class Builder:
    """Collects the parts of one plan.

    Args:
        program: What the plan is of.
        values: Value of each constant, as `IntegerModel` holds it.
        wanted: The order in which a tensor is read, where the readers have one.
        single: The batch size is 1.
    """

    def __init__(
        self, program: Program, values: Mapping[str, Tensor], wanted: Mapping[str, Order], single: bool
    ) -> None:
        self.program, self.wanted, self.single = program, wanted, single
        self._constant_values = values
        self.values: dict[str, Value] = {}
        self.tensors: dict[str, PlanTensor] = {}
        self.constants: dict[str, PlanConstant] = {}
        self.ops: list[PlanOp] = []
        self._copies: dict[tuple[str, tuple[int, ...], Order], str] = {}
        #: codes of the constants, in their physical order
        self._physical: dict[str, Tensor] = {}

    def finish(self, inputs: Sequence[str], outputs: Sequence[str]) -> PlanFile:
        """Return the plan with these tensors of the plan as inputs and outputs."""
        return PlanFile(
            tuple(self.tensors.values()), tuple(self.constants.values()), tuple(self.ops), tuple(inputs), tuple(outputs)
        )

    # -- reading

    def constant(self, name: str) -> Tensor:
        """The value of a constant of the program, on the CPU."""
        return self._constant_values[name].detach().cpu()

    def floats(self, name: str) -> Tensor:
        """The value of a constant of the program as floats, on the CPU."""
        encoding = self.program.constants[name].encoding
        return self.constant(name).float() if encoding is None else encoding.dequantize(self.constant(name))

    def value(self, name: str) -> Value:
        """Where a tensor or constant of codes is; constants in their logical order."""
        if name not in self.values:
            self.values[name] = self._codes(name)
        return self.values[name]

    def _codes(self, name: str) -> Value:
        encoding = self.program.constants[name].encoding
        assert encoding is not None
        codes = self.constant(name)
        value = Value(name, tuple(codes.shape), logical(codes.dim()), TYPES[encoding.dtype], grid_of(encoding))
        self._add_codes(value, codes)
        return value

    def _add_codes(self, value: Value, codes: Tensor) -> None:
        """Add the constant of a value; `codes` are in physical order."""
        kind = {Type.U8: torch.uint8, Type.S8: torch.int8}.get(value.type, torch.int16)
        # of uint16 the low 16 bits
        data = codes.to(torch.int32).to(kind).contiguous().numpy().tobytes()
        self.constants[value.tensor] = PlanConstant(value.tensor, value.type, value.sizes, data, value.grid)
        self._physical[value.tensor] = codes

    def ordered(self, value: Value, order: Order) -> Value:
        """The same tensor in another order: itself, a reshape where that is free, or a transposed copy."""
        moved = replace(value, order=order)
        free = same_memory(value.shape, value.order, order)
        if free and moved.sizes == value.sizes:
            return moved
        perm = permutation(value.order, order)
        key = (value.tensor, value.sizes, perm)
        if key not in self._copies:
            moved = replace(moved, tensor=self._name(f"{value.tensor}:{''.join(map(str, perm))}"))
            self._copies[key] = moved.tensor
            if value.tensor in self._physical:
                self._add_codes(moved, self._physical[value.tensor].permute(perm))
            else:
                self._declare(moved)
                kind, ints = (Kind.RESHAPE, ()) if free else (Kind.TRANSPOSE, perm)
                self.emit(kind, moved.tensor, (value.tensor,), moved, ints)
        return replace(moved, tensor=self._copies[key])

    def spread(self, value: Value, rank: int) -> Value:
        """The tensor with leading dimensions of size 1 up to `rank`."""
        if len(value.shape) == rank:
            return value
        shape = (*(1,) * (rank - len(value.shape)), *value.shape)
        wide = replace(value, shape=shape, order=extended(value.order, rank))
        return replace(wide, tensor=self.resized(value, wide.sizes).tensor)

    def resized(self, value: Value, sizes: tuple[int, ...]) -> Value:
        """The same memory with other physical sizes, as a value in its physical order."""
        moved = Value(value.tensor, sizes, logical(len(sizes)), value.type, value.grid)
        if sizes == value.sizes:
            return moved
        moved = replace(moved, tensor=self._name(f"{value.tensor}:{len(sizes)}d"))
        if value.tensor in self._physical:
            self._add_codes(moved, self._physical[value.tensor].reshape(sizes))
        else:
            self._declare(moved)
            self.emit(Kind.RESHAPE, moved.tensor, (value.tensor,), moved)
        return moved

    def output(self, name: str) -> Value:
        """A value that an operator of the plan writes: a copy where that is an input or a constant."""
        value = self.value(name)
        if any(op.output == value.tensor for op in self.ops):
            return value
        copy = replace(value, tensor=self._name(f"{value.tensor}:copy"))
        self._declare(copy)
        self.reshape(value, copy)
        return copy

    # -- writing

    def reshape(self, value: Value, result: Value) -> None:
        """Emit a reshape to a tensor that was declared."""
        self.emit(Kind.RESHAPE, result.tensor, (value.tensor,), result)

    def define(self, name: str, order: Order, grid: Grid | None = None) -> Value:
        """Declare a tensor of the program in a physical order; its own grid if none is given."""
        info = self.program.tensors[name]
        encoding = info.encoding
        kind = Type.F32 if encoding is None else TYPES[encoding.dtype]
        own = NO_GRID if encoding is None else grid_of(encoding)
        value = Value(name, info.shape, order, kind, own if grid is None else grid)
        self._declare(value)
        self.values[name] = value
        return value

    def temporary(self, name: str, sizes: tuple[int, ...], like: Value) -> Value:
        """Declare a tensor of physical sizes, with the type and grid of another."""
        value = Value(self._name(name), sizes, logical(len(sizes)), like.type, like.grid)
        self._declare(value)
        return value

    def array(self, name: str, values: Tensor, kind: Type | None = None, data: bytes | None = None) -> str:
        """Add a constant without a grid: int32 or float32 values, or `data` of another type; returns its name."""
        found = kind or (Type.F32 if values.is_floating_point() else Type.S32)
        name = self._name(name)
        if data is None:
            data = values.detach().cpu().to(_ARRAYS[found]).contiguous().numpy().tobytes()
        self.constants[name] = PlanConstant(name, found, tuple(values.shape), data)
        return name

    def table(self, name: str, codes: Tensor, like: Value) -> str:
        """Add a table of codes of the type and grid of `like`; returns its name."""
        value = Value(self._name(name), tuple(codes.shape), logical(1), like.type, like.grid)
        self._add_codes(value, codes)
        return value.tensor

    def emit(
        self, kind: Kind, name: str, inputs: Sequence[str], output: Value, ints: Sequence[int] = (),
        floats: Sequence[float] = (),
    ) -> None:  # fmt: skip
        """Add an operator."""
        self.ops.append(PlanOp(kind, name, tuple(inputs), output.tensor, tuple(int(i) for i in ints), tuple(floats)))

    def want(self, name: str) -> Order:
        """The order in which a tensor is read, or the logical one."""
        return self.wanted.get(name, logical(len(self.program.tensors[name].shape)))

    def _declare(self, value: Value) -> None:
        self.tensors[value.tensor] = PlanTensor(value.tensor, value.type, value.sizes, value.grid)

    def _name(self, name: str) -> str:
        taken = (self.tensors, self.constants, self.program.tensors, self.program.constants)
        while any(name in names for names in taken):
            name += "'"
        return name


def _digits(order: Order) -> str:
    return "".join(map(str, order))
