"""What the tests of recognition share: an interpreter that knows nothing but kinds and attributes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qat.graph.operators import Operator, ParamRef, ScalarConst, recognize
from qat.graph.trace import Traced, trace


def traced(model: nn.Module, *inputs: Tensor) -> Traced:
    """Trace a copy of a model, in evaluation."""
    return trace(copy.deepcopy(model).eval(), inputs)


def operators_of(model: nn.Module, *inputs: Tensor) -> list[Operator]:
    """The operators of a model in execution order."""
    return list(recognize(traced(model, *inputs)).values())


def run_operators(model: Traced, operators: Mapping[fx.Node, Operator], *inputs: Tensor) -> Any:
    """Execute a traced model from the kinds and attributes of its operators alone."""
    state = {**dict(model.root.named_buffers()), **dict(model.root.named_parameters(remove_duplicate=False))}
    batch = inputs[0].shape[0]
    values: dict[fx.Node, Any] = {}

    def read(operand: Any) -> Any:
        if isinstance(operand, fx.Node):
            return values[operand]
        if isinstance(operand, ParamRef):
            return state[operand.key]
        return operand.value if isinstance(operand, ScalarConst) else operand

    waiting = list(inputs)
    with torch.no_grad():
        for node in model.graph.nodes:
            if node.op == "placeholder":
                values[node] = waiting.pop(0)
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: values[n])
            elif node in operators and operators[node].kind != "split":
                op = operators[node]
                if op.kind == "constant":
                    state[node.meta["name"]] = values[node] = _constant(node, lambda n: state[n.meta["name"]])
                else:
                    values[node] = execute(op.kind, op.attrs, [read(i) for i in op.inputs], batch)
    raise AssertionError("a graph without an output")


def _constant(node: fx.Node, read: Callable[[fx.Node], Any]) -> Tensor:
    """What the user's own call gives on parameters."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def execute(kind: str, attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    """One operator in float."""
    if kind == "chain":
        value = inputs[0]
        for step, step_attrs in attrs["steps"]:
            value = execute(step, step_attrs, [value], batch)
        return value
    if kind in _BINARY:
        return _BINARY[kind](*inputs)
    return globals()[f"_{kind}"](attrs, inputs, batch)


_BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "matmul": torch.matmul,
    "prelu": F.prelu,
}


def _conv(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    x, weight, bias = inputs
    x = F.pad(x, [side for pair in reversed(attrs["padding"]) for side in pair])
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.ndim]
    return function(x, weight, bias, stride=attrs["stride"], dilation=attrs["dilation"], groups=attrs["groups"])


def _conv_transpose(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    x, weight, bias = inputs
    function = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[weight.ndim]
    padding = [lo for lo, _ in attrs["padding"]]
    others = {k: attrs[k] for k in ("stride", "output_padding", "dilation", "groups")}
    return function(x, weight, bias, padding=padding, **others)


def _linear(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    return F.linear(*inputs)


def _clamp(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    return torch.clamp(inputs[0], attrs["low"], attrs["high"])


def _table(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    function = getattr(F, attrs["function"], None) or getattr(torch, attrs["function"])
    return function(inputs[0], **attrs["params"])


def _softmax(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    return torch.softmax(inputs[0], attrs["axis"])


def _layer_norm(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    x, weight, bias = inputs
    return F.layer_norm(x, x.shape[-attrs["axes_count"] :], weight, bias, attrs["eps"])


def _batch_norm(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    x, weight, bias, mean, variance = inputs
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, attrs["eps"])


def _max_pool(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(attrs["kernel"])]
    padding = [lo for lo, _ in attrs["padding"]]
    return function(
        inputs[0], attrs["kernel"], attrs["stride"], padding, attrs["dilation"], ceil_mode=attrs["ceil_mode"]
    )


def _avg_pool(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(attrs["kernel"])]
    padding = [lo for lo, _ in attrs["padding"]]
    flags = attrs["ceil_mode"], attrs["count_include_pad"]
    return function(inputs[0], attrs["kernel"], attrs["stride"], padding, *flags)


def _mean(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    return inputs[0].mean(attrs["axes"], keepdim=attrs["keepdims"])


def _resize(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    x = inputs[0]
    mode = {"nearest": "nearest", "linear": ("linear", "bilinear", "trilinear")[x.ndim - 3]}[attrs["mode"]]
    place = {"size": attrs["size"]} if attrs["scales"] is None else {"scale_factor": attrs["scales"]}
    result = F.interpolate(x, **place, mode=mode, align_corners=attrs["align_corners"] if mode != "nearest" else None)
    assert tuple(result.shape[2:]) == attrs["size"]
    return result


def _pad(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    x = inputs[0]
    assert len(attrs["pads"]) == x.ndim
    if attrs["mode"] == "constant":
        return F.pad(x, [side for pair in reversed(attrs["pads"]) for side in pair], value=attrs["value"])
    return F.pad(x, [side for pair in reversed(attrs["pads"][2:]) for side in pair], mode=attrs["mode"])


def _concat(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    return torch.cat(inputs, attrs["axis"])


def _stack(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    return torch.stack(inputs, attrs["axis"])


def _reshape(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    return inputs[0].reshape(attrs["shape"])


def _transpose(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    return inputs[0].permute(attrs["perm"])


def _slice(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    x = inputs[0]
    for axis, start, end, step in zip(*(attrs[k] for k in ("axes", "starts", "ends", "steps")), strict=True):
        picked = torch.tensor(list(range(x.shape[axis]))[slice(start, end, step)], dtype=torch.long)
        x = x.index_select(axis, picked)
    return x


def _roll(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    return torch.roll(inputs[0], attrs["shifts"], attrs["axes"])


def _expand(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    return inputs[0].expand([-s * batch if s < 0 else s for s in attrs["shape"]])


def _rescale(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    assert attrs["factor"] > 0
    assert math.isfinite(attrs["factor"])
    return inputs[0] * attrs["factor"]


def _identity(attrs: Mapping[str, Any], inputs: list[Any], batch: int) -> Tensor:
    return inputs[0]


# --- what a test says of a model

IMAGE = (4, 8, 6)  # sizes without the batch
TOKENS = (5, 8)


class Call(nn.Module):
    """A function of the input and of parameters `a`, `b`, ... as a model."""

    def __init__(self, function: Callable[..., Any], *parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in zip("abcd", parameters, strict=False):
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return self.function(x, *(getattr(self, name) for name in self._parameters))


def check(model: nn.Module | Callable[..., Any], sizes: tuple[int, ...], kinds: str, /, **attrs: Any) -> Operator:
    """Kinds in order, attributes of the first operator, and the output at a batch size that was not traced."""
    torch.manual_seed(0)
    if not isinstance(model, nn.Module):
        model = Call(model)
    if type(model).__module__.startswith("torch."):
        model = nn.Sequential(model)  # a module at the root would be traced through
    for value in model.parameters():
        if value.ndim == 1:
            nn.init.uniform_(value, 0.5, 1.5)
    for value in model.buffers():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5)
    x = torch.rand(5, *sizes) * 3 - 1 if "positive" not in kinds else torch.rand(5, *sizes) + 0.1
    model.eval()
    made = traced(model, x[:2])
    found = recognize(made)
    ops = list(found.values())
    assert " ".join(op.kind for op in ops) == kinds.replace(" positive", "")
    for name, value in attrs.items():
        assert ops[0].attrs[name] == value, name
    with torch.no_grad():
        expected = model(x.clone())
    torch.testing.assert_close(run_operators(made, found, x), expected, rtol=1e-5, atol=1e-5)
    return ops[0]
