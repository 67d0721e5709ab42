"""What a traced graph must be: equal to the model at any batch size, named after it, with sizes known."""

from __future__ import annotations

import collections
import copy
import dataclasses
import typing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from qat.errors import TraceError
from qat.graph.trace import Traced, trace, traced_forward


def check(model: nn.Module, *example: Tensor, islands: int = 0, static: bool = False, atol: float = 1e-6) -> Traced:
    """Trace a copy, and compare it with the model at batch sizes that were not hinted."""
    model.eval()
    traced = trace(copy.deepcopy(model), example)
    traced.graph.lint()
    assert len(traced.islands) == islands, traced.islands
    assert (traced.static_batch is not None) == static, traced.static_batch
    run = traced_forward(traced)
    for batch in (example[0].shape[0],) if static else (1, 5):
        inputs = [
            torch.randn(batch, *x.shape[1:]) if x.is_floating_point() else x[:1].repeat(batch, 1) for x in example
        ]
        with torch.no_grad():
            wanted, got = model(*[x.clone() for x in inputs]), run(*inputs)
        assert type(got) is type(wanted)
        torch.testing.assert_close(_plain(got), _plain(wanted), atol=atol, rtol=1e-5)
    names = [node.meta["name"] for node in traced.graph.nodes]
    assert len(names) == len(set(names))
    return traced


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return dict(value) if isinstance(value, dict) else value


def node_named(traced: Traced, name: str):
    return next(node for node in traced.graph.nodes if node.meta["name"] == name)


def names(traced: Traced) -> list[str]:
    return [node.meta["name"] for node in traced.graph.nodes]


X = torch.randn(2, 3, 8, 8)


class Forward(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


# -- names, shapes, sources


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.gain = nn.Parameter(torch.full((3, 1, 1), 2.0))

    def forward(self, x):
        y = self.conv(x) + x
        return F.relu(y * self.gain) + x


def test_names_are_the_users_and_call_sites_are_numbered():
    model = nn.Sequential(collections.OrderedDict(block=Block(), act=nn.ReLU()))
    model.append(model.block)
    assert names(check(model, X)) == [
        "input", "block.conv", "block.add", "block.gain", "block.mul", "block.relu", "block.add#2", "act",
        "block.conv#2", "block.add#3", "block.mul#2", "block.relu#2", "block.add#4", "output",
    ]  # fmt: skip


def test_names_of_tuple_elements_and_of_root_operators():
    traced = check(Forward(lambda _, x: torch.cat([p + 1 for p in x.chunk(3, dim=1)], dim=1)), X)
    assert names(traced)[:4] == ["x", "chunk", "chunk.0", "chunk.1"]
    assert names(traced)[-2] == "cat"


def test_shapes_mark_multiples_of_the_batch():
    traced = check(Forward(lambda m, x: m.conv(x).flatten(0, 1), conv=nn.Conv2d(3, 4, 3)), X)
    shapes = {node.meta["name"]: node.meta["shape"] for node in traced.graph.nodes}
    assert shapes["x"] == (-1, 3, 8, 8)
    assert shapes["conv"] == (-1, 4, 6, 6)
    assert shapes["flatten"] == (-4, 6, 6)
    assert tuple(node_named(traced, "conv").meta["vals"][1].shape) == (3, 4, 6, 6)


def test_source_is_the_users_line():
    traced = check(nn.Sequential(Block()), X)
    file, line = node_named(traced, "0.add").meta["source"].rsplit(":", 1)
    assert file.endswith("test_trace.py")
    assert "self.conv(x) + x" in Path(__file__).read_text().splitlines()[int(line) - 1]


def test_every_node_has_its_meta():
    for node in check(Block(), X).graph.nodes:
        assert isinstance(node.meta["name"], str)
        assert isinstance(node.meta["source"], str)
        assert len(node.meta["vals"]) == 2
        assert node.meta["constant"] == (node.op == "get_attr")


# -- Python on sizes


def test_control_flow_and_arithmetic_on_static_sizes_is_plain_python():
    def forward(_, x):
        b, c, h, w = x.shape
        assert isinstance(h, int)
        assert (c, x.dim(), x.ndim, x.size(-1), x.shape[2:].numel()) == (3, 4, 4, w, 64)
        assert x.dtype is torch.float32
        assert x.device.type == "cpu"
        assert isinstance(x, Tensor)
        assert torch.is_tensor(x)
        assert x.is_floating_point()
        torch._assert(h == 8, "height")
        if h % 5:
            x = F.pad(x, (0, 5 - w % 5, 0, 5 - h % 5))
        for i in range(x.shape[1]):
            x = x + i
        return x.reshape(b, -1, x.shape[-1])

    traced = check(Forward(forward), X)
    assert node_named(traced, "reshape").meta["shape"] == (-1, 30, 10)
    assert names(traced).count("add#3") == 1


def test_batch_dependent_sizes_stay_in_the_graph():
    def forward(_, x):
        b = x.size(0)
        assert b > 0
        assert isinstance(b, int)
        base = torch.arange(4.0).expand(b, 4) + torch.zeros(b, 4)
        return x.view(b * 3, -1).sum(1).view(b, 3), torch.ones((b, 2)), base, x.numel() // 192

    traced = check(Forward(forward), X)
    assert node_named(traced, "mul").meta["shape"] is None
    assert node_named(traced, "view").meta["shape"] == (-3, 64)


def test_slicing_a_constant_by_the_batch_size_is_recorded():
    check(Forward(lambda _, x: torch.arange(10.0)[: len(x.shape)] + torch.arange(40.0)[: x.shape[0]].sum() * 0), X)
    traced = check(Forward(lambda _, x: torch.arange(40.0)[: x.shape[0]]), X)
    assert node_named(traced, "getitem").meta["shape"] == (-1,)


def test_constants_of_static_shape_are_made_eagerly_and_may_be_written_to():
    def forward(_, x):
        mask = x.new_zeros((8, 8))
        for i in range(8):
            mask[i, : i + 1] = 1
        return x * mask + torch.zeros_like(mask)

    traced = check(Forward(forward), X)
    assert names(traced) == ["x", "_constant0", "mul", "_constant1", "add", "output"]
    assert "_constant0" not in traced.root.state_dict()
    torch.testing.assert_close(traced.root.get_buffer("_constant0"), torch.ones(8, 8).tril())


def test_a_constant_that_is_written_to_later_keeps_its_earlier_value():
    def forward(_, x):
        scale = torch.ones(8)
        y = x * scale
        scale[:] = 3
        return y + x * scale

    check(Forward(forward), X)


# -- writing in place


@pytest.mark.parametrize(
    "forward",
    [
        lambda _, x: x.relu_().add_(1).mul_(x),
        lambda _, x: F.relu(x, inplace=True) + x,
        lambda _, x: (torch.relu_(x), x)[1] * 2,
        lambda _, x: F.hardtanh_(x, -0.5, 0.5) + x,
        lambda _, x: x.unsqueeze_(1).mul_(2),
        lambda _, x: x.zero_() + x.shape[1],
        lambda _, x: torch.empty_like(x).copy_(x) * 2,
    ],
)
def test_in_place_operations_on_values(forward):
    check(Forward(forward), X)


def test_augmented_assignment_reaches_every_name_of_a_value():
    def forward(_, x):
        y = x * 1
        z = y
        y += x
        y *= 2
        return z

    check(Forward(forward), X)


def test_item_assignment():
    def forward(_, x):
        out = torch.zeros_like(x)
        out[:, 1:] = x[:, :-1]
        out[:, 0] += 2
        out[:, 2].mul_(3)
        return out

    check(Forward(forward), X)


def test_reading_a_tensor_that_was_written_through_a_view_is_refused():
    def forward(_, x):
        y = x * 1
        y.view(-1).add_(1)
        return y

    with pytest.raises(TraceError, match="written in place through another view"):
        trace(Forward(forward).eval(), X)


class Preactivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = x * 1
        return self.conv(self.relu(y)) + y


def test_in_place_modules_are_made_out_of_place_with_the_same_result():
    traced = check(Preactivation(), X)
    assert traced.root.relu.inplace is False
    assert node_named(traced, "add").args[1] is node_named(traced, "relu")


# -- parameters, buffers, modules


def test_what_is_computed_from_parameters_stays_trainable():
    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 3))
            self.register_buffer("index", torch.tensor([0, 2, 4]))
            self.parts = nn.ParameterList([nn.Parameter(torch.randn(3))])

        def forward(self, x):
            assert isinstance(self.table, nn.Parameter)
            return x.mean((2, 3)) + self.table[self.index].sum(0) + self.parts[0]

    traced = check(Bias(), X)
    traced_forward(traced)(X).sum().backward()
    assert float(traced.root.table.grad.abs().sum()) > 0
    assert float(traced.root.parts[0].grad.abs().sum()) > 0
    assert {"table", "index", "parts.0"} < set(names(traced))
    assert node_named(traced, "sum").meta["constant"]
    assert not node_named(traced, "mean").meta["constant"]


def test_unused_parts_leave_no_trace():
    def forward(_, x):
        x.new_ones(8) + x
        F.dropout(x, 0.3, training=False)
        return x * 2

    traced = check(Forward(forward), X)
    assert names(traced) == ["x", "mul", "output"]
    assert not list(traced.root.buffers())
    assert not list(traced.root.children())


def test_a_subclass_that_changes_nothing_is_a_leaf_and_one_that_does_is_not():
    class Plain(nn.Conv2d):
        pass

    class Standardized(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    class Padded(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return F.conv2d(x, weight * 2, bias)

    traced = check(nn.Sequential(Plain(3, 3, 1), Standardized(3, 3, 1), Padded(3, 3, 1)), X)
    assert "0" in names(traced)
    assert {"1.conv2d", "2.conv2d"} < set(names(traced))


def test_a_module_made_in_a_forward_is_recorded():
    traced = check(Forward(lambda _, x: nn.Upsample(scale_factor=2)(x)), X)
    assert names(traced) == ["x", "upsample", "output"]


def test_functions_wrapped_for_torch_fx_are_traced_through():
    traced = check(Forward(lambda _, x: wrapped(x)), X)
    assert "mul" in names(traced)


class RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_an_autograd_function_keeps_its_own_backward():
    traced = check(nn.Sequential(Forward(lambda _, x: RoundStraightThrough.apply(x) * 2)), X)
    assert names(traced) == ["input", "0.roundstraightthrough", "0.mul", "output"]
    x = X.clone().requires_grad_()
    traced_forward(traced)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))
    assert RoundStraightThrough.apply(X).equal(X.round())


def test_compiled_submodules_become_islands():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    traced = check(nn.Sequential(nn.Conv2d(3, 3, 1), scripted), X, islands=1)
    assert traced.islands[0].path == "1"
    assert "TorchScript" in traced.islands[0].cause


@pytest.mark.parametrize(
    "module",
    [
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
        nn.utils.spectral_norm(nn.Conv2d(3, 3, 1)),
        Forward(lambda m, x: m.lstm(x.flatten(2))[0], lstm=nn.LSTM(64, 5, batch_first=True)),
        Forward(lambda m, x: torch.utils.checkpoint.checkpoint(m.c, x, use_reentrant=False), c=nn.Conv2d(3, 3, 1)),
    ],
)
def test_modules_with_hooks_parametrizations_states_and_checkpoints(module):
    check(nn.Sequential(module), X)


def test_forward_hooks_are_recorded():
    body = nn.Sequential(nn.Conv2d(3, 3, 1))
    body.register_forward_hook(lambda module, args, output: output * 3)
    assert "0.mul" in names(check(nn.Sequential(body), X))


@torch.fx.wrap
def wrapped(x):
    return x * 2 if x.shape[1] == 3 else x


def test_a_traced_forward_leaves_nothing_behind_in_the_model():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.norm = nn.BatchNorm2d(3)
            self.seen = None

        def forward(self, x):
            self.calls += 1
            self.seen = self.norm(x)
            return self.seen * 2

    model = Stateful()
    model.norm.train()
    model.train()
    traced = trace(model, X)
    assert (float(model.calls), model.seen) == (0, None)
    assert model.training
    assert model.norm.training
    copy.deepcopy(traced.root)
    assert nn.Module.__call__ is nn.Module._wrapped_call_impl


# -- dropout


def test_functional_dropout_becomes_a_module_that_acts_in_training():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Forward(lambda m, x: F.dropout(x, 0.5, training=m.training) + 1)

        def forward(self, x):
            return F.dropout2d(self.head(x), p=0.25, training=self.training)

    traced = check(Net(), X)
    assert {"head.dropout", "dropout"} < set(names(traced))
    kinds = [type(m) for n, m in traced.root.named_children() if n.startswith("_dropout")]
    assert kinds == [nn.Dropout, nn.Dropout2d]
    run, ones = traced_forward(traced), torch.ones(2, 3, 8, 8)
    traced.root.train()
    assert not torch.equal(run(ones), run(ones))
    traced.root.eval()
    assert torch.equal(run(ones), ones * 2)


def test_modules_that_act_only_in_training_stay():
    class DropPath(nn.Module):
        def forward(self, x):
            return x * 0 if self.training else x

    traced = check(nn.Sequential(nn.Conv2d(3, 3, 1), DropPath()), X)
    assert names(traced) == ["input", "0", "1", "output"]
    traced.root.train()
    assert not traced_forward(traced)(X).any()


def test_dropout_that_never_stops_is_kept():
    traced = trace(Forward(lambda _, x: F.dropout(x, 0.5, training=True)).eval(), X)
    assert not torch.equal(traced_forward(traced)(X), X)


# -- inputs and outputs


class Pair(typing.NamedTuple):
    first: Tensor
    rest: list


@dataclasses.dataclass
class Result:
    logits: Tensor
    hidden: Tensor | None = None


@pytest.mark.parametrize(
    "forward",
    [
        lambda _, x: (x + 1, [x * 2, x]),
        lambda _, x: {"a": x + 1, "b": None},
        lambda _, x: collections.OrderedDict(out=x + 1, aux=x * 2),
        lambda _, x: Pair(x + 1, [x * 2]),
        lambda _, x: Result(x * 3),
        lambda _, x: (x.max(dim=1).values, *torch.sort(x, 1)),
        lambda _, x: (x, x),
    ],
)
def test_outputs_keep_their_types(forward):
    check(Forward(forward), X)


class Many(nn.Module):
    def forward(self, x, y, mask=None, *, scale: float = 1.0):
        out = x * scale + y
        return out if mask is None else out * mask


def test_several_inputs_keywords_and_defaults():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert names(trace(Many().eval(), (x, y)))[:2] == ["x", "y"]
    traced = trace(Many().eval(), {"x": x, "y": y, "mask": torch.ones(3), "scale": 2.0})
    assert [n.meta["name"] for n in traced.graph.nodes if n.op == "placeholder"] == ["x", "y", "mask"]
    assert node_named(traced, "mask").meta["shape"] == (3,)
    torch.testing.assert_close(traced_forward(traced)(x, y, torch.zeros(3)), torch.zeros(2, 3))


def test_variable_arguments():
    class Sum(nn.Module):
        def forward(self, *xs, **more):
            return sum((*xs, *more.values()))

    x = torch.randn(2, 3)
    traced = trace(Sum().eval(), (x, x))
    assert names(traced)[:2] == ["xs_0", "xs_1"]
    torch.testing.assert_close(traced_forward(traced)(x, x * 2), x * 3)
    assert names(trace(Sum().eval(), {"z": x}))[0] == "z"


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((X, X, X, X, X), "do not fit Many.forward"),
        (([X], X), "list of tensors"),
        ("text", "example inputs of type str"),
    ],
)
def test_wrong_example_inputs(example, message):
    with pytest.raises(TraceError, match=message):
        trace(Many().eval(), example)


# -- islands


class Choosing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        if y.sum() > 0:
            return y
        return y * 2


class Shuffled(nn.Module):
    def forward(self, x):
        for sample in range(x.shape[0]):
            x = x + sample
        return x


def test_control_flow_on_values_makes_a_float_island_of_the_innermost_submodule():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(Choosing(), nn.ReLU()))
    traced = check(model, X, islands=1)
    assert names(traced) == ["input", "0", "1.0", "1.1", "output"]
    island = traced.islands[0]
    assert island.path == "1.0"
    assert island.cause == "control flow or a Python value depends on the values of a tensor"
    file, line = island.source.rsplit(":", 1)
    assert file.endswith("test_trace.py")
    assert "y.sum() > 0" in Path(__file__).read_text().splitlines()[int(line) - 1]


def test_control_flow_on_the_batch_size_makes_a_float_island():
    traced = check(nn.Sequential(nn.Conv2d(3, 3, 1), Shuffled()), X, islands=1)
    assert "batch size" in traced.islands[0].cause


def test_an_island_with_several_results():
    class Splitting(nn.Module):
        def forward(self, x):
            return {"even": x[:, ::2], "flag": bool(x.sum() > 1e9)} if x.sum() < 1e9 else {}

    traced = check(Forward(lambda m, x: m.split(x)["even"] * 2, split=Splitting()), X, islands=1)
    assert node_named(traced, "split.even").meta["shape"] == (-1, 2, 8, 8)


def test_values_of_an_abandoned_submodule_are_not_used():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.ReLU(inplace=True), Choosing())

        def forward(self, x):
            y = x * 1
            return self.inner(y) + y

    check(Outer(), X, islands=1)


def test_a_root_that_cannot_be_traced_is_an_error_with_line_cause_and_mend():
    with pytest.raises(
        TraceError, match=r"cannot trace Choosing at .*test_trace.py:\d+: control flow .*; move the code"
    ):
        trace(Choosing().eval(), X)


def test_a_model_that_is_wrong_itself_is_an_error():
    with pytest.raises(TraceError, match=r"cannot trace Sequential.*RuntimeError"):
        trace(nn.Sequential(nn.Conv2d(4, 4, 1)).eval(), X)


def test_a_model_for_one_batch_size_only_is_traced_for_that():
    traced = check(Forward(lambda _, x: x.view(4, 2, 3, 8, 8).sum(1)), torch.randn(8, 3, 8, 8), static=True)
    assert traced.batches == (8, 8)
    assert node_named(traced, "x").meta["shape"] == (8, 3, 8, 8)
    assert "view" in str(traced.static_batch) or "shape" in str(traced.static_batch)


def test_no_batch_at_all():
    traced = trace(Forward(lambda _, x: x * 2).eval(), torch.tensor(1.0))
    assert traced.static_batch == "no example input has a batch dimension"
