"""The sweep: the values of both paths, who sees what, memory, and no trace of a failure."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from small_nets import Linears, Residual, Shared, Transposed, calibrated, make, vectors
from torch import Tensor, nn

import qat
from qat.algorithms.sweep import Visit, gather, sweep
from qat.algorithms.units import Reach, layer_units, make_unit, quantized_layers, varying_nodes
from qat.errors import DataError, QuantizationWarning, StateError
from qat.graph.prepared import PreparedModel
from qat.quantizers import Phase

NETS = [Residual, Transposed, Linears, Shared]


def output_of(qmodel: PreparedModel, data: Tensor, phase: str) -> Tensor:
    other = copy.deepcopy(qmodel).eval()
    other.fused = False
    other.set_phase(phase)
    with torch.no_grad():
        return other(data)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", NETS)
def test_both_paths_are_those_of_the_model(kind: type[nn.Module]) -> None:
    qmodel, data = make(kind)
    units, seen = layer_units(qmodel), list[Visit]()
    batches = gather(qmodel, [data], batch_size=20)
    assert [len(b[0]) for b in batches] == [20, 20, 20, 4]
    sweep(qmodel, batches, units, seen.append, progress=False)
    assert [v.unit.name for v in seen] == [u.name for u in units]
    last = seen[-1]
    assert last.unit.name == qmodel.opgraph.outputs[0]
    torch.testing.assert_close(torch.cat(last.targets), output_of(qmodel, data, "float"))
    torch.testing.assert_close(torch.cat(list(last.outputs())), output_of(qmodel, data, "quantize"))


def test_layers_after_a_changed_one_see_the_change_in_the_quantized_path_only() -> None:
    qmodel, data = make(Residual)
    before, seen = output_of(qmodel, data, "float"), list[Visit]()

    def double(visit: Visit) -> None:
        seen.append(visit)
        if len(seen) == 1:
            (layer,) = visit.unit.layers
            layer.weight.mul_(2)

    sweep(qmodel, gather(qmodel, [data]), layer_units(qmodel), double, progress=False)
    torch.testing.assert_close(torch.cat(seen[-1].targets), before)
    torch.testing.assert_close(torch.cat(list(seen[-1].outputs())), output_of(qmodel, data, "quantize"))
    assert not torch.equal(before, output_of(qmodel, data, "float"))


def test_the_float_path_can_be_that_of_the_original_model() -> None:
    qmodel, data = make(Linears)
    net = Linears()
    seen: list[Visit] = []
    sweep(qmodel, gather(qmodel, [data]), layer_units(qmodel), seen.append, float_model=net, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(seen[-1].targets), net(data))


@pytest.mark.parametrize(
    ("reach", "ends"),
    [
        ("operator", ["stem.0", "block.conv1", "block.conv2", "depthwise", "head"]),
        ("norm", ["stem.1", "block.bn1", "block.bn2", "depthwise", "head"]),
        ("clamp", ["stem.2", "block.relu", "block.bn2", "relu6", "head"]),
        ("activation", ["stem.2", "block.relu", "block.bn2", "relu6", "head"]),
        ("quantizer", ["stem.2", "block.relu", "block.bn2", "relu6", "head"]),
    ],
)
def test_how_far_a_unit_reaches(reach: Reach, ends: list[str]) -> None:
    qmodel, _ = make(Residual)
    units = layer_units(qmodel, reach)
    assert [u.name for u in units] == ends
    quantizers = [u.output.meta.get("quantizes") for u in units]
    assert all(quantizers) if reach == "quantizer" else not any(quantizers)


class Activated(nn.Module):
    """Layers before a function of each element, before one whose argument is read elsewhere too, and before none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.leaky, self.silu = nn.LeakyReLU(0.1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.leaky(self.norm(self.first(x))))
        return self.last(self.silu(y) + y)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("reach", "ends"),
    [
        ("clamp", ["norm", "second", "last"]),
        ("activation", ["leaky", "second", "last"]),
        ("quantizer", ["leaky", "second", "last"]),
    ],
)
def test_a_unit_goes_on_to_the_activation_that_alone_reads_a_layer(reach: Reach, ends: list[str]) -> None:
    torch.manual_seed(0)
    data = torch.randn(8, 3, 6, 6)
    qmodel = qat.prepare(Activated().eval(), data, target=qat.load_target("onnxruntime-cpu"))
    qat.calibrate(qmodel, [data], progress=False)
    units = layer_units(qmodel, reach)
    assert [u.name for u in units] == ends
    seen: list[Visit] = []
    sweep(qmodel, gather(qmodel, [data]), units, seen.append, progress=False)
    if reach != "clamp":
        # what is to be reproduced is the float model's activation
        model = Activated().eval()
        model.load_state_dict(qmodel.float_state_dict())
        with torch.no_grad():
            want = model.leaky(model.norm(model.first(data)))
        torch.testing.assert_close(torch.cat(seen[0].targets), want, rtol=1e-4, atol=1e-5)


def test_layers_that_share_a_weight_are_known() -> None:
    qmodel, _ = make(Shared)
    calls = {name: layer.calls for name, layer in quantized_layers(qmodel).items()}
    assert calls == {"twice": 2, "twice#2": 2, "once": 1}


class InPlace(nn.Module):
    """A block that begins with an activation in place, which is not the same when it is done twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.act = nn.LeakyReLU(0.5, inplace=True)
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x))
        return self.left(y) + self.right(y)  # type: ignore[no-any-return]


def test_a_unit_can_be_run_again() -> None:
    torch.manual_seed(0)
    data = vectors()
    qmodel = calibrated(InPlace(), data)
    varying = varying_nodes(qmodel.graph)
    nodes = [node for node in qmodel.graph.nodes if node in varying and node.op != "output"]
    layers = tuple(quantized_layers(qmodel).values())[1:]
    start = next(i for i, node in enumerate(nodes) if node.name == "act")
    unit = make_unit("block", nodes[start:], layers, varying)

    def visit(found: Visit) -> None:
        for _ in range(2):
            torch.testing.assert_close(torch.cat(list(found.outputs())), output_of(qmodel, data, "quantize"))
        torch.testing.assert_close(torch.cat(found.targets), output_of(qmodel, data, "float"))

    sweep(qmodel, gather(qmodel, [data]), [unit], visit, progress=False)


def test_few_values_are_alive() -> None:
    qmodel, data = make(Residual)
    # the residual block at its widest: its input, and what is computed beside it, in two paths
    least = 8 * 8 * 8 * 4 * 2 * 2
    with pytest.raises(DataError, match=r"one sample needs .* and the limit is .*; raise memory"):
        gather(qmodel, [data], memory=least)
    with pytest.warns(QuantizationWarning, match="samples are used and 64 or more were given"):
        batches = gather(qmodel, [data], memory=20 * least)
    assert 10 <= sum(len(b[0]) for b in batches) <= 20


def test_no_more_than_the_wanted_samples_are_taken() -> None:
    qmodel, data = make(Linears)
    taken: list[int] = []

    def endless() -> Iterator[Tensor]:
        while True:
            taken.append(1)
            yield data[:10]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = gather(qmodel, endless(), samples=25, batch_size=10)
    assert [len(b[0]) for b in batches] == [10, 10, 5]
    assert len(taken) == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, d: gather(q, []), DataError, "no calibration data; give at least one batch"),
        (lambda q, d: gather(q, [d[:0]]), DataError, "no calibration data; give at least one batch"),
        (lambda q, d: gather(q, [d], samples=0), StateError, "samples is 0; give a positive number"),
        (lambda q, d: gather(q, [d], memory=0), StateError, "memory is 0; give a positive number"),
        (lambda q, d: gather(q, [d], batch_size=0), StateError, "batch_size is 0; give a positive number"),
        (
            lambda q, d: sweep(q, gather(q, [d]), layer_units(q) * 2, lambda v: None),
            StateError,
            "the unit 'relu' overlaps another one; give each node to one unit",
        ),
    ],
)
def test_bad_input(call: Callable[[PreparedModel, Tensor], object], error: type[Exception], message: str) -> None:
    qmodel, data = make(Linears)
    with pytest.raises(error) as caught:
        call(qmodel, data)
    assert str(caught.value) == message


def test_a_model_without_ranges() -> None:
    qmodel = qat.prepare(Linears(), torch.randn(2, 16), target=qat.load_target("onnxruntime-cpu"))
    with pytest.raises(StateError, match="'x' has no range yet"):
        gather(qmodel, [torch.randn(2, 16)])


def test_a_failure_leaves_no_trace() -> None:
    qmodel, data = make(Residual)
    qmodel.train()
    qmodel.set_phase("track")
    state = {key: value.clone() for key, value in qmodel.state_dict().items()}
    count = 0

    def fail(visit: Visit) -> None:
        nonlocal count
        visit.unit.layers[0].weight.zero_()
        visit.unit.layers[0].quantizer.set_phase(Phase())
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(qmodel, gather(qmodel, [data]), layer_units(qmodel), fail, progress=False)
    assert all(torch.equal(value, state[key]) for key, value in qmodel.state_dict().items())
    assert all(module.training for module in qmodel.modules())
