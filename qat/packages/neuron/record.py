"""What the stand-in for NeuroPilot's library has written down: models, their operands and their operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qat.errors import ExportError

#: types of operands by their numbers in NeuronAdapter.h: those that integer networks have
OPERAND_TYPES = {
    0: "FLOAT32",
    1: "INT32",
    2: "UINT32",
    3: "TENSOR_FLOAT32",
    4: "TENSOR_INT32",
    6: "BOOL",
    11: "TENSOR_QUANT8_SYMM_PER_CHANNEL",
    13: "TENSOR_QUANT8_SYMM",
    14: "TENSOR_QUANT8_ASYMM_SIGNED",
}


@dataclass(frozen=True)
class Operand:
    """An operand of a Neuron model.

    Attributes:
        type: Number of its type, see `OPERAND_TYPES`.
        sizes: Its sizes; none for scalars.
        scale: Its scale; 0 where it has none or one a channel.
        zero_point: Its zero point.
        channel_scales: Scales of its channels.
        channel_axis: Dimension of the channels.
        crc: CRC-32 of its bytes; None for what is computed.
    """

    type: int
    sizes: tuple[int, ...]
    scale: float
    zero_point: int
    channel_scales: tuple[float, ...] = ()
    channel_axis: int = 0
    crc: int | None = None

    @property
    def type_name(self) -> str:
        """Name of the type, or its number where it is none of an integer network."""
        return OPERAND_TYPES.get(self.type, str(self.type))


@dataclass(frozen=True)
class Operation:
    """An operation of a Neuron model.

    Attributes:
        code: Number of the operation in NeuronAdapter.h.
        inputs: Numbers of its operands.
        outputs: Numbers of its results.
    """

    code: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class NeuronModel:
    """A model as MediaTek's plug-in spelled it.

    Attributes:
        operands: Its operands by number.
        operations: Its operations in order.
        inputs: Numbers of the operands that it takes.
        outputs: Numbers of the operands that it gives.
    """

    operands: tuple[Operand, ...]
    operations: tuple[Operation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def parse(text: str) -> tuple[NeuronModel, ...]:
    """Read a record.

    Args:
        text: The lines that the stand-in has written.

    Raises:
        ExportError: A line is none of the stand-in's, or a model was not finished.
    """
    models: list[NeuronModel] = []
    lines: list[list[str]] | None = None
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["model"]:
            lines = []
        elif words[:1] == ["finish"] and lines is not None:
            models.append(_model(lines))
            lines = None
        elif lines is not None:
            lines.append(words)
        else:
            raise ExportError(f"the record of Neuron calls has {line!r} outside of a model", "report this model")
    if lines is not None:
        raise ExportError(
            "MediaTek's plug-in has begun a Neuron model and not finished it", "see what it says of the file"
        )
    return tuple(models)


def _model(lines: Sequence[list[str]]) -> NeuronModel:
    operands: list[dict[str, object]] = []
    operations: list[Operation] = []
    borders: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    for words in lines:
        try:
            match words:
                case ["operand", _, code, scale, zero_point, "sizes", *sizes]:
                    operands.append(
                        {
                            "type": int(code),
                            "sizes": tuple(map(int, sizes)),
                            "scale": float(scale),
                            "zero_point": int(zero_point),
                        }
                    )
                case ["channels", number, axis, *scales]:
                    operands[int(number)] |= {"channel_scales": tuple(map(float, scales)), "channel_axis": int(axis)}
                case ["value", number, _, crc]:
                    operands[int(number)] |= {"crc": int(crc)}
                case ["operation", code, "inputs", *rest]:
                    operations.append(Operation(int(code), *_borders(rest)))
                case ["borders", "inputs", *rest]:
                    borders = _borders(rest)
                case _:
                    raise ValueError
        except (ValueError, IndexError):
            raise ExportError(
                f"the record of Neuron calls has a line that none of them writes ({' '.join(words)[:80]})",
                "report this model",
            ) from None
    return NeuronModel(
        tuple(Operand(**fields) for fields in operands),  # type: ignore[arg-type]
        tuple(operations),
        *borders,
    )


def _borders(words: list[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    cut = words.index("outputs")
    return tuple(map(int, words[:cut])), tuple(map(int, words[cut + 1 :]))
