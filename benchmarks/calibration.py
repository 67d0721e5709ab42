"""Calibration against a plain float forward pass over the same batches, and torch.ao's calibration.

    python benchmarks/calibration.py [--observers histogram] [--size 128] [--batch 16] [--batches 8] [--rounds 5]
                                     [--json FILE] [NETWORK ...]

All run in this process, in interleaved rounds, with the same weights (random, seeded), batches and memory format.
`qat.calibrate` is timed as a whole: checks, batches, choosing the ranges (also shown apart), weights. torch.ao's FX
calibration has HistogramObserver for activations and per-channel min-max for weights; its time is the batches and the
choice of the ranges. Numbers are medians over the rounds of each round's ratio to the float pass; the milliseconds are
the machine's.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qat
from qat import native
from qat.graph.prepared import PreparedModel
from qat.torchvision import import_torchvision


def images(count: int, batch: int, size: int) -> list[Tensor]:
    """Batches of smooth noise, channels_last, of about the statistics of normalized photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, batch, 3, size // 8, size // 8, generator=generator)
    return [
        nn.functional.interpolate(x, size=size, mode="bilinear").contiguous(memory_format=torch.channels_last)
        for x in coarse
    ]


def build(name: str, batches: list[Tensor]) -> nn.Module:
    """Return a network whose batch norms know the statistics of the images, as a trained one's would."""
    torch.manual_seed(0)
    model: nn.Module = getattr(import_torchvision("models"), name)(weights=None).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(batches[0])
    return model.eval()


def torch_ao(model: nn.Module, example: Tensor) -> tuple[nn.Module, list[Any]]:
    """Return the model with histogram observers, and these."""
    from torch.ao import quantization
    from torch.ao.quantization.quantize_fx import prepare_fx

    config = quantization.QConfig(
        activation=quantization.HistogramObserver.with_args(reduce_range=False),
        weight=quantization.PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric),
    )
    prepared = prepare_fx(
        copy.deepcopy(model), quantization.QConfigMapping().set_global(config), example_inputs=(example,)
    )
    return prepared, [m for m in prepared.modules() if isinstance(m, quantization.HistogramObserver)]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run_all(model: nn.Module, batches: list[Tensor]) -> None:
    with torch.no_grad():
        for x in batches:
            model(x)


def choose_ranges(qmodel: PreparedModel) -> None:
    for quantizer in qmodel.activation_quantizers().values():
        quantizer.finish()


def prepared(model: nn.Module, example: Tensor, observer: str) -> PreparedModel:
    scheme = {"activations": {"observer": {"name": observer}}}
    return qat.prepare(model, (example,), target=qat.load_target("arm-cpu"), scheme=scheme)


def measure(name: str, batches: list[Tensor], rounds: int, observers: list[str]) -> dict[str, Any]:
    model = build(name, batches)
    qmodels = {observer: prepared(model, batches[0], observer) for observer in observers}
    ours = [key for observer in observers for key in (f"qat {observer}", f"{observer}: ranges")]
    times: dict[str, list[float]] = {key: [] for key in ("float", *ours, "torch.ao")}
    for turn in range(rounds + 1):
        peer, peers = torch_ao(model, batches[0])

        def torch_ao_calibration(peer: nn.Module = peer, peers: list[Any] = peers) -> None:
            run_all(peer, batches)
            for observer in peers:
                observer.calculate_qparams()

        calls: dict[str, Callable[[], object]] = {
            "float": lambda: run_all(model, batches),
            "torch.ao": torch_ao_calibration,
        }
        for observer, qmodel in qmodels.items():
            calls[f"qat {observer}"] = lambda q=qmodel: qat.calibrate(q, batches, progress=False)
            calls[f"{observer}: ranges"] = lambda q=qmodel: choose_ranges(q)
        for key, call in calls.items():
            elapsed = seconds(call)
            if turn > 0:  # the first round warms up
                times[key].append(elapsed)
    ratios = {
        key: statistics.median(a / b for a, b in zip(values, times["float"], strict=True))
        for key, values in times.items()
    }
    return {
        "network": name,
        "milliseconds": {key: 1e3 * statistics.median(values) for key, values in times.items()},
        "ratio to float": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["mobilenet_v2", "resnet18"])
    parser.add_argument("--observers", nargs="+", default=["histogram"], help="of activations")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    batches = images(options.batches, options.batch, options.size)
    print(f"native: {native.status()}; {options.batches} batches of {options.batch} at {options.size} x {options.size}")
    print(f"{'network':16}{'':24}{'ms':>10}{'/ float':>10}")
    results = []
    for name in options.networks:
        result = measure(name, batches, options.rounds, options.observers)
        results.append(result)
        for key, value in result["milliseconds"].items():
            print(f"{name:16}{key:24}{value:10.1f}{result['ratio to float'][key]:10.2f}")
    if options.json:
        setting = {key: getattr(options, key) for key in ("size", "batch", "batches", "rounds", "threads")}
        options.json.write_text(json.dumps({"isa": native.status().isa, **setting, "results": results}, indent=1))


if __name__ == "__main__":
    main()
