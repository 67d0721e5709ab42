"""Many small models in one emulated Python with ONNX Runtime for ARM64: starting one takes ten seconds.

    python3 arm64_many.py FOLDER

FOLDER has `<k>.onnx` and `<k>.npz` (its inputs by name); the outputs go to `<k>.out.npz`, in order.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kernels_ort import Graph
    from torch import Tensor


def run_on_arm64(graphs: Sequence[Graph]) -> list[list[Tensor]]:
    """Run graphs on their inputs on the emulated processor; codes come back as int64, floats as float32."""
    import torch

    from qat.packages.arm64 import run_emulated

    with tempfile.TemporaryDirectory(prefix="qat-arm64-") as name:
        folder = Path(name).resolve()
        for number, graph in enumerate(graphs):
            (folder / f"{number}.onnx").write_bytes(graph.model())
            np.savez(folder / f"{number}.npz", **graph.feeds)
        run_emulated(Path(__file__).resolve(), str(folder))
        found = []
        for number in range(len(graphs)):
            with np.load(folder / f"{number}.out.npz", allow_pickle=False) as arrays:
                values = [arrays[key] for key in arrays.files]
            found.append([torch.from_numpy(y if y.dtype == np.float32 else y.astype(np.int64)) for y in values])
    return found


def _serve(folder: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for number in range(len(list(folder.glob("*.onnx")))):
        with np.load(folder / f"{number}.npz", allow_pickle=False) as arrays:
            feeds = {key: arrays[key] for key in arrays.files}
        session = onnxruntime.InferenceSession(
            str(folder / f"{number}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        np.savez(folder / f"{number}.out.npz", *session.run(None, feeds))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
