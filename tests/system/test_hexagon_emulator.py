"""The Hexagon target files against Qualcomm's HTP emulator: what they call integer is, and what they refuse is not.

Every operator is exported alone and executed in strict mode. The inputs lie on the grid, so that no rounding of the
emulator's own quantization is counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hexagon_cases import CASES, Inputs
from torch import Tensor, nn

import qat
from qat.errors import ExportError, PlanError
from qat.integer.model import IntegerModel
from qat.targets import OperatorRule, Target
from qat.torchvision import import_torchvision

pytest.importorskip("onnxruntime_qnn")

from qat.export.htp import htp_session, read_graph

#: refused although the emulator has an integer operator for it: `case activations [weights granularity]` -> why
REFUSED_ALL_THE_SAME = {
    "pad int8": "wrong: executed with code 0 as padding",
    "pad_value int8": "right, but the rule of pad does not tell values apart",
    "pad_reflect int8": "right, but the rule of pad does not tell modes apart by type",
    "log uint16": "wrong by the whole range",
}
#: several operators: codes of 8 bits
SEVERAL = {"conv_silu": 3, "conv_silu_depthwise": 3}
#: codes that one operator may differ by on v73 and later
TOLERANCE = {"uint8": 1.0, "int8": 1.0, "uint16": 8.0}
#: 16-bit results of approximations: their own bounds, in codes of 65536, on every generation
APPROXIMATE = {"matmul": 400, "softmax": 64, "softmax_channels": 64, "softplus": 128, "mish": 256, "sqrt": 128,
               "reciprocal": 64, "gelu": 32, "div": 16, "concat_requantized": 128}  # fmt: skip
#: v68 and v69: 16-bit products
OLD = 40.0


def scheme(activations: str, weights: str = "int8", granularity: str = "per_channel") -> dict[str, Any]:
    return {
        "activations": {"dtype": activations, "observer": "minmax"},
        "weights": {"dtype": weights, "symmetric": weights.startswith("int"), "granularity": granularity},
    }


def permissive(target: Target) -> Target:
    """The target with every operator, function and type legal: what a user would get who did not ask."""
    names = ("uint8", "int8", "uint16", "int16")
    pairs = frozenset(itertools.product(names, ("", "int8", "uint8", "int4", "uint4", "int16")))
    free = OperatorRule(pairs, frozenset({"per_tensor", "per_channel"}))
    own = qat.load_target("onnxruntime-cpu").operators
    rules = {kind: replace(free, output="own" if rule.output == "fixed" else rule.output) for kind, rule in own.items()}
    del rules["rescale"]
    known = {kind: replace(rule, dtypes=pairs, granularity=free.granularity) for kind, rule in target.operators.items()
             if kind in ("softmax", "resize")}  # fmt: skip
    return replace(target, operators={**rules, **known}, mixed_dtypes=True)


def forecast(model: nn.Module, inputs: Inputs, target: Target, given: Mapping[str, Any]) -> bool:
    """Whether the plan calls every operator integer."""
    try:
        made = qat.plan(model, inputs, target=target, scheme=given)
    except PlanError:
        return False
    return all(made.forecast(entry) in (None, "integer") for entry in made)


def export(model: nn.Module, inputs: Inputs, target: Target, given: Mapping[str, Any], path: Path) -> IntegerModel:
    qmodel = qat.prepare(model, inputs, target=target, scheme=given)
    qat.calibrate(qmodel, [inputs])
    qat.export_onnx(qmodel, path, verify=False)
    return qat.convert(qmodel)


def on_grid(imodel: IntegerModel, inputs: Inputs) -> Inputs:
    """The inputs, rounded to what their codes stand for."""
    program = imodel.program
    grids = {op.inputs[0]: program.tensors[op.outputs[0]].encoding for op in program.ops if op.kind == "quantize"}
    held = zip(program.inputs, inputs, strict=True)
    return tuple(x if (e := grids.get(name)) is None else e.dequantize(e.quantize(x)) for name, x in held)


def difference(imodel: IntegerModel, session: Any, inputs: Inputs) -> Tensor:
    """Differences of the output, in codes."""
    program = imodel.program
    feeds = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
    got = torch.from_numpy(session.run(None, feeds)[0])
    encoding = next(program.tensors[op.inputs[0]].encoding for op in program.ops if op.outputs == program.outputs)
    assert encoding is not None
    with torch.no_grad():
        return (got - imodel(*inputs)).abs() / encoding.scale[0]


def check(name: str, activations: str, arch: int, folder: Path, **weights: str) -> None:
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    model.eval()
    target, given = qat.load_target(f"hexagon-v{arch}"), scheme(activations, **weights)
    integer = forecast(model, inputs, target, given)
    imodel = export(model, inputs, target if integer else permissive(target), given, folder / "m.onnx")
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(htp_session(folder / "m.onnx", arch))
        except ExportError as error:
            if integer:
                raise AssertionError(f"{name} is called integer, and falls back") from error
            return
        floats = opened.graph.floats
        why = REFUSED_ALL_THE_SAME.get(f"{name} {activations}", "")
        if integer or why:
            found = float(difference(imodel, opened.session, on_grid(imodel, inputs)).max())
    if not integer:
        assert floats or why
        # an exception that has become right is none any longer
        assert not why.startswith("wrong") or found > 10 * TOLERANCE[activations]
        return
    assert floats == ()
    bound = max(TOLERANCE[activations], SEVERAL.get(name, 0))
    if activations == "uint16":
        bound = max(
            bound, APPROXIMATE.get(name, 0), 2 * OLD if arch < 73 and name in SEVERAL else OLD if arch < 73 else 0
        )
    # float32 arithmetic of the comparison itself
    assert found <= bound + 0.01


@pytest.mark.parametrize("name", [
    "conv_relu6", "conv_transpose_depthwise", "linear", "add_scalar", "softmax", "sigmoid", "silu", "rescale",
    "concat_requantized", "erf",
])  # fmt: skip
def test_forecast_and_emulator_agree(name: str, tmp_path: Path) -> None:
    check(name, "uint8", 73, tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("activations", "arch"), [("uint8", 68), ("uint8", 73), ("uint16", 68), ("uint16", 73), ("int8", 73)]
)
@pytest.mark.parametrize("name", CASES)
def test_every_operator(name: str, activations: str, arch: int, tmp_path: Path) -> None:
    check(name, activations, arch, tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("arch", [69, 75, 79, 81])
@pytest.mark.parametrize("name", ["conv_depthwise", "linear", "sigmoid", "softmax", "silu"])
@pytest.mark.parametrize("activations", ["uint8", "uint16"])
def test_other_generations(name: str, activations: str, arch: int, tmp_path: Path) -> None:
    check(name, activations, arch, tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("arch", [68, 73])
@pytest.mark.parametrize("name", ["conv", "conv_depthwise", "linear"])
@pytest.mark.parametrize(("activations", "weights", "granularity"), [
    ("uint8", "int8", "per_tensor"), ("uint8", "int4", "per_channel"), ("uint8", "uint8", "per_channel"),
    ("uint8", "int16", "per_channel"), ("int8", "uint8", "per_tensor"),
])  # fmt: skip
def test_weights(name: str, activations: str, weights: str, granularity: str, arch: int, tmp_path: Path) -> None:
    check(name, activations, arch, tmp_path, weights=weights, granularity=granularity)


def test_16_bit_weights_begin_with_v73(tmp_path: Path) -> None:
    model, inputs = CASES["conv"]()
    given = scheme("uint16", "int16")
    old, new = qat.load_target("hexagon-v68"), qat.load_target("hexagon-v73")
    assert not forecast(model, inputs, old, given)
    assert forecast(model, inputs, new, given)
    imodel = export(model, inputs, new, given, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="HTP v68 cannot execute all of"), htp_session(tmp_path / "m.onnx", 68):
        pass
    with htp_session(tmp_path / "m.onnx", 73) as opened:
        assert opened.graph.floats == ()
        assert float(difference(imodel, opened.session, on_grid(imodel, inputs)).max()) <= OLD


def test_16_bit_activations_are_nearer_on_v73(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = CASES["conv"]()
    imodel = export(model, inputs, qat.load_target("hexagon-v68"), scheme("uint16"), tmp_path / "m.onnx")
    found = {}
    for arch in (68, 73):
        with htp_session(tmp_path / "m.onnx", arch) as opened:
            found[arch] = float(difference(imodel, opened.session, on_grid(imodel, inputs)).max())
    assert found[73] <= 4.01 < found[68] <= OLD


@pytest.mark.heavy
def test_an_operator_from_8_to_16_bits_falls_back(tmp_path: Path) -> None:
    model, inputs = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)), CASES["conv"]()[1]
    target = qat.load_target("hexagon-v73")
    given = {**scheme("uint8"), "layers": {"1": {"activations": {"dtype": "uint16"}}}}
    entry = qat.plan(model, inputs, target=target, scheme=given)["1"]
    assert "hexagon-v73 has no conv that reads uint8 and writes uint16" in entry.reason
    assert entry.refusal is not None
    assert entry.refusal.nearest == "uint16/int8 read and written"
    export(model, inputs, permissive(target), given, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="cannot execute all"), htp_session(tmp_path / "m.onnx", 73):
        pass


@pytest.mark.heavy
@pytest.mark.parametrize("targets", [("hexagon-v73",), ("arm-cpu", "hexagon-v73", "apu")])
def test_a_network(targets: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = import_torchvision("models").mobilenet_v2(weights=None, num_classes=10)
    images = torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        for _ in range(2):
            model.train()(images)
    target = qat.load_target(*targets)
    made = qat.plan(model.eval(), images, target=target)
    assert made.integer_share == 1.0
    imodel = export(model, (images,), target, scheme("uint8"), tmp_path / "m.onnx")
    inputs = on_grid(imodel, (images,))[0]
    with htp_session(tmp_path / "m.onnx", 73) as opened:
        assert opened.graph.floats == ()
        found = torch.cat([difference(imodel, opened.session, (image[None],)) for image in inputs])
    print(f"largest difference {found.max():.0f} codes, equal {100 * (found < 0.5).float().mean():.1f} %")
    # seen: 2 codes
    assert float(found.max()) <= 4.01


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the HTP emulator has no v66; use one of 68, 69"), htp_session("m.onnx", 66):
        pass
    with pytest.raises(ExportError, match="HTP v73 cannot execute all of"), htp_session(tmp_path / "none.onnx", 73):
        pass
    with pytest.raises(ExportError, match="has written no graph"):
        read_graph(tmp_path)
