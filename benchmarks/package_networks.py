"""Packages of networks for every family of devices, executed in every runtime that is here: one row each.

    QAT_DATA=... python benchmarks/package_networks.py [--targets NAME ...] [--size 224] [--golden N] [--limit N]
                                                       [NETWORK ...]

For each: the share of multiply-accumulates in integers, the largest difference from the simulation in codes, the share
of equal codes, the size of the artifact, and the time of the execution (loading included) in passes of the float model
over as many images, on one thread. Networks whose weights are in QAT_DATA (see `pretrained_accuracy.py`) also get top-1
of the float model, the simulation, ONNX Runtime and LiteRT on the same images; the others have random weights with
batch norm statistics of the images, so they tell of coverage and exactness alone. Prints Markdown tables.
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
from torch import Tensor, nn
from torchvision_networks import build, load_images

import qat
from qat.errors import QatError
from qat.export.runtime import session
from qat.export.tflite.runtime import Runtime
from qat.packages.executor import Check
from qat.packages.files import ONNX, TFLITE
from qat.packages.kinds import by_kind
from qat.torchvision import import_torchvision

NETWORKS = (
    "mobilenet_v2", "resnet18", "mobilenet_v3_small", "squeezenet1_1", "efficientnet_b0", "vit_ti_16",
)  # fmt: skip
#: networks with trained weights, by the name of their torchvision class here
TRAINED = {"mobilenet_v2": "mobilenet_v2_tin200", "squeezenet1_1": "squeezenet1_1"}
TARGETS = ("arm-cpu", "hexagon-v68", "hexagon-v73", "apu")


def network(name: str, size: int, count: int, limit: int | None, data: Path) -> tuple[nn.Module, Tensor, Any]:
    """Return a model, calibration images and how it is scored, None without weights."""
    if name in TRAINED and size == 224:
        task = load_reference(data, limit).TASKS[TRAINED[name]]
        return task.model().eval(), torch.cat(list(task.calib(32)))[:count], task.score
    images = load_images(data / "imagenet-sample" / "calib", count)
    if size != 224:
        images = nn.functional.interpolate(images, size=size, mode="bilinear", antialias=True)
    return (tiny_vit(size) if name == "vit_ti_16" else build(name, images)), images, None


def tiny_vit(size: int) -> nn.Module:
    """Return ViT-Ti/16 (Touvron et al. 2021: 12 blocks, 192 wide, 3 heads), which torchvision has no name for."""
    torch.manual_seed(0)
    made: nn.Module = import_torchvision("models").VisionTransformer(size, 16, 12, 3, 192, 768)
    nn.init.trunc_normal_(made.heads.head.weight, std=0.02)
    return made.eval()


def by_onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    """A classifier that runs a file in ONNX Runtime, image by image."""
    runtime = session(str(path), 1)
    name = runtime.get_inputs()[0].name
    return lambda x: torch.cat([torch.from_numpy(runtime.run(None, {name: row[None].numpy()})[0]) for row in x])


def by_litert(path: Path) -> Callable[[Tensor], Tensor]:
    """A classifier that runs a file in LiteRT's default kernels, image by image."""
    runtime = Runtime(path.read_bytes(), "default")

    def run(x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(np.concatenate([runtime.run([row[None]])[0].copy() for row in rows]))

    return run


def top1(score: Any, model: Callable[[Tensor], Tensor]) -> str:
    """Top-1 over all images, in percent."""
    metrics = score(model)
    return f"{float((metrics.get('all') or next(iter(metrics.values())))['top1']):.2f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--size", type=int, default=224, help="of the images; trained networks need 224")
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--golden", type=int, default=2)
    parser.add_argument("--limit", type=int, help="score evenly spaced images only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ["QAT_DATA"])
    warnings.simplefilter("ignore")
    print("| network | targets | integer MACs | artifact, MB | executed in | codes apart | equal | time, ÷ float |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    scores: list[str] = []
    for name in args.networks:
        model, images, score = network(name, args.size, args.calibration, args.limit, data)
        start = time.perf_counter()
        with torch.no_grad():
            for row in images[:8]:
                model(row[None])
        passing = (time.perf_counter() - start) / 8
        points = {"float": top1(score, model)} if score else {}
        for names in by_kind(args.targets).values():
            with tempfile.TemporaryDirectory() as folder:
                points |= package(name, names, model, images, passing, args.golden, score, Path(folder) / "p")
        if points:
            scores.append(f"| {name} | " + " | ".join(f"{k} {v}" for k, v in points.items()) + " |")
    print("\nTop-1 on the same images:\n")
    for line in scores:
        print(line)


def package(
    name: str,
    targets: tuple[str, ...],
    model: nn.Module,
    images: Tensor,
    passing: float,
    golden: int,
    score: Any,
    folder: Path,
) -> dict[str, str]:
    """Make a package, print its rows, and return the top-1 of what it holds."""
    title = ", ".join(targets)
    qmodel = qat.prepare(model, images[:2], target=qat.load_target(*targets))
    qat.calibrate(qmodel, list(images.split(16)), progress=False)
    began = [time.perf_counter()]
    spent: list[float] = []

    def say(check: Check) -> None:
        spent.append(time.perf_counter() - began[0])
        began[0] = time.perf_counter()

    began[0] = time.perf_counter()
    share = f"{100 * qmodel.plan.integer_share:.2f} %"
    try:
        made = qat.package(qmodel, targets, folder, golden=golden, say=say)
    except QatError as error:
        print(f"| {name} | {title} | {share} | | {str(error)[:200]} | | | |", flush=True)
        return {}
    for check, seconds in zip(made.manifest.checks, spent, strict=True):
        # a context binary is beside its wrapper
        files = (folder / check.artifact).parent.glob("*") if "/" in check.artifact else [folder / check.artifact]
        size = sum(file.stat().st_size for file in files) / 1e6
        if check.status == "not run":
            cells = f"not run: {check.notes[0]} | | |"
        elif check.outputs:
            apart = max(output.max_difference for output in check.outputs)
            equal = min(output.equal_share for output in check.outputs)
            cells = f"{apart:g} | {100 * equal:.2f} % | {seconds / max(check.samples, 1) / passing:.1f} |"
        else:
            cells = f"{check.status}: {'; '.join(check.notes)[:160]} | | |"
        where = check.runtime or check.executor
        print(f"| {name} | {title} | {share} | {check.artifact} {size:.1f} | {where} | {cells}", flush=True)
    for path, cause in made.manifest.omitted.items():
        print(f"| {name} | {title} | {share} | {path} | left out: {cause[:160]} | | | |", flush=True)
    if score is None:
        return {}
    points = {f"simulation ({made.manifest.kind})": top1(score, qat.convert(qmodel))}
    for file, runner in ((ONNX, by_onnxruntime), (TFLITE, by_litert)):
        if (folder / file).is_file() and made.manifest.kind == "arm-cpu":
            points[file] = top1(score, runner(folder / file))
    return points


if __name__ == "__main__":
    main()
