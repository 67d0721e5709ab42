"""Plans in the native runner against PyTorch's reference kernels, code by code."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from plans import Plan, PlanWriter, Session, library
from runtime_networks import A, B, E, attention, attention_reference, chain, chain_reference
from torch import Tensor

from qat import native
from qat.integer.kernels import elementwise, layer_norm, layout, pool, requantize, resize, table
from qat.integer.kernels.qparams import QParams

pytestmark = pytest.mark.skipif(not native.status().active, reason=f"native extension: {native.status().reason}")


def isas() -> list[str]:
    lib = library() if native.status().active else None
    names = ["portable", "avx2", "avxvnni", "avx512vnni"]
    return [n for n in names if lib is not None and lib.qat_find_isa(n.encode()) == n.encode()]


def codes(q: QParams, *sizes: int, seed: int = 0) -> Tensor:
    return torch.randint(q.qmin, q.qmax + 1, sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_chain_of_layers(isa: str, batch: int, threads: int) -> None:
    session = Session(Plan(chain()), batch, isa, threads)
    for seed in (0, 1):
        image = torch.randn(batch, 3, 9, 11, generator=torch.Generator().manual_seed(seed)) * 2
        (result,) = session.run(image)
        assert torch.equal(result, chain_reference(image))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_attention(isa: str, batch: int, threads: int) -> None:
    q, k = codes(A, batch, 6, 8, seed=1), codes(E, batch, 6, 8, seed=2)
    session = Session(Plan(attention()), batch, isa, threads)
    results = session.run(q.to(torch.uint8), k.to(torch.int8))
    for result, expected in zip(results, attention_reference(q, k), strict=True):
        assert torch.equal(result.to(torch.int32), expected.to(torch.int32))


def test_threads_of_torch() -> None:
    plan = Plan(chain())
    image = torch.randn(3, 3, 9, 11)
    session = Session(plan, 3, threads=4, parallel=plan.lib.qat_torch_parallel)
    assert torch.equal(session.run(image)[0], chain_reference(image))


U16 = QParams(0.0007, 30000, 0, 65535)
CASES: dict[str, tuple[Any, ...]] = {}
"""Operator to (inputs (kind, grid, sizes), output (kind, grid, sizes), integers, floats, constants, reference)."""


def case(name: str, inputs: Any, output: Any, ints: Any, reference: Any, floats: Any = (), constants: Any = ()) -> None:
    CASES[name] = (inputs, output, ints, floats, constants, reference)


IMAGE = ("u8", A, [2, 5, 6, 7])
_SLOPE = torch.tensor([0.1, -0.3, 0.0, 2.0, 1.0, 0.25, -1.0])
_WEIGHT, _OFFSET = torch.linspace(-2, 2, 42), torch.linspace(-1, 3, 42)
_TABLE = codes(U16, 256, seed=4)


def _first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


case("requantize", [IMAGE], ("s8", E, IMAGE[2]), [], lambda x: requantize.requantize_codes(x, A, E))
case("add", [IMAGE, ("s8", E, [6, 1])], ("u8", B, IMAGE[2]), [], lambda a, b: elementwise.add(a, A, b, E, B))
case("sub", [("s8", E, [7]), IMAGE], ("u8", B, IMAGE[2]), [], lambda a, b: elementwise.sub(a, E, b, A, B))
case("mul", [IMAGE, ("s8", E, [2, 5, 6, 7])], ("u8", B, IMAGE[2]), [], lambda a, b: elementwise.mul(a, A, b, E, B))
case("div", [IMAGE, ("s8", E, [1])], ("u8", B, IMAGE[2]), [], lambda a, b: elementwise.div(a, A, b, E, B))
case(
    "avg_pool", [IMAGE], ("u8", B, [2, 3, 5, 7]), [3, 2, 2, 1, 1, 0, 1, 0, 0],
    lambda x: _last(pool.avg_pool(_first(x), A, B, (3, 2), (2, 1), (1, 0, 1, 0), count_include_pad=False)),
)  # fmt: skip
case("mean", [IMAGE], ("s8", E, [2, 1, 6, 1]), [1, 3], lambda x: pool.reduce_mean(x, A, E, [1, 3], keepdims=True))
case(
    "resize_nearest", [IMAGE], ("u8", A, [2, 10, 6, 7]), [], lambda x: _last(resize.resize_nearest(_first(x), (10, 6))),
    constants=[("s32", torch.arange(10) // 2), ("s32", torch.arange(6))],
)  # fmt: skip
_TAPS = [t for out, size in ((7, 5), (9, 6)) for t in resize._taps(out, None, size, False)[:3]]
case(
    "resize_linear", [IMAGE], ("u8", B, [2, 7, 9, 7]), [],
    lambda x: _last(resize.resize_bilinear(_first(x), A, B, (7, 9))),
    constants=[("f32" if t.is_floating_point() else "s32", t) for t in _TAPS],
)  # fmt: skip
case(
    "pad", [IMAGE], ("u8", A, [2, 8, 7, 7]), [0, 9, 0, 0, 1, 2, 0, 1, 0, 0],
    lambda x: torch.nn.functional.pad(x, (0, 0, 0, 1, 1, 2), value=9),
)  # fmt: skip
case("transpose", [IMAGE], ("u8", A, [7, 2, 6, 5]), [3, 0, 2, 1], lambda x: x.permute(3, 0, 2, 1))
case(
    "slice", [IMAGE], ("u8", A, [2, 2, 3, 7]), [0, 4, 1, 0, 1, -3, 2, 1],
    lambda x: x[:, [4, 1]][:, :, [1, 3, 5]],
)  # fmt: skip
case("expand", [("u8", A, [5, 1, 7])], ("u8", A, [2, 5, 6, 7]), [], lambda x: x.expand(2, 5, 6, 7))
case("roll", [IMAGE], IMAGE, [0, 2, -1, 9], lambda x: x.roll((2, -1, 9), (1, 2, 3)))
case(
    "layer_norm", [IMAGE], ("s8", E, IMAGE[2]), [2],
    lambda x: layer_norm.layer_norm(x, A, _WEIGHT.view(6, 7), _OFFSET.view(6, 7), E, 2, 1e-5),
    floats=[1e-5], constants=[("f32", _WEIGHT.view(6, 7)), ("f32", _OFFSET.view(6, 7))],
)  # fmt: skip
case(
    "prelu", [IMAGE], ("u8", B, IMAGE[2]), [3], lambda x: table.prelu(x, A, _SLOPE, B, 3), constants=[("f32", _SLOPE)]
)
case("table", [IMAGE], ("s8", E, IMAGE[2]), [], lambda x: (_TABLE % 256 - 128)[x.long()],
     constants=[("s8", _TABLE % 256 - 128)])  # fmt: skip
case("concat", [IMAGE, ("s8", E, [2, 5, 2, 7])], ("u8", A, [2, 5, 8, 7]), [2],
     lambda a, b: layout.concat([(a, A), (b, E)], A, 2))  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    inputs, output, ints, floats, constants, reference = CASES[name]
    w = PlanWriter()
    names = [w.tensor(f"in{i}", kind, sizes, q) for i, (kind, q, sizes) in enumerate(inputs)]
    w.tensor("y", output[0], output[2], output[1])
    extra = [w.constant(f"constant{i}", kind, values) for i, (kind, values) in enumerate(constants)]
    w.op(name, [*names, *extra], "y", ints, floats)
    given = [codes(q, *sizes, seed=i) for i, (_, q, sizes) in enumerate(inputs)]
    expected = reference(*given)
    stored = [g.to({"u8": torch.uint8, "s8": torch.int8}[kind]) for g, (kind, _, _) in zip(given, inputs, strict=True)]
    for threads in (1, 3):
        (result,) = Session(Plan(w.to_bytes(names, ["y"])), 1, threads=threads).run(*stored)
        assert torch.equal(result.to(torch.int32), expected.to(torch.int32).contiguous())


@pytest.mark.parametrize("double_rounding", [True, False])
def test_fixed_point_profile(double_rounding: bool) -> None:
    from int8_layers import Conv

    g = torch.Generator().manual_seed(3)
    weight = torch.randint(-127, 128, (5, 3, 3, 4), generator=g)
    fixed = torch.randint(2**30, 2**31 - 1, (5,), generator=g)
    shift = torch.tensor([-7, -8, -6, -9, -7])
    x = codes(E, 2, 6, 6, 4, seed=3)
    w = PlanWriter(profile=1 if double_rounding else 2)
    w.tensor("x", "s8", [-1, 6, 6, 4], E)
    w.tensor("y", "s8", [-1, 4, 4, 5], E)
    w.constant("weight", "s8", weight)
    w.constant("scales", "f32", torch.full((5,), 0.01))
    w.constant("multipliers", "s32", fixed)
    w.constant("shifts", "s32", shift)
    w.conv("c", {n: n for n in ("x", "weight", "scales", "multipliers", "shifts")}, "y", ("s8", E))
    expected = Conv(
        x, weight, "s8", "s8", E, E, fixed=fixed, shift=shift, double_rounding=double_rounding
    ).reference()
    (result,) = Session(Plan(w.to_bytes(["x"], ["y"])), 2).run(x.to(torch.int8))
    assert torch.equal(result.to(torch.int32), expected.to(torch.int32))


def test_tensors_that_only_change_their_sizes_cost_nothing() -> None:
    w = PlanWriter()
    for name, sizes in (("x", [-1, 4, 1, 6]), ("t", [1, -1, 6, 4]), ("u", [-24]), ("y", [-1, 24]), ("z", [-12, 2])):
        w.tensor(name, "u8", sizes, A)
    w.op("transpose", ["x"], "t", [2, 0, 3, 1])
    w.op("reshape", ["t"], "u")
    w.op("reshape", ["u"], "y")
    w.op("reshape", ["x"], "z")
    x = codes(A, 3, 4, 1, 6).to(torch.uint8)
    session = Session(Plan(w.to_bytes(["x"], ["y", "z", "x", "y"])), 3)
    y, z, same, again = session.run(x)
    assert torch.equal(y, x[:, :, 0].transpose(1, 2).reshape(3, 24))
    assert torch.equal(z, x.reshape(36, 2))
    assert torch.equal(same, x)
    assert torch.equal(again, y)
    assert session.arena_bytes <= 128


def test_memory_is_used_again() -> None:
    w = PlanWriter()
    size = 100_000
    for i in range(12):
        w.tensor(f"t{i}", "u8", [-1, size], A if i % 2 == 0 else B)
    ramp = torch.arange(256)
    w.constant("up", "u8", ramp.flip(0))
    for i in range(11):
        # a table in place, and a roll, which is not
        if i % 2 == 0:
            w.op("table", [f"t{i}", "up"], f"t{i + 1}")
        else:
            w.op("requantize", [f"t{i}"], f"t{i + 1}")
    session = Session(Plan(w.to_bytes(["t0"], ["t11"])), 1)
    x = codes(A, 1, size)
    expected = x
    for i in range(11):
        expected = 255 - expected if i % 2 == 0 else requantize.requantize_codes(expected, B, A)
    assert torch.equal(session.run(x.to(torch.uint8))[0].to(torch.int32), expected)
    assert session.arena_bytes < 1.1 * size


def test_a_result_does_not_overwrite_what_is_still_needed() -> None:
    w = PlanWriter()
    names = [w.tensor(n, "u8", [-1, 300], A) for n in ("x", "a", "b", "c", "d", "e")]
    w.constant("table", "u8", 255 - torch.arange(256))
    w.op("roll", ["x"], "a", [0, 1])
    w.op("table", ["a", "table"], "b")
    w.op("table", ["b", "table"], "c")
    w.op("add", ["a", "c"], "d")
    w.op("sub", ["d", "b"], "e")
    x = codes(A, 2, 300)
    a = x.roll(1, 1)
    d = elementwise.add(a, A, a, A, A)
    expected = elementwise.sub(d, A, 255 - a, A, A)
    assert names
    (e,) = Session(Plan(w.to_bytes(["x"], ["e"])), 2).run(x.to(torch.uint8))
    assert torch.equal(e.to(torch.int32), expected.to(torch.int32))


def test_profile_counts_every_operator_that_runs() -> None:
    session = Session(Plan(chain()), 1)
    image = torch.randn(1, 3, 9, 11)
    session.run(image)
    assert sum(session.times().values()) == 0
    session.profile(True)
    session.run(image)
    once = session.times()
    assert {name.split(".")[0] for name, time in once.items() if time == 0} == {"reshape"}
    session.run(image)
    session.profile(False)
    twice = session.times()
    assert all(twice[name] > time for name, time in once.items() if time)
    session.run(image)
    assert session.times() == twice


def test_plan_tells_what_it_takes_and_gives() -> None:
    plan = Plan(attention())
    assert plan.border("input", 1) == {
        "name": "k", "type": "s8", "sizes": [-1, 6, 8], "grid": (pytest.approx(E.scale), -7, -128, 127)
    }  # fmt: skip
    assert [plan.border("output", i)["name"] for i in range(4)] == ["turned", "wide", "scores", "k"]
    kinds = [plan.lib.qat_plan_operator_kind(plan.handle, i) for i in range(9)]
    assert kinds[:3] == [b"matmul", b"softmax", b"matmul"]
    assert kinds[8] is None


def test_sessions_run_side_by_side() -> None:
    plan = Plan(chain())
    sessions = [Session(plan, batch, threads=2) for batch in (1, 2, 2)]
    images = [torch.randn(s.batch, 3, 9, 11) for s in sessions]
    results: dict[int, list[Tensor]] = {}

    def run(i: int) -> None:
        results[i] = [sessions[i].run(images[i])[0] for _ in range(5)]

    workers = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, image in enumerate(images):
        expected = chain_reference(image)
        assert all(torch.equal(result, expected) for result in results[i])


def test_a_session_outlives_its_plan() -> None:
    plan = Plan(chain())
    session = Session(plan, 2)
    outputs = plan.outputs(2)
    plan.close()
    image = torch.randn(2, 3, 9, 11)
    assert torch.equal(session.run(image, outputs=outputs)[0], chain_reference(image))


def test_wide_tables() -> None:
    w = PlanWriter()
    narrow = QParams(0.1, 100, 60, 200)
    s16 = QParams(0.001, 0, -32768, 32767)
    w.tensor("x", "u8", [-1, 50], narrow)
    w.tensor("y", "s16", [-1, 50], s16)
    values = codes(s16, 141, seed=9)
    w.constant("table", "s16", values)
    w.op("table", ["x", "table"], "y")
    x = codes(narrow, 2, 50)
    (y,) = Session(Plan(w.to_bytes(["x"], ["y"])), 2).run(x.to(torch.uint8))
    assert torch.equal(y.to(torch.int32), values[(x - 60).long()])


def test_not_a_number_becomes_the_smallest_code() -> None:
    w = PlanWriter()
    w.tensor("x", "f32", [-1, 6])
    w.tensor("y", "s8", [-1, 6], E)
    w.op("quantize", ["x"], "y", [0, 1])
    x = torch.tensor([[0.0, 1.0, float("nan"), float("inf"), -float("inf"), 0.015]])
    (y,) = Session(Plan(w.to_bytes(["x"], ["y"])), 1).run(x)
    expected = requantize.quantize(x, E)
    assert y[0, 2] == -128
    assert torch.equal(y.to(torch.int32), expected.to(torch.int32))
