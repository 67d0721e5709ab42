"""Runs a model in ONNX Runtime or LiteRT, inside an emulated Python that has only those: `arm64.py` starts it.

    python3 arm64_child.py JOB

JOB is a folder with `job.json`: `{"runtime": ..., "file": ..., "inputs": [...], "outputs": [...], "samples": N}`.
Inputs are read from `i<input>_<sample>.npy`, outputs go to `o<output>_<sample>.npy`, in the order of the lists.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

#: arrays of inputs, in order, to arrays of outputs, in order
Run = Callable[[list[Any]], list[Any]]


def onnxruntime_session(file: str, inputs: list[str], outputs: list[str]) -> Run:
    """Open an ONNX file; on ARM it needs no session entries to compute in integers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda arrays: list(session.run(outputs, dict(zip(inputs, arrays, strict=True))))


def litert_session(file: str, resolver: str) -> Run:
    """Open a TFLite file with the kernels of a resolver."""
    from ai_edge_litert import interpreter as litert

    made: Any = litert.Interpreter(
        model_content=Path(file).read_bytes(),
        experimental_op_resolver_type=getattr(litert.OpResolverType, resolver),
        num_threads=1,
    )
    made.allocate_tensors()

    def run(arrays: list[Any]) -> list[Any]:
        for entry, array in zip(made.get_input_details(), arrays, strict=True):
            made.set_tensor(entry["index"], array)
        made.invoke()
        return [made.get_tensor(entry["index"]) for entry in made.get_output_details()]

    return run


def main(folder: Path) -> None:
    """Run a job."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    if job["runtime"] == "onnxruntime":
        run = onnxruntime_session(job["file"], job["inputs"], job["outputs"])
    else:
        run = litert_session(job["file"], job["runtime"])
    for sample in range(job["samples"]):
        arrays = [np.load(folder / f"i{i}_{sample}.npy", allow_pickle=False) for i in range(len(job["inputs"]))]
        for number, array in enumerate(run(arrays)):
            np.save(folder / f"o{number}_{sample}.npy", array, allow_pickle=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
