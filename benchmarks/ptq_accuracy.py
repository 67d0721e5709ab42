"""Post-training quantization of pretrained networks, method by method, on the same images.

    QAT_DATA=... python benchmarks/ptq_accuracy.py [--limit N] [--images N] [--bits w8a8 w4a8 w4a4] [--json FILE]
                                                   [--observers NAME ...] [--weights NAME ...]
                                                   [--recipes default best] [--peers] [NETWORK ...]

QAT_DATA names a folder with `reference.py` (see `pretrained_accuracy.py`). Every network gets the same recipes:

    observer    calibration with one observer of activations
    weights     calibration with one observer of weights, and the default one of activations
    default     equalize, calibrate with the observer `auto`, correct_bias               (8-bit weights)
                equalize, calibrate with the default one, correct_bias, gptq, correct_bias  (4-bit weights)
    best        the same with reconstruct in the place of gptq: minutes in the place of seconds

Beside each: its time, conversion included, in passes of the float model over the calibration images, and the peak of
the process's memory meanwhile, above what it held before (Linux).

4-bit activations go with 8 bits at the ends of the network (`ends`). Scores are top-1 of the integer model
(`qat.convert`), whose codes ONNX Runtime gives too. With `--peers` torch.ao (FX, histogram) and
onnxruntime.quantization (MinMax, Entropy, Percentile) quantize and score in the same run.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pretrained_accuracy import load_reference
from torch import Tensor, nn

import qat
from qat.graph.prepared import PreparedModel

NETWORKS = ["mobilenet_v1_025", "squeezenet1_1", "cifar_resnet20", "ds_cnn_kws"]
TARGET = "onnxruntime-cpu"
ITERATIONS = 1000
SCHEMES: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "w8a8 per tensor": {"weights": {"granularity": "per_tensor"}},
    "w4a8": {"weights": {"dtype": "int4"}},
    "w4a4": {"weights": {"dtype": "int4"}, "activations": {"qmin": 0, "qmax": 15}},
}
#: what `ends` makes of it
EIGHT = {"weights": {"dtype": "int8"}, "activations": {"qmin": 0, "qmax": 255}}


def top1(scores: dict[str, Any]) -> float:
    """Return the percentage over all images of a task."""
    return float(scores.get("all", next(iter(scores.values())))["top1"])


def prepare(model: nn.Module, example: Tensor, scheme: dict[str, Any], observer: str | None) -> PreparedModel:
    """Prepare a model with another observer of activations, where one is given."""
    activations = scheme.get("activations", {}) | ({"observer": observer} if observer else {})
    full = {**scheme, "activations": activations} if activations else scheme
    if "qmax" in activations:
        full["layers"] = ends(model, example)
    return qat.prepare(model, example, target=qat.load_target(TARGET), scheme=full or None)


def ends(model: nn.Module, example: Tensor) -> dict[str, Any]:
    """Return the rules for 8 bits at the ends: input, weights of the first layer, last layer and its result.

    All published results of 4-bit activations are with such ends (LSQ, BRECQ, QDrop).
    """
    qmodel = qat.prepare(model, example, target=qat.load_target(TARGET))
    weighted = [op.name for op in qmodel.opgraph.ops.values() if op.weight is not None]
    inputs = [entry.name for entry in qmodel.plan if entry.role == "input"]
    return {
        **{name: {"activations": EIGHT["activations"]} for name in inputs},
        weighted[0]: {"weights": EIGHT["weights"]},
        weighted[-1]: EIGHT,
    }


def has_four_bits(scheme: dict[str, Any]) -> bool:
    """Tell whether the weights have 4 bits."""
    return bool(scheme.get("weights", {}).get("dtype") == "int4")


def corrected(model: nn.Module, batches: list[Tensor], scheme: dict[str, Any]) -> tuple[PreparedModel, nn.Module]:
    """Equalize, calibrate and correct biases; return the float model that was equalized too."""
    qmodel = prepare(model, batches[0], scheme, None if has_four_bits(scheme) else "auto")
    qat.equalize(qmodel, batches, progress=False)
    reference = copy.deepcopy(model)
    reference.load_state_dict(qmodel.float_state_dict())
    qat.calibrate(qmodel, batches, progress=False)
    qat.correct_bias(qmodel, batches, progress=False)
    return qmodel, reference


def default(model: nn.Module, batches: list[Tensor], scheme: dict[str, Any]) -> PreparedModel:
    """Quantize by the default recipe."""
    qmodel, reference = corrected(model, batches, scheme)
    if has_four_bits(scheme):
        qat.gptq(qmodel, batches, float_model=reference, progress=False)
        qat.correct_bias(qmodel, batches, float_model=reference, progress=False)
    return qmodel


def best(model: nn.Module, batches: list[Tensor], scheme: dict[str, Any]) -> PreparedModel:
    """Quantize by block reconstruction, with learned scales of activations of 4 bits."""
    qmodel, reference = corrected(model, batches, scheme)
    rate = 1e-3 if "activations" in scheme else 0.0
    qat.reconstruct(
        qmodel, batches, iterations=ITERATIONS, scale_rate=rate, correct=True, float_model=reference, progress=False
    )
    qat.correct_bias(qmodel, batches, float_model=reference, progress=False)
    return qmodel


def weighed(model: nn.Module, batches: list[Tensor], scheme: dict[str, Any], observer: str) -> PreparedModel:
    """Calibrate with one observer of weights."""
    weights = {**scheme.get("weights", {}), "observer": observer}
    qmodel = prepare(model, batches[0], {**scheme, "weights": weights}, None)
    qat.calibrate(qmodel, batches, progress=False)
    return qmodel


def observed(model: nn.Module, batches: list[Tensor], scheme: dict[str, Any], observer: str) -> PreparedModel:
    """Calibrate with one observer."""
    qmodel = prepare(model, batches[0], scheme, observer)
    qat.calibrate(qmodel, batches, progress=False)
    return qmodel


RECIPES = {"default": default, "best": best}


def torch_ao(model: nn.Module, batches: list[Tensor], scheme: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """Quantize by torch.ao's FX mode with histograms; None for what it does not have."""
    from torch.ao import quantization as ao
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    weights = scheme.get("weights", {})
    if "activations" in scheme:
        return None
    four = {"quant_min": -8, "quant_max": 7} if weights.get("dtype") == "int4" else {}
    per_tensor = weights.get("granularity") == "per_tensor"
    kind = ao.MinMaxObserver if per_tensor else ao.PerChannelMinMaxObserver
    layout = torch.per_tensor_symmetric if per_tensor else torch.per_channel_symmetric
    config = ao.QConfig(
        # without VNNI its products of 8 bits saturate; it has 7 bits for that
        activation=ao.HistogramObserver.with_args(reduce_range=not has_vnni()),
        weight=kind.with_args(dtype=torch.qint8, qscheme=layout, **four),
    )
    prepared = prepare_fx(copy.deepcopy(model), ao.QConfigMapping().set_global(config), (batches[0],))
    with torch.no_grad():
        for x in batches:
            prepared(x)
    quantized: Callable[[Tensor], Tensor] = convert_fx(prepared)
    return quantized


def onnxruntime_static(
    model: nn.Module, batches: list[Tensor], scheme: dict[str, Any], method: str
) -> Callable[[Tensor], Tensor] | None:
    """Quantize by onnxruntime.quantization; None for what it does not have."""
    import onnxruntime as ort
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if scheme.get("weights", {}).get("dtype") == "int4" or "activations" in scheme:
        return None

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            # its histograms want batches of one size
            self.left = iter([x for x in batches if len(x) == len(batches[0])])

        def get_next(self) -> dict[str, Any] | None:
            x = next(self.left, None)
            return None if x is None else {"x": x.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("float.onnx", "ready.onnx", "quantized.onnx")]
        torch.onnx.export(
            model, (batches[0],), paths[0], input_names=["x"], dynamo=True, verbose=False,
            dynamic_shapes={next(iter(_arguments(model))): {0: torch.export.Dim("batch")}},
        )  # fmt: skip
        quant_pre_process(paths[0], paths[1])
        quantize_static(
            paths[1], paths[2], Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, per_channel=scheme.get("weights", {}).get("granularity") != "per_tensor",
            calibrate_method=CalibrationMethod[method],
        )  # fmt: skip
        options = ort.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = ort.InferenceSession(paths[2], options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.contiguous().numpy()})[0])


def has_vnni() -> bool:
    """Tell whether this processor adds products of 8 bits without saturation."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "vnni" in flags


def reset_peak() -> float:
    """Set the process's peak of memory to what it holds now, and return that, in MB; nan where the system cannot."""
    gc.collect()
    try:
        # what is free but still ours would hide what is taken next
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return float("nan")
    return peak()


def peak() -> float:
    """Return the process's peak of memory, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def _arguments(model: nn.Module) -> list[str]:
    import inspect

    return list(inspect.signature(model.forward).parameters)


def methods(
    model: nn.Module, batches: list[Tensor], scheme: dict[str, Any], args: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], Callable[[Tensor], Tensor] | None]]]:
    """Yield each method's name and how it quantizes."""
    for observer in args.observers:
        yield observer, lambda o=observer: qat.convert(observed(model, batches, scheme, o))
    for observer in args.weights:
        yield f"weights {observer}", lambda o=observer: qat.convert(weighed(model, batches, scheme, o))
    for name in args.recipes:
        yield f"{name} recipe", lambda r=RECIPES[name]: qat.convert(r(model, batches, scheme))
    if args.peers:
        yield "torch.ao FX", lambda: torch_ao(model, batches, scheme)
        for method in ("MinMax", "Entropy", "Percentile"):
            yield f"onnxruntime {method}", lambda m=method: onnxruntime_static(model, batches, scheme, m)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--limit", type=int, help="score evenly spaced files of each image set only")
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--bits", nargs="+", default=["w8a8"], choices=list(SCHEMES))
    parser.add_argument("--observers", nargs="*", default=["minmax", "histogram"])
    parser.add_argument("--weights", nargs="*", default=[], help="observers of weights")
    parser.add_argument("--recipes", nargs="*", default=["default"], choices=list(RECIPES))
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = os.environ.get("QAT_DATA")
    if not folder:
        sys.exit("QAT_DATA names no folder")
    warnings.simplefilter("ignore")
    reference = load_reference(Path(folder), args.limit)
    rows: list[dict[str, Any]] = []
    print("| network | bits | method | top-1 | drop | time, ÷ float | peak, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for network in args.networks:
        task = reference.TASKS[network]
        model = task.model().eval()
        batches = list(torch.cat(list(task.calib(32)))[: args.images].split(32))
        start = time.perf_counter()
        with torch.no_grad():
            for x in batches:
                model(x)
        passing = time.perf_counter() - start
        score = top1(task.score(model))
        print(f"| {network} | float | | {score:.2f} | | | |", flush=True)
        for bits in args.bits:
            for name, quantize in methods(model, batches, SCHEMES[bits], args):
                before, start = reset_peak(), time.perf_counter()
                try:
                    quantized = quantize()
                except Exception as error:  # noqa: BLE001 - a peer may fail in any way
                    print(f"{network}, {bits}, {name}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
                    continue
                if quantized is None:
                    continue
                seconds, memory = time.perf_counter() - start, peak() - before
                found = top1(task.score(quantized))
                rows.append(
                    {"network": network, "bits": bits, "method": name, "float": score, "top1": found,
                     "cost": seconds / passing, "peak_mb": memory}
                )  # fmt: skip
                cost = f"{seconds / passing:.1f}"
                print(
                    f"| {network} | {bits} | {name} | {found:.2f} | {score - found:+.2f} | {cost} | {memory:.0f} |",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
