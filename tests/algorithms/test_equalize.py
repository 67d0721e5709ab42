"""Equalization, absorption of biases, bias correction and batch norms: the same function, less noise."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qat
from qat.algorithms.bias import clamped_normal_mean
from qat.algorithms.channels import channel_groups
from qat.algorithms.noise import NoisyLayer, NoisyTensor, least_noise_factors, noise
from qat.algorithms.rewrite import in_float, scale_channels
from qat.algorithms.statistics import channel_statistics
from qat.errors import DataError, QuantizationWarning, StateError
from qat.graph.prepared import PreparedModel

TARGET = qat.load_target("onnxruntime-cpu")
IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3)) + 0.5


class Net(nn.Module):
    """Everything that a factor of a channel passes through, and some things that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.branch = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(16, 12, 1, groups=2, bias=False)
        self.grouped_norm = nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.gate = nn.Conv2d(6, 6, 1)
        self.hidden = nn.Linear(6, 10)
        self.layer_norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.stem_norm(self.stem(x)), 0.1)
        y = F.relu(self.depthwise(x))
        y = F.relu(y + self.branch(F.max_pool2d(x, 3, 1, 1)))
        y = torch.cat([y, x], 1)
        y = self.up(F.relu(self.grouped_norm(self.grouped(y))))
        y = y * torch.sigmoid(self.gate(y))
        y = F.relu(y).mean((2, 3))
        return self.head(self.layer_norm(F.relu6(self.hidden(y))))


def network(seed: int = 0, spread: float = 3.0) -> nn.Module:
    """A network whose channels have ranges that differ by `e**spread`."""
    torch.manual_seed(seed)
    net = Net()
    with torch.no_grad():
        for norm in (net.stem_norm, net.grouped_norm):
            norm.weight.copy_(torch.exp(torch.linspace(-spread, spread, norm.num_features) / 2))
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return net.eval()


def prepare(model: nn.Module, **scheme: Any) -> PreparedModel:
    return qat.prepare(model, IMAGES[:2], target=TARGET, scheme=scheme or None)


def output(qmodel: PreparedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = qmodel.eval()(IMAGES)
    return found


def test_channels_are_connected_through_what_is_homogeneous() -> None:
    qmodel = prepare(network())
    groups = channel_groups(qmodel)

    def of(name: str) -> list[int]:
        return groups.groups[groups.tensors[name].ids].tolist()

    # the addition connects its operands; the concatenation has the channels of both
    assert of("add") == of("branch") == of("depthwise")
    assert of("cat") == [*of("add"), *of("stem_norm")]
    assert len(set(of("cat"))) == 16
    assert 0 not in of("cat")
    # what a gate multiplies keeps its factors, but the layer that makes the gate reads them too
    assert of("up") == of("mul")
    assert 0 not in of("up")
    # ReLU6, layer norm's input and the model's output do not
    assert set(of("hidden")) == {0}
    assert "sigmoid" not in groups.tensors
    assert 0 not in of("layer_norm")
    assert set(of("head")) == {0}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_any_factors_leave_the_function_as_it_was(seed: int) -> None:
    qmodel = prepare(network())
    wanted = output(qmodel)
    groups = channel_groups(qmodel)
    factors = torch.exp(torch.randn(groups.count, generator=torch.Generator().manual_seed(seed))).double()
    factors[0] = 1.0
    scale_channels(qmodel, groups, factors)
    torch.testing.assert_close(output(qmodel), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["noise", "weights", "activations"])
def test_equalization_undoes_factors_that_make_a_model_worse(method: Any) -> None:
    model = network(spread=0.0)
    wanted = output(prepare(model))
    worse = prepare(model)
    groups = channel_groups(worse)
    factors = torch.exp(1.5 * torch.randn(groups.count, generator=torch.Generator().manual_seed(5))).double()
    factors[0] = 1.0
    scale_channels(worse, groups, factors)
    better = copy.deepcopy(worse)
    done = qat.equalize(better, [IMAGES[:32], IMAGES[32:]], method=method, progress=False)
    assert done.channels > 0
    assert done.largest > 1.5
    assert not done.undone
    torch.testing.assert_close(output(better), wanted, rtol=1e-3, atol=1e-4)
    errors = []
    for qmodel in (worse, better):
        qat.calibrate(qmodel, [IMAGES], progress=False)
        errors.append(float((output(qmodel) - wanted).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_noise_expects_less_after_than_before() -> None:
    qmodel = prepare(network())
    groups = channel_groups(qmodel)
    factors = torch.exp(torch.randn(groups.count, generator=torch.Generator().manual_seed(5))).double()
    factors[0] = 1.0
    scale_channels(qmodel, groups, factors)
    done = qat.equalize(qmodel, [IMAGES], progress=False)
    assert done.noise_before is not None
    assert done.noise_after is not None
    assert 0.0 < done.noise_after < 0.8 * done.noise_before


def test_the_expected_noise_is_that_of_uniform_errors() -> None:
    """One tensor of two channels and one layer: the formula against errors that are drawn."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]], dtype=torch.float64)
    x = torch.rand(200_000, 2, generator=generator, dtype=torch.float64) * torch.tensor([4.0, 1.0])
    # the outputs are those of the layer
    tensor = NoisyTensor(
        torch.tensor([1, 2]), x.amin(0), x.amax(0), symmetric=False, levels=15, sensitivity=weight.square().sum(0)
    )
    grids = torch.tensor([[0, 0], [1, 1]])
    layer = NoisyLayer(
        weight.abs(), 1, torch.tensor([[1, 2], [1, 2]]), torch.zeros(2, 2, dtype=torch.int64),
        x.square().mean(0).expand(2, 2), torch.ones(2, 2, dtype=torch.float64), grids, levels=7,
    )  # fmt: skip
    step = float(x.max()) / 15
    drawn = (torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5) * step
    steps = weight.abs().amax(1, keepdim=True) / 7
    errors = (torch.rand(2000, 2, 2, generator=generator, dtype=torch.float64) - 0.5) * steps
    power = float((drawn @ weight.T).square().sum(1).mean())
    power += float(torch.einsum("noc,mc->nmo", errors, x[:500]).square().sum(2).mean())
    found = noise(torch.zeros(3, dtype=torch.float64), [tensor], [layer])
    assert float(found) == pytest.approx(power, rel=0.05)
    factors, before, after = least_noise_factors([tensor], [layer], 3)
    assert before == pytest.approx(float(found))
    assert after < before
    # only the ratio of the two matters
    assert float(factors[1] / factors[2]) > 1.0


def test_sensitivities_are_those_of_drawn_noise() -> None:
    """Noise of a small variance in one channel: what it does to the outputs, squared."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(5, 2, 3)).double().eval()
    x = torch.randn(48, 3, 6, 6, dtype=torch.float64)
    qmodel = qat.prepare(copy.deepcopy(net).float(), x[:2].float(), target=TARGET)
    with in_float(qmodel):
        found = channel_statistics(qmodel, [x.float()], {"input": 1, "0": 1}, sensitivity=True, progress=False)
        plain = channel_statistics(qmodel, [x.float()], {"0": 1}, progress=False)
    assert torch.equal(plain["0"].sensitivity, torch.zeros(5, dtype=torch.float64))
    assert all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        wanted, middle = net(x), net[0](x)
        for name, value, rest in (("input", x, net), ("0", middle, net[1:])):
            for channel in range(value.shape[1]):
                changes = []
                for seed in range(20):
                    noise = torch.zeros_like(value)
                    generator = torch.Generator().manual_seed(seed)
                    noise[:, channel] = 1e-4 * torch.randn(value[:, channel].shape, generator=generator)
                    changes.append(float((rest(value + noise) - wanted).square().flatten(1).sum(1).mean()))
                expected = sum(changes) / len(changes) / 1e-8
                assert float(found[name].sensitivity[channel]) == pytest.approx(expected, rel=0.15)


def test_what_the_outputs_hang_on_gets_the_codes() -> None:
    """Of two channels that share a grid, the small one decides: without its factor its codes would be few."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(2, 4, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[8.0, 8, 8], [0.1, 0.1, 0.1]])[:, :, None, None])
        net[2].weight.copy_(torch.tensor([[[[0.001]]], [[[20.0]]]]))
    qmodel = qat.prepare(net.eval(), IMAGES[:2], target=TARGET)
    before = qmodel.float_state_dict()["0.weight"].flatten(1).abs().amax(1).clone()
    qat.equalize(qmodel, [IMAGES], progress=False)
    after = qmodel.float_state_dict()["0.weight"].flatten(1).abs().amax(1)
    assert float(before[0] / before[1]) == pytest.approx(80.0)
    assert float(after[0] / after[1]) < 2.0


def test_what_changes_the_function_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from qat.algorithms import equalize as module

    def wrong(qmodel: PreparedModel, groups: Any, factors: Tensor) -> None:
        with torch.no_grad():
            qmodel.float_state_dict()["hidden.weight"].mul_(2.0)

    monkeypatch.setattr(module, "scale_channels", wrong)
    qmodel = prepare(network())
    before = copy.deepcopy(qmodel.float_state_dict())
    with pytest.warns(QuantizationWarning, match="changed the outputs by .* and was undone"):
        done = qat.equalize(qmodel, method="weights")
    assert done.channels == 0
    assert "undone" in done.undone
    assert all(torch.equal(value, before[key]) for key, value in qmodel.float_state_dict().items())


def test_errors_of_equalization() -> None:
    qmodel = prepare(network())
    with pytest.raises(StateError, match=r"unknown method .*'noisy'.*noise, weights, activations"):
        qat.equalize(qmodel, method="noisy")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="needs data"):
        qat.equalize(qmodel)
    with pytest.raises(DataError, match="no data"):
        qat.equalize(qmodel, [])
    with pytest.raises(DataError, match=r"strength 1.5 .* outside \[0, 1\]"):
        qat.equalize(qmodel, [IMAGES], method="activations", strength=1.5)
    with pytest.warns(UserWarning, match="samples only"):
        qat.calibrate(qmodel, [IMAGES[:4]], progress=False)
    with pytest.raises(StateError, match="'x' has a range already"):
        qat.equalize(qmodel, [IMAGES])


# --- high biases


class Biased(nn.Module):
    """Two layers, a ReLU that some channels never reach between them."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.second = nn.Conv2d(6, 4, 2, bias=not norm)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.second(F.relu(self.first(x))))
        return out


@pytest.mark.parametrize("norm", [False, True])
def test_high_biases_move_on(norm: bool) -> None:
    torch.manual_seed(0)
    model = Biased(norm).eval()
    with torch.no_grad():
        assert model.first.bias is not None
        model.first.bias.copy_(torch.tensor([20.0, 30.0, 0.0, -1.0, 15.0, 0.5]))
    qmodel = prepare(model)
    wanted = output(qmodel)
    done = qat.absorb_high_bias(qmodel, [IMAGES], progress=False)
    assert done.layers == ("first",)
    assert done.channels == 3
    torch.testing.assert_close(output(qmodel), wanted, rtol=1e-4, atol=1e-4)
    lowered = qmodel.float_state_dict()["first.bias"]
    assert bool((lowered[[0, 1, 4]] < 12.0).all())
    assert torch.equal(lowered[[2, 3, 5]], torch.tensor([0.0, -1.0, 0.5]))
    # the codes of what was always there are free now
    plain = prepare(model)
    for one in (plain, qmodel):
        qat.calibrate(one, [IMAGES], progress=False)
    assert qmodel.encodings()["relu"].scale[0] < 0.5 * plain.encodings()["relu"].scale[0]


def test_padded_layers_keep_their_biases() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].bias.fill_(20.0)  # type: ignore[union-attr]
    assert qat.absorb_high_bias(prepare(model), [IMAGES], progress=False).channels == 0


# --- bias correction


def four_bits(model: nn.Module) -> PreparedModel:
    qmodel = prepare(model, weights={"dtype": "int4"})
    qat.calibrate(qmodel, [IMAGES], progress=False)
    return qmodel


def test_bias_correction_takes_the_mean_error_away() -> None:
    model = network(spread=1.0)
    wanted = output(prepare(model))
    plain, corrected = four_bits(model), four_bits(model)
    with pytest.warns(QuantizationWarning, match="bias of"):
        pass_through = qat.correct_bias(copy.deepcopy(_without_bias()), [IMAGES], progress=False)
    assert pass_through.skipped[0][0] == "0"
    done = qat.correct_bias(corrected, [IMAGES], progress=False)
    assert done.method == "empirical"
    assert set(done.corrected) | set(done.kept) == {
        "stem", "depthwise", "branch", "grouped", "up", "gate", "hidden", "head"
    }  # fmt: skip
    errors = [output(q) - wanted for q in (plain, corrected)]
    assert float(errors[1].square().mean()) < 0.7 * float(errors[0].square().mean())
    # the last layer's correction leaves no mean error at all
    assert float(errors[1].mean(0).abs().max()) < 0.02 * float(wanted.std())


def _without_bias() -> PreparedModel:
    model = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.ReLU()).eval()
    qmodel = prepare(model)
    qat.calibrate(qmodel, [IMAGES], progress=False)
    return qmodel


def test_the_analytic_correction_is_the_empirical_one_of_normal_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    x = torch.randn(512, 3, 4, 4)
    with torch.no_grad():
        # the statistics of the batch norm are those of the data
        model[1].momentum = None  # type: ignore[assignment]
        model.train()(x)
        model.eval()
        model[1].weight.uniform_(0.5, 2.0)  # type: ignore[union-attr,operator]
        model[1].bias.normal_()  # type: ignore[union-attr,operator]
    qmodel = qat.prepare(model, x[:2], target=TARGET, scheme={"weights": {"dtype": "int4"}})
    qat.calibrate(qmodel, [x], progress=False)
    empirical, analytic = copy.deepcopy(qmodel), copy.deepcopy(qmodel)
    qat.correct_bias(empirical, [x], progress=False)
    with pytest.warns(QuantizationWarning, match="'0' is not corrected: no batch norm"):
        done = qat.correct_bias(analytic, method="analytic")
    assert done.corrected == ("3",)
    before, found, wanted = (q.float_state_dict()["3.bias"] for q in (qmodel, analytic, empirical))
    # the first layer's error is in the empirical one too
    assert float((found - wanted).norm()) < 0.5 * float((before - wanted).norm())


@settings(max_examples=50, deadline=None)
@given(
    mean=st.floats(-3, 3), deviation=st.floats(0.0, 3), low=st.one_of(st.just(-torch.inf), st.floats(-2, 0)),
    high=st.one_of(st.just(torch.inf), st.floats(0.5, 6)),
)  # fmt: skip
def test_the_mean_of_a_clamped_normal_variable(mean: float, deviation: float, low: float, high: float) -> None:
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    values = (mean + deviation * torch.special.ndtri(uniform)).clamp(low, high)
    found = clamped_normal_mean(*(torch.tensor([v], dtype=torch.float64) for v in (mean, deviation)), low, high)
    assert float(found) == pytest.approx(float(values.mean()), abs=2e-4 * (1 + deviation))


def test_errors_of_bias_correction() -> None:
    qmodel = prepare(network())
    with pytest.raises(StateError, match="no range yet"):
        qat.correct_bias(qmodel, [IMAGES])
    with pytest.raises(StateError, match="unknown method"):
        qat.correct_bias(qmodel, method="both")  # type: ignore[arg-type]
    qmodel = four_bits(network())
    with pytest.raises(DataError, match="needs data"):
        qat.correct_bias(qmodel)


# --- batch norms


def test_batch_norms_get_the_statistics_of_quantized_layers() -> None:
    model = network(spread=1.0)
    qmodel = prepare(model, weights={"dtype": "int4"})
    qat.calibrate(qmodel, [IMAGES], progress=False)
    state = {k: v.clone() for k, v in qmodel.float_state_dict().items()}
    assert qat.reestimate_batch_norm(qmodel, [IMAGES[:32], IMAGES[32:]], progress=False) == (
        "stem_norm",
        "grouped_norm",
    )
    changed = {k for k, v in qmodel.float_state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {
        "stem_norm.running_mean", "stem_norm.running_var", "grouped_norm.running_mean", "grouped_norm.running_var"
    }  # fmt: skip
    # what the first one reads does not depend on another: quantized images, quantized weight
    plain = prepare(model, weights={"dtype": "int4"})
    qat.calibrate(plain, [IMAGES], progress=False)
    seen: list[Tensor] = []
    handle = plain.get_submodule("stem_norm").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output(plain)
    handle.remove()
    rows = seen[0].movedim(1, 0).flatten(1)
    found = qmodel.float_state_dict()
    torch.testing.assert_close(found["stem_norm.running_mean"], rows.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["stem_norm.running_var"], rows.var(1), rtol=1e-4, atol=1e-5)
    assert qmodel.get_submodule("stem_norm").momentum == 0.1  # type: ignore[comparison-overlap]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(qmodel)


def test_errors_of_batch_norms() -> None:
    qmodel = prepare(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval())
    qat.calibrate(qmodel, [IMAGES], progress=False)
    with pytest.raises(StateError, match="no batch norm"):
        qat.reestimate_batch_norm(qmodel, [IMAGES])
    qmodel = four_bits(network())
    before = copy.deepcopy(qmodel.float_state_dict())
    with pytest.raises(DataError, match="no data"):
        qat.reestimate_batch_norm(qmodel, [])
    assert all(torch.equal(value, before[key]) for key, value in qmodel.float_state_dict().items())


def test_bias_correction_that_moves_the_outputs_away_is_undone() -> None:
    """The outputs depend on one place of the layer, whose error is the opposite of that of the others."""

    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y[:, 0]

    torch.manual_seed(0)
    x = 0.1 * torch.randn(64, 8, 12, generator=torch.Generator().manual_seed(1)) + 5.0
    x[:, 0] -= 10.0
    qmodel = qat.prepare(Token().eval(), x[:2], target=TARGET, scheme={"weights": {"dtype": "int4"}})
    qat.calibrate(qmodel, [x])
    before = {key: value.clone() for key, value in qmodel.state_dict().items()}
    with pytest.warns(QuantizationWarning, match="bias correction is undone"):
        done = qat.correct_bias(qmodel, [x], progress=False)
    assert (done.corrected, done.kept) == ((), ("layer",))
    assert all(torch.equal(before[key], value) for key, value in qmodel.state_dict().items())
    # with all places alike the same layer is corrected
    x[:, 0] += 10.0
    same = qat.prepare(Token().eval(), x[:2], target=TARGET, scheme={"weights": {"dtype": "int4"}})
    qat.calibrate(same, [x])
    assert qat.correct_bias(same, [x], progress=False).corrected == ("layer",)
