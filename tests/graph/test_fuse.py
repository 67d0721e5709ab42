"""The fused form of a prepared model: the same training, the same state."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat import native
from qat.graph.fuse import fuse
from qat.quantizers.fused import add_fake_quantize, norm_fake_quantize


class Block(nn.Module):
    """A bottleneck with a residual, one of torchvision's kinds each."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True))
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.project = nn.Sequential(nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.depthwise(self.expand(x))))
        y = self.project(y)
        y = y + x
        return self.head(torch.relu(y).mean((2, 3)))  # type: ignore[no-any-return]


def images(seed: int = 0) -> Tensor:
    return torch.randn(6, 4, 7, 7, generator=torch.Generator().manual_seed(seed))


def prepared(*, fused: bool = True, learned: str | None = None) -> qat.PreparedModel:
    torch.manual_seed(0)
    scheme = {"activations": {"quantizer": learned}, "weights": {"quantizer": learned}} if learned else None
    qmodel = qat.prepare(Block(), images(), target=qat.load_target("arm-cpu"), scheme=scheme, fused=fused)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [images()])
    qmodel.set_phase("track")
    return qmodel.train()


def targets(qmodel: qat.PreparedModel) -> list[object]:
    return [node.target for node in fuse(qmodel.graph, qmodel).nodes if node.op == "call_function"]


def train(qmodel: qat.PreparedModel, steps: int = 4, channels_last: bool = False) -> list[float]:
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        x = images(step)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss = F.cross_entropy(qmodel(x), torch.arange(6) % 3)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_what_is_fused() -> None:
    qmodel = prepared()
    assert qmodel.fused
    assert targets(qmodel).count(norm_fake_quantize) == 3
    assert targets(qmodel).count(add_fake_quantize) == 1
    # the graph that others read keeps one call an operator
    assert norm_fake_quantize not in [node.target for node in qmodel.graph.nodes]
    assert not prepared(fused=False).fused


def test_a_value_with_two_readers_is_not_fused_away() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(self.conv(x))
            return F.relu(y), y

    qmodel = qat.prepare(Two(), images(), target=qat.load_target("arm-cpu"))
    first, second = qmodel.eval()(images())
    assert torch.equal(first, F.relu(second))


def test_a_sum_in_place_that_is_read_again_is_not_fused_away() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = y.add_(x)
            return torch.cat([z, y], 1)

    qmodel = qat.prepare(InPlace(), images(), target=qat.load_target("arm-cpu")).eval()
    plain = qat.prepare(InPlace(), images(), target=qat.load_target("arm-cpu"), fused=False).eval()
    plain.load_state_dict(qmodel.state_dict())
    assert torch.equal(qmodel(images()), plain(images()))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_training_is_that_of_the_single_modules(channels_last: bool, frozen: bool) -> None:
    fused, plain = prepared(), prepared(fused=False)
    for qmodel in (fused, plain):
        if frozen:
            qmodel.freeze_batch_norm()
    have, want = train(fused, channels_last=channels_last), train(plain, channels_last=channels_last)
    torch.testing.assert_close(torch.tensor(have), torch.tensor(want), rtol=2e-3, atol=2e-3)
    states = fused.state_dict(), plain.state_dict()
    assert list(states[0]) == list(states[1])
    for key, value in states[1].items():
        if value.is_floating_point():
            assert torch.allclose(states[0][key], value, rtol=2e-2, atol=5e-3), key
    counts = [state["norm.num_batches_tracked"] for state in states]
    assert int(counts[0]) == int(counts[1]) == (0 if frozen else 4)


def test_the_first_step_agrees_to_float_rounding() -> None:
    gradients = []
    for fused in (True, False):
        qmodel = prepared(fused=fused)
        F.cross_entropy(qmodel(images()), torch.arange(6) % 3).backward()
        gradients.append({name: p.grad for name, p in qmodel.named_parameters()})
    for name, want in gradients[1].items():
        assert want is not None
        torch.testing.assert_close(gradients[0][name], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["lsq", "lsq_plus", "tqt", "ulq"])
def test_learned_grids_in_fused_passes(name: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for key in ("norm_quantize_learned", "add_quantize_learned", "fake_quantize_weight_learned"):
        whole = getattr(native, key)
        monkeypatch.setattr(native, key, lambda *a, f=whole, k=key: (calls.append(k), f(*a))[1])
    gradients = []
    for fused in (True, False):
        qmodel = prepared(fused=fused, learned=name)
        if frozen:
            qmodel.freeze_batch_norm()
        F.cross_entropy(qmodel(images()), torch.arange(6) % 3).backward()
        gradients.append({name: p.grad for name, p in qmodel.named_parameters()})
    if native.status().active:
        assert [calls.count(key) for key in ("norm_quantize_learned", "add_quantize_learned")] == [3, 1]
        # of the three convolutions, in both models
        assert calls.count("fake_quantize_weight_learned") == 6
    for key, want in gradients[1].items():
        assert want is not None
        torch.testing.assert_close(gradients[0][key], want, rtol=1e-3, atol=1e-5, msg=key)


def test_learning_in_fused_passes_is_that_of_the_single_modules() -> None:
    fused, plain = prepared(learned="lsq"), prepared(fused=False, learned="lsq")
    have, want = train(fused), train(plain)
    torch.testing.assert_close(torch.tensor(have), torch.tensor(want), rtol=2e-3, atol=2e-3)
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=2e-2, atol=5e-3), name
    for qmodel in (fused, plain):
        qmodel.set_phase("quantize")
    torch.testing.assert_close(fused.eval()(images(9)), plain.eval()(images(9)), rtol=2e-2, atol=2e-2)


def test_state_moves_between_both_forms() -> None:
    fused, plain = prepared(), prepared(fused=False)
    train(fused)
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused.eval()(images(9)), plain.eval()(images(9)), rtol=1e-5, atol=1e-5)
    assert [p for p, _ in fused.named_modules()] == [p for p, _ in plain.named_modules()]


def test_copies_are_fused_and_apart() -> None:
    qmodel = prepared()
    other = copy.deepcopy(qmodel)
    assert other.fused
    before = {key: value.clone() for key, value in qmodel.state_dict().items()}
    train(other)
    assert all(torch.equal(before[key], value) for key, value in qmodel.state_dict().items())


def test_hooks_of_a_batch_norm_are_called() -> None:
    qmodel = prepared()
    seen: list[object] = []
    handle = qmodel.norm.register_forward_hook(lambda _, args, out: seen.append(out.shape))  # type: ignore[union-attr]
    qmodel(images())
    assert seen == [torch.Size((6, 12, 7, 7))]
    handle.remove()
    qmodel(images())
    assert len(seen) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        qmodel(images())
    finally:
        handle.remove()
    assert seen.count(nn.BatchNorm2d) == 3


def test_calibration_of_both_forms_gives_the_same_ranges() -> None:
    have, want = prepared().encodings(), prepared(fused=False).encodings()
    assert list(have) == list(want)
    for name in want:
        torch.testing.assert_close(have[name].scale_tensor, want[name].scale_tensor, rtol=1e-5, atol=0.0)


@pytest.mark.heavy
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("learned", [None, "lsq"])
def test_compiled_training_runs_the_fused_calls_in_one_graph(
    backend: str, channels_last: bool, learned: str | None
) -> None:
    torch._dynamo.reset()
    eager, compiled = prepared(learned=learned), prepared(learned=learned)
    calls: list[str] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        calls.extend(str(node.target) for m in graph.modules() for node in m.graph.nodes)  # type: ignore[union-attr]
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    run = torch.compile(compiled, fullgraph=True, backend=counting)
    x = images().contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for _ in range(2):
        for qmodel, forward in ((eager, eager), (compiled, run)):
            qmodel.zero_grad()
            F.cross_entropy(forward(x), torch.arange(6) % 3).backward()
    if native.status().active:
        infix = "_learned" if learned else ""
        assert sum(f"norm_quantize{infix}_forward" in call for call in calls) == 3
        assert sum(f"add_quantize{infix}_forward" in call for call in calls) == 1
        # the last layer has no batch norm
        assert sum(f"fake_quantize_weight{infix}_forward" in call for call in calls) == (3 if learned else 4)
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_autocast_keeps_to_the_modules() -> None:
    qmodel = prepared()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(qmodel(images()).float(), torch.arange(6) % 3)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in qmodel.parameters())


def test_it_can_be_switched_off() -> None:
    qmodel = qat.optimize_for_training(prepared(), enabled=False)
    assert not qmodel.fused
    assert qat.optimize_for_training(qmodel).fused


class Residual(nn.Module):
    """As in residual networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        z = self.bn2(self.conv2(y))
        z = z + y
        return self.relu(z)  # type: ignore[no-any-return]


@pytest.mark.parametrize("observer", ["histogram", "minmax", "moving_average", "kl"])
@pytest.mark.parametrize("module", [Block, Residual])
def test_calibration_in_fused_passes(module: type[nn.Module], observer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.status().active:
        pytest.skip("the passes are native")
    calls = []
    for name in ("norm_observe", "add_observe"):
        whole = getattr(native, name)

        def counted(*args: Any, whole: Any = whole, **options: Any) -> Tensor:
            calls.append(options["in_place"])
            return whole(*args, **options)  # type: ignore[no-any-return]

        monkeypatch.setattr(native, name, counted)
    torch.manual_seed(0)
    model, batches = module(), [images(seed).requires_grad_(False) for seed in range(3)]
    scheme = {"activations": {"observer": {"name": observer}}}
    made, before = [], [x.clone() for x in batches]
    for fused in (True, False):
        qmodel = qat.prepare(model, batches[:1], target=qat.load_target("arm-cpu"), scheme=scheme, fused=fused)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            qat.calibrate(qmodel, batches)
        made.append(qmodel)
    assert len(calls) == 3 * (4 if module is Block else 3)
    # results of layers and of other passes are overwritten
    assert all(calls)
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))
    for (name, a), (_, b) in zip(*(m.named_buffers() for m in made), strict=True):
        if name.endswith("counts"):
            # rounding may move an element into the next bin
            assert int(a.sum()) == int(b.sum())
            assert float((a.cumsum(0) - b.cumsum(0)).abs().max()) <= 0.002 * float(a.sum())
        elif name.endswith("zero_point"):
            assert int((a - b).abs().max()) <= 1
        else:
            torch.testing.assert_close(a, b, rtol=2e-3 if observer == "histogram" else 1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["conv1", "bn1", "bn2"])
def test_calibration_leaves_what_hooks_keep(name: str) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    # in place it would be the model that changes what the hook keeps
    model.relu.inplace = False
    qmodel = qat.prepare(model, images(), target=qat.load_target("arm-cpu"))
    kept: list[Tensor] = []
    for m in (qmodel, model):
        m.get_submodule(name).register_forward_hook(lambda *given: kept.append(given[2]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [images()])
    model(images())
    torch.testing.assert_close(kept[0], kept[1])


def test_nan_reaches_the_observers() -> None:
    torch.manual_seed(0)
    qmodel = qat.prepare(Residual(), images(), target=qat.load_target("arm-cpu")).eval()
    qmodel.set_phase("observe")
    bad = images()
    bad[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        qmodel(bad)
    assert all(int(q.observer.nonfinite) > 0 for q in qmodel.activation_quantizers().values())
