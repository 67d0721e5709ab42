"""A training step of quantization-aware training against a float one: time and peak memory.

Every variant trains the same network on the same batch: forward, loss, backward, SGD with momentum. Each is timed in
both memory formats and counts with its better one. All run in this process, in interleaved rounds; the numbers are
medians, the ratios count. Peak memory is that of a child process a variant, above what it holds before its first step.

    python benchmarks/qat_step.py [--networks mobilenet_v2 resnet18] [--batch 16] [--size 128] [--threads 2]
                                  [--rounds 9] [--compile] [--json FILE]

torch.ao is measured as it stands in torch, Brevitas where it is installed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import qat
from qat import native
from qat.torchvision import import_torchvision

Step = Callable[[], float]
BASE = "float"


def _qat(model: nn.Module, images: torch.Tensor, fused: bool) -> nn.Module:
    qmodel = qat.prepare(model.eval(), images, target=qat.load_target("arm-cpu"), fused=fused)
    qat.calibrate(qmodel, [images], progress=False)
    qmodel.set_phase("track")
    return qmodel


def _torch_ao(model: nn.Module, images: torch.Tensor) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), images)


def _brevitas(model: nn.Module, images: torch.Tensor) -> nn.Module:
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    quantized: nn.Module = quantize(preprocess_for_quantize(model.eval()))
    quantized.eval()(images)
    return quantized


VARIANTS: dict[str, Callable[[nn.Module, torch.Tensor], nn.Module]] = {
    BASE: lambda model, images: model,
    "qat": lambda model, images: _qat(model, images, True),
    "qat, not fused": lambda model, images: _qat(model, images, False),
    "torch.ao FX": _torch_ao,
    "Brevitas": _brevitas,
}


def make_step(network: str, variant: str, channels_last: bool, args: argparse.Namespace) -> Step:
    """Return a function that trains one step and returns the loss."""
    torch.manual_seed(0)
    model = getattr(import_torchvision("models"), network)(num_classes=10)
    images, labels = torch.randn(args.batch, 3, args.size, args.size), torch.randint(0, 10, (args.batch,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = VARIANTS[variant](copy.deepcopy(model), images).train()
    if channels_last:
        trained = trained.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01, momentum=0.9)
    run: Any = torch.compile(trained) if args.compile else trained

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def peak(network: str, variant: str, args: argparse.Namespace) -> float:
    """Return by how many MiB a process grows beyond its size before the first step, at most, in three steps."""
    command = [sys.executable, __file__, "--networks", network, "--child", variant]
    command += ["--batch", str(args.batch), "--size", str(args.size), "--threads", str(args.threads)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(answer.stdout.split()[-1])


def child(network: str, variant: str, args: argparse.Namespace) -> None:
    """Print the growth of this process, on Linux: its peak counts from before the first step on."""
    step = make_step(network, variant, True, args)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(3):
        step()
    print((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    """Return a line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def measure(network: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all variants of a network."""
    steps: dict[tuple[str, bool], Step] = {}
    for variant in VARIANTS:
        if args.compile and variant not in (BASE, "qat"):
            continue
        try:
            for channels_last in (False, True):
                steps[variant, channels_last] = make_step(network, variant, channels_last, args)
        except ImportError as error:
            print(f"{variant}: skipped, {error}", file=sys.stderr)
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in steps}
    for turn in range(args.rounds + 2):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:  # the first ones warm up
                times[key].append(1e3 * (time.perf_counter() - start))
    best = {v: min(statistics.median(times[v, c]) for c in (False, True)) for v, _ in steps}
    growth = {v: peak(network, v, args) for v in best if v in (BASE, "qat")} if not args.compile else {}
    return [
        {
            "network": network, "variant": variant, "ms": round(ms, 1), "ratio": round(ms / best[BASE], 3),
            "memory_ratio": round(growth[variant] / growth[BASE], 3) if variant in growth else None,
        }
        for variant, ms in best.items()
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v2", "resnet18"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="torch.compile on float and qat")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        child(args.networks[0], args.child, args)
        return
    print(f"torch {torch.__version__}, native: {native.status()}, {args.threads} threads")
    print(f"batch {args.batch}, {args.size}²\n")
    print("| network | step | ms | ÷ float | peak memory ÷ float |\n| --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    for network in args.networks:
        for row in measure(network, args):
            rows.append(row)
            memory = "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
            print(f"| {network} | {row['variant']} | {row['ms']:.1f} | {row['ratio']:.2f} | {memory} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
