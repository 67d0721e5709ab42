"""MediaTek's compiler plug-in, which LiteRT's wheel has, run by LiteRT's own tool `apply_plugin_main`."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qat.errors import ExportError
from qat.export.tflite.schema import schema

#: what the plug-in takes for `soc_model` (ai-edge-litert 2.3.0)
SOCS = (
    *("mt6853", "mt6877", "mt6878", "mt6879", "mt6886", "mt6893", "mt6895", "mt6897"),
    *("mt6983", "mt6985", "mt6989", "mt6991", "mt6993", "mt8171", "mt8188", "mt8189"),
)
#: SoCs whose SDK is NeuroPilot 9, for which the plug-in has to be told; the others' is 8
_VERSION9 = ("mt6993",)
_DISPATCH = b"DISPATCH_OP"
_SECONDS = 600


@dataclass(frozen=True)
class Plugin:
    """Files of LiteRT's wheel.

    Attributes:
        tool: The program that applies a compiler plug-in.
        libraries: Folder of MediaTek's plug-in.
    """

    tool: Path
    libraries: Path


def find_plugin() -> Plugin | None:
    """Return where MediaTek's plug-in is, or None: wheels for other systems than Linux on x86-64 do not have it."""
    found = find_spec("ai_edge_litert")
    if found is None or not found.submodule_search_locations:
        return None
    root = Path(next(iter(found.submodule_search_locations)))
    plugin = Plugin(root / "tools" / "apply_plugin_main", root / "vendors" / "mediatek" / "compiler")
    here = os.access(plugin.tool, os.X_OK) and any(plugin.libraries.glob("libLiteRtCompilerPlugin_MediaTek.so"))
    return plugin if here else None


def apply(model: Path, output: Path, soc: str, libraries: Path, record: Path | None = None) -> tuple[str, ...]:
    """Compile a `.tflite` file for a SoC: what the plug-in can spell becomes DISPATCH_OP operators.

    Args:
        model: The file.
        output: The compiled file to write.
        soc: One of `SOCS`.
        libraries: Folder of NeuroPilot's `libneuron_adapter.so`, or of the stand-in.
        record: Where the stand-in writes its calls.

    Returns:
        The operators that were left as they are, as `type 'name of the first output'`.

    Raises:
        ExportError: LiteRT's wheel has no such plug-in here, the SoC is unknown to it, or it does not compile the file.
    """
    plugin = find_plugin()
    if plugin is None:
        raise ExportError(
            "MediaTek's compiler plug-in is not installed", "pip install 'qat[litert]' on Linux on x86-64"
        )
    if soc not in SOCS:
        raise ExportError(f"MediaTek's compiler plug-in does not know {soc!r}", f"use one of {', '.join(SOCS)}")
    options = ["--mediatek_sdk_version_type=version9"] if soc in _VERSION9 else []
    search = [str(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(search)}
    if record is not None:
        environment["QAT_NEURON_RECORD"] = str(record)
    output.unlink(missing_ok=True)
    command = [str(plugin.tool), "--cmd=apply", f"--model={model}", f"--o={output}", f"--libs={plugin.libraries}"]
    command += ["--soc_manufacturer=MediaTek", f"--soc_model={soc}", *options]
    # in the output's folder: the plug-in makes folders where it is run
    done = subprocess.run(
        command,
        cwd=output.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_SECONDS,
        check=False,
    )
    # the tool leaves an empty file behind where it fails
    if done.returncode != 0 or not output.exists() or not output.stat().st_size:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line]
        cause = " ".join(said[0].split())[:160] if said else f"exit status {done.returncode}"
        raise ExportError(f"MediaTek's compiler plug-in does not compile {model.name} for {soc} ({cause})", _MEND)
    return left_over(output.read_bytes())


_MEND = "run it by hand with the tool apply_plugin_main of ai-edge-litert, and see its log"


def left_over(content: bytes) -> tuple[str, ...]:
    """Name the operators of a compiled `.tflite` that no DISPATCH_OP has taken in."""
    tflite = schema()
    names = {code: name for name, code in vars(tflite.BuiltinOperator).items() if isinstance(code, int)}
    model = tflite.ModelT.InitFromPackedBuf(content, 0)
    left = []
    for op in model.subgraphs[0].operators:
        kind = model.operatorCodes[op.opcodeIndex]
        if kind.customCode != _DISPATCH:
            code = max(kind.builtinCode, kind.deprecatedBuiltinCode)
            output = model.subgraphs[0].tensors[op.outputs[0]].name.decode()
            left.append(f"{names.get(code, code)} {output!r}")
    return tuple(left)
