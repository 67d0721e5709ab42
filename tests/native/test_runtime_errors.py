"""What the native runner refuses: a status, and a message that names the tensor or operator, the cause and the mend."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plans import STATUSES, Plan, PlanWriter, RunnerError, Session, library, sealed
from runtime_cases import codes, convolution, layers
from runtime_networks import A, E, attention, chain

from qat import native
from qat.integer.kernels.qparams import QParams

pytestmark = pytest.mark.skipif(not native.status().active, reason=f"native extension: {native.status().reason}")


def refused(plan: bytes, status: str, *words: str, batch: int | None = None) -> None:
    """Loading the plan, or a session of it, fails with this status and these words."""
    loaded = Plan(plan) if batch is not None else None
    with pytest.raises(RunnerError) as caught:
        Plan(plan) if loaded is None else Session(loaded, batch or 0)
    assert caught.value.status == status
    for word in words:
        assert word in caught.value.message
    # cause, then mend
    assert "; " in caught.value.message


def test_status_names() -> None:
    assert [library().qat_status_name(i).decode() for i in range(9)] == STATUSES
    assert library().qat_status_name(99) == b"unknown status"


def test_foreign_bytes() -> None:
    refused(b"", "QAT_NOT_A_PLAN", "plan")
    refused(b"QAT", "QAT_NOT_A_PLAN", "plan")
    refused(b"PK\3\4" + bytes(100), "QAT_NOT_A_PLAN", "plan")


def test_other_version() -> None:
    plan = chain()
    refused(plan[:8] + struct.pack("<I", 2) + plan[12:], "QAT_UNSUPPORTED_VERSION", "version 2")


def test_every_truncation() -> None:
    plan = attention()
    for size in range(8, len(plan)):
        refused(plan[:size], "QAT_TRUNCATED", "plan")


def test_every_record_cut_short() -> None:
    """The size and the checksum are right, but the records end too early."""
    plan = attention()
    start = struct.unpack_from("<Q", plan, 24)[0]
    for cut in range(64, start, 64):
        short = plan[:16] + struct.pack("<QQ", cut, cut) + plan[32:cut]
        refused(sealed(short), "QAT_INVALID_PLAN")


def test_every_changed_byte_is_noticed() -> None:
    plan = attention()
    for i in range(16, len(plan), 7):
        changed = plan[:i] + bytes([plan[i] ^ 16]) + plan[i + 1 :]
        with pytest.raises(RunnerError) as caught:
            Plan(changed)
        assert caught.value.status in {"QAT_CORRUPT", "QAT_TRUNCATED", "QAT_INVALID_PLAN"}


def test_more_bytes_than_stated() -> None:
    refused(chain() + b"\0", "QAT_INVALID_PLAN", "followed by other bytes")


def roll(sizes: list[int], q: QParams = A, kind: str = "u8") -> PlanWriter:
    w = PlanWriter()
    w.tensor("x", kind, sizes, q)
    w.tensor("y", kind, sizes, q)
    w.op("roll", ["x"], "y", [1] * len(sizes))
    return w


def test_sizes() -> None:
    refused(roll([-1, 0]).to_bytes(["x"], ["y"]), "QAT_INVALID_PLAN", "'x'")
    refused(roll([-1, 1 << 20, 1 << 12]).to_bytes(["x"], ["y"]), "QAT_INVALID_PLAN", "'x'", "2 GiB")
    refused(roll([-(1 << 63)]).to_bytes(["x"], ["y"]), "QAT_INVALID_PLAN", "'x'")
    refused(roll([-1] * 8 + [2]).to_bytes(["x"], ["y"]), "QAT_INVALID_PLAN", "'x'", "8 dimensions")


def test_sizes_that_only_a_batch_makes_too_large() -> None:
    plan = roll([-1, 1 << 20]).to_bytes(["x"], ["y"])
    assert Session(Plan(plan), 1, memory_limit=1 << 30).arena_bytes < 1 << 20
    refused(plan, "QAT_INVALID_PLAN", "'x'", batch=1 << 11)
    refused(plan, "QAT_INVALID_PLAN", "'x'", batch=1 << 62)


def test_a_shape_that_fits_one_batch_size_only() -> None:
    w = PlanWriter()
    w.tensor("x", "u8", [-1, 4], A)
    w.tensor("y", "u8", [4], A)
    w.op("reshape", ["x"], "y")
    plan = w.to_bytes(["x"], ["y"])
    assert Session(Plan(plan), 1).run(torch.zeros(1, 4, dtype=torch.uint8))[0].shape == (4,)
    refused(plan, "QAT_INVALID_PLAN", "'reshape.0'", "elements", batch=2)


@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        ("u8", (0.0, 0, 0, 255)), ("u8", (float("nan"), 0, 0, 255)), ("u8", (float("inf"), 0, 0, 255)),
        ("u8", (-0.1, 0, 0, 255)), ("u8", (0.1, 256, 0, 255)), ("u8", (0.1, 0, -1, 255)), ("s8", (0.1, 0, -128, 128)),
        ("u8", (0.1, 9, 10, 9)), ("s16", (0.1, 40000, 0, 9)),
    ],
)  # fmt: skip
def test_grids(kind: str, grid: tuple[float, int, int, int]) -> None:
    w = roll([-1, 4], A, kind)
    record = struct.pack("<fiiiB", A.scale, A.zero_point, A.qmin, A.qmax, A.wide)
    w.tensors["x"] = w.tensors["x"].replace(record, struct.pack("<fiiiB", *grid, 0))
    refused(w.to_bytes(["x"], ["y"]), "QAT_INVALID_PLAN", "'x'", "scale, zero point or range")


def test_order_of_operators() -> None:
    w = PlanWriter()
    for name in ("x", "y", "z"):
        w.tensor(name, "u8", [4], A)
    w.op("roll", ["y"], "z", [1])
    w.op("roll", ["x"], "y", [1])
    refused(w.to_bytes(["x"], ["z"]), "QAT_INVALID_PLAN", "'roll.0'", "'y'", "before it is written")
    w.ops = [("roll", ["x"], "y", [1], []), ("roll", ["x"], "y", [1], [])]
    refused(w.to_bytes(["x"], ["y"]), "QAT_INVALID_PLAN", "'roll.1'", "written before")
    w.ops = [("roll", ["x"], "y", [1], [])]
    refused(w.to_bytes(["x"], ["y"]), "QAT_INVALID_PLAN", "'z'", "nothing writes it")
    w.ops.append(("roll", ["x"], "x", [1], []))
    refused(w.to_bytes(["x"], ["y"]), "QAT_INVALID_PLAN", "'roll.1'", "written before")


Change = Callable[[PlanWriter], None]


def _ints(w: PlanWriter, index: int, value: int) -> None:
    kind, inputs, output, ints, floats = w.ops[0]
    w.ops[0] = (kind, inputs, output, [*ints[:index], value, *ints[index + 1 :]], floats)


def images(kind: str, y: list[int], ints: list[int], constants: dict[str, torch.Tensor] | None = None) -> PlanWriter:
    w = PlanWriter()
    w.tensor("x", "u8", [-1, 5, 6, 7], A)
    w.tensor("y", "u8", y, A)
    names = []
    for name, values in (constants or {}).items():
        names.append(w.constant(name, "f32" if values.is_floating_point() else "s32", values))
    w.op(kind, ["x", *names], "y", ints)
    return w


@pytest.mark.parametrize(
    ("kind", "y", "ints", "cause"),
    [
        ("transpose", [-1, 5, 6, 7], [0, 1, 2, 2], "occurs twice"),
        ("transpose", [-1, 5, 6, 7], [0, 1, 2, 4], "outside of"),
        ("transpose", [-1, 5, 6, 7], [0, 2, 1, 3], "sizes of y"),
        ("transpose", [-1, 5, 6, 7], [0, 1, 2], "wrong number of integers"),
        ("slice", [-1, 2, 6, 7], [0, 4, 0, 0, 1, 1, 1, 1], "outside of x"),
        ("slice", [-1, 2, 6, 7], [0, 0, 0, 0, 1, -1, 1, 1], "outside of x"),
        ("slice", [-1, 2, 6, 7], [0, 0, 0, 0, 1, 0, 1, 1], "outside of x"),
        ("slice", [-1, 2, 6, 7], [0, 0, 0, 0, 1, 1 << 62, 1, 1], "step"),
        ("expand", [-1, 5, 12, 7], [], "do not broadcast"),
        ("roll", [-1, 5, 7, 6], [0, 0, 0, 0], "different sizes"),
        ("pad", [-1, 5, 6, 8], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1], "sizes of x with its padding"),
        ("pad", [-1, 5, 6, 14], [1, 0, 0, 0, 0, 0, 0, 0, 7, 0], "outside of"),
        ("pad", [-1, 5, 6, 8], [3, 0, 0, 0, 0, 0, 0, 0, 1, 0], "mode"),
        ("max_pool", [-1, 5, 6, 7], [2, 2, 1, 1, 0, 0, 0, 0, 1, 0], "dilation"),
        ("max_pool", [-1, 9, 6, 7], [2, 1, 1, 1, 0, 0, 0, 0, 1, 1], "no element of x"),
        ("max_pool", [-1, 5, 6, 7], [2, 1, 1, 1, 2, 0, 0, 0, 1, 1], "no element of x"),
        ("avg_pool", [-1, 5, 6, 6], [1, 1, 1, 1, 0, 0, 0, 0, 1], "channels"),
        ("avg_pool", [-1, 5, 6, 7], [1, 1, 0, 1, 0, 0, 0, 0, 1], "stride"),
        ("mean", [-1, 7], [1, 4], "axis"),
        ("mean", [-1, 7], [1, 1], "occurs twice"),
        ("mean", [-1, 6], [1, 2], "other sizes"),
        ("softmax", [-1, 5, 6, 7], [4], "axis"),
        ("softmax", [-1, 5, 6, 7], [-1], "axis"),
        ("concat", [-1, 5, 6, 8], [3], "shorter"),
        ("concat", [-1, 5, 6, 6], [3], "longer"),
        ("reshape", [-1, 211], [], "elements"),
    ],
)
def test_operators(kind: str, y: list[int], ints: list[int], cause: str) -> None:
    refused(images(kind, y, ints).to_bytes(["x"], ["y"]), "QAT_INVALID_PLAN", f"'{kind}.0' ({kind})", cause)


@pytest.mark.parametrize(
    ("name", "values", "cause"),
    [
        ("rows", torch.tensor([0, 5]), "outside of x"),
        ("rows", torch.tensor([-1, 0]), "outside of x"),
        ("columns", torch.tensor([0, 1, 2, 3]), "3 elements"),
        ("columns", torch.tensor([0.0, 1.0, 2.0]), "constant of its type"),
    ],
)
def test_indices(name: str, values: torch.Tensor, cause: str) -> None:
    constants = {"rows": torch.tensor([0, 4]), "columns": torch.tensor([0, 5, 5]), name: values}
    plan = images("resize_nearest", [-1, 2, 3, 7], [], constants).to_bytes(["x"], ["y"])
    refused(plan, "QAT_INVALID_PLAN", "'resize_nearest.0'", cause)


def conv_writer() -> PlanWriter:
    w = PlanWriter()
    w.tensor("x", "u8", [-1, 5, 5, 8], A)
    w.tensor("y", "u8", [-1, 5, 5, 6], A)
    w.constant("weight", "s8", torch.ones(6, 1, 1, 8))
    w.constant("scales", "f32", torch.full((6,), 0.01))
    w.conv("c", {"x": "x", "weight": "weight", "scales": "scales"}, "y", ("u8", A))
    return w


@pytest.mark.parametrize(
    ("index", "value", "cause"),
    [
        (0, 0, "stride"), (1, 1 << 40, "stride"), (2, -1, "padding"), (4, 0, "dilation"), (6, 3, "channels"),
        (6, 0, "groups"), (7, 2, "transposed"), (9, 5, "own type"), (9, 2, "own result"), (10, 300, "own result"),
        (11, -1, "own result"),
    ],
)  # fmt: skip
def test_integers_of_convolutions(index: int, value: int, cause: str) -> None:
    w = conv_writer()
    assert Plan(w.to_bytes(["x"], ["y"])).lib
    _ints(w, index, value)
    refused(w.to_bytes(["x"], ["y"]), "QAT_INVALID_PLAN", "'conv.0' (conv)", cause)


@pytest.mark.parametrize(
    ("slot", "kind", "values", "cause"),
    [
        ("scales", "f32", torch.full((5,), 0.01), "6 elements"),
        ("scales", "f32", torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.0]), "positive"),
        ("weight", "s8", torch.ones(6, 1, 1, 7), "channels"),
        ("weight", "s8", torch.ones(5, 1, 1, 8), "channels"),
        ("zero_points", "s32", torch.full((6,), 128), "zero point"),
        ("bias", "s32", torch.zeros(7), "6 elements"),
        ("bias", "f32", torch.zeros(6), "constant of its type"),
        ("table", "u8", torch.zeros(255), "256 elements"),
        ("multipliers", "s32", torch.zeros(6), "profile tflite"),
    ],
)
def test_constants_of_convolutions(slot: str, kind: str, values: torch.Tensor, cause: str) -> None:
    w = PlanWriter()
    w.tensor("x", "u8", [-1, 5, 5, 8], A)
    w.tensor("y", "u8", [-1, 5, 5, 6], A)
    given = {
        "weight": ("s8", torch.ones(6, 1, 1, 8)), "scales": ("f32", torch.full((6,), 0.1)), slot: (kind, values)
    }  # fmt: skip
    for name, (of, data) in given.items():
        w.constant(name, of, data)
    w.conv("c", {"x": "x"} | {name: name for name in given}, "y", ("u8", A))
    refused(w.to_bytes(["x"], ["y"]), "QAT_INVALID_PLAN", "'conv.0' (conv)", cause)


def test_scales_whose_product_is_infinite() -> None:
    w = conv_writer()
    w.tensor("x", "u8", [-1, 5, 5, 8], QParams(1e37, 3, 0, 255))
    w.constant("scales", "f32", torch.full((6,), 1e3))
    refused(w.to_bytes(["x"], ["y"]), "QAT_INVALID_PLAN", "'conv.0' (conv)", "scale of the weight is too large")


def test_arguments() -> None:
    lib, plan = library(), Plan(chain())
    handle = ctypes.c_void_p()
    assert lib.qat_plan_load(None, 0, ctypes.byref(handle)) == 1
    assert b"bytes: is null" in lib.qat_last_error()
    assert lib.qat_session_create(plan.handle, 1, None, None) == 1
    assert lib.qat_session_run(None, None, None) == 1
    for batch in (0, -1):
        with pytest.raises(RunnerError, match=r"QAT_INVALID_ARGUMENT: batch"):
            Session(plan, batch)
    for threads in (-1, 1025):
        with pytest.raises(RunnerError, match=r"QAT_INVALID_ARGUMENT: threads"):
            Session(plan, 1, threads=threads)
    with pytest.raises(RunnerError, match=r"QAT_INVALID_ARGUMENT: isa 'mmx'"):
        Session(plan, 1, isa="mmx")
    with pytest.raises(RunnerError, match=r"QAT_INVALID_ARGUMENT: flags"):
        Session(plan, 1, flags=4)
    with pytest.raises(RunnerError, match=r"QAT_INVALID_ARGUMENT: index"):
        plan.border("input", 1)
    session = Session(plan, 1)
    nulls = (ctypes.c_void_p * 1)(None)
    assert lib.qat_session_run(session.handle, nulls, nulls) == 1
    assert b"inputs" in lib.qat_last_error()
    lib.qat_plan_free(None)
    lib.qat_session_free(None)


def test_memory_limit() -> None:
    plan = Plan(chain())
    needed = Session(plan, 3).arena_bytes
    assert Session(plan, 3, memory_limit=needed).arena_bytes == needed
    with pytest.raises(RunnerError, match=rf"QAT_OUT_OF_MEMORY: arena: needs {needed} bytes"):
        Session(plan, 3, memory_limit=needed - 1)


def test_no_memory_outside_of_inputs_is_needed() -> None:
    """Inputs of convolutions are copied, as their kernels read ahead."""
    layer = layers()["table"]
    session = Session(Plan(convolution(layer)), 1)
    assert session.arena_bytes >= layer.x.numel() + 64
    assert codes(E, 3).shape == (3,)


@pytest.mark.heavy
def test_changed_plans_crash_nothing(tmp_path: Path) -> None:
    import fuzzing

    summary = fuzzing.run(fuzzing.build(tmp_path), tmp_path, 2000, 3)
    assert summary.startswith("2000 inputs")
