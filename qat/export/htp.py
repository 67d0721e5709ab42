"""Qualcomm's HTP emulator, which comes with onnxruntime-qnn, as the executor of exported models.

The QNN execution provider takes every operator that it can, and two of its habits hide what it did: an unknown
`htp_arch` is v68, and an operator that has no integer form is computed in float16 between Dequantize and Quantize
inside the graph, which is no fallback. So a session here is strict, and the graph that the compiler was given is read
back.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qat.errors import ExportError

#: generations of the HTP that the emulator knows, and a system on chip that has each: its name and QNN's number of it
CHIPS: Mapping[int, tuple[str, int]] = {
    68: ("SM8350", 30), 69: ("SM8450", 36), 73: ("SM8550", 43), 75: ("SM8650", 57), 79: ("SM8750", 69),
    81: ("SM8850", 87),
}  # fmt: skip
ARCHITECTURES = tuple(CHIPS)
_PROVIDER = "QNNExecutionProvider"
#: QNN's numbers of float32 and float16, and of the tensors that are inputs and outputs of the graph
_FLOATS = (0x0232, 0x0216)
_BORDERS = (0, 1)


@dataclass(frozen=True)
class HtpGraph:
    """What the compiler was given.

    Attributes:
        operators: Types of the operators, in the compiler's spelling, by name.
        floats: Names of the tensors inside the graph that are not integer; inputs and outputs may be float.
    """

    operators: dict[str, str]
    floats: tuple[str, ...]


@dataclass(frozen=True)
class HtpSession:
    """A model that is ready to run on the emulator.

    Attributes:
        session: The `onnxruntime.InferenceSession`.
        graph: The graph that it executes.
    """

    session: Any
    graph: HtpGraph


def available() -> bool:
    """Whether onnxruntime-qnn is installed."""
    return find_spec("onnxruntime_qnn") is not None


def runtime_name() -> str:
    """Name and version of the emulator's runtime."""
    return f"onnxruntime-qnn {metadata.version('onnxruntime-qnn')}"


@contextmanager
def htp_session(model: str | Path | bytes, arch: int, *, graph: bool = True) -> Iterator[HtpSession]:
    """Open an ONNX model, or the wrapper of a context binary, on the HTP emulator, with nothing left to the CPU.

    Args:
        model: Path of the model, or the model itself, serialised; its shapes are static.
        arch: Generation of the HTP, one of `ARCHITECTURES`.
        graph: Read back the graph that the compiler is given; a context binary has none, it is compiled.

    Raises:
        ExportError: onnxruntime-qnn is not installed, the generation is unknown, or the emulator cannot execute the
            whole model.
    """
    _check(arch)
    with TemporaryDirectory(prefix="qat-htp-") as folder:
        dump = {"dump_json_qnn_graph": "1", "json_qnn_graph_dir": folder} if graph else {}
        session = _open(model if isinstance(model, bytes) else str(model), arch, dump, {})
        yield HtpSession(session, read_graph(Path(folder)) if graph else HtpGraph({}, ()))


def write_context(model: str | Path, arch: int, wrapper: Path) -> Path:
    """Compile an ONNX model for a generation of the HTP: a context binary, which a device loads without compiling.

    Args:
        model: Path of the model; its shapes are static.
        arch: Generation of the HTP, one of `ARCHITECTURES`.
        wrapper: Path of the ONNX file with one `EPContext` node that stands for the model; the binary is put beside it.

    Returns:
        Path of the binary. Its bytes differ from run to run.

    Raises:
        ExportError: As `htp_session`; or no binary came of it.
    """
    _check(arch)
    entries = {
        "ep.context_enable": "1",
        # a file of its own: protobuf would hold no binary of 2 GiB
        "ep.context_embed_mode": "0",
        "ep.context_file_path": str(wrapper),
    }
    _open(str(model), arch, {}, entries)
    found = sorted(wrapper.parent.glob(f"{wrapper.stem}*.bin"))
    if not wrapper.is_file() or len(found) != 1:
        raise ExportError(f"HTP v{arch} gave no context binary of {model}", "see that the whole model runs there")
    return found[0]


def _check(arch: int) -> None:
    if not available():
        raise ExportError("the HTP emulator needs onnxruntime-qnn", "pip install 'qat[hexagon]'")
    if arch not in ARCHITECTURES:
        raise ExportError(f"the HTP emulator has no v{arch}", f"use one of {', '.join(map(str, ARCHITECTURES))}")


def _open(model: str | bytes, arch: int, settings: Mapping[str, str], entries: Mapping[str, str]) -> Any:
    """Open a strict session."""
    with _stdout_to_stderr():
        return _configured(model, arch, settings, entries)


def _configured(model: str | bytes, arch: int, settings: Mapping[str, str], entries: Mapping[str, str]) -> Any:
    """The one place where the provider is configured."""
    import onnxruntime
    import onnxruntime_qnn

    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == _PROVIDER]
    if not devices:
        onnxruntime.register_execution_provider_library(_PROVIDER, onnxruntime_qnn.get_library_path())
        devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == _PROVIDER]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, value in {"session.disable_cpu_ep_fallback": "1", **entries}.items():
        options.add_session_config_entry(key, value)
    own = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "htp_arch": str(arch),
        "offload_graph_io_quantization": "1",
    }
    options.add_provider_for_devices([devices[0]], {**own, **settings})
    try:
        return onnxruntime.InferenceSession(model, options)
    # ONNX Runtime's exceptions have no common public base
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        what = "the given model" if isinstance(model, bytes) else model
        raise ExportError(
            f"HTP v{arch} cannot execute all of {what} ({cause})", "see what `qat plan` says of the target"
        ) from error


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keep standard output for what the application says: the emulator's library writes a line there."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def read_graph(folder: Path) -> HtpGraph:
    """Read the graphs that the provider has written to a folder (`dump_json_qnn_graph`).

    Raises:
        ExportError: There is none.
    """
    files = [path for path in sorted(folder.glob("*.json")) if not path.stem.endswith("_tensor_log")]
    if not files:
        raise ExportError("the HTP emulator has written no graph", "report this: without it nothing is known")
    operators: dict[str, str] = {}
    floats: list[str] = []
    for path in files:
        graph = json.loads(path.read_text(encoding="utf-8"))["graph"]
        operators.update({name: node["type"] for name, node in graph["nodes"].items()})
        floats += [
            name
            for name, tensor in graph["tensors"].items()
            if tensor["data_type"] in _FLOATS and tensor["type"] not in _BORDERS
        ]
    return HtpGraph(operators, tuple(floats))
