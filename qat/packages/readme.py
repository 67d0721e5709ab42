"""The README of a package."""

from __future__ import annotations

from qat.export.contract import TensorContract
from qat.packages.artifact import Artifact
from qat.packages.manifest import Manifest
from qat.packages.verify import describe

_USE = {
    "onnx": (
        '`onnxruntime.InferenceSession({path!r}, providers=["CPUExecutionProvider"])`; on x86 processors without VNNI '
        "with the session entry `session.x64quantprecision=1`, or sums saturate."
    ),
    "tflite": (
        "`ai_edge_litert.interpreter.Interpreter({path!r})`, or any TFLite runtime; four-dimensional inputs and "
        "outputs are channels-last."
    ),
    "plan": (
        "`qat_run {path} --input input_0.npy --output output_0.npy`. `runner/` has its sources, whose "
        "`CMakeLists.txt` says how to build it for Linux and Android; `runner/bin/` is the program for 64-bit ARM "
        "Linux, where there was a compiler."
    ),
    "neuron": "LiteRT with MediaTek's dispatch library, on the SoC named only; nothing has executed it.",
    "qnn-context": "ONNX Runtime with the QNN execution provider; it was compiled for the generation named.",
    "onnx-encodings": (
        "`qairt-converter --input_network {path} --quantization_overrides ENCODINGS`, or AIMET's "
        "`load_encodings_to_sim`; "
        "its weights are those of the integer model, so that rounding them by the encodings gives the same codes."
    ),
}
_DEPLOY = (
    "To put it on a phone that adb reaches: `./deploy.sh --dry-run` says what it would do and why, `./deploy.sh` does "
    "it, `./deploy.sh --run` compares the phone's answers as well."
)
_STANDING = {
    "verified": "All that has to be executed was, and held.",
    "partly verified": "**Some runtimes were not at hand; what they would have executed is not verified.**",
    "unverified": "**UNVERIFIED: no runtime was at hand to execute anything in this package.**",
    "failed": "**A check did not hold.**",
}


def readme(title: str, manifest: Manifest) -> str:
    """Return the README of a package.

    Args:
        title: What it is for, such as `ARM CPU`.
        manifest: What is in it.
    """
    golden = f"golden/{manifest.artifacts[0].path.replace('/', '_')}/000"
    checks = "\n".join(f"- {describe(check)}" for check in manifest.checks)
    about = (
        f"Targets: {', '.join(manifest.targets)}. Made by qat {manifest.versions['qat']}. `manifest.json` has all of "
        "this for machines, with the SHA-256 of every file; `encodings.json` has the scale and zero point of every "
        "tensor."
    )
    parts: list[str] = [
        f"# {manifest.name} for {title}",
        about,
        f"## Verification\n\n{_STANDING[manifest.standing]}\n\n{checks}",
        "To do it again on this machine, in this folder: `qat verify .`",
        _DEPLOY,
        *(_artifact(artifact) for artifact in manifest.artifacts),
        *(f"**{path} is not in this package**: {cause}." for path, cause in manifest.omitted.items()),
    ]
    if manifest.preprocessing:
        steps = "\n".join(f"- {key}: {value}" for key, value in manifest.preprocessing.items())
        parts.append(f"## Preprocessing\n\n{steps}")
    parts.append(
        f"## Golden samples\n\n`{golden}/input_0.npy` is the first input of the first sample as "
        f"{manifest.artifacts[0].path} takes it, `output_0.npy` what the simulation gives; {manifest.golden} of each "
        "artifact."
    )
    return "\n\n".join(parts) + "\n"


def _artifact(artifact: Artifact) -> str:
    options = "".join(f", {key} {value}" for key, value in artifact.options)
    rows = ["| | name | type | shape | real value |", "| --- | --- | --- | --- | --- |"]
    rows += [_row("input", c) for c in artifact.inputs] + [_row("output", c) for c in artifact.outputs]
    table = "\n".join(rows)
    use = _USE[artifact.format].format(path=artifact.path)
    return f"## {artifact.path}\n\nNumerics `{artifact.numerics}`{options}. {use}\n\n{table}"


def _row(kind: str, c: TensorContract) -> str:
    shape = " x ".join("batch" if d == -1 else f"{-d} batch" if d < 0 else str(d) for d in c.shape)
    if c.scale is None:
        real = "itself"
    elif c.dtype == "float32":
        real = f"itself; on the grid {c.scale:.9g} (q - {c.zero_point}), q in [{c.qmin}, {c.qmax}]"
    else:
        real = f"{c.scale:.9g} (q - {c.zero_point}), q in [{c.qmin}, {c.qmax}]"
    return f"| {kind} | {c.name} | {c.dtype} | {shape} | {real} |"
