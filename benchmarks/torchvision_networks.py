"""Torchvision's networks through the whole flow: what becomes integer, and how far ONNX Runtime is from the simulation.

    python benchmarks/torchvision_networks.py [--images DIR] [--samples 32] [--json FILE] [NETWORK ...]

Weights are random (seeded), batch norm statistics come from the images, so this measures coverage and exactness and not
accuracy. Images: a folder with JPEG files anywhere below it (default: `imagenet-sample/calib` below QAT_DATA).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qat
from qat.torchvision import import_torchvision

NETWORKS = (
    "mobilenet_v2", "mobilenet_v3_small", "resnet18", "resnet50", "shufflenet_v2_x1_0", "squeezenet1_1",
    "efficientnet_b0", "mnasnet1_0", "regnet_y_400mf", "densenet121", "googlenet", "convnext_tiny", "vit_b_16",
    "swin_t",
)  # fmt: skip


def load_images(folder: Path, count: int) -> Tensor:
    """Return `count` images, shape (count, 3, 224, 224), ImageNet mean and standard deviation."""
    transforms = import_torchvision("transforms")
    from PIL import Image

    prepare = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    files = sorted(folder.rglob("*.JPEG")) + sorted(folder.rglob("*.jpg"))
    if len(files) < count:
        sys.exit(f"{folder} holds {len(files)} JPEG files and {count} are needed")
    step = len(files) // count
    return torch.stack([prepare(Image.open(f).convert("RGB")) for f in files[::step][:count]])


def build(name: str, images: Tensor) -> nn.Module:
    """Return the network with seeded random weights and batch norm statistics of the images."""
    models = import_torchvision("models")
    torch.manual_seed(0)
    extra = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    model: nn.Module = getattr(models, name)(weights=None, **extra)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # a plain average over the batches
        norm.reset_running_stats()
    model.eval()
    if norms:
        for norm in norms:
            norm.train()
        with torch.no_grad():
            for batch in images.split(16):
                model(batch)
    for module in model.modules():
        # some heads start at zero (ViT): their codes would all be equal, which proves nothing
        if isinstance(module, nn.Linear) and not bool(module.weight.any()):
            nn.init.trunc_normal_(module.weight, std=0.02)
    return model.eval()


def measure(name: str, images: Tensor, samples: int, folder: Path, level: str) -> dict[str, Any]:
    """Take one network through the flow."""
    model = build(name, images)
    start = time.perf_counter()
    target = qat.load_target("onnxruntime-cpu")
    prepared = qat.prepare(model, images[:2], target=target)
    qat.calibrate(prepared, images.split(8), progress=False)
    seconds_ready = time.perf_counter() - start
    compared = images[-samples:].split(8)
    result = qat.export_onnx(
        prepared, folder / f"{name}.onnx", samples=compared, verify=level, bound=255.0, unequal_share=None
    )
    assert result.verification is not None
    output = result.verification.tensors[0]
    comparison = qat.compare(model, prepared, [images[-samples:]], progress=False)
    return {
        "network": name,
        "macs": prepared.plan.macs,
        "integer_share": prepared.plan.integer_share,
        "left_float": [[e.name, e.kind, e.reason] for e in prepared.plan.left_float()],
        "samples": samples,
        "max_difference": output.max_difference,
        "equal_share": 1.0 - output.unequal_share,
        "codes": output.count,
        "worst_tensor": [result.verification.worst.name, result.verification.worst.max_difference],
        "sqnr_db": comparison.output_sqnr_db,
        "seconds_prepare_calibrate": seconds_ready,
        "seconds_all": time.perf_counter() - start,
    }


def main() -> None:
    """Measure, print one row a network, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("QAT_DATA", "../shared/data")) / "imagenet-sample" / "calib"
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--images", type=Path, default=default)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--layers", action="store_true", help="compare every quantized tensor (slower)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    images = load_images(args.images, args.calibration + args.samples)
    rows = []
    print("| network | MACs (M) | integer | left float | max difference (codes) | codes equal | SQNR (dB) | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            row = measure(name, images, args.samples, Path(folder), "layers" if args.layers else "outputs")
            rows.append(row)
            floats = "; ".join(f"{n} ({k}): {r}" for n, k, r in row["left_float"]) or "none"
            cells = (
                name, f"{row['macs'] / 1e6:.0f}", f"{100 * row['integer_share']:.2f} %", floats,
                f"{row['max_difference']:g}", f"{100 * row['equal_share']:.3f} %", f"{row['sqnr_db']:.1f}",
                f"{row['seconds_all']:.0f}",
            )  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
