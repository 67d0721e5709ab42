"""Pretrained networks through the whole flow, scored on real data: float, simulation, and ONNX Runtime.

    python benchmarks/pretrained_accuracy.py [--target NAME] [--observer SPEC] [--limit N] [--integer]
        [--json FILE] [--markdown FILE] [NETWORK ...]

QAT_DATA names a folder with `reference.py`, whose `TASKS[name]` has `model()`, `calib(batch)` (calibration batches)
and `score(callable)`. Every network gets the same unchanged recipe: the target's default schemes, calibration on
`calib`, no training. The scores are of the same images, so differences are paired. SPEC replaces the observer of
activations: a name, or YAML such as '{name: percentile, percentile: 99.9}'.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import qat
from qat.export.verify import session

#: the recipe is one for all; this is only how much is held in memory at a time
BATCH = 8
#: metrics by which a task may be judged, the first that it has
METRICS = ("top1", "mIoU", "AP50")

Network = Callable[[Tensor], Tensor]


def load_reference(folder: Path, limit: int | None) -> Any:
    """Import `reference.py` by its path; with a limit, score evenly spaced files of each image set only."""
    path = folder / "reference.py"
    spec = importlib.util.spec_from_file_location("qat_data_reference", path)
    if spec is None or spec.loader is None or not path.is_file():
        sys.exit(f"there is no {path}: let QAT_DATA name the folder of data")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if limit:
        top1, files = module.top1, module.coco_files
        module.top1 = lambda model, items, load, **options: top1(model, spaced(items, limit), load, **options)
        module.coco_files = lambda *place: spaced(files(*place), limit)
    return module


def spaced(items: Sequence[Any], count: int) -> Sequence[Any]:
    """Return at most `count` of the items, evenly spaced."""
    return items[:: max(1, -(-len(items) // count))]


class Scored:
    """A network with what it answers on the way: the largest output of each sample, where outputs are classes.

    Args:
        run: The network, tensor to tensor.
    """

    def __init__(self, run: Network) -> None:
        self.run = run
        self.classes: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        out = self.run(x)
        if out.dim() == 2:
            self.classes += out.argmax(1).tolist()
        return out

    def agreement(self, other: Scored) -> float | None:
        """Share of samples with the same largest output."""
        pairs = list(zip(self.classes, other.classes, strict=True))
        return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def scored(task: Any, run: Network) -> tuple[Scored, str, float, int]:
    """Score a network; return its answers, the metric, its value in percent and the number of samples."""
    watched = Scored(run)
    sets: Mapping[str, Mapping[str, Any]] = task.score(watched)
    chosen = sets.get("all") or next(iter(sets.values()))
    metric = next(name for name in METRICS if name in chosen)
    return watched, metric, float(chosen[metric]), int(chosen["n"])


def onnx_network(path: Path) -> Network:
    """Return the network of an ONNX file with one input and one output, executed by ONNX Runtime."""
    runtime = session(str(path))
    name = runtime.get_inputs()[0].name
    return lambda x: torch.from_numpy(runtime.run(None, {name: x.numpy()})[0])


def some(batches: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """Yield batches until there were `count` samples."""
    for batch in batches:
        yield batch[:count]
        count -= len(batch)
        if count <= 0:
            return


def measure(name: str, task: Any, target: qat.Target, observer: Any, verify: int, integer: bool) -> dict[str, Any]:
    """Take one network through the flow and score it at each stage."""
    model: nn.Module = task.model().eval()
    batches = list(task.calib(BATCH))
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    seconds_float = time.perf_counter() - start

    start = time.perf_counter()
    scheme = {"activations": {"observer": observer}} if observer else None
    prepared = qat.prepare(model, batches[0][:2], target=target, scheme=scheme).eval()
    seconds_prepare = time.perf_counter() - start
    start = time.perf_counter()
    seen = qat.calibrate(prepared, batches, progress=False)
    seconds_calibrate = time.perf_counter() - start

    reference, metric, value_float, count = scored(task, model)
    simulated, _, value_simulated, _ = scored(task, prepared)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        result = qat.export_onnx(prepared, path, samples=some(batches, verify), bound=255.0, unequal_share=None)
        executed, _, value_onnx, _ = scored(task, onnx_network(path))
    assert result.verification is not None
    row = {
        "network": name,
        "metric": metric,
        "samples": count,
        "float": value_float,
        "simulation": value_simulated,
        "onnxruntime": value_onnx,
        "same_answer": reference.agreement(executed),
        "simulation_same_answer_as_onnxruntime": simulated.agreement(executed),
        "integer_share": prepared.plan.integer_share,
        "left_float": [[e.name, e.kind, e.reason] for e in prepared.plan.left_float()],
        "verified_samples": result.verification.samples,
        "max_difference": result.verification.worst.max_difference,
        "equal_share": 1.0 - result.verification.worst.unequal_share,
        "calibration_samples": seen,
        "seconds_prepare": seconds_prepare,
        "seconds_calibrate": seconds_calibrate,
        "seconds_float_same_samples": seconds_float,
    }
    if integer:
        exact, _, row["integer"], _ = scored(task, qat.convert(prepared))
        row["integer_same_answer_as_onnxruntime"] = exact.agreement(executed)
    return row


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share in percent, rounded down: 100 means all."""
    if share is None:
        return "-"
    return f"{int(share * 10 ** (digits + 2) + 1e-9) / 10**digits:.{digits}f} %"


def columns(integer: bool) -> list[str]:
    """Return the headings of the table."""
    scores = ["float", "PTQ, simulated", "PTQ, ONNX Runtime", *(["PTQ, IntegerModel"] if integer else [])]
    rest = ["drop", "same answer", "integer MACs", "largest difference", "equal codes", "calibration"]
    return ["network", "metric (n)", *scores, *rest]


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a network's row."""
    return [
        row["network"],
        f"{row['metric']} ({row['samples']})",
        *(f"{row[k]:.2f}" for k in ("float", "simulation", "onnxruntime", "integer") if k in row),
        f"{row['float'] - row['onnxruntime']:+.2f}",
        percent(row["same_answer"]),
        percent(row["integer_share"], 2),
        f"{row['max_difference']:g}",
        percent(row["equal_share"], 3),
        f"{row['seconds_calibrate'] / row['seconds_float_same_samples']:.1f} x float",
    ]


def line(values: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(values)} |"


def main() -> None:
    """Measure, print one row a network, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="default: all of them")
    parser.add_argument("--target", default="onnxruntime-cpu")
    parser.add_argument("--observer", type=yaml.safe_load, metavar="SPEC")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="at most N files of each image set (arrays are scored whole)"
    )
    parser.add_argument(
        "--verify", type=int, default=16, metavar="N", help="calibration samples that are compared in codes"
    )
    parser.add_argument("--integer", action="store_true", help="score the IntegerModel too (slow)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="calibrated on")
    reference = load_reference(Path(os.environ.get("QAT_DATA", "../shared/data")), args.limit)
    unknown = [name for name in args.networks if name not in reference.TASKS]
    if unknown:
        parser.error(f"unknown network {unknown[0]!r}: choose from {', '.join(reference.TASKS)}")
    target = qat.load_target(args.target)
    heading = columns(args.integer)
    lines = [line(heading), line(["---"] * len(heading))]
    print("\n".join(lines), flush=True)
    rows = []
    for name in args.networks or reference.TASKS:
        rows.append(measure(name, reference.TASKS[name], target, args.observer, args.verify, args.integer))
        lines.append(line(cells(rows[-1])))
        print(lines[-1], flush=True)
        # after each, so that an interrupted run loses one network only
        if args.json:
            record = {"target": args.target, "observer": args.observer, "machine": platform.machine(), "rows": rows}
            args.json.write_text(json.dumps(record, indent=1) + "\n")
        if args.markdown:
            args.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
