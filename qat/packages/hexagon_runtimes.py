"""Qualcomm's HTP emulator and AIMET, as executors of Hexagon packages."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qat.errors import ExportError, VerificationError
from qat.export import htp
from qat.export.cuts import Layer, cut_layers
from qat.export.onnx import model_bytes
from qat.export.runtime import session
from qat.packages.artifact import Artifact
from qat.packages.executor import Array, Executor, Missing, Run, Sample
from qat.packages.files import ONNX
from qat.packages.golden import FOLDER
from qat.packages.hexagon import FLOAT_OPERATORS, architecture
from qat.packages.hexagon_products import product_codes
from qat.packages.hexagon_spread import spread
from qat.packages.runtimes import ONNXRUNTIME

#: largest difference of one operator, in its own codes of 8 or 16 bits, from ONNX Runtime, or, of a product of two
#: uint8 activations, from what the HTP's arithmetic gives (`hexagon_products`); 16-bit ones are approximated
OPERATOR_BOUND = {8: 1, 16: 512}
#: of a whole network, in codes of 8 bits: differences of operators add up along it. It catches what is grossly wrong,
#: and what the compiler does where it fuses operators; the proof is the comparison operator by operator. Where single
#: codes, added up, come to more, that much may be (`hexagon_spread`), but no more than is still a bound.
NETWORK_BOUND, LARGEST_NETWORK_BOUND = 32.0, 96.0
#: of AIMET, which simulates in float32: a sum on the other side of a tie is a code, and adds up likewise
AIMET_BOUND = 8.0
#: whole networks take about a second a sample
SAMPLES = 2


def executors(targets: Sequence[str]) -> tuple[Executor, ...]:
    """Return what executes the artifacts of a package for Hexagon targets."""
    archs = [architecture(target) for target in targets]
    # measured once for all generations
    bound = cache(network_bound)
    emulators = [_emulator(arch, lambda file: bound(_root(file))) for arch in archs]
    contexts = [_context(arch, lambda file: bound(_root(file))) for arch in archs]
    return (ONNXRUNTIME, *emulators, *contexts, AIMET)


def network_bound(root: Path) -> float:
    """Return how far the outputs of a package's model may be off on the HTP, in codes of 8 bits.

    Args:
        root: The package; its golden samples tell.
    """
    names = [value.name for value in onnx.load(str(root / ONNX)).graph.input]
    found = [NETWORK_BOUND]
    for number in range(SAMPLES):
        files = [root / FOLDER / ONNX / f"{number:03d}" / f"input_{k}.npy" for k in range(len(names))]
        if all(file.is_file() for file in files):
            inputs = {name: np.load(file, allow_pickle=False) for name, file in zip(names, files, strict=True)}
            found.append(spread(root / ONNX, inputs))
    return min(max(found), LARGEST_NETWORK_BOUND)


def _root(file: Path) -> Path:
    """The package's folder, from an artifact's file."""
    return next(folder for folder in file.parents if (folder / ONNX).is_file())


def _missing() -> Missing | None:
    if htp.available():
        return None
    return Missing("Qualcomm's HTP emulator (onnxruntime-qnn)", "pip install 'qat[hexagon]'")


def _runtime(arch: int, what: str) -> Callable[[], str]:
    return lambda: f"{htp.runtime_name()}, HTP v{arch} {what}, {platform.machine()}"


def _emulator(arch: int, bound: Callable[[Path], float]) -> Executor:
    return Executor(
        name=f"htp-v{arch}",
        accepts=lambda artifact: artifact.format == "onnx",
        runtime=_runtime(arch, "emulator"),
        missing=_missing,
        run=_run_emulator(arch),
        bound=bound,
        samples=SAMPLES,
    )


def _run_emulator(arch: int) -> Run:
    def run(file: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
        with htp.htp_session(file, arch) as opened:
            graph = opened.graph
            found = _outputs(opened.session, artifact, samples)
        notes = [f"{len(graph.operators)} operators on the HTP, none on the CPU, {len(graph.floats)} float tensors"]
        islands = dict(artifact.options).get(FLOAT_OPERATORS, "")
        if graph.floats and not islands:
            raise VerificationError(
                f"HTP v{arch} computes {graph.floats[0]!r} in float, which the plan calls integer",
                "report this model, or leave the operator float by the scheme's layers",
            )
        if islands:
            notes.append(f"float by the plan: {islands}")
        if samples:
            notes.append(check_operators(file, samples[0], arch))
        return found, tuple(notes)

    return run


def _outputs(runtime: Any, artifact: Artifact, samples: Sequence[Sample]) -> list[Sample]:
    names = [contract.name for contract in artifact.outputs]
    return [dict(zip(names, runtime.run(names, dict(sample)), strict=True)) for sample in samples]


# -- operator by operator


def check_operators(file: Path, sample: Sample, arch: int) -> str:
    """Execute every operator alone, on the codes that ONNX Runtime's CPU kernels give it.

    Returns:
        What was found, for the record.

    Raises:
        VerificationError: An operator is further off than it may be; it is named.
        ExportError: The emulator does not execute one of them.
    """
    model = onnx.load(str(file))
    layers = cut_layers(model)
    if not layers:
        return "no operator to execute alone"
    reference = _reference(model, layers, sample)
    worst, equal, count, products = 0, 0, 0, 0
    for layer in layers:
        given = {alias: reference[name] for name, alias in layer.given.items()}
        with htp.htp_session(model_bytes(layer.model), arch, graph=False) as opened:
            (codes,) = opened.session.run(None, given)
        expected = reference[layer.codes]
        product = product_codes(layer.model, given)
        largest = int(_apart(codes, expected if product is None else product).max(initial=0))
        bound = OPERATOR_BOUND[8 * expected.dtype.itemsize]
        if largest > bound:
            how = "" if product is None else ", its second factor rounded as HTP does,"
            raise VerificationError(
                f"HTP v{arch} is {largest} codes off in {layer.codes.removesuffix('/codes')!r} alone{how or ','} where "
                f"{bound} may be",
                "report this operator; `float` in the scheme's layers leaves it out",
            )
        apart = _apart(codes, expected)
        worst, equal, count = max(worst, int(apart.max(initial=0))), equal + int((apart == 0).sum()), count + apart.size
        products += product is not None
    share = 100 * equal / max(count, 1)
    said = f"each of {len(layers)} operators alone: at most {worst} code{'s' * (worst != 1)} off, {share:.4g} % equal"
    return said + (f"; of {products} products of activations, HTP rounds the second factor" if products else "")


def _apart(a: Array, b: Array) -> Array:
    apart: Array = np.abs(a.astype(np.int64) - b.astype(np.int64))
    return apart


def _reference(model: onnx.ModelProto, layers: Sequence[Layer], sample: Sample) -> Mapping[str, Array]:
    """What every layer reads and gives, computed by ONNX Runtime's CPU kernels, which the simulation equals."""
    probe = onnx.shape_inference.infer_shapes(model, data_prop=True)
    held = {value.name for value in (*probe.graph.output, *probe.graph.input)}
    values = {value.name: value for value in probe.graph.value_info}
    wanted = list(dict.fromkeys(name for layer in layers for name in (*layer.given, layer.codes)))
    wanted = [name for name in wanted if name not in sample]
    probe.graph.output.extend(values[name] for name in wanted if name not in held)
    found = session(model_bytes(probe)).run(wanted, dict(sample)) if wanted else []
    return {**sample, **dict(zip(wanted, found, strict=True))}


# -- context binaries


def _context(arch: int, bound: Callable[[Path], float]) -> Executor:
    return Executor(
        name=f"htp-context-v{arch}",
        accepts=lambda artifact: artifact.format == "qnn-context" and dict(artifact.options)["htp_arch"] == str(arch),
        runtime=_runtime(arch, "emulator, context binary"),
        missing=_missing,
        run=_run_context(arch),
        bound=bound,
        samples=SAMPLES,
    )


def _run_context(arch: int) -> Run:
    def run(file: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
        blob = _blob(file)
        # the emulator loads a binary of any generation, a device does not
        if f"arch={arch}".encode() not in blob.read_bytes():
            raise VerificationError(f"{blob.name} is not for HTP v{arch}", "make the package again")
        root = file.parents[len(Path(artifact.path).parts) - 1]
        with htp.htp_session(file, arch, graph=False) as opened:
            found = _outputs(opened.session, artifact, samples)
        with htp.htp_session(root / dict(artifact.options)["model"], arch, graph=False) as opened:
            direct = _outputs(opened.session, artifact, samples)
        for have, want in zip(found, direct, strict=True):
            for name, values in want.items():
                if not np.array_equal(have[name], values):
                    raise VerificationError(
                        f"{blob.name} gives another {name!r} than the model that it was compiled from",
                        "make the package again",
                    )
        return found, (f"{blob.name} ({blob.stat().st_size} bytes) loads, and gives what the model gives there",)

    return run


def _blob(wrapper: Path) -> Path:
    """The binary that a wrapper names.

    Raises:
        ExportError: It names none beside it.
    """
    nodes = [node for node in onnx.load(str(wrapper)).graph.node if node.op_type == "EPContext"]
    named = [a.s.decode() for node in nodes for a in node.attribute if a.name == "ep_cache_context"]
    if len(named) != 1 or Path(named[0]).name != named[0] or not (wrapper.parent / named[0]).is_file():
        raise ExportError(f"{wrapper.name} names no context binary beside it", "make the package again")
    return wrapper.parent / str(named[0])


# -- AIMET


def _run_aimet(file: Path, artifact: Artifact, samples: Sequence[Sample]) -> tuple[Sequence[Sample], tuple[str, ...]]:
    from aimet_onnx import QuantizationSimModel, quantsim

    encodings = file.parent / dict(artifact.options)["encodings"]
    try:
        simulation = QuantizationSimModel(onnx.load(str(file)), config_file="htp_v73")
        # not strict: its rules ask symmetric codes of the second factor of a product, which Hexagon does not need
        mismatches = quantsim.load_encodings_to_sim(simulation, str(encodings), strict=False)
        # its session has names of its own
        names = [contract.name for contract in artifact.outputs]
        found = [dict(zip(names, simulation.session.run(None, dict(sample)), strict=True)) for sample in samples]
    # AIMET and ONNX Runtime have no common public base of their exceptions
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        raise ExportError(f"AIMET cannot execute {file.name} ({cause})", "make the package again") from error
    enabled = sum(quantizer.enabled for quantizer in simulation.qc_quantize_op_dict.values())
    return found, (f"{enabled} quantizers, settings of {len(mismatches)} other than AIMET's own rules for HTP v73",)


def _no_aimet() -> Missing | None:
    return None if find_spec("aimet_onnx") else Missing("AIMET (aimet-onnx)", "pip install aimet-onnx")


AIMET = Executor(
    name="aimet",
    accepts=lambda artifact: artifact.format == "onnx-encodings",
    runtime=lambda: f"aimet-onnx {metadata.version('aimet-onnx')}, {platform.machine()}",
    missing=_no_aimet,
    run=_run_aimet,
    bound=AIMET_BOUND,
    optional=True,
)
