"""`IntegerModel`: arguments, state, copies, exactness whatever PyTorch's settings are, and integer arithmetic."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whole_networks import Fn, conv, flat, prepared

import qat
from qat.errors import DataError, StateError
from qat.integer.kernels import accumulate
from qat.integer.model import IntegerModel
from qat.native import Status, runner


class Network(nn.Module):
    """Two inputs, an island with parameters, a residual, and products of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.up = conv(4, 24), conv(24, 4), nn.ConvTranspose2d(4, 4, 2, 2)
        self.island = nn.GroupNorm(2, 4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = F.hardswish(self.b(F.relu(self.a(x))) + y)
        z = self.up(self.drop(self.island(z)))
        w = z.flatten(2)
        return {"scores": self.head(z.mean((2, 3))), "gram": (w @ w.mT).softmax(-1)}


def inputs(batch: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4, 8, 8), torch.randn(batch, 4, 8, 8)


@pytest.fixture
def imodel() -> IntegerModel:
    return qat.convert(prepared(Network(), *inputs()))


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


# arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7])
def test_any_batch_size(imodel: IntegerModel, batch: int) -> None:
    x, y = inputs(batch)
    whole = imodel(x, y)
    assert whole["scores"].shape == (batch, 3)
    parts = [imodel(x[i : i + 1], y[i : i + 1]) for i in range(batch)]
    for key in whole:
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts]))


def test_no_sample_at_all(imodel: IntegerModel) -> None:
    assert imodel(*inputs(0))["scores"].shape == (0, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: m(x), "the input 'y' is missing; give x, y"),
        (lambda m, x, y: m(x, y, x), "3 inputs for a model of 2"),
        (lambda m, x, y: m(x, z=y), "unexpected input 'z'"),
        (lambda m, x, y: m(x, x=y), "unexpected input 'x'"),
        (lambda m, x, y: m(x, y[..., :7]), r"the input 'y' has shape \(4, 4, 8, 7\); give batchx4x8x8"),
        (lambda m, x, y: m(x[0], y), r"the input 'x' has shape \(4, 8, 8\)"),
        (lambda m, x, y: m(x, y.to(torch.int32)), "the input 'y' has dtype torch.int32; give torch.float32"),
        (lambda m, x, y: m(x, [1.0]), "the input 'y' is a list; give a tensor"),
        (
            lambda m, x, y: m(x, y[:2]),
            "the input 'y' has 2 rows, 1 a sample, and 'x' has 4 samples; give batches of one size",
        ),
    ],
    ids=["missing", "many", "unknown", "twice", "size", "rank", "dtype", "type", "batches"],
)
def test_wrong_inputs_are_named(imodel: IntegerModel, call: Callable[..., Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call(imodel, *inputs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_floats_of_another_width_are_converted(imodel: IntegerModel, dtype: torch.dtype) -> None:
    x, y = (value.to(dtype) for value in inputs())
    result = imodel(x, y)
    assert result["scores"].dtype == torch.float32
    assert same(result, imodel(x.float(), y.float()))


def test_infinities_saturate_and_nan_does_not_spread(imodel: IntegerModel) -> None:
    x, y = inputs()
    x[0, 0, 0, 0], x[1, 0, 0, 0] = torch.inf, torch.nan
    assert all(bool(torch.isfinite(value).all()) for value in flat(imodel(x, y)))


def test_codes_of_any_tensor_can_be_seen(imodel: IntegerModel) -> None:
    found = imodel.run(inputs(), {"a", "relu", "x", "x:float", "a.weight"} & set(imodel.program.tensors))
    for name, value in found.items():
        encoding = imodel.program.tensors[name].encoding
        if encoding is None:
            assert value.dtype == torch.float32
        else:
            assert value.dtype == torch.int32
            assert int(value.min()) >= encoding.qmin
            assert int(value.max()) <= encoding.qmax
    with pytest.raises(StateError, match="the program has no tensor 'nowhere'"):
        imodel.run(inputs(), {"nowhere"})


# state --------------------------------------------------------------------------------------------------------------


def test_the_state_holds_codes_and_what_islands_need(imodel: IntegerModel) -> None:
    state = imodel.state_dict()
    assert state["constants.a/weight"].dtype == torch.int8
    assert state["constants.a/bias"].dtype == torch.int32
    assert any(key.startswith("islands.") for key in state)


def test_a_loaded_state_is_used(imodel: IntegerModel) -> None:
    x = inputs()
    before = imodel(*x)
    other = copy.deepcopy(imodel)
    with torch.no_grad():
        other.constants.get_buffer("head/bias").add_(1000)
    imodel.load_state_dict(other.state_dict())
    assert not torch.equal(imodel(*x)["scores"], before["scores"])
    assert same(imodel(*x), other(*x))


def test_a_copy_is_independent(imodel: IntegerModel) -> None:
    x = inputs()
    before = imodel(*x)
    other = copy.deepcopy(imodel)
    assert same(other(*x), before)
    with torch.no_grad():
        other.constants.get_buffer("head/weight").zero_()
    assert same(imodel(*x), before)


def test_a_saved_model_is_the_same_model() -> None:
    # a lambda cannot be pickled, so this network is a class
    imodel = qat.convert(prepared(Network(), *inputs()))
    x = inputs()
    before = imodel(*x)
    file = io.BytesIO()
    torch.save(imodel, file)
    file.seek(0)
    # what is loaded here was written three lines above
    loaded = torch.load(file, weights_only=False)
    assert same(loaded(*x), before)
    state = io.BytesIO()
    torch.save(imodel.state_dict(), state)
    state.seek(0)
    imodel.load_state_dict(torch.load(state, weights_only=True))
    assert same(imodel(*x), before)


def test_there_is_no_training(imodel: IntegerModel) -> None:
    x = inputs()
    before = imodel(*x)
    assert not imodel.train().training
    assert same(imodel(*x), before)
    assert not any(module.training for module in imodel.modules())
    assert not any(value.requires_grad for value in flat(imodel(*x)))


# without the native runner ------------------------------------------------------------------------------------------


@pytest.fixture
def no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "status", lambda: Status(False, "the extension was not built"))


def test_pytorch_runs_what_the_library_cannot(imodel: IntegerModel, no_runner: None) -> None:
    x = inputs()
    found, expected = imodel(*x), imodel.run(x)
    assert same([found["scores"], found["gram"]], [expected[name] for name in imodel.program.outputs])
    count = len(imodel.program.ops)
    assert str(imodel.native) == f"PyTorch runs all {count} operators: the extension was not built"


def test_operators_in_pytorch_have_a_profile_too(imodel: IntegerModel, no_runner: None) -> None:
    profile = imodel.profile(*inputs(), rounds=1)
    assert [entry.name for entry in profile.entries] == [op.name for op in imodel.program.ops]
    assert {entry.where for entry in profile.entries} == {"pytorch"}
    assert sum(entry.macs for entry in profile.entries) == 4 * sum(op.macs for op in imodel.program.ops)


# exactness ----------------------------------------------------------------------------------------------------------


def test_inference_mode(imodel: IntegerModel) -> None:
    x = inputs()
    before = imodel(*x)
    with torch.inference_mode():
        inside = imodel(*x)
    assert same(inside, before)
    # what was prepared in inference mode serves outside of it too
    fresh = qat.convert(prepared(Fn(lambda m, x: m.a(x), a=conv()), torch.randn(3, 4, 8, 8)))
    with torch.inference_mode():
        first = fresh(x[0])
    assert same(fresh(x[0]), first)


def test_inputs_stay_as_they_are(imodel: IntegerModel) -> None:
    x = inputs()
    kept = [value.clone() for value in x]
    imodel(*x)
    assert same(x, kept)


def test_autocast_and_precision_modes_change_no_code(imodel: IntegerModel) -> None:
    x = inputs()
    names = {name for name, info in imodel.program.tensors.items() if info.encoding is not None}
    # the island is float, and may well change: what precedes it may not
    before_island = {n for n in names if n in ("x", "a", "relu", "b", "add", "hardswish", "y")}
    assert len(before_island) >= 4
    before = imodel.run(x, before_island)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            after = imodel.run(x, before_island)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert all(torch.equal(before[name], after[name]) for name in before_island)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_memory_formats_change_no_code(imodel: IntegerModel, threads: int) -> None:
    x, y = inputs()
    before = imodel(x, y)
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        after = imodel(x.to(memory_format=torch.channels_last), y.mT.contiguous().mT)
    finally:
        torch.set_num_threads(count)
    assert same(before, after)


def test_accumulators_are_integers(imodel: IntegerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every convolution, linear layer and product hands on to be requantized is int32."""
    seen: list[torch.dtype] = []
    original = accumulate._as_integer

    def spy(acc: Tensor, bound: int) -> Tensor:
        assert torch.equal(acc, acc.round())
        result = original(acc, bound)
        seen.append(result.dtype)
        return result

    monkeypatch.setattr(accumulate, "_as_integer", spy)
    imodel.run(inputs())
    products = [op for op in imodel.program.ops if op.kind in ("conv", "conv_transpose", "linear", "matmul")]
    assert len(products) == 5
    assert len(seen) >= len(products)
    assert set(seen) == {torch.int32}


def test_a_long_sum_is_exact() -> None:
    """A sum beyond 2**24 is what float32 alone would get wrong."""
    layer = nn.Linear(4096, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(1, 128, (3, 4096)).float())
    imodel = qat.convert(prepared(Fn(lambda m, x: m.big(x), big=layer), torch.rand(4, 4096)))
    x = torch.rand(5, 4096) * 0.5 + 0.5
    codes = imodel.run((x,), {imodel.program.ops[0].outputs[0], "big"})
    program = imodel.program
    source, weight = program.tensors[program.ops[0].outputs[0]].encoding, program.constants["big.weight"]
    result = program.tensors["big"].encoding
    assert source is not None
    assert weight.encoding is not None
    assert result is not None
    left = codes[program.ops[0].outputs[0]].to(torch.int64) - source.zero_point[0]
    acc = left @ weight.value.to(torch.int64).T
    assert int(acc.max()) > 2**24
    multiplier = torch.tensor(source.scale[0]) * weight.encoding.scale_tensor / torch.tensor(result.scale[0])
    expected = (acc.float() * multiplier).round() + result.zero_point[0]
    assert torch.equal(codes["big"], expected.clamp(result.qmin, result.qmax).to(torch.int32))


def test_weights_are_prepared_once(imodel: IntegerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs()
    before = imodel.run(x)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a weight was prepared again")

    monkeypatch.setattr("qat.integer.operators.plan_conv", never)
    monkeypatch.setattr("qat.integer.operators.plan_linear", never)
    assert same(imodel.run(x), before)
    imodel.to(torch.device("cpu"))
    with pytest.raises(AssertionError, match="prepared again"):
        imodel.run(x)
