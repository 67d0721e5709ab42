"""Programs as plans: every tensor of every kind of operator by an interpreter, layouts, fusions, the file."""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_networks import NETWORKS, SCHEMES, image
from plan_interpreter import differing
from torch import Tensor, nn
from torch.nn import functional as F
from whole_networks import Fn, conv, prepared

import qat
from qat.errors import ExportError
from qat.integer.native.lowering import SegmentPlan, lower_segment
from qat.integer.native.order import groups_of, reshaped
from qat.integer.native.planfile import Grid, Kind, PlanConstant, PlanFile, PlanOp, PlanTensor, Type
from qat.integer.native.segments import reasons, split


def plan_of(model: nn.Module, *inputs: Tensor, single: bool = False, **options: Any) -> SegmentPlan:
    """The plan of a network that is native from end to end."""
    imodel = qat.convert(prepared(model, *inputs, **options))
    segments = split(imodel.program, reasons(imodel.program))
    assert [segment.native for segment in segments] == [True]
    constants = {name: imodel.constants.get_buffer(key) for name, key in imodel._keys.items()}
    return lower_segment(imodel.program, segments[0], constants, single=single)


def kinds(plan: SegmentPlan) -> Counter[Kind]:
    return Counter(op.kind for op in plan.plan.ops)


# results ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("scheme", ["uint8", "arm"])
def test_every_tensor_of_every_operator(name: str, scheme: str) -> None:
    model, inputs = NETWORKS[name]()
    imodel = qat.convert(prepared(model, *inputs, **SCHEMES[scheme]))
    for batch in (3, 1):
        some = tuple(x[:batch] for x in inputs)
        assert differing(imodel, some, every=True) == []
        assert differing(imodel, some, every=False) == []


def test_what_stays_in_pytorch_has_a_reason() -> None:
    model, inputs = NETWORKS["islands"]()
    program = qat.convert(prepared(model, *inputs)).program
    found = reasons(program)
    assert "normalizes" in found["norm:float"]
    assert found["three"] == "3 spatial dimensions"
    segments = split(program, found)
    # everything that does not need an island's result comes first
    assert [segment.native for segment in segments] == [True, False, True, False, True]


# layouts ------------------------------------------------------------------------------------------------------------


def test_a_network_of_convolutions_needs_no_copy() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    plan = plan_of(model, torch.randn(3, 3, 21, 21))
    assert kinds(plan)[Kind.TRANSPOSE] == 0
    assert plan.plan.ops[0].ints == (0, 2, 3, 1)
    sizes = {t.name: t.sizes for t in plan.plan.tensors}
    assert sizes["x:float"] == (-1, 3, 21, 21) if "x:float" in sizes else sizes[plan.plan.inputs[0]] == (-1, 3, 21, 21)


def test_transposes_and_splits_of_channels_are_free() -> None:
    def forward(m: Fn, x: Tensor) -> Tensor:
        y = m.norm(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return m.b(y.reshape(y.shape[0], 2, 2, 9, 7).flatten(1, 2))

    assert kinds(plan_of(Fn(forward, a=conv(), b=conv(), norm=nn.LayerNorm(4)), *image()))[Kind.TRANSPOSE] == 0


def test_a_channel_shuffle_is_one_copy() -> None:
    def forward(m: Fn, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y.reshape(y.shape[0], 2, 2, 9, 7).transpose(1, 2).flatten(1, 2))

    assert kinds(plan_of(Fn(forward, a=conv(), b=conv()), *image()))[Kind.TRANSPOSE] == 1


@given(st.data())
def test_a_reshape_in_any_order(data: st.DataObject) -> None:
    """The physical reshape gives the logical one, and is free where the order chosen is the one at hand."""
    factors = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=6))

    def merged() -> list[int]:
        cuts = (
            [0, *sorted(data.draw(st.sets(st.integers(1, len(factors) - 1)))), len(factors)]
            if len(factors) > 1
            else [0, 1]
        )
        return [math.prod(factors[a:b]) for a, b in itertools.pairwise(cuts)]

    before, after = merged(), merged()
    order = tuple(data.draw(st.permutations(range(len(before)))))
    wanted = tuple(data.draw(st.permutations(range(len(after)))))
    x = torch.arange(math.prod(factors)).reshape(before)
    source, result = reshaped(before, after, order, wanted)
    physical = x.permute(source).reshape([after[d] for d in result])
    assert torch.equal(physical, x.reshape(after).permute(result))
    groups = groups_of(before, after)
    assert sorted(d for g in groups for d in g.before) == list(range(len(before)))
    assert sorted(d for g in groups for d in g.after) == list(range(len(after)))


def test_the_batch_is_never_merged_by_mistake() -> None:
    assert [(g.before, g.after) for g in groups_of((-4, 6), (-1, 4, 2, 3))] == [((0,), (0, 1)), ((1,), (2, 3))]


# fusions ------------------------------------------------------------------------------------------------------------


def test_residual_additions_are_part_of_a_convolution() -> None:
    model, inputs = NETWORKS["residuals"]()
    plan = plan_of(model, *inputs)
    # of seven convolutions six have one reader, an addition
    assert kinds(plan)[Kind.CONV] == 7
    assert kinds(plan)[Kind.TABLE] == 1
    assert kinds(plan)[Kind.ADD] == 1
    residuals = [op for op in plan.plan.ops if op.kind == Kind.CONV and op.inputs[7]]
    assert len(residuals) == 4


def test_clamps_narrow_the_range_of_what_is_before_them() -> None:
    model = Fn(lambda m, x: F.relu(m.a(x)) + F.relu(m.b(x)), a=conv(), b=conv())
    plan = plan_of(model, *image(), target="arm-cpu", scheme={"activations": {"dtype": "int8", "symmetric": True}})
    assert kinds(plan)[Kind.TABLE] == 0
    assert all(op.ints[11] == op.ints[10] for op in plan.plan.ops if op.kind == Kind.CONV)


def test_an_activation_by_table_is_part_of_a_layer() -> None:
    plan = plan_of(nn.Sequential(conv(), nn.Hardswish(), nn.Flatten(), nn.Linear(252, 3), nn.Sigmoid()), *image())
    layers = [op for op in plan.plan.ops if op.kind == Kind.CONV]
    assert len(layers) == 2
    assert all(op.inputs[8] for op in layers)
    assert kinds(plan)[Kind.TABLE] == 0


def test_a_result_with_two_readers_stays() -> None:
    def forward(m: Fn, x: Tensor) -> Tensor:
        y = m.a(x)
        return F.hardswish(y) + y

    model = Fn(forward, a=conv())
    plan = plan_of(model, *image())
    assert kinds(plan)[Kind.TABLE] == 1
    assert kinds(plan)[Kind.ADD] == 1


# the file -----------------------------------------------------------------------------------------------------------

GRID = Grid(0.5, 3, 0, 255)
SMALL = PlanFile(
    tensors=(PlanTensor("x", Type.U8, (-1, 2), GRID), PlanTensor("y", Type.U8, (-1, 2), GRID)),
    constants=(PlanConstant("t", Type.U8, (256,), bytes(range(256)), GRID),),
    ops=(PlanOp(Kind.TABLE, "f", ("x", "t"), "y"),),
    inputs=("x",),
    outputs=("y",),
)


def test_the_bytes_are_those_of_the_page() -> None:
    data = SMALL.to_bytes()
    assert data[:8] == b"QATPLAN\0"
    version, crc, size, start, profile, *counts = struct.unpack_from("<IIQQIIIIII", data, 8)
    assert (version, size, profile, counts) == (1, len(data), 0, [2, 1, 1, 1, 1])
    assert crc == zlib.crc32(data[16:])
    assert start % 64 == 0
    assert data[start:] == bytes(range(256))
    grid = struct.pack("<fiiiB", 0.5, 3, 0, 255, 0)
    assert data[64:].startswith(struct.pack("<I", 1) + b"x" + struct.pack("<BBqq", 1, 2, -1, 2) + grid)
    operator = struct.pack("<HI", 23, 1) + b"f" + struct.pack("<Hiii", 2, 0, 2, 1) + struct.pack("<HH", 0, 0)
    assert operator + struct.pack("<II", 0, 1) in data[:start]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ()}, "f: reads 'x', which nothing has written"),
        ({"outputs": ("z",)}, "'z', which is no tensor"),
        ({"constants": ()}, "f: reads 't'"),
        ({"ops": (*SMALL.ops, *SMALL.ops)}, "f: writes 'y', which is no tensor, or was written before"),
        ({"tensors": (*SMALL.tensors, SMALL.tensors[0])}, "'x' names two things"),
        ({"constants": (replace(SMALL.constants[0], sizes=(255,)),)}, r"'t' of a plan has 256 bytes for \(255,\)"),
        ({"tensors": (SMALL.tensors[0], replace(SMALL.tensors[1], type=Type.S4))}, "'y' of a plan has 4 bits"),
    ],
)
def test_a_plan_that_contradicts_itself_is_not_written(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        replace(SMALL, **change).to_bytes()
