"""`compare`: a quantized model beside its float original, tensor by tensor and answer by answer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.errors import DataError
from qat.graph.batches import first_samples, model_inputs, sample_count
from qat.graph.prepared import QUANTIZERS, PreparedModel
from qat.quantizers import FLOAT, QUANTIZE, FakeQuantize


@dataclass(frozen=True)
class TensorComparison:
    """How far one activation is from its float original.

    Attributes:
        name: Tensor name.
        dtype: Integer type.
        sqnr_db: Signal to quantization noise ratio in dB, the error of all layers before included.
        cosine: Cosine similarity of all elements.
        saturated: Share of float elements outside the range that has codes.
        max_error: Largest absolute error.
    """

    name: str
    dtype: str
    sqnr_db: float
    cosine: float
    saturated: float
    max_error: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`; prints as a table.

    Attributes:
        samples: Number of samples.
        tensors: One row per quantized activation, in execution order.
        top1_agreement: Share of samples with the same largest output, or None where the output is no class score.
        top5_agreement: Share of samples whose float top-1 is within the quantized top-5, or None.
        output_sqnr_db: SQNR of the first output in dB.
    """

    samples: int
    tensors: tuple[TensorComparison, ...]
    top1_agreement: float | None
    top5_agreement: float | None
    output_sqnr_db: float

    def worst(self, count: int = 5) -> tuple[TensorComparison, ...]:
        """The tensors with the lowest SQNR."""
        return tuple(sorted(self.tensors, key=lambda t: t.sqnr_db)[:count])

    def __str__(self) -> str:
        header = ("tensor", "dtype", "SQNR dB", "cosine", "saturated", "max error")
        rows = [header] + [
            (t.name, t.dtype, f"{t.sqnr_db:.1f}", f"{t.cosine:.5f}", f"{100 * t.saturated:.3f} %", f"{t.max_error:.4g}")
            for t in self.tensors
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        tail = f"{self.samples} samples, output SQNR {self.output_sqnr_db:.1f} dB"
        if self.top1_agreement is not None and self.top5_agreement is not None:
            tail += (
                f", top-1 agreement {100 * self.top1_agreement:.2f} %, float top-1 within top-5"
                f" {100 * self.top5_agreement:.2f} %"
            )
        return "\n".join([*lines, "", tail])

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of the comparison."""
        return asdict(self)


class _Errors:
    """Running sums of one tensor."""

    def __init__(self) -> None:
        self.signal = self.noise = self.other = self.dot = 0.0
        self.outside = self.count = 0
        self.largest = 0.0

    def add(self, reference: Tensor, actual: Tensor, low: float = -math.inf, high: float = math.inf) -> None:
        r, a = reference.double(), actual.double()
        error = a - r
        self.signal += float((r * r).sum())
        self.other += float((a * a).sum())
        self.noise += float((error * error).sum())
        self.dot += float((r * a).sum())
        self.outside += int(((r < low) | (r > high)).sum())
        self.count += r.numel()
        self.largest = max(self.largest, float(error.abs().max()) if r.numel() else 0.0)

    @property
    def sqnr(self) -> float:
        if self.noise == 0.0:
            return math.inf
        return 10.0 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        norm = math.sqrt(self.signal * self.other)
        return self.dot / norm if norm else 1.0


def compare(
    model: nn.Module,
    qmodel: PreparedModel,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Compare a prepared model in fake quantization with the float model, on data.

    Args:
        model: The float model.
        qmodel: The calibrated or trained model; it is left as it was.
        batches: As for `calibrate`.
        samples: Stop after this many samples; None for all.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        CheckpointError: `model` is not the model that `qmodel` was made of.
        StateError: `qmodel` was not calibrated.
        DataError: No batch, or one that does not fit.
    """
    reference = copy.deepcopy(qmodel).eval()
    reference.load_float_state_dict(model.state_dict())
    reference.set_phase(FLOAT)
    actual = copy.deepcopy(qmodel).eval()
    actual.set_phase(QUANTIZE)
    encodings = actual.encodings()
    sites = _sites(qmodel)
    rows = {name: _Errors() for names in sites.values() for name in names}
    output, seen, same1, same5, scored = _Errors(), 0, 0, 0, 0
    float_values, codes = _Recorder(reference, sites, inputs=True), _Recorder(actual, sites, inputs=False)
    bar = tqdm(batches, desc="compare", unit="batch", leave=False, disable=None if progress is None else not progress)
    with torch.no_grad():
        for batch in bar:
            inputs = model_inputs(qmodel, batch)
            if samples is not None:
                inputs = first_samples(qmodel, inputs, samples - seen)
            want, have = _first_tensor(reference(*inputs)), _first_tensor(actual(*inputs))
            for name, value in float_values.take().items():
                low, high = encodings[name].representable()
                rows[name].add(value, codes.values[name], low, high)
            codes.take()
            output.add(want, have)
            if want.dim() == 2 and want.shape[1] > 1:
                best = want.argmax(1)
                top = have.topk(min(5, have.shape[1]), 1).indices
                # codes tie where floats do not: argmax, unlike topk, then says which one a user would get
                same1 += int((have.argmax(1) == best).sum())
                same5 += int((top == best[:, None]).any(1).sum())
                scored += len(best)
            seen += sample_count(qmodel, inputs)
            if samples is not None and seen >= samples:
                break
    if not seen:
        raise DataError("no data to compare on", "give at least one batch")
    return Comparison(
        samples=seen,
        tensors=tuple(
            TensorComparison(name, encodings[name].dtype, e.sqnr, e.cosine, e.outside / max(e.count, 1), e.largest)
            for name, e in rows.items()
        ),
        top1_agreement=same1 / scored if scored else None,
        top5_agreement=same5 / scored if scored else None,
        output_sqnr_db=output.sqnr,
    )


def _sites(qmodel: PreparedModel) -> dict[str, list[str]]:
    """Names that each quantizer module quantizes, in the order of its calls."""
    sites: dict[str, list[str]] = {}
    for node in qmodel.graph.nodes:
        if node.meta.get("quantizes") is not None:
            sites.setdefault(str(node.target).removeprefix(QUANTIZERS + "."), []).append(node.meta["quantizes"])
    return sites


class _Recorder:
    """Keeps what goes into, or comes out of, every quantizer of a model during one forward pass."""

    def __init__(self, qmodel: PreparedModel, sites: dict[str, list[str]], *, inputs: bool) -> None:
        self.values: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        for key, names in sites.items():
            module = qmodel.quantizers[key]
            module.register_forward_hook(self._hook(key, names, inputs))

    def _hook(self, key: str, names: list[str], inputs: bool) -> Any:
        def hook(module: FakeQuantize, args: tuple[Tensor, ...], result: Tensor) -> None:
            call = self._calls.get(key, 0)
            self._calls[key] = call + 1
            self.values[names[call]] = (args[0] if inputs else result).detach()

        return hook

    def take(self) -> dict[str, Tensor]:
        """Return what was recorded and forget it."""
        taken, self.values, self._calls = self.values, {}, {}
        return taken


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return _first_tensor(next(iter(values)))
