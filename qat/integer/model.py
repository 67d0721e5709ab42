"""`IntegerModel`: a program that runs in PyTorch, exact to its numerics profile."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import DataError, ExportError, StateError
from qat.graph.prepared import PreparedModel
from qat.integer import floats
from qat.integer.kernels.requantize import dequantize
from qat.integer.lower import lower
from qat.integer.native.execution import NativeProgram
from qat.integer.native.profiling import Placement, Profile
from qat.integer.operators import Operand, qparams
from qat.integer.profiles import Arithmetic, arithmetic_of
from qat.integer.program import Op, Program
from qat.native import runner


class IntegerModel(nn.Module):
    """A converted network: integer codes between integer operators, floats at the borders and in float islands.

    The arguments of `forward` are the tensors of the user's model, in its order; it returns what the user's model
    returns. It is always in evaluation. `state_dict` holds the codes (`constants.<name>`, with "/" for ".") and the
    parameters of float islands; scales are part of `program`.

    Args:
        program: What to run.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.constants = nn.Module()
        self._keys: dict[str, str] = {}
        for name, constant in program.constants.items():
            key = name.replace(".", "/")
            while key in self.constants._buffers:
                key += "~"
            self._keys[name] = key
            self.constants.register_buffer(key, constant.value)
        self.islands = nn.ModuleList(op.call for op in program.ops if isinstance(op.call, nn.Module))
        last_use: dict[str, int] = {}
        for position, op in enumerate(program.ops):
            last_use.update(dict.fromkeys(op.inputs, position))
        self._last_use = last_use
        #: constants with what operators have prepared of them; made when first read
        self._operands: dict[str, Operand] = {}
        #: the program on the native runner, made when first run
        self._native: NativeProgram | None = None
        self.eval()

    def train(self, mode: bool = True) -> IntegerModel:  # noqa: ARG002 - the signature of nn.Module
        """Do nothing: there is no training of integers."""
        super().train(False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerModel:
        self._forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load codes of the same program."""
        self._forget()
        return super().load_state_dict(state_dict, strict, assign)

    def _forget(self) -> None:
        """Drop what was prepared of constants."""
        self._operands.clear()
        self._native = None

    @property
    def _arithmetic(self) -> Arithmetic:
        return arithmetic_of(self.program.numerics)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operands": {}, "_native": None}

    @property
    def native(self) -> Placement:
        """Which operators run in the native runner where the inputs are on the CPU, and why the others do not.

        Codes that are changed in place are not seen after the first run; load them by `load_state_dict`.
        """
        return self._on_native().placement

    def constant_values(self) -> dict[str, Tensor]:
        """Return the value of each of the program's constants, as this model holds it."""
        return {name: self.constants.get_buffer(key) for name, key in self._keys.items()}

    def _on_native(self) -> NativeProgram:
        if self._native is None:
            known = runner.status()
            values = self.constant_values()
            elsewhere = next((str(v.device) for v in values.values() if v.device.type != "cpu"), "")
            reason = self._arithmetic.native or (f"the model is on {elsewhere}" if elsewhere else known.reason)
            active = known.active and not elsewhere and not self._arithmetic.native
            self._native = NativeProgram(self.program, values, active=active, reason=reason)
        return self._native

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Run the network.

        Args:
            *args: The model's tensor inputs, float32 (or integer where the model reads indices), batch first.
            **kwargs: Inputs by name.

        Raises:
            DataError: A missing or superfluous input, or one of another shape or dtype; it is named.
        """
        results = self._execute(self._inputs(args, kwargs))
        return self.program.pack_outputs([results[name] for name in self.program.outputs])

    @torch.no_grad()
    def run(self, inputs: tuple[Tensor, ...], collect: Collection[str] = ()) -> dict[str, Tensor]:
        """Run the network in PyTorch and return named tensors: codes (int32) where they are quantized, else floats.

        This is the reference that the native runner, which `forward` uses where it can, equals in every bit.

        Args:
            inputs: The model's tensor inputs in order.
            collect: Names in `program.tensors`; none means the program's outputs.
        """
        wanted = frozenset(collect) or frozenset(self.program.outputs)
        unknown = sorted(wanted - set(self.program.tensors))
        if unknown:
            raise StateError(f"the program has no tensor {unknown[0]!r}", "see program.tensors")
        return self._execute(self._inputs(inputs, {}), wanted)

    @torch.no_grad()
    def profile(self, *args: Tensor, rounds: int = 10, **kwargs: Tensor) -> Profile:
        """Measure the time of every operator, as `forward` runs them; prints as a table.

        Args:
            *args: The model's tensor inputs, on the CPU.
            rounds: Number of runs, after one that is not counted; the shortest time of each operator is kept.
            **kwargs: Inputs by name.

        Raises:
            DataError: Inputs as `forward` refuses them, an empty batch, or inputs that are not on the CPU.
        """
        inputs = self._inputs(args, kwargs)
        batch = self._batch(inputs)
        if rounds < 1 or batch < 1 or not _on_cpu(inputs):
            raise DataError("there is nothing to measure", "give at least one round, one sample, and inputs on the CPU")
        program = self._on_native()
        with torch.autocast("cpu", enabled=False):
            program.run(inputs, batch, self._run_op)
            times = program.times(inputs, batch, self._run_op, rounds)
        return Profile(tuple(times), batch, torch.get_num_threads())

    # -- running

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        names = {self.program.tensors[n].public_name: n for n in self.program.inputs}
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names):
            raise DataError(f"{len(args)} inputs for a model of {len(names)}", f"give {', '.join(names)}")
        for key, value in kwargs.items():
            if key not in names or key in given:
                raise DataError(f"unexpected input {key!r}", f"the inputs are {', '.join(names)}")
            given[key] = value
        found: dict[str, Tensor] = {}
        for public, name in names.items():
            if public not in given:
                raise DataError(f"the input {public!r} is missing", f"give {', '.join(names)}")
            found[name] = self._checked(public, name, given[public])
        return found

    def _checked(self, public: str, name: str, value: object) -> Tensor:
        info = self.program.tensors[name]
        if not isinstance(value, Tensor):
            raise DataError(f"the input {public!r} is a {type(value).__name__}", "give a tensor")
        if value.is_floating_point() != info.dtype.is_floating_point:
            raise DataError(f"the input {public!r} has dtype {value.dtype}", f"give {info.dtype}")
        fits = value.dim() == len(info.shape) and all(
            want < 0 or want == have for want, have in zip(info.shape, value.shape, strict=False)
        )
        if not fits:
            want = "x".join("batch" if s < 0 else str(s) for s in info.shape)
            raise DataError(f"the input {public!r} has shape {tuple(value.shape)}", f"give {want}")
        return value.to(info.dtype)

    def _batch(self, inputs: dict[str, Tensor]) -> int:
        batch, first = 1, ""
        for name, value in inputs.items():
            info = self.program.tensors[name]
            for want, have in zip(info.shape, value.shape, strict=True):
                if want >= 0:
                    continue
                if have % -want or (first and have // -want != batch):
                    raise DataError(
                        f"the input {info.public_name!r} has {have} rows, {-want} a sample"
                        + (f", and {first!r} has {batch} samples" if first else ""),
                        "give batches of one size",
                    )
                batch, first = have // -want, first or info.public_name
        return batch

    @torch.no_grad()
    def _execute(self, inputs: dict[str, Tensor], wanted: frozenset[str] | None = None) -> dict[str, Tensor]:
        """Run everything: where it is fastest if no tensors are named, else in PyTorch."""
        values: dict[str, Tensor] = dict(inputs)
        batch = self._batch(inputs)
        device = next((value.device.type for value in inputs.values()), "cpu")
        # autocast would round the operands of exact sums to bfloat16
        with torch.autocast(device, enabled=False):
            if wanted is None and batch > 0 and _on_cpu(inputs) and self.native.active:
                return self._on_native().run(inputs, batch, self._run_op)
            return self._collect(values, frozenset(self.program.outputs) if wanted is None else wanted, batch)

    def _collect(self, values: dict[str, Tensor], wanted: frozenset[str], batch: int) -> dict[str, Tensor]:
        collected = {name: value for name, value in values.items() if name in wanted}
        for position, op in enumerate(self.program.ops):
            for name, value in zip(op.outputs, self._run_op(op, values, batch), strict=True):
                values[name] = value
                if name in wanted:
                    collected[name] = value
            for name in op.inputs:
                if self._last_use[name] == position:
                    values.pop(name, None)
        for name in wanted:
            if name not in collected and name in self.program.constants:
                collected[name] = self._read(name, values).value
        return collected

    def _read(self, name: str, values: dict[str, Tensor]) -> Operand:
        if name in self._keys:
            if name not in self._operands:
                value = getattr(self.constants, self._keys[name])
                self._operands[name] = Operand(value, self.program.constants[name].encoding)
            return self._operands[name]
        return Operand(values[name], self.program.tensors[name].encoding)

    def _run_op(self, op: Op, values: dict[str, Tensor], batch: int) -> tuple[Tensor, ...]:
        inputs = [self._read(name, values) if name else None for name in op.inputs]
        encoding = self.program.tensors[op.outputs[0]].encoding
        if op.kind == "island":
            assert op.call is not None
            result = op.call(*(i.value for i in inputs if i is not None))
            return tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if op.kind == "quantize":
            assert inputs[0] is not None
            return (self._arithmetic.quantize(inputs[0].value, qparams(encoding)),)
        if op.kind == "dequantize":
            assert inputs[0] is not None
            return (dequantize(inputs[0].value, inputs[0].params),)
        if op.kind == "expand":
            return (floats.expand(op.attrs, [inputs[0].value if inputs[0] else None], batch),)
        if encoding is None:
            return (self._run_float(op, inputs),)
        run = self._arithmetic.operators.get(op.kind)
        if run is None:
            raise ExportError(f"{op.name}: no integer operator {op.kind!r}", "leave the layer float")
        return (run(op.attrs, inputs, encoding),)

    @staticmethod
    def _run_float(op: Op, inputs: list[Operand | None]) -> Tensor:
        run = floats.FLOAT_OPERATORS.get(op.kind)
        if run is None:
            raise ExportError(f"{op.name}: no float operator {op.kind!r}", "leave the module out of tracing")
        return run(op.attrs, [None if i is None else i.value for i in inputs])


def _on_cpu(inputs: Mapping[str, Tensor]) -> bool:
    """Whether the inputs are in memory that the runner can read; while torch compiles or exports they are in none."""
    return not torch.compiler.is_compiling() and all(value.device.type == "cpu" for value in inputs.values())


def convert(qmodel: PreparedModel, numerics: str | None = None) -> IntegerModel:
    """Return the integer model of a calibrated or trained `PreparedModel`.

    Every operator that the plan calls integer reads and writes codes and accumulates in integers.

    Args:
        qmodel: The model.
        numerics: The numerics profile, `onnx`, `onnx-arm64` or `tflite`; None for that of the plan's target.

    Raises:
        StateError: A tensor was not calibrated; it is named.
        ExportError: A weight or bias cannot be expressed in integers, or an operator has none in the profile; the
            operator is named.
    """
    chosen = arithmetic_of(numerics or qmodel.plan.numerics)
    return IntegerModel(chosen.prepare(lower(qmodel)))
