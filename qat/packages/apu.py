"""What a package for MediaTek's APU holds, and how it is checked without one.

The artifact is an int8 `.tflite` within the operators that MediaTek's compiler plug-in can spell (target `apu`). LiteRT
executes it; the plug-in shows what NeuroPilot would be given. Neither says that an APU ran it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from qat.errors import ExportError, QatError, VerificationError
from qat.export.io_mode import IoMode
from qat.files import atomic_path
from qat.packages.artifact import Artifact
from qat.packages.executor import Executor, Missing, Sample
from qat.packages.files import write_tflite
from qat.packages.neuron.compare import compare, refuse_left_over
from qat.packages.neuron.library import stand_in
from qat.packages.neuron.plugin import SOCS, apply, find_plugin
from qat.packages.neuron.record import parse
from qat.packages.runtimes import LITERT, XNNPACK
from qat.packages.source import Source

#: what `model.tflite` of this package has among its options
_OPTION = ("device", "mediatek-apu")
#: one SoC of each generation of NeuroPilot that the plug-in knows, 8 and 9
RECORDED_SOCS = ("mt6989", "mt6993")
_SDK = "ai_edge_litert_sdk_mediatek"
_SOCS_VARIABLE = "QAT_APU_SOCS"


def write_apu(source: Source, folder: Path, io: IoMode) -> Artifact:
    """Write `model.tflite`.

    Args:
        source: The model, planned for the target `apu`.
        folder: The package's folder.
        io: What the file takes and gives.

    Raises:
        ExportError: See `write_tflite`.
        OutputError: The file cannot be written.
    """
    return replace(write_tflite(source, folder, io), options=(_OPTION,))


def write(source: Source, folder: Path, io: IoMode) -> tuple[tuple[Artifact, ...], Mapping[str, str]]:
    """Write `model.tflite`, and what is compiled from it ahead of time for the SoCs that QAT_APU_SOCS names.

    Raises:
        ExportError: See `write_tflite`.
        OutputError: A file cannot be written.
    """
    model = write_apu(source, folder, io)
    artifacts, omitted = [model], {}
    socs = [soc for soc in os.environ.get(_SOCS_VARIABLE, "").replace(",", " ").split() if soc]
    if not socs:
        omitted["compiled/"] = f"{_SOCS_VARIABLE} names no SoC (mt6989, ...), so the phone compiles the model"
    for soc in socs:
        path = f"compiled/{soc}/model.tflite"
        try:
            compile_apu(folder / model.path, folder / path, soc)
        except (ExportError, VerificationError) as error:
            omitted[path] = str(error)
        else:
            artifacts.append(replace(model, path=path, format="neuron", options=(("soc_model", soc),)))
    return tuple(artifacts), omitted


def sdk_libraries(soc: str) -> Path | None:
    """Return the folder of NeuroPilot's `libneuron_adapter.so` for this machine, or None without the SDK.

    It is `NEUROPILOT_SDK_ROOT/host/lib` or that folder itself, else what the package ai-edge-litert-sdk-mediatek has
    downloaded.

    Args:
        soc: The SoC to compile for, which decides between the versions 8 and 9 of the SDK.
    """
    root = os.environ.get("NEUROPILOT_SDK_ROOT", "")
    if root:
        folders = (Path(root) / "host" / "lib", Path(root))
        return next((f for f in folders if any(f.glob("libneuron*adapter*.so"))), None)
    if find_spec(_SDK) is None:
        return None
    folder = importlib.import_module(_SDK).path_to_sdk_libs("v9" if soc == "mt6993" else "v8")
    return None if folder is None else Path(folder)


def compile_apu(model: Path, output: Path, soc: str) -> None:
    """Compile a `.tflite` for one SoC ahead of time, by NeuroPilot's SDK; no other SoC runs the result.

    Args:
        model: The file.
        output: The compiled file to write.
        soc: The SoC, as in `SOCS`.

    Raises:
        ExportError: The SDK or MediaTek's plug-in is not installed, the SoC is unknown, or the file does not compile.
        VerificationError: Operators are left that the APU does not take; they are named.
        OutputError: The file cannot be written.
    """
    if soc not in SOCS:
        raise ExportError(f"MediaTek's compiler plug-in does not know {soc!r}", f"use one of {', '.join(SOCS)}")
    libraries = sdk_libraries(soc)
    if libraries is None:
        raise ExportError(
            f"compiling {model.name} for {soc} needs MediaTek's NeuroPilot SDK, which is not installed",
            "pip install ai-edge-litert-sdk-mediatek, or set NEUROPILOT_SDK_ROOT; else let the phone compile it",
        )
    with TemporaryDirectory(prefix="qat-apu-") as folder, atomic_path(output) as temporary:
        compiled = Path(folder) / "compiled.tflite"
        refuse_left_over(apply(model.resolve(), compiled, soc, libraries.resolve()), model.name)
        temporary.write_bytes(compiled.read_bytes())


def _missing() -> Missing | None:
    if find_plugin() is None:
        return Missing("MediaTek's compiler plug-in for LiteRT", "pip install 'qat[litert]' on Linux on x86-64")
    try:
        stand_in()
    except QatError as error:
        return Missing("the recording stand-in for libneuron_adapter.so", str(error))
    return None


def _runtime() -> str:
    version = metadata.version("ai-edge-litert")
    return f"MediaTek's compiler plug-in of LiteRT {version}, with a recording stand-in for libneuron_adapter.so"


def _run(path: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
    content, library = path.read_bytes(), stand_in()
    for soc in RECORDED_SOCS:
        with TemporaryDirectory(prefix="qat-neuron-") as folder:
            record = Path(folder) / "record.txt"
            left = apply(path.resolve(), Path(folder) / "applied.tflite", soc, library.parent, record)
            refuse_left_over(left, artifact.path)
            models = parse(record.read_text(encoding="ascii"))
        if len(models) != 1:
            raise ExportError(f"MediaTek's plug-in made {len(models)} Neuron models of {artifact.path}", "report this")
        found = compare(content, models[0])
    agreement = (
        f"each of the {found.operators} operators has a Neuron operation; {found.activations} activations and "
        f"{found.constants} weights and biases have the same types, sizes, scales and zero points there "
        f"({', '.join(RECORDED_SOCS)})"
    )
    return (), (agreement, _LIMIT)


_LIMIT = "legalization only: nothing was executed, and whether an APU runs it, and how it rounds, is not known"


def executors(targets: Sequence[str]) -> tuple[Executor, ...]:
    """Return what executes the artifacts, and what inspects them."""
    return (LITERT, XNNPACK, *apu_executors())


def apu_executors() -> tuple[Executor, ...]:
    """Return `mediatek-legalization`: the plug-in's spelling of the file, operand by operand, executed by nothing."""
    return (
        Executor(
            name="mediatek-legalization",
            accepts=lambda artifact: artifact.format == "tflite" and _OPTION in artifact.options,
            runtime=_runtime,
            missing=_missing,
            run=_run,
            role="inspection",
        ),
    )
