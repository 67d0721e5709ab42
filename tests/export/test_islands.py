"""Float islands: PyTorch's exporter, inlined."""

from __future__ import annotations

import onnx
import pytest
import torch
from export_programs import B, Builder, enc, execute, samples, single
from torch import Tensor, nn

from qat.errors import ExportError
from qat.export.onnx import model_bytes, program_to_onnx
from qat.export.verify import verify_onnx
from qat.integer.program import Constant


class Gate(nn.Module):
    """Two inputs, two outputs, parameters, and a shape that depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.cumsum(self.project(x), dim=1)
        return gate * y, gate.reshape(x.shape[0] * 2, -1)


def gated(dynamic: bool = True) -> tuple[Builder, Gate]:
    b, gate = Builder(), Gate().eval()
    x, y = b.input("x", (B, 4, 6), enc()), b.input("y", (B, 4, 6), None)
    first = b.op("island", "neck.gate", (x, y), (B, 4, 6), enc(low=-8.0, high=8.0), call=gate)
    b.tensors["neck.gate#1"] = b.tensors["neck.gate"].__class__("neck.gate#1", (-2, 12))
    op = b.ops[-1]
    b.ops[-1] = op.__class__(op.kind, op.name, op.inputs, (first, "neck.gate#1"), op.attrs, op.call)
    b.output(first)
    b.output("neck.gate#1")
    return b, gate


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_island_with_parameters_is_inlined_under_its_name(dynamic: bool) -> None:
    builder, gate = gated()
    program = builder.program()
    model = program_to_onnx(program, dynamic_batch=dynamic, batch_size=2)
    inputs = samples(program, batch=2) if not dynamic else [*samples(program, batch=1), *samples(program, batch=5)]
    assert verify_onnx(model, program, inputs, execute, level="layers").ok(1)
    inner = [t.name for t in model.graph.initializer if t.dims == [6, 6] or t.dims == [6]]
    assert len(inner) == 2
    assert all(name.startswith("neck.gate/") for name in inner)
    assert "project" in " ".join(inner)
    assert gate.project.weight.requires_grad


def test_no_trace_of_the_exporting_machine_is_left() -> None:
    builder, _ = gated()
    content = model_bytes(program_to_onnx(builder.program()))
    assert b"stack_trace" not in content
    assert b".py" not in content


def test_the_same_island_gives_the_same_bytes() -> None:
    builder, _ = gated()
    first, second = (model_bytes(program_to_onnx(builder.program())) for _ in range(2))
    assert first == second


def test_an_island_that_is_a_plain_function() -> None:
    program = single("island", (B, 8), (B, 8), None, None, call=lambda x: torch.flip(torch.cumsum(x, 1), (1,)))
    assert verify_onnx(program_to_onnx(program), program, samples(program), execute).ok(0.01)


def test_an_island_that_returns_its_input_is_copied() -> None:
    program = single("island", (B, 8), (B, 8), None, None, call=lambda x: x)
    assert verify_onnx(program_to_onnx(program), program, samples(program), execute).ok(0)


def test_an_island_with_control_flow_keeps_its_branches_apart() -> None:
    def choose(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda v: v + 1.0, lambda v: v * 2.0, (x,))

    b = Builder()
    x = b.input("x", (4, 8), None)
    y = b.op("island", "first", (x,), (4, 8), None, call=choose)
    b.output(b.op("island", "second", (y,), (4, 8), None, call=choose))
    program = b.program()
    model = program_to_onnx(program)
    assert "If" in {node.op_type for node in model.graph.node}
    inputs = [(torch.ones(4, 8),), (-torch.ones(4, 8),)]
    for (sample,) in inputs:
        expected = choose(choose(sample))
        from qat.export.runtime import session

        assert torch.equal(torch.from_numpy(session(model_bytes(model)).run(None, {"x": sample.numpy()})[0]), expected)


def test_a_failure_names_the_island_and_the_cause() -> None:
    def unexportable(x: Tensor) -> Tensor:
        raise RuntimeError("this operator needs a licence")

    program = single("island", (B, 8), (B, 8), None, None, call=unexportable)
    with pytest.raises(ExportError, match=r"float island 'block\.y' cannot be exported.*needs a licence") as caught:
        program_to_onnx(program)
    assert "\n" not in str(caught.value)


def test_an_island_with_another_number_of_results_is_refused() -> None:
    program = single("island", (B, 8), (B, 8), None, None, call=lambda x: (x + 1, x - 1))
    with pytest.raises(ExportError, match=r"'block\.y' exports 2 tensors, not 1"):
        program_to_onnx(program)


def test_an_island_without_a_callable_is_refused() -> None:
    with pytest.raises(ExportError, match=r"'block\.y' has no callable"):
        program_to_onnx(single("island", (B, 8), (B, 8), None, None))


def test_constants_are_operands_of_islands_too() -> None:
    k = Constant("anchors", torch.randn(8))
    program = single("island", (B, 8), (B, 8), None, None, (k,), call=lambda x, a: torch.cumsum(x * a, 1))
    model = program_to_onnx(program)
    assert "anchors" in {t.name for t in model.graph.initializer}
    onnx.checker.check_model(model)
    assert verify_onnx(model, program, samples(program), execute).ok(0.01)
