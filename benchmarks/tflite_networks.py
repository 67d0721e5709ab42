"""Trained networks as `.tflite` files on real data: LiteRT's reference kernels, its default ones, and the accuracy.

    QAT_DATA=... python benchmarks/tflite_networks.py [NETWORK ...] [--compared N] [--calibration N] [--limit N]

For each network: the largest difference and the share of unequal codes of the output from the simulation, in the
reference kernels and in the default ones (XNNPACK), and top-1 of the float model, of the `onnx` and the `tflite`
profile and of the default kernels on the same images. Prints a Markdown table. QAT_DATA is that of
`pretrained_accuracy.py`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrained_accuracy import load_reference
from torch import Tensor

import qat
from qat.export.tflite.runtime import Runtime

NETWORKS = ("cifar_resnet20", "ds_cnn_kws", "mobilenet_v1_025", "squeezenet1_1", "mobilenet_v2_tin200")


def default_kernels(path: Path) -> Callable[[Tensor], Tensor]:
    """A classifier that runs the file in LiteRT's default kernels, image by image."""
    runtime = Runtime(path.read_bytes(), "default")

    def run(x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(np.concatenate([runtime.run([row[None]])[0].copy() for row in rows]))

    return run


def top1(metrics: Any) -> tuple[float, int]:
    """Top-1 in percent and the number of images, of what a task's `score` returns."""
    found = metrics.get("all") or next(iter(metrics.values()))
    return float(found["top1"]), int(found["n"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--compared", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    tasks = load_reference(Path(os.environ["QAT_DATA"]), options.limit).TASKS
    print("| network | operators | reference | default | n | float | onnx | tflite | default, top-1 | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.networks:
        start, task = time.perf_counter(), tasks[name]
        batches = [batch for _, batch in zip(range(max(options.calibration // 32, 1)), task.calib(32), strict=False)]
        model = task.model()
        qmodel = qat.prepare(model, batches[0], target=qat.load_target("arm-cpu"))
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            qat.calibrate(qmodel, batches)
            path = Path(folder) / "m.tflite"
            result = qat.export_tflite(qmodel, path, samples=[batches[0][: options.compared]], verify="layers")
            assert result.verification is not None
            assert result.default is not None
            runs = (model, qat.convert(qmodel, "onnx"), qat.convert(qmodel, "tflite"), default_kernels(path))
            scores = [top1(task.score(run)) for run in runs]
        cells = [
            f"{v.worst.max_difference:g} codes, {100 * v.worst.unequal_share:.2f} %"
            for v in (result.verification, result.default)
        ]
        points = " | ".join(f"{score:.2f}" for score, _ in scores)
        seconds = time.perf_counter() - start
        print(
            f"| {name} | {len(result.operators)} | {' | '.join(cells)} | {scores[0][1]} | {points} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
