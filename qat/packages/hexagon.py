"""The package for Qualcomm Hexagon: the model for the QNN execution provider, what that compiles, and AIMET's view.

- `model.onnx`: QDQ, static shapes, the same for all generations.
- `contexts/v73/model_ctx.onnx` with its `.bin`: compiled ahead of time for one generation (a QNN context binary).
- `float.onnx` and `float.encodings`: the same network for Qualcomm's converters (`qairt-converter` and its
  `--quantization_overrides`) and for AIMET. Its weights are the floats of the codes in `model.onnx`, not the trained
  ones: rounding them by the encodings gives exactly these codes, whatever algorithm chose them. `float.v2.encodings`
  has the int32 biases too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qat.encodings import Encodings
from qat.errors import EncodingError, ExportError, TargetError
from qat.export.borders import contracts
from qat.export.htp import ARCHITECTURES, CHIPS, available, write_context
from qat.export.io_mode import IoMode
from qat.export.onnx import model_bytes
from qat.export.twin import MOVEMENTS, FloatTwin, float_twin
from qat.files import atomic_write_bytes
from qat.integer.program import Program
from qat.interop.aimet import write_aimet
from qat.packages.artifact import Artifact
from qat.packages.files import ONNX, write_onnx
from qat.packages.source import Source

FLOAT, OVERRIDES, OVERRIDES_2 = "float.onnx", "float.encodings", "float.v2.encodings"
TARGETS = tuple(f"hexagon-v{arch}" for arch in ARCHITECTURES)
#: option of `model.onnx` that lists what is computed in float
FLOAT_OPERATORS = "float_operators"


def architecture(target: str) -> int:
    """Return the generation of a target.

    Raises:
        TargetError: It is no Hexagon target.
    """
    if target not in TARGETS:
        raise TargetError(f"{target!r} is no Hexagon target", f"use {', '.join(TARGETS)}")
    return ARCHITECTURES[TARGETS.index(target)]


def context_path(arch: int) -> str:
    """Where the context binary's wrapper of a generation is."""
    return f"contexts/v{arch}/model_ctx.onnx"


def write(source: Source, folder: Path, io: IoMode) -> tuple[tuple[Artifact, ...], Mapping[str, str]]:
    """Write the artifacts; what could not be made is named with the cause.

    Raises:
        ExportError: The model cannot be expressed in ONNX, or has floats where `io` wants codes.
    """
    program = source.simulation("onnx").program
    floats = " ".join(float_operators(program))
    plain = write_onnx(source, folder, io)
    options = ((FLOAT_OPERATORS, floats),) if floats else ()
    model = Artifact(plain.path, plain.format, plain.numerics, plain.inputs, plain.outputs, options)
    artifacts, omitted = [model], {}
    for arch in map(architecture, source.targets):
        try:
            artifacts.append(_write_context(model, folder, arch))
        except ExportError as error:
            omitted[context_path(arch)] = str(error)
    try:
        artifacts.append(_write_float(source, program, folder))
    except (ExportError, EncodingError) as error:
        omitted[FLOAT] = str(error)
    return tuple(artifacts), omitted


def float_operators(program: Program) -> tuple[str, ...]:
    """Names of the operators of a program that compute in float."""
    borders = ("quantize", "dequantize")
    return tuple(op.name for op in program.ops if op.kind not in borders and program.encoding_of(op.outputs[0]) is None)


def _write_context(model: Artifact, folder: Path, arch: int) -> Artifact:
    if not available():
        raise ExportError("compiling it needs onnxruntime-qnn", "pip install 'qat[hexagon]' and make the package again")
    wrapper = folder / context_path(arch)
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    write_context(folder / ONNX, arch, wrapper)
    chip, number = CHIPS[arch]
    options = (("htp_arch", str(arch)), ("soc", chip), ("soc_model", str(number)), ("model", ONNX))
    return Artifact(context_path(arch), "qnn-context", model.numerics, model.inputs, model.outputs, options)


def _write_float(source: Source, program: Program, folder: Path) -> Artifact:
    twin = float_twin(program, batch_size=source.qmodel.plan.batch_size or 1, name=source.name)
    table, names = overrides(twin), frozenset(twin.parameters)
    write_aimet(table, folder / OVERRIDES, parameters=names, version="1.0.0")
    write_aimet(table, folder / OVERRIDES_2, parameters=names, version="2.0.0", biases=True)
    atomic_write_bytes(folder / FLOAT, model_bytes(twin.model))
    inputs, outputs = contracts(program, twin.model, IoMode())
    return Artifact(FLOAT, "onnx-encodings", "onnx", inputs, outputs, (("encodings", OVERRIDES),))


def overrides(twin: FloatTwin) -> Encodings:
    """Return the encodings that AIMET and Qualcomm's converters take for a float model."""
    derived = {name for node in twin.model.graph.node if node.op_type in MOVEMENTS for name in node.output}
    own = {name: e for name, e in twin.activations.items() if name not in derived}
    return Encodings({**own, **twin.parameters})
