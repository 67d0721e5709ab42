"""What all quantizers share: the grid in buffers, phases, provenance, and how these are saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat import native, numerics
from qat.encoding import Encoding, Provenance, warn_of_floor
from qat.errors import CheckpointError, EncodingError, SchemeError
from qat.observers import resolve_observer
from qat.scheme import Granularity, Scheme

_WIDEST = 16
_FLOAT_BUFFERS = ("scale", "min_val", "max_val")


@dataclass(frozen=True)
class Phase:
    """What quantizers do in a forward pass.

    Attributes:
        observing: Feed values to the observer (calibration).
        quantizing: Fake-quantize.
        tracking: In training mode, let the range follow a moving average of the batches' ranges.
    """

    observing: bool = False
    quantizing: bool = False
    tracking: bool = False


def pack_state(state: Mapping[str, Any]) -> Tensor:
    """Return a JSON-able mapping as a uint8 tensor, shape (bytes,).

    Extra state in this form passes `torch.load(weights_only=True)` and safetensors alike.
    """
    return torch.tensor(list(json.dumps(dict(state), sort_keys=True).encode()), dtype=torch.uint8)


def unpack_state(packed: object, name: str) -> dict[str, Any]:
    """Read what `pack_state` wrote.

    Raises:
        CheckpointError: It is not such a tensor; `name` is named.
    """
    try:
        if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() != 1:
            raise ValueError("not a vector of uint8")
        state = json.loads(bytes(packed.tolist()))
        if not isinstance(state, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(
            f"the extra state of {name!r} is malformed ({error})",
            "load a checkpoint that this version of qat wrote",
        ) from None
    return state


def tensor_range(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Return smallest and largest values, float32: scalars, (C,) per-channel, one a group (flat, row-major).

    A last group that is shorter than the others is filled up with zeros, which no range may exclude anyway. A
    nan makes its bounds nan. The tensor must not be empty.
    """
    if granularity.kind == "per_tensor":
        low, high = torch.aminmax(x)
        return low.to(torch.float32), high.to(torch.float32)
    axis = granularity.axis % x.dim()
    if granularity.kind == "per_channel":
        rows = x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x.unsqueeze(1)
        return rows.amin(1).to(torch.float32), rows.amax(1).to(torch.float32)
    size = granularity.size or 1
    missing = -x.shape[axis] % size
    rows = x.movedim(axis, -1)
    if missing:
        rows = F.pad(rows, (0, missing))
    groups = rows.reshape(*rows.shape[:-1], -1, size)
    low, high = (values.movedim(-1, axis).flatten() for values in (groups.amin(-1), groups.amax(-1)))
    return low.to(torch.float32), high.to(torch.float32)


class Quantizer(nn.Module):
    """Base of the fake quantizers: a grid, phases and provenance.

    Buffers, with their final shapes from construction (() for per-tensor, else (count,)): `scale` float32,
    `zero_point` int32, and the range they came from, `min_val` and `max_val` float32, which is empty (min
    above max) where nothing is known. They stay float32 when a model is cast to half precision.

    The phases `observing`, `quantizing` and `tracking` are plain booleans: they cost no device
    synchronisation, and `torch.compile` one recompilation when they change. With the provenance of the range
    they are saved as extra state.

    Args:
        scheme: How the tensor is quantized; its quantizer must be `static`, its codes of at most 16 bits.
        name: Name of the tensor, for messages.
        count: Number of scales.

    Raises:
        SchemeError: The scheme asks for another quantizer or for wider codes; the tensor is named.
    """

    scale: Tensor
    zero_point: Tensor
    min_val: Tensor
    max_val: Tensor

    def __init__(self, scheme: Scheme, name: str, count: int) -> None:
        super().__init__()
        if scheme.quantizer != "static":
            raise SchemeError(f"unknown quantizer {scheme.quantizer!r} for {name!r}", "choose static")
        if scheme.int_type.bits > _WIDEST:
            raise SchemeError(f"{name!r} cannot be fake-quantized to {scheme.dtype}", "use 16 bits or fewer")
        # another system's name of an observer would hide what it is from whoever asks
        self.scheme = scheme.with_(observer=resolve_observer(scheme.observer))
        self.name = name
        #: how a range becomes the grid, for the native extension
        self.rule = native.GridRule(
            *scheme.code_range,
            axis=None if scheme.granularity.kind == "per_tensor" else scheme.granularity.axis,
            symmetric=scheme.symmetric,
            middle=scheme.symmetric_zero_point,
            power_of_two=scheme.power_of_two,
        )
        self.observing = False
        self.quantizing = False
        self.tracking = False
        #: whether the buffers hold a grid that was calibrated, tracked, fixed or loaded
        self.ready = False
        self._provenance: Provenance | None = None
        self._loaded = False
        self._method = ""
        self._has_range = False
        shape = () if scheme.granularity.kind == "per_tensor" else (count,)
        self.register_buffer("scale", torch.ones(shape))
        zero = scheme.symmetric_zero_point if scheme.symmetric else min(max(0, self.qmin), self.qmax)
        self.register_buffer("zero_point", torch.full(shape, zero, dtype=torch.int32))
        self.register_buffer("min_val", torch.full(shape, torch.inf))
        self.register_buffer("max_val", torch.full(shape, -torch.inf))

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return self.scheme.code_range[0]

    @property
    def qmax(self) -> int:
        """Largest code."""
        return self.scheme.code_range[1]

    @property
    def phase(self) -> Phase:
        """The phase that this quantizer is in."""
        return Phase(self.observing, self.quantizing, self.tracking)

    def set_phase(self, phase: Phase) -> None:
        """Enter a phase."""
        self.observing, self.quantizing, self.tracking = phase.observing, phase.quantizing, phase.tracking

    def _note(self, provenance: Provenance | None, method: str, *, has_range: bool, loaded: bool = False) -> None:
        """Record where the grid comes from."""
        self._provenance, self._method, self._has_range, self._loaded = provenance, method, has_range, loaded
        # a bool of its own: `torch.compile` then guards on it and not on the provenance
        self.ready = provenance is not None

    def _set_range(self, low: Tensor, high: Tensor, provenance: Provenance, method: str) -> None:
        """Set the buffers from a range; warn where it is empty, or too small for a scale of its own.

        Raises:
            EncodingError: The range is not finite or inverted; the tensor is named.
        """
        try:
            scale, zero_point = numerics.range_to_scale(low, high, self.scheme)
        except EncodingError as error:
            raise EncodingError(f"{self.name!r}: {error}") from None
        warn_of_floor(self.name, scale, stacklevel=2)
        for buffer, value in (
            (self.scale, scale), (self.zero_point, zero_point), (self.min_val, low), (self.max_val, high),
        ):  # fmt: skip
            buffer.copy_(value.reshape(buffer.shape))
        self._note(provenance, method, has_range=True)

    def load_encoding(self, encoding: Encoding) -> None:
        """Take the grid, range and provenance of an encoding.

        Raises:
            EncodingError: Its dtype, integer range, granularity, symmetry or number of scales is not this
                tensor's.
        """
        mend = "change the scheme of this tensor, or the encoding"
        mine, theirs = (
            self._grid_kind(),
            _kind(encoding.dtype, encoding.qmin, encoding.qmax, encoding.granularity),
        )
        if mine != theirs:
            raise EncodingError(f"the encoding of {self.name!r} is {theirs} and its scheme is {mine}", mend)
        if len(encoding.scale) != self.scale.numel():
            raise EncodingError(
                f"the encoding of {self.name!r} has {len(encoding.scale)} scales and the tensor "
                f"has {self.scale.numel()}",
                "give the encoding of this model",
            )
        middle = self.scheme.symmetric_zero_point
        if self.scheme.symmetric and any(z != middle for z in encoding.zero_point):
            raise EncodingError(f"the encoding of {self.name!r} is not symmetric and its scheme is", mend)
        has_range = encoding.min is not None and encoding.max is not None
        if encoding.min is not None and encoding.max is not None:
            low, high = torch.tensor(encoding.min), torch.tensor(encoding.max)
        else:
            # a moving average needs somewhere to start from
            low, high = numerics.representable_range(
                encoding.scale_tensor, encoding.zero_point_tensor, encoding.qmin, encoding.qmax
            )
        self.scale.copy_(encoding.scale_tensor)
        self.zero_point.copy_(encoding.zero_point_tensor)
        self.min_val.copy_(low.reshape(self.min_val.shape))
        self.max_val.copy_(high.reshape(self.max_val.shape))
        self._note(encoding.provenance, encoding.method, has_range=has_range, loaded=True)

    def _buffers_encoding(self, provenance: Provenance, method: str, samples: int, has_range: bool) -> Encoding:
        """Return the encoding of what the buffers hold."""
        scale, zero, low, high = (
            tuple(b.detach().reshape(-1).tolist()) for b in (self.scale, self.zero_point, self.min_val, self.max_val)
        )
        return Encoding(
            dtype=self.scheme.dtype,
            scale=scale,
            zero_point=zero,
            qmin=self.qmin,
            qmax=self.qmax,
            symmetric=self.scheme.symmetric,
            granularity=self.scheme.granularity,
            min=low if has_range else None,
            max=high if has_range else None,
            provenance=provenance,
            method=method,
            samples=samples,
        )

    def _grid_kind(self) -> str:
        return _kind(self.scheme.dtype, self.qmin, self.qmax, self.scheme.granularity)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Quantizer:
        # `model.half()` must not round scales: an activation's codes would no longer be those of the export
        exact = {name: self._buffers[name] for name in _FLOAT_BUFFERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            now = self._buffers[name]
            if before is not None and now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self

    def get_extra_state(self) -> Tensor:
        """Return phases and provenance as a uint8 tensor."""
        return pack_state(
            {
                "grid": self._grid_kind(),
                "phase": [self.observing, self.quantizing, self.tracking],
                "provenance": self._provenance,
                "method": self._method,
                "has_range": self._has_range,
                "loaded": self._loaded,
            }
        )

    def set_extra_state(self, state: object) -> None:
        """Restore phases and provenance.

        Raises:
            CheckpointError: The state is malformed, or of a tensor with another integer type, range or
                granularity.
        """
        values = self.read_extra_state(state)
        self.set_phase(Phase(*values["phase"]))
        self._note(values["provenance"], values["method"], has_range=values["has_range"], loaded=values["loaded"])

    def read_extra_state(self, state: object) -> dict[str, Any]:
        """Check extra state, and unpack it, without restoring anything.

        Raises:
            CheckpointError: As `set_extra_state`.
        """
        values = unpack_state(state, self.name)
        if values.get("grid") != self._grid_kind():
            raise CheckpointError(
                f"the checkpoint has {self.name!r} as {values.get('grid')} and the model as {self._grid_kind()}",
                "prepare the model with the scheme of the checkpoint",
            )
        phase, provenance, method = values.get("phase"), values.get("provenance"), values.get("method")
        if (
            not isinstance(phase, list)
            or len(phase) != len(("observing", "quantizing", "tracking"))
            or not all(isinstance(v, bool) for v in [*phase, values.get("has_range"), values.get("loaded")])
            or (provenance is not None and provenance not in get_args(Provenance))
            or not isinstance(method, str)
        ):
            raise CheckpointError(
                f"the extra state of {self.name!r} is malformed",
                "load a checkpoint that this version of qat wrote",
            )
        return values

    def extra_repr(self) -> str:
        """Return scheme and phases for `print(model)`."""
        phases = [p for p in ("observing", "quantizing", "tracking") if getattr(self, p)]
        return f"{self.name!r}, {self.scheme.describe()}, {'+'.join(phases) or 'float'}"


def _kind(dtype: str, qmin: int, qmax: int, granularity: Granularity) -> str:
    place: str = granularity.kind
    if granularity.kind == "per_channel":
        place += f"({granularity.axis})"
    if granularity.kind == "per_group":
        place += f"({granularity.axis}, {granularity.size})"
    return f"{dtype} [{qmin}, {qmax}] {place}"
