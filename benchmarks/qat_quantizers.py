"""A training step of each quantizer against a float one: time and peak memory.

Every variant trains the same network on the same batch, in channels_last: forward, loss, backward, SGD with momentum,
at 4 bits. All run in this process, in interleaved rounds; the numbers are medians, and the ratios, each of one round,
count. With one thread the time is the processor's, which other processes disturb less. Peak memory is that of a child
process a variant, above what it holds before its first step, as in qat_step.py.

    python benchmarks/qat_quantizers.py [--network resnet18] [--batch 16] [--size 128] [--threads 2] [--rounds 7]
                                        [--only static lsq] [--no-memory] [--json FILE]
"""

from __future__ import annotations

import argparse
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
from torch.nn import functional as F

import qat
from qat import native
from qat.torchvision import import_torchvision

Step = Callable[[], float]
BASE = "float"
#: quantizers of activations and of weights, and whether oscillations are tracked
VARIANTS: dict[str, tuple[Any, Any, bool] | None] = {
    BASE: None,
    "static": ("static", "static", False),
    "lsq": ("lsq", "lsq", False),
    "lsq_plus": ("lsq_plus", "lsq_plus", False),
    "pact, dorefa weights": ("pact", "dorefa", False),
    "dorefa": ("dorefa", "dorefa", False),
    "tqt": ("tqt", "tqt", False),
    "ulq": ("ulq", "ulq", False),
    "qdrop": ("qdrop", "static", False),
    "lsq, frozen": ("lsq", "lsq", False),
    "lsq, oscillations": ("lsq", "lsq", True),
}


def make_step(network: str, variant: str, args: argparse.Namespace) -> Step:
    """Return a function that trains one step and returns the loss."""
    torch.manual_seed(0)
    model = getattr(import_torchvision("models"), network)(num_classes=10)
    images, labels = torch.randn(args.batch, 3, args.size, args.size), torch.randint(0, 10, (args.batch,))
    choice = VARIANTS[variant]
    tracker = None
    if choice is not None:
        activations, weights, tracked = choice
        scheme = {
            "activations": {"qmax": 15, "quantizer": activations},
            "weights": {"dtype": "int4", "quantizer": weights},
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            qmodel = qat.prepare(model.eval(), images, target=qat.load_target("onnxruntime-cpu"), scheme=scheme)
            qat.calibrate(qmodel, [images], progress=False)
        qmodel.set_phase("quantize" if variant.endswith("frozen") else "track")
        tracker = qat.OscillationTracker(qmodel, freeze=0.1) if tracked else None
        model = qmodel
    model = model.train().to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    learned = dict(model.quantizer_parameters()) if choice is not None else {}
    groups: list[dict[str, Any]] = [{"params": [p for n, p in model.named_parameters() if n not in learned]}]
    if learned:
        # nobody trained the network: at the rate of the weights its grids would collapse within a step
        groups.append({"params": list(learned.values()), "lr": 1e-6})
    optimizer = torch.optim.SGD(groups, lr=0.001, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        decay = model.quantizer_loss() if choice is not None else None
        (loss if decay is None else loss + decay).backward()
        optimizer.step()
        if tracker is not None:
            tracker.step_end(model)
        return float(loss.detach())

    return step


def peak(variant: str, args: argparse.Namespace) -> float:
    """Return by how many MiB a process grows beyond its size before the first step, at most, in three steps."""
    command = [sys.executable, __file__, "--network", args.network, "--child", variant]
    command += ["--batch", str(args.batch), "--size", str(args.size), "--threads", str(args.threads)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(answer.stdout.split()[-1])


def child(variant: str, args: argparse.Namespace) -> None:
    """Print the growth of this process, on Linux: its peak counts from before the first step on."""
    step = make_step(args.network, variant, args)
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=[v for v in VARIANTS if v != BASE], help="besides float")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        child(args.child, args)
        return
    print(f"torch {torch.__version__}, native: {native.status()}, {args.threads} threads")
    print(f"{args.network}, batch {args.batch}, {args.size}²\n")
    variants = [v for v in VARIANTS if v == BASE or not args.only or v in args.only]
    steps = {variant: make_step(args.network, variant, args) for variant in variants}
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    clock = time.process_time if args.threads == 1 else time.perf_counter
    for turn in range(args.rounds + 1):
        for variant, step in steps.items():
            start = clock()
            step()
            if turn:  # the first one warms up
                times[variant].append(1e3 * (clock() - start))
    del steps
    ratios = {
        variant: statistics.median(mine / base for mine, base in zip(found, times[BASE], strict=True))
        for variant, found in times.items()
    }
    growth = {} if args.no_memory else {variant: peak(variant, args) for variant in variants}
    print("| quantizer | ms | ÷ float | peak memory ÷ float |\n| --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    for variant, ratio in ratios.items():
        ms = statistics.median(times[variant])
        memory = growth[variant] / growth[BASE] if growth else None
        rows.append({"quantizer": variant, "ms": ms, "ratio": ratio, "memory_ratio": memory})
        shown = "" if memory is None else f"{memory:.2f}"
        print(f"| {variant} | {ms:.1f} | {ratio:.2f} | {shown} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
