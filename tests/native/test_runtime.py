"""Plans in the native runner against PyTorch's reference kernels, code by code."""

from __future__ import annotations

import threading

import pytest
import torch
from plans import DTYPES, Plan, PlanWriter, Session, library
from runtime_cases import CASES, codes, convolution, fixed_point, layers, operator_plan
from runtime_networks import A, B, E, attention, attention_reference, chain, chain_reference
from torch import Tensor

from qat import native
from qat.integer.kernels import elementwise, requantize
from qat.integer.kernels.qparams import QParams

pytestmark = pytest.mark.skipif(not native.status().active, reason=f"native extension: {native.status().reason}")


def isas() -> list[str]:
    lib = library() if native.status().active else None
    names = ["portable", "avx2", "avxvnni", "avx512vnni"]
    return [n for n in names if lib is not None and lib.qat_find_isa(n.encode()) == n.encode()]


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


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    case = CASES[name]
    given = [codes(q, *sizes, seed=i) for i, (_, q, sizes) in enumerate(case.inputs)]
    expected = case.reference(*given)
    stored = [g.to(DTYPES[kind]) for g, (kind, _, _) in zip(given, case.inputs, strict=True)]
    for threads in (1, 3):
        (result,) = Session(Plan(operator_plan(name)), 1, threads=threads).run(*stored)
        assert torch.equal(result.to(torch.int32), expected.to(torch.int32).contiguous())


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("name", layers())
def test_convolution(name: str, isa: str) -> None:
    layer = layers()[name]
    inputs = [layer.x.to(DTYPES[layer.x_type])]
    if layer.residual is not None:
        inputs.append(layer.residual.to(DTYPES[layer.residual_type]))
    (result,) = Session(Plan(convolution(layer)), 1, isa, 2).run(*inputs)
    assert torch.equal(result.to(torch.int32), layer.reference().to(torch.int32))


@pytest.mark.parametrize("double_rounding", [True, False])
def test_fixed_point_profile(double_rounding: bool) -> None:
    plan, layer = fixed_point(double_rounding)
    (result,) = Session(Plan(plan), 2).run(layer.x.to(torch.int8))
    assert torch.equal(result.to(torch.int32), layer.reference().to(torch.int32))


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
