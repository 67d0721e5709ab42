"""Calls without a kind and why, parameters by key, constants, writes in place."""

from __future__ import annotations

import operator
import re

import pytest
import torch
import torch.nn.functional as F
from operator_reference import IMAGE, TOKENS, Call, operators_of, run_operators, traced
from torch import Tensor, nn

from qat.graph.operators import ParamRef, ScalarConst, recognize


class Doubled(nn.Linear):
    """Looks like a linear layer, computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Untouched(nn.Linear):
    """A subclass that computes what its base computes."""


def island_of(model, sizes: tuple[int, ...]):
    model = Call(model) if not isinstance(model, nn.Module) else model
    if type(model).__module__.startswith("torch."):
        model = nn.Sequential(model)
    found = [op for op in operators_of(model, torch.rand(5, *sizes)) if op.kind == "island"]
    assert found, "nothing stays float"
    return found[-1]


@pytest.mark.parametrize(
    ("model", "sizes", "cause"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE, "padding_mode='reflect'.*two modules"),
        (Call(lambda x, w: F.linear(x, w * 2), torch.randn(3, 8)), TOKENS, "weight is computed in the forward pass"),
        (lambda x: F.linear(x, x.mean((0, 1)).unsqueeze(0)), TOKENS, "weight is computed"),
        (nn.BatchNorm2d(4, track_running_stats=False), IMAGE, "statistics of the batch"),
        (lambda x: F.batch_norm(x, None, None, training=True), IMAGE, "statistics of the batch"),
        (nn.GroupNorm(2, 4), IMAGE, "statistics of each sample"),
        (nn.InstanceNorm2d(4), IMAGE, "statistics of each sample"),
        (Recurrent(), TOKENS, r"no integer kind for nn\.LSTM"),
        (nn.SELU(), IMAGE, r"no integer kind for nn\.SELU"),
        (lambda x: torch.cumsum(x, 1), IMAGE, r"no integer kind for torch\.cumsum"),
        (lambda x: F.logsigmoid(x), IMAGE, r"no integer kind for F\.log_?sigmoid"),
        (lambda x: x.sort()[0], IMAGE, r"no integer kind for Tensor\.sort"),
        (lambda x: torch.maximum(x, x), IMAGE, r"torch\.maximum"),
        (lambda x: F.log_softmax(x, 1), IMAGE, r"F\.log_softmax"),
        (lambda x: x.sum(1), IMAGE, "write it as a mean"),
        (lambda x: x.mean(0), IMAGE, "a mean along the batch"),
        (lambda x: x.mean(), IMAGE, "a mean along the batch"),
        (lambda x: x.softmax(0), IMAGE, "softmax along the batch"),
        (lambda x: x.mean(1, dtype=torch.float64), IMAGE, "converts from torch.float32 to torch.float64"),
        (lambda x: torch.add(x, x, alpha=2), IMAGE, "alpha=2"),
        (lambda x: torch.div(x, x, rounding_mode="floor"), IMAGE, "rounding_mode='floor'"),
        (lambda x: x * float("inf"), IMAGE, "inf is not finite"),
        (lambda x: x * x.shape[0], IMAGE, "depends on the batch size"),
        (lambda x: x + torch.tensor([0.0, float("-inf")]).repeat(3), IMAGE, "operand holds inf or nan.*-100"),
        (lambda x: x // 2, IMAGE, r"operator\.floordiv"),
        (lambda x: x**x, IMAGE, "exponent is a tensor"),
        (lambda x: torch.clamp(x, min=x), IMAGE, "bounds are tensors"),
        (nn.Threshold(0.1, 20), IMAGE, "replacement value differs"),
        (nn.Softplus(beta=2), IMAGE, "beta=2"),
        (nn.CELU(0.5), IMAGE, "alpha=0.5"),
        (lambda x: F.rrelu(x, training=True), IMAGE, "slope is random"),
        (lambda x: F.dropout(x, 0.5), IMAGE, "random in inference"),
        (lambda x: torch.einsum("bij,bkj->bik", x, x), TOKENS, "einsum 'bij,bkj->bik' is no plain matrix product"),
        (lambda x: torch.einsum("bij->bji", x), TOKENS, "no plain matrix product"),
        (lambda x: x @ x[0, 0], TOKENS, "product with a vector"),
        (nn.AdaptiveAvgPool2d(3), IMAGE, "from 8x6 to 3x3 has windows of unequal size"),
        (nn.AdaptiveMaxPool2d(5), IMAGE, "from 8x6 to 5x5 has windows of unequal size"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), IMAGE, "divisor_override=3"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], IMAGE, "max_pool2d_with_indices"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), IMAGE, "mode='bicubic'"),
        (lambda x: F.interpolate(x, size=4, mode="bilinear", antialias=True), IMAGE, "antialias"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), IMAGE, "'circular'"),
        (lambda x: F.pad(x, (-1, 1)), IMAGE, "pads and crops"),
        (lambda x: x.repeat(1, 2, 1, 1), IMAGE, "repeats an axis"),
        (lambda x: x[torch.tensor([0, 1])], IMAGE, "tensor of indices"),
        (lambda x: x[:, [0, 2]], IMAGE, "tensor of indices"),
        (lambda x: x[0], IMAGE, "indexing along the batch"),
        (lambda x: torch.roll(x, 1), IMAGE, "flattened"),
        (lambda x: x.flip(0), IMAGE, "flip along the batch"),
        (lambda x: x.double(), IMAGE, "converts from torch.float32 to torch.float64"),
        (lambda x: x.view(torch.int32), IMAGE, "another dtype"),
        (lambda x: x.int() + 1, IMAGE, "computes with int32 values"),
    ],
)
def test_what_has_no_kind_says_why(model, sizes, cause):
    op = island_of(model, sizes)
    assert re.search(cause, op.attrs["cause"]), op.attrs["cause"]
    assert "\n" not in op.attrs["cause"]
    assert op.macs == 0


def test_a_subclass_that_computes_the_same_is_recognized():
    assert [op.kind for op in operators_of(nn.Sequential(Untouched(8, 3)), torch.randn(2, *TOKENS))] == ["linear"]


def test_a_subclass_that_computes_something_else_is_what_it_computes():
    ops = operators_of(nn.Sequential(Doubled(8, 3)), torch.randn(2, *TOKENS))
    assert [op.kind for op in ops] == ["linear", "rescale"]


def test_a_module_with_hooks_is_not():
    model = nn.Sequential(nn.Linear(8, 3))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    (op,) = operators_of(model, torch.randn(2, *TOKENS))
    assert op.attrs["cause"] == "its Linear has forward hooks"


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_an_untraceable_module_has_the_cause_that_tracing_found():
    made = traced(nn.Sequential(Branching()), torch.randn(2, *TOKENS))
    (op,) = recognize(made).values()
    assert (op.kind, op.attrs["cause"]) == ("island", made.islands[0].cause)


def test_an_island_reads_the_tensors_behind_sizes_and_tuples():
    model = Call(lambda x: x.sort()[0].cumsum(1) + torch.zeros((x.shape[0], 1, 1, 1)))
    made = traced(model, torch.rand(2, *IMAGE))
    x = next(iter(made.graph.nodes))
    item, cumsum, zeros, add = recognize(made).values()
    assert item.inputs == (x,)
    assert cumsum.inputs[0].target is operator.getitem
    assert zeros.inputs == (x,)
    assert add.kind == "add"


# --- parameters


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8, bias=False))
        self.inner[0].weight = self.first.weight
        self.shift = nn.Parameter(torch.zeros(8))
        self.register_buffer("factor", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(self.first(x)) + self.shift, self.inner[0].weight) * self.factor


def test_parameters_are_named_by_state_dict_key_and_place():
    model = Shared()
    first, tied, shift, functional, factor = operators_of(model, torch.randn(2, *TOKENS))
    assert first.inputs[1:] == (ParamRef("first.weight", "first", "weight"), ParamRef("first.bias", "first", "bias"))
    assert tied.inputs[1:] == (ParamRef("first.weight", "inner.0", "weight"), None)
    assert shift.inputs[1] == ParamRef("shift", "", "shift")
    assert functional.inputs[1].key == "first.weight"
    assert factor.inputs[1] == ParamRef("factor", "", "factor")
    assert {
        r.key for op in (first, tied, shift, functional, factor) for r in op.inputs if isinstance(r, ParamRef)
    } <= set(model.state_dict())


class Bias(nn.Module):
    """Swin's relative position bias: parameters gathered by a buffer of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("index", torch.randint(9, (25,)))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table[self.index].view(5, 5, 2).permute(2, 0, 1).contiguous()
        return x + bias.unsqueeze(0)


def test_what_depends_on_parameters_alone_is_no_island():
    ops = operators_of(Bias(), torch.randn(2, 2, 5, 5))
    assert [op.kind for op in ops] == ["constant", "reshape", "transpose", "identity", "reshape", "add"]
    assert [r.key for r in ops[0].inputs] == ["table", "index"]


def test_random_numbers_are_no_constant():
    (op, _) = operators_of(Call(lambda x, a: x + torch.bernoulli(a), torch.rand(6)), torch.randn(2, *IMAGE))
    assert op.kind == "island"


def test_a_number_is_an_operand():
    (op,) = operators_of(Call(lambda x: 3 - x), torch.randn(2, *IMAGE))
    assert op.inputs[0] == ScalarConst(3.0)


def test_macs_count_one_sample():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 4, 10))
    assert [op.macs for op in operators_of(model, torch.randn(2, *IMAGE))] == [8 * 6 * 4 * 2 * 9, 0, 0, 10 * 192]
    windows = Call(lambda x, w: x.reshape(-1, 2, 4) @ w, torch.randn(4, 3))
    assert operators_of(windows, torch.randn(2, 5, 8))[-1].macs == 5 * 2 * 4 * 3


# --- writes in place, which tracing undoes


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y += 1
        return self.act(y).mul_(y)


def test_writes_of_whole_tensors_are_ordinary_calls():
    made = traced(InPlace(), torch.randn(2, *IMAGE))
    found = recognize(made)
    assert [op.kind for op in found.values()] == ["rescale", "add", "clamp", "mul"]
    x = torch.randn(5, *IMAGE)
    torch.testing.assert_close(run_operators(made, found, x), InPlace()(x))


def test_a_write_into_a_part_stays_float():
    def model(x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] = 0
        return y

    assert "writes into a part of a tensor" in island_of(model, IMAGE).attrs["cause"]


def test_a_fixed_batch_counts_one_sample():
    model = Call(lambda x, w: F.linear(torch.cat([x, x[:1]]), w), torch.randn(3, 8))
    made = traced(model, torch.randn(4, *TOKENS))
    assert made.static_batch
    assert [op.kind for op in recognize(made).values()] == ["slice", "concat", "linear"]
    assert list(recognize(made).values())[-1].macs == 5 * 5 * 3 * 8 // 4
