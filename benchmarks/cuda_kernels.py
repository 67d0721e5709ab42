"""The operators of the GPU: memory-bound passes against a copy, int8 products against `torch._int_mm` and bfloat16.

Needs a GPU and a native extension that was built for it. Rounds are interleaved; each number is a median. Prints one
table, and writes it as JSON where a path is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from qat import native

Call = Callable[[], object]
ROUNDS, REPEATS = 15, 10


def seconds(calls: dict[str, Call]) -> dict[str, float]:
    """Return the median time of each call, measured by events on the device."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 3):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPEATS):
                call()
            end.record()
            end.synchronize()
            if turn >= 3:  # before, it warms up
                times[name].append(begin.elapsed_time(end) / REPEATS / 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def passes(dtype: torch.dtype) -> list[dict[str, object]]:
    """Memory-bound passes: the fraction of the bandwidth that a copy of the same tensor reaches."""
    x = torch.randn(64, 64, 112, 112, device="cuda").to(dtype)
    y, grad, ops = torch.empty_like(x), torch.randn_like(x), torch.ops.qat
    one, zero = torch.full((1,), 0.05, device="cuda"), torch.zeros(1, device="cuda")
    many, zeros = one.repeat(64), zero.repeat(64)
    bits = ops.fake_quantize_forward(x, one, zero, -128, 127)[1]
    counts, nonfinite = (torch.zeros(n, dtype=torch.int64, device="cuda") for n in (65536, 1))
    low, high = one.clone(), one.clone()
    state, grid = (low, high, nonfinite), (one, zero, -128, 127)

    def both(counts: torch.Tensor | None) -> object:
        return ops.fake_quantize_observe(x, *grid, -1, *state, counts, 7, None, True)

    def apart(counts: torch.Tensor | None) -> object:
        if counts is None:
            ops.observe_range(x, *state)
        else:
            ops.observe_histogram(x, counts, *state)
        return ops.fake_quantize_forward(x, *grid)

    size, mask = x.numel() * x.element_size(), bits.numel()
    last = x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, tuple[int, Call]] = {
        "copy": (2 * size, lambda: y.copy_(x)),
        "fake_quantize": (2 * size + mask, lambda: ops.fake_quantize_forward(x, one, zero, -128, 127)),
        "fake_quantize, channels": (2 * size + mask, lambda: ops.fake_quantize_forward(x, many, zeros, -128, 127, 1)),
        "fake_quantize, channels_last": (
            2 * size + mask,
            lambda: ops.fake_quantize_forward(last, many, zeros, -128, 127, 1),
        ),
        "and range": (2 * size + mask, lambda: both(None)),
        "and range, two operators": (3 * size + mask, lambda: apart(None)),
        "and histogram": (2 * size + mask, lambda: both(counts)),
        "and histogram, two operators": (3 * size + mask, lambda: apart(counts)),
        "backward": (2 * size + mask, lambda: ops.fake_quantize_backward(grad, bits, x.stride())),
        "min and max": (size, lambda: ops.observe_minmax(x)),
        "histogram": (size, lambda: ops.observe_histogram(x, counts, low, high, nonfinite)),
    }
    times = seconds({name: call for name, (_, call) in calls.items()})
    rate = {name: calls[name][0] / times[name] for name in calls}
    return [
        {"what": f"{name}, {dtype}", "ms": 1000 * times[name], "GB/s": rate[name] / 1e9,
         "of the copy": rate[name] / rate["copy"]}
        for name in calls
    ]  # fmt: skip


def fused_passes(form: torch.memory_format) -> list[dict[str, object]]:
    """Batch norm and addition with ReLU and fake quantization, float32: the fraction of the bandwidth of a copy.

    Counted are the bytes of the passes that the kernels make: a batch norm in training reads its input twice.
    """
    x, y, grad = (torch.randn(64, 64, 56, 56, device="cuda").contiguous(memory_format=form) for _ in range(3))
    many, mean, var = (torch.rand(64, device="cuda") + 0.5 for _ in range(3))
    state = [torch.full((1,), value, device="cuda") for value in (-1.0, 3.0, 0.02)]
    state += [torch.zeros(1, dtype=kind, device="cuda") for kind in (torch.int32, torch.int64)]
    rule, ops = (0.01, 0, 255, False, 0, False), torch.ops.qat

    def norm(batch: bool) -> tuple[torch.Tensor, ...]:
        made: tuple[torch.Tensor, ...] = ops.norm_quantize_forward(
            x, many, many, mean, var, batch, 0.1, 1e-5, 0.0, torch.inf, *state, batch, *rule
        )
        return made

    _, bits, center, inverse = norm(True)
    size, mask = x.numel() * x.element_size(), bits.numel()
    calls: dict[str, tuple[int, Call]] = {
        "copy": (2 * size, lambda: y.copy_(x)),
        "norm, statistics of the batch, tracked": (3 * size + mask, lambda: norm(True)),
        "norm, frozen": (2 * size + mask, lambda: norm(False)),
        "norm, gradient": (
            5 * size + 2 * mask,
            lambda: ops.norm_quantize_backward(grad, x, bits, many, center, inverse, True, True),
        ),
        "addition, tracked": (
            5 * size + mask,
            lambda: ops.add_quantize_forward(x, grad, 0.0, torch.inf, *state, True, *rule),
        ),
        "activation, tracked": (
            3 * size + mask,
            lambda: ops.fake_quantize_track_forward(x, *state, 0.01, 0, 255, -1, False, 0, False),
        ),
    }
    times = seconds({name: call for name, (_, call) in calls.items()})
    rate = {name: calls[name][0] / times[name] for name in calls}
    layout = str(form).removeprefix("torch.")
    return [
        {"what": f"{name}, {layout}", "ms": 1000 * times[name], "GB/s": rate[name] / 1e9,
         "of the copy": rate[name] / rate["copy"]}
        for name in calls
    ]  # fmt: skip


def products(m: int, n: int, k: int) -> list[dict[str, object]]:
    """One matrix product with its epilogue, and the same in other ways."""
    x = torch.randint(0, 128, (m, k), dtype=torch.uint8, device="cuda")
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
    signed, factor = x.to(torch.int8), torch.rand(n, device="cuda") * 1e-4
    a, b = x.bfloat16(), w.bfloat16()

    def separate() -> torch.Tensor:
        steps = torch._int_mm(signed, w.t()).float() * factor
        return steps.clamp_(-90, 165).round_().add_(90).to(torch.uint8)

    calls: dict[str, Call] = {
        "int8_gemm": lambda: torch.ops.qat.int8_gemm(x, w, None, factor, 0, 90, 0, 255),
        "_int_mm and epilogue": separate,
        "bfloat16": lambda: a @ b.t(),
    }
    return compared(calls, f"{m} x {n} x {k}", 2 * m * n * k, "int8_gemm")


def convolutions(batch: int, size: int, channels: int, outputs: int, kernel: int) -> list[dict[str, object]]:
    """One convolution with its epilogue, and the same in bfloat16."""
    x = torch.randint(0, 256, (batch, size, size, channels), dtype=torch.uint8, device="cuda")
    w = torch.randint(-128, 128, (outputs, kernel, kernel, channels), dtype=torch.int8, device="cuda")
    factor, pad = torch.rand(outputs, device="cuda") * 1e-4, kernel // 2
    a, b = (t.bfloat16().permute(0, 3, 1, 2) for t in (x, w))
    calls: dict[str, Call] = {
        "int8_conv2d": lambda: torch.ops.qat.int8_conv2d(
            x, w, None, factor, 3, 90, 0, 255, False, [1, 1], [pad] * 4, [1, 1], 1
        ),
        "bfloat16": lambda: torch.nn.functional.conv2d(a, b, padding=pad),
    }
    operations = 2 * batch * size * size * channels * outputs * kernel * kernel
    return compared(calls, f"{batch} x {size} x {size}, {channels} to {outputs}, {kernel} x {kernel}", operations,
                    "int8_conv2d")  # fmt: skip


def compared(calls: dict[str, Call], shape: str, operations: int, own: str) -> list[dict[str, object]]:
    """Rows of one shape, with the time of each call over our own."""
    times = seconds(calls)
    return [
        {
            "what": f"{name}, {shape}",
            "ms": 1000 * time,
            "TOP/s": operations / time / 1e12,
            "over ours": time / times[own],
        }
        for name, time in times.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the table goes as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU: there is nothing to measure")
    if not native.status().cuda:
        sys.exit(f"the native extension has no CUDA kernels: {native.status()}")
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in passes(dtype)]
    rows += [row for form in (torch.contiguous_format, torch.channels_last) for row in fused_passes(form)]
    for shape in ((4096, 4096, 4096), (8192, 1024, 1024), (256, 4096, 4096)):
        rows += products(*shape)
    for layer in ((64, 56, 64, 64, 3), (64, 14, 256, 256, 3), (64, 56, 64, 256, 1)):
        rows += convolutions(*layer)
    sys.stdout.write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    for row in rows:
        numbers = "  ".join(f"{name} {value:9.3f}" for name, value in row.items() if isinstance(value, float))
        sys.stdout.write(f"{row['what']:<55}{numbers}\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
