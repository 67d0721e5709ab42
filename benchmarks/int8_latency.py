"""Latency of int8 networks, float32 images in and logits out: this project, ONNX Runtime, OpenVINO and torch.ao.

    python benchmarks/int8_latency.py [--networks mobilenet_v2 resnet50] [--batches 1 16] [--rounds 30] [--json FILE]

All peers run in this process, in interleaved rounds; a peer that is not installed is named and left
out. ONNX Runtime and OpenVINO read the file that this project exports, so the three compute the same quantized network
(ONNX Runtime twice: in the sessions of `qat.export.runtime`, which are exact, and in plain ones, which on x86 without
VNNI saturate sums). torch.ao quantizes the same model itself (FX; the table names the engine). Weights are random:
no time depends on them. Ratios are of medians, and above 1 where this project is faster. Run it with nothing else
on the machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qat
from qat import native
from qat.export import runtime
from qat.graph.prepared import PreparedModel
from qat.torchvision import import_torchvision

Call = Callable[[], object]
OURS = "qat"
SIZE = 224


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(import_torchvision("models"), name)(weights=None)
    model.train()
    with torch.no_grad():
        model(torch.randn(2, 3, SIZE, SIZE))
    return model.eval()


def quantized(model: nn.Module, folder: Path) -> tuple[PreparedModel, Path]:
    """The calibrated model and its exported file."""
    images = torch.randn(2, 3, SIZE, SIZE)
    qmodel = qat.prepare(model, images, target=qat.load_target("onnxruntime-cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [images], progress=False)
    path = folder / "model.onnx"
    qat.export_onnx(qmodel, path, samples=[images[:1]], verify="outputs", bound=255.0, unequal_share=None)
    return qmodel, path


def onnxruntime_calls(path: Path, x: Tensor, threads: int) -> dict[str, Call]:
    try:
        import onnxruntime
    except ImportError:
        print("onnxruntime is not installed: left out", file=sys.stderr)
        return {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    plain = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    sessions = {"onnxruntime": runtime.session(str(path), threads), "onnxruntime plain": plain}
    feed = {plain.get_inputs()[0].name: x.numpy()}
    return {name: lambda session=session: session.run(None, feed) for name, session in sessions.items()}


def openvino_calls(path: Path, x: Tensor, threads: int) -> dict[str, Call]:
    try:
        import openvino
    except ImportError:
        print("openvino is not installed: left out", file=sys.stderr)
        return {}
    model = openvino.Core().read_model(str(path))
    model.reshape(list(x.shape))
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    data = x.numpy()
    return {"openvino": lambda: request.infer([data], share_inputs=True, share_outputs=True)}


def torch_calls(model: nn.Module, x: Tensor) -> dict[str, Call]:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    engines = torch.backends.quantized.supported_engines
    engine = next((e for e in ("x86", "onednn", "fbgemm", "qnnpack") if e in engines), "")
    if not engine:
        print("torch has no quantized engine: left out", file=sys.stderr)
        return {}
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(engine), (x[:1],))
        prepared(x[:1])
        converted = convert_fx(prepared)
    converted(x)
    return {f"torch.ao FX ({engine})": lambda: converted(x)}


def float_calls(model: nn.Module, x: Tensor) -> dict[str, Call]:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    y = x.to(memory_format=torch.channels_last)
    return {"float32 eager": lambda: last(y)}


@torch.inference_mode()
def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 3:  # the first ones warm up
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def measure(name: str, batches: list[int], rounds: int, threads: int) -> list[dict[str, Any]]:
    model = model_of(name)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        qmodel, path = quantized(model, Path(folder))
        imodel = qat.convert(qmodel)
        print(f"{name}: {imodel.native}", file=sys.stderr)
        for batch in batches:
            x = torch.randn(batch, 3, SIZE, SIZE)
            calls: dict[str, Call] = {OURS: lambda x=x: imodel(x)}
            calls |= onnxruntime_calls(path, x, threads) | openvino_calls(path, x, threads)
            calls |= torch_calls(model, x) | float_calls(model, x)
            times = interleaved(calls, max(rounds // (4 if batch > 1 else 1), 3))
            medians = {peer: statistics.median(values) for peer, values in times.items()}
            rows += [
                {
                    "network": name, "batch": batch, "peer": peer, "median_ms": medians[peer], "min_ms": min(values),
                    "ratio": medians[peer] / medians[OURS], "ratio_of_min": min(values) / min(times[OURS]),
                }
                for peer, values in times.items()
            ]  # fmt: skip
    return rows


def main() -> None:
    """Measure, print one table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v2", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=40, help="at batch size 1; a quarter of it above")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for name in args.networks for row in measure(name, args.batches, args.rounds, args.threads)]
    print(f"{args.threads} threads, {native.status()}")
    print("| network | batch | peer | median (ms) | min (ms) | ratio | ratio of min |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        numbers = (f"{row[key]:.2f}" for key in ("median_ms", "min_ms", "ratio", "ratio_of_min"))
        print(f"| {row['network']} | {row['batch']} | {row['peer']} | {' | '.join(numbers)} |")
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "native": str(native.status()), "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
