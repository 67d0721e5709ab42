"""Random networks, whose tensors live shorter and longer and are several outputs: no result overwrites another one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import Plan, PlanWriter, Session
from runtime_cases import codes
from runtime_networks import A
from torch import Tensor

from qat import native
from qat.integer.kernels import elementwise

pytestmark = pytest.mark.skipif(not native.status().active, reason=f"native extension: {native.status().reason}")

REVERSED = 255 - torch.arange(256)
KINDS = ("table", "roll", "add", "sub", "concat", "reshape", "transpose", "slice", "matmul", "conv", "expand")


class Network:
    """A plan, and the value of each of its tensors; all are (2 N, rows, columns), so that all operators fit."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.w = PlanWriter()
        self.values: dict[str, Tensor] = {}
        self.w.constant("reversed", "u8", REVERSED)
        self.w.constant("scales", "f32", torch.ones(6))
        self.w.constant("unit", "s8", torch.eye(6)[:, None, None, :])

    def define(self, value: Tensor) -> str:
        name = f"t{len(self.values)}"
        self.w.tensor(name, "u8", [-2, *value.shape[1:]], A)
        self.values[name] = value.to(torch.int32)
        return name

    def add(self, kind: str, x: str, other: str) -> None:
        """Append an operator on tensors of (2 N, 6, 6); what it makes gets these sizes, too."""
        a, b = self.values[x], self.values[other]
        if kind == "table":
            self.w.op("table", [x, "reversed"], self.define(255 - a))
        elif kind == "roll":
            self.w.op("roll", [x], self.define(a.roll((1, 2), (0, 2))), [1, 0, 2])
        elif kind in {"add", "sub"}:
            self.w.op(kind, [x, other], self.define(getattr(elementwise, kind)(a, A, b, A, A)))
        elif kind == "concat":
            both = self.define(torch.cat([a, b], 2))
            self.w.op("concat", [x, other], both, [2])
            self.w.op("slice", [both], self.define(self.values[both][:, :, 3:9]), [0, 0, 3, 1, 1, 1])
        elif kind == "reshape":
            flat = self.define(a.reshape(-1, 4, 9))
            self.w.op("reshape", [x], flat)
            self.w.op("roll", [flat], self.define(self.values[flat].roll(1, 1)), [0, 1, 0])
            last = list(self.values)[-1]
            self.w.op("reshape", [last], self.define(self.values[last].reshape(-1, 6, 6)))
        elif kind == "transpose":
            self.w.op("transpose", [x], self.define(a.transpose(1, 2)), [0, 2, 1])
        elif kind == "slice":
            self.w.op("slice", [x], self.define(a.flip(1)), [0, 5, 0, 1, -1, 1])
        elif kind == "expand":
            row = self.define(a[:, 2:3])
            self.w.op("slice", [x], row, [0, 2, 0, 1, 1, 1])
            self.w.op("expand", [row], self.define(self.values[row].expand(-1, 6, 6)))
        elif kind == "matmul":
            exact = (a - A.zero_point) @ (b - A.zero_point)
            scaled = (exact.float() * (torch.tensor(A.scale) * A.scale / A.scale)).round()
            self.w.op("matmul", [x, other], self.define((scaled + A.zero_point).clamp(0, 255)), [0])
        else:
            self._conv(x, other)

    def _conv(self, x: str, other: str) -> None:
        """The codes of x as they are, and `other` added to them."""
        images = []
        for name in (x, other):
            images.append(self.define(self.values[name][:, None]))
            self.w.op("reshape", [name], images[-1])
        total = elementwise.add(self.values[x], A, self.values[other], A, A)
        y = self.define(total[:, None])
        inputs = {"x": images[0], "weight": "unit", "scales": "scales", "residual": images[1]}
        self.w.conv("c", inputs, y, ("u8", A))
        self.w.op("reshape", [y], self.define(total))


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=12),
    outputs=st.lists(st.integers(0, 99), min_size=1, max_size=4),
    batch=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_random_network(steps: list[tuple[str, int, int]], outputs: list[int], batch: int, seed: int) -> None:
    network = Network(batch)
    inputs = [network.define(codes(A, 2 * batch, 6, 6, seed=seed + i)) for i in range(2)]
    for kind, first, second in steps:
        square = [name for name, value in network.values.items() if value.shape[1:] == (6, 6)]
        # recent tensors, so that chains become long
        network.add(kind, square[-1 - first % min(len(square), 3)], square[-1 - second % len(square)])
    names = list(network.values)
    taken = [names[-1 - i % len(names)] for i in outputs]
    session = Session(Plan(network.w.to_bytes(inputs, taken)), batch)
    results = session.run(*(network.values[name].to(torch.uint8) for name in inputs))
    for name, result in zip(taken, results, strict=True):
        assert torch.equal(result.to(torch.int32), network.values[name]), name
