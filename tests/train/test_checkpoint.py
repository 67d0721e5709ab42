"""Checkpoints: exact round trip, and what damaged, malicious or foreign files get."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qat.errors import CheckpointError, OutputError
from qat.models import cifar_resnet20
from qat.train.checkpoint import (
    check_same_model,
    fingerprint,
    load_checkpoint,
    load_weights,
    read_weights,
    save_checkpoint,
)


def model(width: int = 4) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width))


def test_round_trip_keeps_every_bit_and_the_notes(tmp_path: Path) -> None:
    state = {**model().state_dict(), "extra": torch.tensor([1, 2], dtype=torch.uint8)}
    state |= {"half": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0), "flag": torch.tensor(True)}
    path = tmp_path / "deep" / "a.safetensors"
    save_checkpoint(path, state, {"stage": 3, "metrics": {"top1": 0.5}})
    back = load_checkpoint(path)
    assert back.info == {"stage": 3, "metrics": {"top1": 0.5}}
    assert back.fingerprint == fingerprint(state)
    assert set(back.tensors) == set(state)
    assert all(torch.equal(back.tensors[k], v) and back.tensors[k].dtype == v.dtype for k, v in state.items())
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_shared_and_strided_tensors_can_be_saved(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    save_checkpoint(tmp_path / "a.safetensors", {"a": base, "b": base, "c": base.t()})
    back = load_checkpoint(tmp_path / "a.safetensors").tensors
    assert torch.equal(back["c"], base.t())


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'n' of the state is a int"):
        save_checkpoint(tmp_path / "a.safetensors", {"n": 3})  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_weights_are_read_however_they_were_saved(tmp_path: Path) -> None:
    state = model().state_dict()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "nested.pt")
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "parallel.th")
    save_file(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "unnamed.bin")
    save_checkpoint(tmp_path / "ours.safetensors", state)
    for path in sorted(tmp_path.iterdir()):
        fresh = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        load_weights(fresh, path)
        assert all(torch.equal(state[k], v) for k, v in fresh.state_dict().items()), path


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_malicious_checkpoint_is_never_unpickled(tmp_path: Path, how: str) -> None:
    target, path = tmp_path / "owned", tmp_path / "evil.pth"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Malicious(target)))
    else:
        content = {"a": torch.zeros(1), "b": Malicious(target)}
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_weights(path)
    assert not target.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut{suffix}"
    state = model(64).state_dict()
    torch.save(state, path) if suffix == ".pth" else save_checkpoint(path, state)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    fresh = model(64)
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"cut\.(pth|safetensors) is truncated or no"):
        load_weights(fresh, path)
    assert all(torch.equal(before[k], v) for k, v in fresh.state_dict().items())


def test_missing_foreign_and_newer_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.safetensors", tmp_path / "no.pth"):
        with pytest.raises(CheckpointError, match=r"cannot read .*no"):
            read_weights(path)
    save_file(model().state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"plain\.safetensors is not a checkpoint of qat"):
        load_checkpoint(tmp_path / "plain.safetensors")
    document = '{"version": 99, "fingerprint": "", "info": {}}'
    save_file(model().state_dict(), tmp_path / "new.safetensors", {"qat": document})
    with pytest.raises(CheckpointError, match="version 99"):
        load_checkpoint(tmp_path / "new.safetensors")
    document = '{"version": 2, "fingerprint": "0", "info": {}}'
    save_file(model().state_dict(), tmp_path / "odd.safetensors", {"qat": document})
    with pytest.raises(CheckpointError, match="does not hold the tensors"):
        load_checkpoint(tmp_path / "odd.safetensors")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="not a state_dict"):
        read_weights(tmp_path / "tensor.pth")


@pytest.mark.parametrize("part", ["tensors", "notes"])
def test_one_changed_bit_is_noticed(tmp_path: Path, part: str) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, model().state_dict(), {"epoch": 1234})
    raw = bytearray(path.read_bytes())
    place = len(raw) - 1 if part == "tensors" else raw.index(b"1234") + 3
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"a\.safetensors is damaged: its checksum is another"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_model_names_the_first_keys(tmp_path: Path) -> None:
    state = model().state_dict()
    wide = model(8).state_dict()
    with pytest.raises(CheckpointError, match=r"0\.weight is \(8, 1, 3, 3\) where the model has \(4, 1, 3, 3\)"):
        check_same_model(state, wide, "a.pth")
    fewer = {k: v for k, v in state.items() if not k.startswith("1.")}
    with pytest.raises(CheckpointError, match=r"it lacks 1\.weight, 1\.bias and 3 more"):
        check_same_model(state, fewer, "a.pth")
    with pytest.raises(CheckpointError, match=r"the unknown 1\.weight, 1\.bias"):
        check_same_model(fewer, state, "a.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    fresh = model()
    state = {k: v.clone() for k, v in fresh.state_dict().items()}
    state["0.bias"][1] = value
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: 0\.bias holds nan or inf"):
        load_weights(fresh, tmp_path / "a.pth")
    assert torch.isfinite(fresh[0].bias).all()


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "a.safetensors", model().state_dict())


def test_published_cifar_weights_fit(data_root: Path) -> None:
    net = cifar_resnet20()
    load_weights(net, data_root / "weights" / "cifar_resnet20.pth")
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
