"""AIMET's files of encodings, which Qualcomm's converters read as quantization overrides: formats 0.6.1, 1.0.0, 2.0.0.

Sources: aimet-onnx 2.42 (`QuantizationSimModel.export`, `load_encodings_to_sim`), measured. In 0.6.1 and 1.0.0 an
offset is minus the zero point on the unsigned grid, whatever the type: -128 for symmetric int8. 2.0.0 has ONNX's zero
points and types, and names no parameters. A table says nothing of the axis of channels before 2.0.0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from qat.encoding import Encoding
from qat.encodings import Encodings
from qat.errors import EncodingError
from qat.export.twin import MOVEMENTS
from qat.files import atomic_write_text, read_json
from qat.scheme import Granularity, int_type

Version = Literal["0.6.1", "1.0.0", "2.0.0"]
VERSIONS: tuple[Version, ...] = get_args(Version)
_SEE = "give a file that AIMET, or `qat encodings convert --to aimet`, wrote"
_TYPES = ("int4", "uint4", "int8", "uint8", "int16", "uint16", "int32")


def write_aimet(
    encodings: Encodings,
    path: str | os.PathLike[str],
    *,
    parameters: Collection[str],
    version: Version = "1.0.0",
    biases: bool = False,
) -> None:
    """Write a table of encodings for the ONNX model that has its tensors.

    Args:
        encodings: Encodings by the names of the model's tensors and initializers.
        path: The file to write.
        parameters: Names of the initializers among them.
        version: Format of the file.
        biases: Write the int32 encodings of biases too. AIMET loads them, but not strictly, since it simulates none.

    Raises:
        EncodingError: There is no such format, or an encoding cannot be written in it; the tensor is named.
        OutputError: The file cannot be written.
    """
    data = aimet_document(encodings, parameters=parameters, version=version, biases=biases)
    atomic_write_text(Path(path), json.dumps(data, indent=1, allow_nan=False) + "\n")


def aimet_document(
    encodings: Encodings, *, parameters: Collection[str], version: Version = "1.0.0", biases: bool = False
) -> dict[str, Any]:
    """Return the JSON document of `write_aimet`."""
    if version not in VERSIONS:
        raise EncodingError(f"AIMET has no format {version!r} of encodings", f"choose {', '.join(VERSIONS)}")
    grouped = next((name for name, e in encodings.items() if e.granularity.kind == "per_group"), None)
    if grouped is not None:
        raise EncodingError(
            f"{grouped!r} has a scale for each group, which is not written for AIMET",
            "quantize it per tensor or per channel",
        )
    chosen = {name: e for name, e in encodings.items() if biases or e.dtype != "int32"}
    producer = {"version": version, "producer": "qat"}
    if version == "2.0.0":
        return {**producer, "encodings": [_entry_2(name, e) for name, e in chosen.items()]}
    split = [{n: e for n, e in chosen.items() if (n in parameters) == inside} for inside in (False, True)]
    found: dict[str, Any] = {**producer}
    for key, table in zip(("activation_encodings", "param_encodings"), split, strict=True):
        if version == "0.6.1":
            found[key] = {name: _entries_0(e) for name, e in table.items()}
        else:
            found[key] = [_entry_1(name, e) for name, e in table.items()]
    found["quantizer_args"] = _arguments(*split)
    return found


def _arguments(activations: Mapping[str, Encoding], parameters: Mapping[str, Encoding]) -> dict[str, Any]:
    """What AIMET calls the defaults of its quantizers."""

    def bits(table: Mapping[str, Encoding]) -> int:
        return max((int_type(e.dtype).bits for e in table.values() if e.dtype != "int32"), default=8)

    return {
        "activation_bitwidth": bits(activations),
        "dtype": "int",
        "is_symmetric": any(e.symmetric for e in parameters.values()),
        "param_bitwidth": bits(parameters),
        "per_channel_quantization": any(not e.per_tensor for e in parameters.values()),
        "quant_scheme": "post_training_tf",
    }


def _offsets(encoding: Encoding) -> list[int]:
    kind = int_type(encoding.dtype)
    return [-(zero - kind.qmin) for zero in encoding.zero_point]


def _entries_0(encoding: Encoding) -> list[dict[str, Any]]:
    bits = int_type(encoding.dtype).bits
    return [
        {
            "bitwidth": bits,
            "dtype": "int",
            "is_symmetric": str(encoding.symmetric),
            "min": offset * scale,
            "max": (offset + 2**bits - 1) * scale,
            "offset": offset,
            "scale": scale,
        }
        for offset, scale in zip(_offsets(encoding), encoding.scale, strict=True)
    ]


def _entry_1(name: str, encoding: Encoding) -> dict[str, Any]:
    return {
        "name": name,
        "enc_type": "PER_TENSOR" if encoding.per_tensor else "PER_CHANNEL",
        "dtype": "INT",
        "bw": int_type(encoding.dtype).bits,
        "is_sym": encoding.symmetric,
        "scale": list(encoding.scale),
        "offset": _offsets(encoding),
    }


def _entry_2(name: str, encoding: Encoding) -> dict[str, Any]:
    whole = encoding.per_tensor
    found: dict[str, Any] = {
        "name": name,
        "output_dtype": encoding.dtype,
        "y_scale": encoding.scale[0] if whole else list(encoding.scale),
    }
    if any(encoding.zero_point):
        found["y_zero_point"] = encoding.zero_point[0] if whole else list(encoding.zero_point)
    if not whole:
        found["axis"] = encoding.granularity.axis
    return found


def tensors_of(path: str | os.PathLike[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the tensors and of the weights of an ONNX model, quantized (QDQ) or float.

    Results of operators that only move values are left out: AIMET wants no encodings of them.

    Raises:
        EncodingError: It cannot be read as an ONNX model.
    """
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # noqa: BLE001 - protobuf's errors have no public base that is typed
        raise EncodingError(f"cannot read the ONNX model {path} ({error})", "give an existing model") from None
    parameters = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        # a weight that is dequantized, or widened first, bears its name behind that
        if node.op_type in ("DequantizeLinear", "Cast") and node.input[0] in parameters:
            parameters.update(node.output)
    values = {name for node in graph.node if node.op_type not in MOVEMENTS for name in node.output}
    values |= {value.name for value in graph.input}
    return frozenset(values - parameters), frozenset(parameters)


# -- reading


def read_aimet(path: str | os.PathLike[str], *, axes: Mapping[str, int] | None = None) -> Encodings:
    """Read a file of encodings.

    Formats before 2.0.0 tell no sign and no axis: symmetric encodings are read as signed, others as unsigned ones (the
    same grid), and channels run along axis 0 unless `axes` says otherwise.

    Args:
        path: The file.
        axes: Axis of the channels by name; transposed convolutions have axis 1.

    Raises:
        EncodingError: The file is missing, not JSON, of an unknown version, or malformed; the tensor and key are named.
    """
    data = read_json(Path(path), EncodingError, _SEE)
    return read_aimet_document(data, str(path), axes=axes)


def read_aimet_document(data: object, source: str, *, axes: Mapping[str, int] | None = None) -> Encodings:
    """Read the JSON document of a file of encodings, see `read_aimet`."""
    if not isinstance(data, dict) or "version" not in data:
        raise EncodingError(f"{source} is no file of AIMET encodings: it has no 'version'", _SEE)
    version = data["version"]
    if version not in VERSIONS:
        raise EncodingError(f"{source} has version {version!r}", f"read are {', '.join(VERSIONS)}")
    reader = _Reader(source, dict(axes or {}))
    if version == "2.0.0":
        found = reader.listed(data, "encodings", reader.entry_2)
    else:
        keys = ("activation_encodings", "param_encodings")
        if version == "0.6.1":
            found = [pair for key in keys for pair in reader.mapped(data, key)]
        else:
            found = [pair for key in keys for pair in reader.listed(data, key, reader.entry_1)]
    table: dict[str, Encoding] = {}
    for name, encoding in found:
        if name in table:
            raise EncodingError(f"{source}: {name!r} occurs twice", "keep one")
        table[name] = encoding
    return Encodings(table, {"source": f"AIMET {version}"})


class _Reader:
    """Reads entries of one file; every error names the file, the tensor and the key."""

    def __init__(self, source: str, axes: Mapping[str, int]) -> None:
        self.source, self.axes = source, axes

    def fail(self, where: str, what: str) -> EncodingError:
        return EncodingError(f"{self.source}: {where}: {what}", _SEE)

    def value(self, entry: Mapping[str, Any], key: str, where: str, check: Callable[[Any], bool], what: str) -> Any:
        if key not in entry:
            raise self.fail(where, f"the key {key!r} is missing")
        if not check(entry[key]):
            raise self.fail(where, f"{key!r} is {entry[key]!r} and no {what}")
        return entry[key]

    def listed(
        self, data: Mapping[str, Any], key: str, read: Callable[[Mapping[str, Any], str], Encoding]
    ) -> list[tuple[str, Encoding]]:
        entries = self.value(data, key, "the file", lambda v: isinstance(v, list), "list")
        found = []
        for number, entry in enumerate(entries):
            where = f"{key}[{number}]"
            if not isinstance(entry, dict):
                raise self.fail(where, "it is no object")
            name = self.value(entry, "name", where, lambda v: isinstance(v, str) and bool(v), "name")
            found.append((name, self._made(name, partial(read, entry, name))))
        return found

    def mapped(self, data: Mapping[str, Any], key: str) -> list[tuple[str, Encoding]]:
        tables = self.value(data, key, "the file", lambda v: isinstance(v, dict), "object")
        return [(name, self._made(name, partial(self.entries_0, entries, name))) for name, entries in tables.items()]

    def _made(self, name: str, make: Callable[[], Encoding]) -> Encoding:
        try:
            return make()
        except EncodingError as error:
            if str(error).startswith(self.source):
                raise
            raise self.fail(repr(name), str(error)) from None

    def entries_0(self, entries: Any, name: str) -> Encoding:
        if not isinstance(entries, list) or not entries or any(not isinstance(e, dict) for e in entries):
            raise self.fail(repr(name), "it is no list of objects, one a channel")
        where = repr(name)
        for entry in entries:
            self.value(entry, "dtype", where, lambda v: v == "int", "'int' (float encodings are not read)")
        bits = [self.value(e, "bitwidth", where, _whole, "whole number") for e in entries]
        symmetric = [
            self.value(e, "is_symmetric", where, lambda v: v in ("True", "False", True, False), "'True' or 'False'")
            for e in entries
        ]
        if len(set(bits)) > 1 or len({str(s) for s in symmetric}) > 1:
            raise self.fail(where, "its channels differ in 'bitwidth' or 'is_symmetric'")
        scales = [self.value(e, "scale", where, _positive, "positive number") for e in entries]
        offsets = [self.value(e, "offset", where, _whole, "whole number") for e in entries]
        return self._affine(name, bits[0], str(symmetric[0]) == "True", scales, offsets, len(entries) > 1)

    def entry_1(self, entry: Mapping[str, Any], name: str) -> Encoding:
        where = repr(name)
        kinds = ("PER_TENSOR", "PER_CHANNEL")
        kind = self.value(entry, "enc_type", where, lambda v: v in kinds, f"one of {', '.join(kinds)}")
        self.value(entry, "dtype", where, lambda v: v == "INT", "'INT' (float encodings are not read)")
        bits = self.value(entry, "bw", where, _whole, "whole number")
        symmetric = self.value(entry, "is_sym", where, lambda v: isinstance(v, bool), "true or false")
        scales = self.value(entry, "scale", where, _list_of(_positive), "list of positive numbers")
        offsets = self.value(entry, "offset", where, _list_of(_whole), "list of whole numbers")
        return self._affine(name, bits, symmetric, scales, offsets, kind == "PER_CHANNEL")

    def _affine(
        self, name: str, bits: int, symmetric: bool, scales: Sequence[float], offsets: Sequence[int], channels: bool
    ) -> Encoding:
        dtype = f"{'' if symmetric or bits == 32 else 'u'}int{bits}"
        if dtype not in _TYPES:
            raise self.fail(repr(name), f"{bits} bits are not read")
        low = int_type(dtype).qmin
        return _encoding(
            dtype, scales, [low - offset for offset in offsets], symmetric, channels, self.axes.get(name, 0)
        )

    def entry_2(self, entry: Mapping[str, Any], name: str) -> Encoding:
        where = repr(name)
        dtype = self.value(entry, "output_dtype", where, lambda v: v in _TYPES, f"one of {', '.join(_TYPES)}")
        scale = self.value(
            entry, "y_scale", where, lambda v: _positive(v) or _list_of(_positive)(v), "positive number or list of such"
        )
        if entry.get("block_size"):
            raise self.fail(where, "'block_size': a scale for each group is not read")
        scales = scale if isinstance(scale, list) else [scale]
        zeros: Any = 0
        if entry.get("y_zero_point") is not None:
            zeros = self.value(
                entry, "y_zero_point", where, lambda v: _whole(v) or _list_of(_whole)(v), "whole number or list of such"
            )
        zeros = zeros if isinstance(zeros, list) else [zeros] * len(scales)
        axis = 0
        if entry.get("axis") is not None:
            axis = self.value(entry, "axis", where, _whole, "whole number")
        symmetric = int_type(dtype).signed and not any(zeros)
        return _encoding(dtype, scales, zeros, symmetric, isinstance(scale, list), axis)


def _encoding(
    dtype: str, scales: Sequence[float], zeros: Sequence[int], symmetric: bool, channels: bool, axis: int
) -> Encoding:
    kind = int_type(dtype)
    return Encoding(
        dtype,
        tuple(float(s) for s in scales),
        tuple(zeros),
        kind.qmin,
        kind.qmax,
        symmetric=symmetric,
        granularity=Granularity("per_channel", axis) if channels else Granularity(),
        provenance="imported",
        method="AIMET",
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(check(v) for v in value)
