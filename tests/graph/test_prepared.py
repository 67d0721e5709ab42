"""`PreparedModel`: the float model when it simulates nothing, the integer model's weights, and its state."""

from __future__ import annotations

import copy
import io
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qat
from qat.errors import CheckpointError, EncodingError, PlanError, StateError
from qat.graph.prepared import PreparedModel
from qat.integer.model import IntegerModel
from qat.quantizers import pack_frozen

TARGET = qat.load_target("onnxruntime-cpu")


class Net(nn.Module):
    """Convolutions with batch norm (one transposed, one grouped), a tie, dropout, a class token, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.up_norm = nn.BatchNorm2d(8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = torch.cat([y, F.hardswish(self.norm(self.depth(y)))], 1)
        y = F.relu6(self.up_norm(self.up(y)))
        y = y.flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1)
        return self.head(self.drop(y.mean(1)))


def net() -> Net:
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.2, 3.0)  # type: ignore[union-attr]
    return model


IMAGES = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def prepare(model: nn.Module, example: Any = None, **scheme: Any) -> PreparedModel:
    return qat.prepare(model, IMAGES[:2] if example is None else example, target=TARGET, scheme=scheme)


@pytest.fixture(scope="module")
def made() -> tuple[Net, PreparedModel, PreparedModel]:
    """A float model, prepared, and calibrated; made once, so tests take copies."""
    torch.manual_seed(0)
    model = net()
    prepared = prepare(model)
    calibrated = copy.deepcopy(prepared)
    qat.calibrate(calibrated, [IMAGES])
    return model, prepared, calibrated


@pytest.fixture
def model(made: tuple[Net, PreparedModel, PreparedModel]) -> Net:
    return copy.deepcopy(made[0])


@pytest.fixture
def prepared(made: tuple[Net, PreparedModel, PreparedModel]) -> PreparedModel:
    return copy.deepcopy(made[1])


@pytest.fixture
def calibrated(made: tuple[Net, PreparedModel, PreparedModel]) -> PreparedModel:
    return copy.deepcopy(made[2])


# -- phase float


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_without_simulation_it_is_the_float_model(
    model: Net, prepared: PreparedModel, training: bool, fused: bool
) -> None:
    prepared.fused = fused
    model.train(training)
    prepared.train(training)
    results, gradients = [], []
    for each in (model, prepared):
        torch.manual_seed(3)
        out = each(IMAGES)
        (out * torch.arange(3.0)).sum().backward()
        results.append(out.detach())
        gradients.append([p.grad for p in each.parameters()])
    torch.testing.assert_close(results[1], results[0])
    by_shape = sorted(gradients[0], key=lambda g: (tuple(g.shape), g.sum()))  # type: ignore[union-attr]
    for mine, theirs in zip(sorted(gradients[1], key=lambda g: (tuple(g.shape), g.sum())), by_shape, strict=True):  # type: ignore[union-attr]
        # the gradient of a bias before batch norm is zero but for rounding, and that is another in fused passes
        torch.testing.assert_close(mine, theirs, **({"rtol": 2e-5, "atol": 1e-4} if fused else {}))
    for key, value in prepared.float_state_dict().items():  # running statistics moved alike
        torch.testing.assert_close(value, model.state_dict()[key])


def test_the_users_model_is_left_alone(model: Net) -> None:
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model)
    qat.calibrate(prepared, [IMAGES])
    prepared.train()(IMAGES).sum().backward()
    torch.optim.SGD(prepared.parameters(), lr=1.0).step()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.stem[2].inplace
    assert all(p.grad is None for p in model.parameters())


def test_modules_keep_their_names(prepared: PreparedModel) -> None:
    assert isinstance(prepared.stem[0], nn.Conv2d)
    assert isinstance(prepared.head, nn.Linear)
    assert isinstance(prepared.drop, nn.Dropout)
    assert {name for name, _ in prepared.named_children()} >= {"stem", "depth", "up", "head", "quantizers"}


@pytest.mark.parametrize("training", [False, True])
def test_the_training_mode_is_the_users(training: bool) -> None:
    prepared = prepare(net().train(training))
    assert prepared.training is training
    assert all(m.training is training for m in prepared.modules())


def test_dropout_acts_in_training_only(calibrated: PreparedModel) -> None:
    calibrated.train()
    assert not torch.equal(calibrated(IMAGES), calibrated(IMAGES))
    calibrated.eval()
    assert torch.equal(calibrated(IMAGES), calibrated(IMAGES))


def test_functional_dropout_acts_in_training_only() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.lin(x), 0.5, self.training)

    prepared, x = prepare(Model(), torch.rand(2, 4)), torch.rand(8, 4)
    prepared.train()
    assert not torch.equal(prepared(x), prepared(x))
    prepared.eval()
    assert torch.equal(prepared(x), prepared(x))


# -- the weights that the simulation uses


@pytest.mark.parametrize("trained", [False, True])
def test_layers_see_the_weight_that_folding_gives(calibrated: PreparedModel, trained: bool) -> None:
    if trained:
        calibrated.train()
        optimizer = torch.optim.SGD(calibrated.parameters(), lr=0.05)
        for _ in range(3):
            calibrated(IMAGES).square().sum().backward()
            optimizer.step()
        calibrated.eval()
    constants = qat.convert(calibrated).program.constants
    for path in ("stem.0", "depth", "up", "head"):
        module: Any = calibrated.get_submodule(path)
        constant = constants[f"{path}.weight"]
        assert constant.encoding is not None
        real = constant.encoding.dequantize(constant.value)
        factor = module.parametrizations.weight[0].factor()
        if factor is not None:
            axis = 1 if path == "up" else 0
            real = real / factor.reshape([-1 if d == axis else 1 for d in range(real.dim())])
        assert torch.equal(module.weight, real), path


def test_the_simulation_equals_the_integer_model(calibrated: PreparedModel) -> None:
    calibrated.eval()
    step = qat.convert(calibrated).program.encoding_of("head")
    assert step is not None
    difference = (calibrated(IMAGES) - qat.convert(calibrated)(IMAGES)).abs().max()
    assert difference <= 1.001 * step.scale[0]


def test_weights_that_modules_share_are_one_parameter_and_one_quantizer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    for observer in ("minmax", "histogram"):
        prepared: Any = prepare(model, weights={"observer": observer})
        first, second = (prepared.get_submodule(n).parametrizations.weight for n in ("0", "2"))
        assert first.original is second.original
        assert first[0] is second[0]
        assert len(list(prepared.parameters())) == 3
        qat.calibrate(prepared, [IMAGES])
        twin: Any = copy.deepcopy(prepared)
        chains = [twin.get_submodule(n).parametrizations.weight for n in ("0", "2")]
        assert chains[0].original is chains[1].original
        assert chains[0].original is not first.original
        assert torch.equal(prepared.get_submodule("0").weight, prepared.get_submodule("2").weight)
        assert qat.convert(prepared)(IMAGES).shape == prepared(IMAGES).shape


def test_a_shared_weight_whose_first_owner_is_never_called() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spare, self.used = nn.Linear(4, 4), nn.Linear(4, 4)
            self.used.weight = self.spare.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    prepared = prepare(Model(), torch.rand(2, 4))
    qat.calibrate(prepared, [torch.rand(60, 4)])
    assert "spare.weight" in prepared.encodings()
    assert isinstance(qat.convert(prepared), IntegerModel)


def test_a_weight_of_the_root_is_quantized() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.conv2d(x, self.weight))

    model = Root()
    prepared = prepare(model)
    torch.testing.assert_close(prepared(IMAGES), model(IMAGES))
    qat.calibrate(prepared, [IMAGES])
    prepared.train()(IMAGES).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())
    assert list(prepared.float_state_dict()) == ["weight"]
    assert prepared.encodings()["weight"].granularity.kind == "per_channel"
    assert not torch.equal(prepared.eval()(IMAGES), model(IMAGES))
    assert isinstance(qat.convert(copy.deepcopy(prepared)), IntegerModel)


@pytest.mark.parametrize("name", ["plan", "graph", "quantizers", "samples", "encodings"])
def test_members_with_names_of_a_prepared_model_are_refused(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, nn.Conv2d(3, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, name)(x)  # type: ignore[no-any-return]

    with pytest.raises(PlanError, match=f"has a member '{name}', a name that a prepared model needs; rename it"):
        prepare(Model())


# -- outputs and inputs of any structure


Pair = namedtuple("Pair", ["first", "rest"])


def test_structures_of_outputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return {"main": self.a(x), "more": Pair(self.b(x), [x, None, (x.shape[0], 3)])}

    model = Model()
    prepared = prepare(model)
    for batch in (IMAGES[:5], IMAGES[:2]):
        got, want = prepared(batch), model(batch)
        assert type(got) is dict
        assert type(got["more"]) is Pair
        torch.testing.assert_close(got["main"], want["main"])
        torch.testing.assert_close(got["more"].first, want["more"].first)
        assert torch.equal(got["more"].rest[0], batch)
        assert got["more"].rest[1:] == [None, (len(batch), 3)]
    qat.calibrate(prepared, [IMAGES])
    assert list(prepared(IMAGES)) == ["main", "more"]


def test_several_inputs_by_position_and_by_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor, weight: Tensor | None = None, *, shift: float = 1.0) -> Tensor:
            y: Tensor = self.a(x) + shift
            return y if weight is None else y * weight

    x, w = torch.rand(8, 4), torch.rand(8, 4)
    prepared = prepare(Model(), {"x": x, "weight": w})
    assert prepared.opgraph.inputs == ("x", "weight")
    torch.testing.assert_close(prepared(x, w), prepared(weight=w, x=x))


# -- state


def buffers(prepared: PreparedModel) -> dict[str, Tensor]:
    return {k: v for k, v in prepared.state_dict().items() if not k.endswith("_extra_state")}


def test_all_state_exists_after_prepare(prepared: PreparedModel) -> None:
    before = {key: (value.shape, value.dtype) for key, value in buffers(prepared).items()}
    parameters = [id(p) for p in prepared.parameters()]
    keys = list(prepared.state_dict())
    qat.calibrate(prepared, [IMAGES])
    prepared.set_phase("track")
    prepared.train()(IMAGES).sum().backward()
    assert list(prepared.state_dict()) == keys
    assert {key: (value.shape, value.dtype) for key, value in buffers(prepared).items()} == before
    assert [id(p) for p in prepared.parameters()] == parameters
    assert all(p.grad is not None for p in prepared.parameters())


def trained(prepared: PreparedModel) -> PreparedModel:
    qat.calibrate(prepared, [IMAGES])
    prepared.set_phase("track")
    prepared.train()
    prepared.freeze_batch_norm(["norm"])
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(IMAGES).square().sum().backward()
        optimizer.step()
    return prepared


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_state_round_trip(prepared: PreparedModel, form: str, tmp_path: Path) -> None:
    other = copy.deepcopy(prepared)
    source = trained(prepared)
    state = source.state_dict()
    if form == "torch":
        stream = io.BytesIO()
        torch.save(state, stream)
        stream.seek(0)
        read = torch.load(stream, weights_only=True)
    else:
        save_file(state, tmp_path / "state.safetensors")
        read = load_file(tmp_path / "state.safetensors")
    other.load_state_dict(read)
    assert {name: q.phase for name, q in other.activation_quantizers().items()} == {
        name: q.phase for name, q in source.activation_quantizers().items()
    }
    assert other.training
    assert not other.get_submodule("norm").training
    assert other.get_submodule("up_norm").training
    assert other.encodings() == source.encodings()
    assert any(e.provenance == "qat" for e in other.encodings().values())
    for mode in (True, False):
        results = []
        for each in (source, other):
            each.train(mode)
            torch.manual_seed(5)
            results.append(each(IMAGES))
        assert torch.equal(*results)
    assert buffers(other).keys() == buffers(source).keys()
    assert all(torch.equal(v, buffers(source)[k]) for k, v in buffers(other).items())


def test_a_frozen_batch_norm_stays_frozen(calibrated: PreparedModel) -> None:
    calibrated.freeze_batch_norm()
    calibrated.train()
    before = calibrated.get_buffer("norm.running_mean").clone()
    calibrated(IMAGES)
    assert torch.equal(calibrated.get_buffer("norm.running_mean"), before)
    calibrated.freeze_batch_norm([])
    calibrated(IMAGES)
    assert not torch.equal(calibrated.get_buffer("norm.running_mean"), before)
    with pytest.raises(StateError, match="no batch norm 'nome'"):
        calibrated.freeze_batch_norm(["nome"])
    with pytest.raises(StateError, match="unknown phase 'quantise'"):
        calibrated.set_phase("quantise")


def smaller() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.bias"), "lacks 'head.bias'"),
        (lambda s: s.update(extra=torch.zeros(1)), "has the unknown key 'extra'"),
        (lambda s: s.update({"head.bias": torch.zeros(4)}), r"'head.bias' has shape \(4,\) and not \(3,\)"),
        (lambda s: s.update({"quantizers.x._extra_state": torch.zeros(3)}), "extra state of 'x' is malformed"),
        (lambda s: s.update({"_extra_state": torch.zeros(3)}), "'frozen_batch_norms' is malformed"),
        (lambda s: s.update({"head.bias": "zero"}), "'head.bias' of the state is a str"),
    ],
)
def test_a_checkpoint_of_another_model_changes_nothing(calibrated: PreparedModel, change: Any, message: str) -> None:
    state = dict(calibrated.state_dict())
    before = {k: v.clone() for k, v in state.items()}
    other = {k: torch.zeros_like(v) if v.is_floating_point() else v for k, v in state.items()}
    change(other)
    with pytest.raises(CheckpointError, match=message):
        calibrated.load_state_dict(other)
    assert all(torch.equal(v, before[k]) for k, v in calibrated.state_dict().items())


def test_checkpoints_of_other_schemes_and_models(calibrated: PreparedModel) -> None:
    with pytest.raises(CheckpointError, match="the checkpoint lacks"):
        calibrated.load_state_dict(prepare(smaller()).state_dict())
    with pytest.raises(CheckpointError, match="the checkpoint has 'x' as uint8"):
        prepare(net(), activations={"dtype": "int8"}).load_state_dict(calibrated.state_dict())
    state = calibrated.state_dict()
    state["_extra_state"] = pack_frozen(["gone"])
    with pytest.raises(CheckpointError, match="the checkpoint freezes 'gone'"):
        calibrated.load_state_dict(state)


def test_float_weights_in_and_out(model: Net, calibrated: PreparedModel) -> None:
    state = calibrated.float_state_dict()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    donor = net()
    scale = calibrated.encodings()["head"].scale
    calibrated.load_float_state_dict(donor.state_dict())
    assert all(torch.equal(v, donor.state_dict()[k]) for k, v in calibrated.float_state_dict().items())
    assert calibrated.encodings()["head"].scale == scale
    calibrated.set_phase("float")
    torch.testing.assert_close(calibrated.eval()(IMAGES), donor.eval()(IMAGES))
    # and a model that never saw qat takes them
    net().load_state_dict(calibrated.float_state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("token"), "lacks 'token'"),
        (lambda s: s.update(other=torch.zeros(1)), "unknown key 'other'"),
        (lambda s: s.update(token=torch.zeros(1)), "'token' has shape"),
    ],
)
def test_float_weights_of_another_model(calibrated: PreparedModel, change: Any, message: str) -> None:
    state = {key: torch.zeros_like(value) for key, value in net().state_dict().items()}
    change(state)
    before = {k: v.clone() for k, v in calibrated.float_state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        calibrated.load_float_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in calibrated.float_state_dict().items())


def test_copies_are_independent(prepared: PreparedModel) -> None:
    source = trained(prepared)
    twin: Any = copy.deepcopy(source)
    torch.manual_seed(0)
    want = source(IMAGES)
    torch.manual_seed(0)
    # the batch norms of `source` have moved on; a copy that referred to them would see it
    got = twin(IMAGES)
    assert torch.equal(got, want)
    for path in ("stem.0", "depth", "up"):
        norm = twin.get_submodule(path).parametrizations.weight[0].batch_norm
        assert norm in set(twin.modules())
        assert norm not in set(source.modules())
    ids = {id(t) for t in (*source.parameters(), *source.buffers())}
    assert not ids & {id(t) for t in (*twin.parameters(), *twin.buffers())}
    before = source.encodings()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(IMAGES).square().sum().backward()
    optimizer.step()
    twin.eval()
    twin.set_phase("float")
    assert source.encodings() == before
    assert source.training
    assert source.activation_quantizers()["x"].quantizing


def test_moving_between_float_types_keeps_the_grid(calibrated: PreparedModel) -> None:
    before = calibrated.encodings()
    for dtype in (torch.float64, torch.bfloat16):
        cast = copy.deepcopy(calibrated).eval().to(dtype)
        assert cast(IMAGES.to(dtype)).dtype == dtype
        assert all(cast.encodings()[name].scale == before[name].scale for name in cast.activation_quantizers())


@pytest.mark.parametrize("phase", ["float", "observe", "quantize", "track"])
def test_no_phase_mixes_devices_or_waits_for_one(calibrated: PreparedModel, phase: str) -> None:
    """On the meta device reading a value raises, as does a tensor of another device."""
    calibrated.set_phase(phase)
    moved = calibrated.to("meta").train()
    out = moved(IMAGES.to("meta"))
    assert out.device.type == "meta"
    out.sum().backward()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in moved.parameters())
    assert {b.device.type for b in moved.buffers()} == {"meta"}


# -- encodings


def test_nothing_is_promised_before_calibration(prepared: PreparedModel) -> None:
    for step in (prepared.encodings, lambda: qat.convert(prepared), lambda: qat.export_onnx(prepared, "never.onnx")):
        with pytest.raises(StateError, match="'x' has no range yet; calibrate the model first"):
            step()
    prepared.set_phase("quantize")
    with pytest.raises(StateError, match="'x' has no range yet"):
        prepared.eval()(IMAGES)
    assert not Path("never.onnx").exists()


def test_encodings_say_where_they_come_from(calibrated: PreparedModel) -> None:
    table = calibrated.encodings()
    assert (table["x"].provenance, table["x"].method, table["x"].samples) == ("ptq", "histogram", 64)
    assert table["cat"].provenance == "derived"
    assert "tied to" in table["cat"].method
    assert table["flatten"].provenance == "derived"
    assert table["stem.0.weight"].provenance == "ptq"
    assert table["flatten"].scale == table["relu6"].scale


def test_encodings_in(prepared: PreparedModel, calibrated: PreparedModel) -> None:
    table = calibrated.encodings()
    other = prepared
    other.load_encodings(table)
    other.set_phase("quantize")
    assert torch.equal(other.eval()(IMAGES), calibrated.eval()(IMAGES))
    assert other.encodings() == table
    with pytest.raises(EncodingError, match="none of the encodings names a tensor of this model"):
        other.load_encodings(qat.Encodings({"elsewhere": table["x"]}))
    signed = prepare(net(), activations={"dtype": "int8"})
    qat.calibrate(signed, [IMAGES])
    with pytest.raises(EncodingError, match="the encoding of 'x' is int8"):
        other.load_encodings(signed.encodings())
