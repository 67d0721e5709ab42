"""`qat env`: versions and hardware, for bug reports."""

from __future__ import annotations

import os
import platform
from typing import Any

import typer

from qat.cli.options import Json

_LIBRARIES = (
    "torch", "torchvision", "numpy", "onnx", "onnxruntime", "onnxscript", "pydantic", "safetensors", "typer",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("env")(env)


def env(as_json: Json = False) -> None:
    """Print versions and hardware."""
    import json

    facts = _facts()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    width = max(map(len, facts))
    print("\n".join(f"{key.ljust(width)}  {value}" for key, value in facts.items()))


def _facts() -> dict[str, Any]:
    from importlib import metadata

    import torch

    import qat
    from qat import native

    facts: dict[str, Any] = {
        "qat": qat.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native": str(native.status()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    for name in _LIBRARIES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "not installed"
    return facts
