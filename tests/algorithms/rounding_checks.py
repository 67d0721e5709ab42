"""What must hold after any algorithm that rounds weights."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import qat
from qat.algorithms.rounding import Rounding
from qat.graph.prepared import PreparedModel
from qat.integer.lower import lower


def output_error(qmodel: PreparedModel, net_out: Tensor, data: Tensor) -> float:
    """Mean squared error of the fake-quantized model's output."""
    qmodel.eval()
    with torch.no_grad():
        return float((qmodel(data) - net_out).square().mean())


def float_output(qmodel: PreparedModel, data: Tensor) -> Tensor:
    """Output in float."""
    other = copy.deepcopy(qmodel).eval()
    other.set_phase("float")
    with torch.no_grad():
        return other(data)  # type: ignore[no-any-return]


def weight_codes(qmodel: PreparedModel) -> dict[str, Tensor]:
    """Codes of every quantized weight."""
    return {key: quantizer.codes(weight)[0] for key, quantizer, weight in qmodel.weight_quantizers()}


def floors(qmodel: PreparedModel) -> dict[str, Tensor]:
    """What the codes of every quantized weight are when it is rounded down, not clamped."""
    found = {}
    for key, quantizer, weight in qmodel.weight_quantizers():
        steps, _, zero_point = quantizer.steps(weight)
        found[key] = (steps.floor() + zero_point).to(torch.int32)
    return found


def check_rounded(qmodel: PreparedModel, result: Rounding, data: Tensor) -> None:
    """Grids are fixed; a saved state, conversion and export (executed in ONNX Runtime) have the same codes."""
    kept = {key for unit in result.units if unit.kept for key in unit.weights}
    rounded = {key for unit in result.units for key in unit.weights} - kept
    for key, quantizer, weight in qmodel.weight_quantizers():
        if key in rounded:
            assert not quantizer.follows
            assert quantizer.codes(weight)[1].method == result.method
            torch.testing.assert_close(quantizer(weight), weight.detach(), rtol=1e-6, atol=0)
    codes = weight_codes(qmodel)
    other = copy.deepcopy(qmodel)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(qmodel.state_dict())
    assert all(torch.equal(codes[key], again) for key, again in weight_codes(other).items())
    qmodel.eval()
    constants = lower(qmodel).constants
    assert all(torch.equal(codes[key], constants[key].value.to(torch.int32)) for key in codes)
    with torch.no_grad():
        simulated = qmodel(data)
    # biases are integers in one of them
    step = qmodel.encodings()[qmodel.opgraph.outputs[0]].scale[0]
    assert float((qat.convert(qmodel)(data) - simulated).abs().max()) <= 2.01 * step
    with tempfile.TemporaryDirectory() as folder:
        qat.export_onnx(qmodel, Path(folder) / "model.onnx")


def trains(qmodel: PreparedModel, data: Tensor) -> bool:
    """Whether a few steps of training move codes and lower a loss."""
    before = weight_codes(qmodel)
    qmodel.train()
    qmodel.set_phase("track")
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(qmodel(data), torch.zeros(()).expand_as(qmodel(data)))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    after = weight_codes(qmodel)
    return losses[-1] < losses[0] and any(not torch.equal(before[key], after[key]) for key in before)
