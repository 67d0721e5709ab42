"""The activation fake quantizer: phases, calibration, tracking, encodings, state."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from qat.encoding import Encoding
from qat.errors import CheckpointError, DataError, EncodingError, SchemeError, StateError
from qat.quantizers import FLOAT, OBSERVE, QUANTIZE, TRACK, FakeQuantize, Phase, set_phase
from qat.scheme import Granularity, ObserverSpec, QuantizerSpec, Scheme

UINT8 = Scheme("uint8")
CHANNELS = Scheme("int8", symmetric=True, granularity=Granularity("per_channel", 1))


def calibrated(scheme: Scheme = UINT8, *batches: torch.Tensor, channels: int | None = None) -> FakeQuantize:
    quantizer = FakeQuantize(scheme, "x", channels)
    set_phase(quantizer, OBSERVE)
    for batch in batches or (torch.linspace(-1, 3, 60).reshape(5, 3, 4),):
        assert quantizer(batch) is batch
    quantizer.finish()
    set_phase(quantizer, FLOAT)
    return quantizer


def test_calibration_gives_the_encoding_of_the_observed_range() -> None:
    quantizer = calibrated(UINT8, torch.tensor([[-1.0, 0.5]]), torch.tensor([[0.0, 3.0], [1.0, 2.0]]))
    expected = Encoding.from_range(-1.0, 3.0, UINT8, provenance="ptq", method="minmax", samples=3)
    assert quantizer.encoding() == expected


def test_per_channel_encoding() -> None:
    x = torch.randn(5, 3, 4)
    quantizer = calibrated(CHANNELS, x, channels=3)
    low, high = x.amin((0, 2)), x.amax((0, 2))
    assert quantizer.encoding() == Encoding.from_range(low, high, CHANNELS, samples=5)


@pytest.mark.parametrize("scheme", [UINT8, CHANNELS, Scheme("int16"), Scheme("uint4", qmax=13)])
def test_quantizing_equals_the_encoding(scheme: Scheme) -> None:
    quantizer = calibrated(scheme, channels=3)
    set_phase(quantizer, QUANTIZE)
    x = torch.randn(7, 3, 2) * 4
    encoding = quantizer.encoding()
    assert torch.equal(quantizer(x), encoding.dequantize(encoding.quantize(x)))


def test_phases_are_off_until_set() -> None:
    quantizer = FakeQuantize(UINT8, "x")
    x = torch.randn(3, 2)
    assert quantizer.phase == FLOAT
    assert quantizer(x) is x
    with pytest.raises(StateError, match=r"'x'.*at least one batch"):
        quantizer.finish()
    with pytest.raises(StateError, match=r"'x' has no range"):
        quantizer.encoding()
    set_phase(quantizer, QUANTIZE)
    with pytest.raises(StateError, match=r"'x' has no range"):
        quantizer(x)


def test_non_finite_data_is_named() -> None:
    quantizer = FakeQuantize(UINT8, "layer1.0.add")
    set_phase(quantizer, OBSERVE)
    quantizer(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(DataError, match=r"layer1\.0\.add"):
        quantizer.finish()


def test_all_zero_data_warns_with_the_name() -> None:
    with pytest.warns(UserWarning, match=r"'x' is all zero"):
        quantizer = calibrated(UINT8, torch.zeros(2, 2))
    set_phase(quantizer, QUANTIZE)
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))


def test_tracking_is_a_moving_average_that_starts_from_the_calibrated_range() -> None:
    quantizer = calibrated(UINT8, torch.tensor([[-1.0, 3.0]]))
    set_phase(quantizer, TRACK)
    quantizer.train()
    quantizer(torch.tensor([[-2.0, 5.0]]))
    momentum = torch.tensor(0.01)
    low, high = -1 + momentum * -1.0, 3 + momentum * 2.0
    expected = Encoding.from_range(low, high, UINT8, provenance="qat", method="moving_average", samples=2)
    assert quantizer.encoding() == expected
    quantizer.eval()
    quantizer(torch.tensor([[-100.0, 100.0]]))
    set_phase(quantizer, QUANTIZE)
    quantizer.train()
    quantizer(torch.tensor([[-100.0, 100.0]]))
    assert quantizer.encoding() == expected


def test_tracking_without_calibration_starts_from_the_first_batch() -> None:
    quantizer = FakeQuantize(UINT8, "x", momentum=0.5)
    set_phase(quantizer, TRACK)
    quantizer(torch.tensor([[0.0, 1.0]]))
    quantizer(torch.tensor([[0.0, 2.0]]))
    assert quantizer.encoding().max == (1.5,)
    for phase in (TRACK, QUANTIZE):
        set_phase(quantizer, phase)
        quantizer.eval()
        assert float(quantizer(torch.tensor(9.0))) == pytest.approx(1.5)


def test_tracking_leaves_out_empty_and_non_finite_batches() -> None:
    quantizer = FakeQuantize(UINT8, "x")
    set_phase(quantizer, TRACK)
    quantizer(torch.tensor([float("nan")]))
    quantizer(torch.empty(0, 4))
    with pytest.raises(StateError):
        quantizer.encoding()
    quantizer(torch.tensor([-1.0, 1.0]))
    before = quantizer.encoding()
    for bad in (float("nan"), float("inf"), -float("inf")):
        quantizer(torch.tensor([0.0, bad]))
    assert quantizer(torch.empty(0, 4)).shape == (0, 4)
    assert quantizer.encoding().scale == before.scale


def test_recalibration_makes_the_provenance_ptq_again() -> None:
    quantizer = calibrated()
    set_phase(quantizer, TRACK)
    quantizer(torch.randn(2, 3))
    assert quantizer.encoding().provenance == "qat"
    quantizer.finish()
    assert quantizer.encoding().provenance == "ptq"


def test_a_fixed_range_is_never_observed_or_tracked() -> None:
    quantizer = FakeQuantize(UINT8, "softmax", fixed=(0.0, 1.0))
    set_phase(quantizer, Phase(observing=True, quantizing=True, tracking=True))
    quantizer(torch.tensor([-5.0, 5.0]))
    quantizer.finish()
    encoding = quantizer.encoding()
    assert encoding.provenance == "fixed"
    assert encoding.same_grid(Encoding.from_range(0.0, 1.0, UINT8))


@pytest.mark.parametrize("name", ["qat", "ptq", "derived", "fixed", "imported"])
@pytest.mark.parametrize("known", [True, False])
def test_a_loaded_encoding_comes_back_unchanged(name: str, known: bool) -> None:
    low, high = torch.tensor([-1.0, 0.0, -3.0]), torch.tensor([1.0, 2.0, 0.5])
    encoding = Encoding.from_range(low, high, CHANNELS, provenance=name, method="m", samples=9)  # type: ignore[arg-type]
    if not known:
        encoding = Encoding(
            **{k: getattr(encoding, k) for k in encoding.__dataclass_fields__ if k not in ("min", "max")}
        )
    quantizer = FakeQuantize(CHANNELS, "x", 3)
    quantizer.load_encoding(encoding)
    assert quantizer.encoding() == encoding
    set_phase(quantizer, TRACK)
    quantizer(torch.zeros(2, 3))
    tracked = quantizer.encoding()
    assert tracked.provenance == "qat"
    assert all(0.95 < b / a < 1.0 for a, b in zip(encoding.scale, tracked.scale, strict=True))


def test_an_encoding_that_does_not_fit_is_refused_by_name() -> None:
    quantizer = FakeQuantize(CHANNELS, "features.3", 3)
    for scheme, count in (
        (CHANNELS, 4),
        (CHANNELS.with_(dtype="int4"), 3),
        (CHANNELS.with_(qmin=-127), 3),
        (CHANNELS.with_(granularity=Granularity("per_channel", 0)), 3),
        (CHANNELS.with_(symmetric=False), 3),
    ):
        with pytest.raises(EncodingError, match=r"'features\.3'"):
            quantizer.load_encoding(Encoding.from_range(torch.zeros(count), torch.ones(count), scheme))
    assert not quantizer.ready


@pytest.mark.parametrize("how", ["torch", "safetensors"])
def test_state_round_trip(how: str) -> None:
    quantizer = calibrated(CHANNELS, channels=3)
    set_phase(quantizer, TRACK)
    quantizer(torch.randn(4, 3, 2))
    state = quantizer.state_dict()
    if how == "torch":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    else:
        loaded = load(save(state))
    other = FakeQuantize(CHANNELS, "x", 3)
    other.load_state_dict(loaded)
    assert other.phase == TRACK
    assert other.encoding() == quantizer.encoding()
    x = torch.randn(2, 3, 5)
    assert torch.equal(other.eval()(x), quantizer.eval()(x))
    other.finish()
    quantizer.finish()
    assert other.encoding() == quantizer.encoding()


def test_a_checkpoint_of_another_scheme_or_a_broken_one_is_refused_by_name() -> None:
    state = calibrated().state_dict()
    with pytest.raises(CheckpointError, match=r"'x'.*uint8.*int8"):
        FakeQuantize(Scheme("int8"), "x").load_state_dict(state)
    for broken in (
        torch.tensor([1, 2], dtype=torch.uint8),
        torch.zeros(3),
        torch.tensor(list(b'{"grid": "uint8 [0, 255] per_tensor", "phase": 3}'), dtype=torch.uint8),
    ):
        with pytest.raises(CheckpointError, match="'x'"):
            FakeQuantize(UINT8, "x").load_state_dict({**state, "_extra_state": broken})


def test_all_shapes_are_final_at_construction() -> None:
    fresh = FakeQuantize(CHANNELS, "x", 3).state_dict()
    used = calibrated(CHANNELS, channels=3).state_dict()
    assert {k: v.shape for k, v in fresh.items() if k != "_extra_state"} == {
        k: v.shape for k, v in used.items() if k != "_extra_state"
    }


def test_deepcopy_is_independent() -> None:
    quantizer = calibrated()
    twin = copy.deepcopy(quantizer)
    set_phase(twin, TRACK)
    twin(torch.full((1, 1), 1000.0))
    assert twin.encoding() != quantizer.encoding()
    assert quantizer.phase == FLOAT


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_scales_survive_a_cast_of_the_model(cast: object) -> None:
    quantizer = calibrated(UINT8, torch.randn(4, 4))
    before = quantizer.encoding()
    cast(nn.Sequential(nn.Linear(2, 2), quantizer))  # type: ignore[operator]
    assert quantizer.encoding() == before


def test_bf16_autocast_keeps_the_dtype_and_the_grid() -> None:
    quantizer = calibrated(UINT8, torch.tensor([[-4.0, 4.0]]))
    set_phase(quantizer, QUANTIZE)
    linear = nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(torch.randn(3, 8))
        out = quantizer(y)
    assert y.dtype == out.dtype == torch.bfloat16
    encoding = quantizer.encoding()
    assert torch.equal(out, encoding.dequantize(encoding.quantize(y)).to(torch.bfloat16))


def test_bad_arguments() -> None:
    with pytest.raises(SchemeError, match=r"'x'.*per group"):
        FakeQuantize(UINT8.with_(granularity=Granularity("per_group", 1, 4)), "x", 4)
    with pytest.raises(SchemeError, match=r"'x'.*channels"):
        FakeQuantize(CHANNELS, "x")
    with pytest.raises(SchemeError, match=r"'x'.*int32"):
        FakeQuantize(Scheme("int32"), "x")
    with pytest.raises(SchemeError, match=r"'x': unknown quantizer 'lsd'; did you mean 'lsq'"):
        FakeQuantize(Scheme(quantizer=QuantizerSpec("lsd")), "x")
    with pytest.raises(SchemeError, match="momentum"):
        FakeQuantize(UINT8, "x", momentum=0.0)
    with pytest.raises(SchemeError):
        FakeQuantize(UINT8.with_(observer=ObserverSpec("no_such_observer")), "x")
    with pytest.raises(EncodingError, match="'x'"):
        FakeQuantize(UINT8, "x", fixed=(1.0, -1.0))
    quantizer = calibrated()
    set_phase(quantizer, QUANTIZE)
    with pytest.raises(DataError, match=r"'x'.*int64"):
        quantizer(torch.arange(3))


WORKER = """
import sys, torch, torch.distributed as dist
from qat.quantizers import FakeQuantize, TRACK
from qat.scheme import Scheme
torch.set_num_threads(1)
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
data = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0))
data[4, 1, 0] = float("nan")
quantizer = FakeQuantize(Scheme(), "x", momentum=0.3)
quantizer.set_phase(TRACK)
for i, batch in enumerate(data):
    part = batch[:8 if i == 5 else 3] if rank == 0 else batch[8 if i == 5 else 3:]
    quantizer(part)
print(*quantizer.encoding().min, *quantizer.encoding().max)
dist.destroy_process_group()
"""


def test_tracking_on_two_processes_equals_one_on_the_same_data(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    data = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0))
    data[4, 1, 0] = float("nan")
    quantizer = FakeQuantize(UINT8, "x", momentum=0.3)
    set_phase(quantizer, TRACK)
    for batch in data:
        quantizer(batch)
    encoding = quantizer.encoding()
    assert encoding.min is not None
    assert encoding.max is not None
    for output in outputs:
        low, high = map(float, output.split())
        assert (low, high) == (encoding.min[0], encoding.max[0])
