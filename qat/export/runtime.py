"""ONNX Runtime as the executor of exported models."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch


def session_entries() -> Mapping[str, str]:
    """The session entries with which this machine's ONNX Runtime computes what the exported graph says, in integers.

    ARM needs none. x86 CPUs without VNNI add pairs of uint8 x int8 products in 16 bits, with saturation, so that sums
    which fit in 32 bits are clipped: `session.x64quantprecision` makes the runtime use exact kernels. On x86 the
    runtime also turns int8 activations to uint8, which it manages only for tensors with one reader, and it computes
    the others in float: with VNNI, `session.qdqisint8allowed` keeps them int8 and in integers, the default on ARM. The
    two entries exclude each other: together they ask for kernels that do not exist.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    # the function is newer than the oldest supported torch
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"):
        return {"session.qdqisint8allowed": "1"}
    return {"session.x64quantprecision": "1"}


def session(model: bytes | str, threads: int | None = None) -> Any:
    """Return an `onnxruntime.InferenceSession` on the CPU, with the default graph optimizations and `session_entries`.

    Args:
        model: The serialised model or the path of its file.
        threads: Threads within an operator; PyTorch's number if None.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    for key, value in session_entries().items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
