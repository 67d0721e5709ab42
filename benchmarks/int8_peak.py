"""Fraction of this machine's int8 peak that single layers reach, and what a layer of a network costs.

The peak is a loop of the multiply-accumulate instruction on registers only (vpdpbusd; without VNNI the saturating
vpmaddubsw, vpmaddwd, vpaddd), measured beside every layer, times the threads. Products are those of the convolution,
without padding of channels or tiles. The last line of a network is the time of all its layers.

    python benchmarks/int8_peak.py [--network resnet50|mobilenet_v2] [--batch 1 16] [--isa ISA] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from qat import native

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "native"))
from int8_layers import Conv, QParams

ROUNDS = 15
#: Seconds that one measurement takes at least.
SLICE = 0.005


def _resnet50() -> list[tuple[int, ...]]:
    """Distinct convolutions: inputs, outputs, kernel, stride, groups, input size, how many there are."""
    layers: list[tuple[int, ...]] = [(3, 64, 7, 2, 1, 224, 1)]
    inputs, size = 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        out = size // stride
        layers += [
            (inputs, width, 1, 1, 1, size, 1),
            (width, width, 3, stride, 1, size, 1),
            (width, width * 4, 1, 1, 1, out, blocks),
            (inputs, width * 4, 1, stride, 1, size, 1),
            (width * 4, width, 1, 1, 1, out, blocks - 1),
            (width, width, 3, 1, 1, out, blocks - 1),
        ]
        inputs, size = width * 4, out
    return [*layers, (2048, 1000, 1, 1, 1, 1, 1)]


def _mobilenet_v2() -> list[tuple[int, ...]]:
    layers: list[tuple[int, ...]] = [(3, 32, 3, 2, 1, 224, 1), (32, 32, 3, 1, 32, 112, 1), (32, 16, 1, 1, 1, 112, 1)]
    inputs, size = 16, 112
    for expand, width, blocks, stride in (
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for block in range(blocks):
            hidden, step = inputs * expand, stride if block == 0 else 1
            layers += [
                (inputs, hidden, 1, 1, 1, size, 1),
                (hidden, hidden, 3, step, hidden, size, 1),
                (hidden, width, 1, 1, 1, size // step, 1),
            ]
            inputs, size = width, size // step
    return [*layers, (320, 1280, 1, 1, 1, 7, 1), (1280, 1000, 1, 1, 1, 1, 1)]


NETWORKS = {"resnet50": _resnet50, "mobilenet_v2": _mobilenet_v2}


def _layer(shape: tuple[int, ...], batch: int) -> Conv:
    inputs, outputs, kernel, stride, groups, size, _ = shape
    return Conv(
        x=torch.randint(0, 256, (batch, size, size, inputs)),
        weight=(torch.randn(outputs, kernel, kernel, inputs // groups) * 35).round().clamp(-127, 127),
        y_grid=QParams(1.0, 100, 0, 255),
        stride=(stride, stride),
        padding=(kernel // 2,) * 4,
        groups=groups,
    )


def _measure(layer: Conv, isa: str) -> tuple[float, float]:
    """Return the seconds of one run and the products a second of one thread's peak, the best of several slices.

    Slices of the two alternate, as a shared machine's clock moves.
    """
    layer.run(isa, 1)
    repeats = max(2, int(SLICE / layer.run(isa, 2)[1]))
    seconds = peak = float("inf")
    for _ in range(ROUNDS):
        seconds = min(seconds, layer.run(isa, repeats)[1] / repeats)
        start = time.perf_counter()
        products = torch.ops.qat._int8_peak(isa, 50_000)
        peak = min(peak, (time.perf_counter() - start) / products)
    return seconds, 1 / peak


def main() -> None:
    """Measure and print one table a network and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=sorted(NETWORKS), default=sorted(NETWORKS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--isa", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not native.status().active:
        sys.exit(f"the native extension is not in use: {native.status().reason}")
    isa = torch.ops.qat._int8_isa(options.isa)
    threads = torch.get_num_threads()
    rows = []
    for network in options.network:
        for batch in options.batch:
            print(f"{network}, batch {batch}, {threads} threads, {isa}")
            print("| layer | count | us | products / peak |\n| --- | --- | --- | --- |")
            total = products_total = 0.0
            for shape in NETWORKS[network]():
                inputs, outputs, kernel, stride, groups, size, count = shape
                layer = _layer(shape, batch)
                height, width = layer.out_size
                products = batch * height * width * outputs * kernel * kernel * inputs // groups
                seconds, peak = _measure(layer, isa)
                peak *= threads
                fraction = products / seconds / peak
                name = f"{kernel}x{kernel} {inputs}-{outputs} /{stride} {size}²" + (" depthwise" if groups > 1 else "")
                print(f"| {name} | {count} | {seconds * 1e6:.1f} | {fraction:.2f} |")
                rows.append(
                    {"network": network, "batch": batch, "layer": name, "count": count, "peak_fraction": fraction}
                )
                total += count * seconds
                products_total += count * products
            print(f"| all, {total * 1e3:.2f} ms | | {total * 1e6:.0f} | {products_total / total / peak:.2f} |\n")
    if options.json:
        options.json.write_text(json.dumps({"isa": isa, "threads": threads, "layers": rows}, indent=1))


if __name__ == "__main__":
    main()
