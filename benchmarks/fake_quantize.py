"""Fake quantization, forward and backward, and observation: native, in PyTorch, and a plain copy of the same tensor.

"apart / native" is what two operators take, one that observes and one that quantizes, over the one that does both.
The last table has the weights of mobilenet_v2 with their batch norms, all 52 together: there the calls are what counts.

Prints one table and writes JSON. All peers run in this process, in interleaved rounds; the numbers are medians. The
ratios count, the milliseconds are the machine's. Run it with nothing else on the machine:

    python benchmarks/fake_quantize.py [--threads 2] [--rounds 30] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qat import native
from qat.observers import make_observer
from qat.quantizers import QUANTIZE, TRACK, FakeQuantize, WeightFakeQuantize, activation, learned, static, weight
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme
from qat.torchvision import import_torchvision

# the largest activations of mobilenet_v2 and a late one, batch 16 at 128 x 128
SHAPES = ((16, 96, 64, 64), (16, 144, 32, 32), (16, 960, 4, 4))


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, in changing order: a call may find in the cache what the one before it read."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffled, order = list(calls.items()), random.Random(0)
    for turn in range(rounds + 2):
        order.shuffle(shuffled)
        for name, call in shuffled:
            start = time.perf_counter()
            call()
            if turn >= 2:  # the first ones warm up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(x), x, upstream)


def pytorch(x: Tensor, grid: tuple[Tensor, Tensor, int, int], axis: int | None) -> Tensor:
    """The PyTorch path, whatever `fake_quantize` would choose."""
    from qat import numerics

    scale, zero_point, qmin, qmax = grid
    granularity = PER_TENSOR if axis is None else Granularity("per_channel", axis)
    s = numerics.expand_to(scale, x, granularity)
    z = numerics.expand_to(zero_point.to(torch.float32), x, granularity)
    out: Tensor = static._StraightThrough.apply(x, s, z, None, qmin, qmax)
    return out


def in_pytorch(call: Callable[[], object]) -> Callable[[], object]:
    """The same call with the native extension left alone."""
    modules = (activation, learned, static, weight)

    def run() -> object:
        kept = [vars(module)["is_for_native"] for module in modules]
        for module in modules:
            vars(module)["is_for_native"] = lambda *_, **__: False
        try:
            return call()
        finally:
            for module, function in zip(modules, kept, strict=True):
                vars(module)["is_for_native"] = function

    return run


def weights(rounds: int) -> dict[str, float]:
    """Milliseconds for all the weights of a network, each scaled by its batch norm."""
    layers = list(import_torchvision("models").mobilenet_v2(weights=None).modules())
    scheme = Scheme("int8", symmetric=True, granularity=Granularity("per_channel", 0))
    pairs = []
    for conv, norm in itertools.pairwise(layers):
        if isinstance(norm, torch.nn.BatchNorm2d):
            quantizer = WeightFakeQuantize(scheme, "weight", conv.weight.shape, norm)
            quantizer.set_phase(QUANTIZE)
            pairs.append((quantizer, conv.weight, torch.ones_like(conv.weight)))

    def forward() -> None:
        for quantizer, value, _ in pairs:
            quantizer(value)

    def step() -> None:
        for quantizer, value, upstream in pairs:
            torch.autograd.grad(quantizer(value), value, upstream)

    return interleaved(
        {
            "forward native": forward,
            "forward PyTorch": in_pytorch(forward),
            "forward + backward native": step,
            "forward + backward PyTorch": in_pytorch(step),
        },
        rounds,
    )


def measure(shape: tuple[int, ...], memory_format: torch.memory_format, rounds: int) -> dict[str, float]:
    x = torch.randn(shape).to(memory_format=memory_format)
    leaf, upstream, target = x.clone().requires_grad_(), torch.randn_like(x), torch.empty_like(x)
    channels = shape[1]
    one = (torch.tensor(0.03), torch.tensor(128, dtype=torch.int32), 0, 255)
    many = (torch.rand(channels) * 0.05 + 0.01, torch.full((channels,), 128, dtype=torch.int32), 0, 255)
    observer = make_observer(ObserverSpec("histogram"), PER_TENSOR, None, "x")
    ends, nonfinite = (torch.tensor(torch.inf), torch.tensor(-torch.inf)), torch.zeros((), dtype=torch.int64)
    minmax = native.Statistics(*ends, nonfinite)
    histogram = native.Statistics(*ends, nonfinite, torch.zeros(65536, dtype=torch.int64))
    observer._is_for_native = lambda _: False  # type: ignore[method-assign]
    tracking = FakeQuantize(Scheme(), "x")
    tracking.set_phase(TRACK)
    step_tracking = gradient(tracking, leaf, upstream)
    learned_grid = [t.float().requires_grad_() for t in one[:2]]

    def step_learned() -> object:
        y = learned.fake_quantize_learned(leaf, *learned_grid, 0, 255)
        return torch.autograd.grad(y, [leaf, *learned_grid], upstream)

    step_native = gradient(lambda v: native.fake_quantize(v, *one), leaf, upstream)
    step_channels = gradient(lambda v: native.fake_quantize(v, *many, 1), leaf, upstream)
    return interleaved(
        {
            "copy": lambda: target.copy_(x),
            "clone": x.clone,
            "forward native": lambda: native.fake_quantize(leaf, *one),
            "forward PyTorch": lambda: pytorch(leaf, one, None),
            "forward and range native": lambda: native.fake_quantize_observe(leaf, *one, None, minmax),
            "forward and range apart": lambda: (native.observe(x, minmax), native.fake_quantize(leaf, *one)),
            "forward and range PyTorch": lambda: (torch.aminmax(x), pytorch(leaf, one, None)),
            "forward and histogram native": lambda: native.fake_quantize_observe(leaf, *one, None, histogram),
            "forward and histogram apart": lambda: (native.observe(x, histogram), native.fake_quantize(leaf, *one)),
            "forward and histogram PyTorch": lambda: (observer.observe(x), pytorch(leaf, one, None)),
            "forward + backward native": step_native,
            "forward + backward PyTorch": gradient(lambda v: pytorch(v, one, None), leaf, upstream),
            "the same per channel native": step_channels,
            "the same per channel PyTorch": gradient(lambda v: pytorch(v, many, 1), leaf, upstream),
            "tracked range, step native": step_tracking,
            "tracked range, step PyTorch": in_pytorch(step_tracking),
            "learned grid, step native": step_learned,
            "learned grid, step PyTorch": in_pytorch(step_learned),
            "range native": lambda: native.observe_minmax(x),
            "range PyTorch": lambda: torch.aminmax(x),
            "histogram native": lambda: native.observe(x, histogram),
            "histogram PyTorch": lambda: observer.observe(x),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the milliseconds to this file")
    options = parser.parse_args()
    status = native.status()
    if not status.active:
        raise SystemExit(f"the native extension is {status}")
    torch.set_num_threads(options.threads)
    print(f"native: {status.isa}, threads: {options.threads}, median of {options.rounds} interleaved rounds")
    results = []
    for shape in SHAPES:
        for name, memory_format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
            times = measure(shape, memory_format, options.rounds)
            results.append({"shape": shape, "layout": name, "milliseconds": times})
            print(f"\n{'x'.join(map(str, shape))} {name}; copy {times['copy']:.2f} ms, clone {times['clone']:.2f} ms")
            print(f"{'':28}{'native ms':>10}{'PyTorch / native':>18}{'native / copy':>15}{'apart / native':>16}")
            for what in [key.removesuffix(" native") for key in times if key.endswith(" native")]:
                ours, theirs = times[f"{what} native"], times[f"{what} PyTorch"]
                apart = f"{times[f'{what} apart'] / ours:16.2f}" if f"{what} apart" in times else ""
                print(f"{what:28}{ours:10.2f}{theirs / ours:18.1f}{ours / times['copy']:15.2f}{apart}")
    small = weights(options.rounds)
    results.append({"weights": "mobilenet_v2", "milliseconds": small})
    print("\nall weights of mobilenet_v2 with their batch norms")
    for what in ("forward", "forward + backward"):
        ours, theirs = small[f"{what} native"], small[f"{what} PyTorch"]
        print(f"{what:28}{ours:10.2f}{theirs / ours:18.1f}")
    if options.json:
        options.json.write_text(
            json.dumps({"isa": status.isa, "threads": options.threads, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
