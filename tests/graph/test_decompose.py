"""SiLU and Mish on targets that have no table for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.graph.decompose import GATES

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
HEXAGON = qat.load_target("hexagon-v73")


class Net(nn.Module):
    def __init__(self, activation: Callable[[], nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 6, 3), activation(), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.head(self.act(self.conv(x))))


def forecast(model: nn.Module, target: qat.Target, **scheme: Any) -> dict[str, str]:
    made = qat.plan(model, X, target=target, scheme=scheme)
    return {entry.name: f"{entry.kind} {made.forecast(entry)}" for entry in made if made.forecast(entry)}


def test_silu_is_sigmoid_and_product() -> None:
    assert forecast(Net(), HEXAGON) == {
        "conv": "conv integer", "act.sigmoid": "table integer", "act": "mul integer", "head": "conv integer",
        "act#2.sigmoid": "table integer", "act#2": "mul integer",
    }  # fmt: skip


def test_mish_is_three_operators() -> None:
    found = forecast(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Mish(inplace=True)), HEXAGON)
    assert found == {"0": "conv integer", "1.softplus": "table integer", "1.tanh": "table integer", "1": "mul integer"}


@pytest.mark.parametrize("function", [F.silu, F.mish])
def test_the_function_stays_the_same(function: Callable[[Tensor], Tensor]) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.conv(x))

    model = Functional().eval()
    qmodel = qat.prepare(model, X, target=HEXAGON)
    torch.testing.assert_close(qmodel(X), model(X), rtol=1e-5, atol=1e-6)
    assert qmodel.float_state_dict().keys() == model.state_dict().keys()


def test_targets_with_a_table_keep_it() -> None:
    assert forecast(Net(), qat.load_target("arm-cpu"))["act"] == "table integer"
    # one network serves both
    both = qat.load_target("arm-cpu", "hexagon-v73")
    assert forecast(Net(), both)["act"] == "mul integer"


def test_no_target_gets_what_it_has_not() -> None:
    assert "act.sigmoid" not in forecast(Net(), qat.load_target("mace-cpu"))  # neither sigmoid nor mul


def test_what_is_kept_float_is_not_taken_apart() -> None:
    made = qat.plan(Net(), X, target=HEXAGON, scheme={"layers": {"act": "float"}})
    assert made["act"].kind == "table"
    assert "act.sigmoid" not in made.entries


def test_a_name_that_is_taken() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 1), nn.SiLU()
            self.act.sigmoid = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.conv(x))
            return self.act.sigmoid(x)

    found = forecast(Taken(), HEXAGON)
    assert {"act.sigmoid", "act.sigmoid#2"} <= found.keys()


def test_simulation_is_what_onnx_runtime_computes(tmp_path: Any) -> None:
    qmodel = qat.prepare(Net().eval(), X, target=HEXAGON)
    with pytest.warns(UserWarning, match="calibrated on"):
        qat.calibrate(qmodel, [X], progress=False)
    result = qat.export_onnx(qmodel, tmp_path / "m.onnx", verify="layers")
    assert result.verification is not None
    assert result.verification.worst.max_difference <= 1
    with torch.no_grad():
        apart = (qmodel(X) - qat.convert(qmodel)(X)).abs().max()
    assert apart <= 2 * qmodel.encodings()["act#2"].scale[0]


def test_every_gate_is_a_function_of_targets() -> None:
    from qat.targets.rule import FUNCTIONS

    assert {*GATES, *(name for gates in GATES.values() for name, _ in gates)} <= FUNCTIONS


def test_16_bit_factors_are_computed_on_rows(tmp_path: Any) -> None:
    qmodel = qat.prepare(Net(nn.Mish).eval(), X, target=HEXAGON, scheme={"activations": {"dtype": "uint16"}})
    assert [e.name for e in qmodel.plan if e.role == "activation" and "#2" not in e.name] == [
        "conv", "act.flatten", "act.softplus", "act.tanh", "act.reshape", "act", "head"
    ]  # fmt: skip
    torch.testing.assert_close(qmodel(X[:2]), Net.forward(qmodel, X[:2]), rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="calibrated on"):
        qat.calibrate(qmodel, [X], progress=False)
    result = qat.export_onnx(qmodel, tmp_path / "m.onnx", dynamic_batch=False)
    assert result.verification is not None
    # a product of two codes of 16 bits
    assert result.verification.worst.max_difference <= 16
    rows = qat.plan(nn.Sequential(nn.Linear(8, 4), nn.SiLU()), torch.randn(2, 8), target=HEXAGON,
                    scheme={"activations": {"dtype": "uint16"}})  # fmt: skip
    assert "1.flatten" not in rows.entries
