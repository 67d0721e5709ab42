"""Block reconstruction: a smaller error, learned scales, and the same bits after an interruption."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding_checks import check_rounded, float_output, floors, output_error, trains, weight_codes
from safetensors import safe_open
from small_nets import Linears, Residual, Shared, Transposed, make
from torch import Tensor, nn

import qat.algorithms.reconstruct as engine
from qat.algorithms.adaround import adaround
from qat.algorithms.blocks import block_units
from qat.algorithms.feed import PlaceFeed, SampleFeed, make_feed
from qat.algorithms.reconstruct import reconstruct
from qat.algorithms.sweep import Visit, gather, sweep
from qat.errors import CheckpointError, QuantizationWarning, StateError
from qat.graph.prepared import PreparedModel

FEW: dict[str, Any] = {"iterations": 12, "batch_size": 8, "learning_rate": 0.1, "progress": False}
W4A4 = {"weights": {"dtype": "int4"}, "activations": {"dtype": "uint4"}}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    # few iterations need not help, and the model says so
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantizationWarning)
        yield


@pytest.mark.parametrize(
    ("kind", "options", "factor"),
    [
        (Residual, {}, 0.6),
        (Residual, {"drop": 0.0}, 0.5),
        (Residual, {"blocks": ["stem", "block"]}, 0.6),
        (Transposed, {}, 0.75),
        (Linears, {}, 0.65),
    ],
)
def test_the_error_is_smaller_than_that_of_rounding_to_nearest(
    kind: type[nn.Module], options: dict[str, Any], factor: float
) -> None:
    qmodel, data = make(kind)
    wanted, lowest = float_output(qmodel, data), floors(qmodel)
    before = output_error(qmodel, wanted, data)
    result = reconstruct(
        qmodel, [data], iterations=50, batch_size=16, learning_rate=0.05, correct=False, progress=False, **options
    )
    assert output_error(qmodel, wanted, data) < factor * before
    for key, codes in weight_codes(qmodel).items():
        low = lowest[key].clamp(-7, 7)
        assert bool(((codes == low) | (codes == (lowest[key] + 1).clamp(-7, 7))).all()), key
    check_rounded(qmodel, result, data)


def test_the_layers_of_a_block_are_learned_together() -> None:
    qmodel, data = make(Residual)
    result = reconstruct(qmodel, [data], **FEW)
    assert [u.weights for u in result.units] == [
        ("stem.0.weight",),
        ("block.conv1.weight", "block.conv2.weight"),
        ("depthwise.weight",),
        ("head.weight",),
    ]


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_scales_of_activations_can_be_learned(rate: float) -> None:
    qmodel, data = make(Residual, W4A4)
    wanted = float_output(qmodel, data)
    error = output_error(qmodel, wanted, data)
    before = {name: q.encoding() for name, q in qmodel.activation_quantizers().items()}
    options = {"iterations": 60, "batch_size": 16, "learning_rate": 0.05, "drop": 0.0, "progress": False}
    result = reconstruct(qmodel, [data], scale_rate=rate, **options)
    assert output_error(qmodel, wanted, data) < 0.65 * error
    changed = {name for name, q in qmodel.activation_quantizers().items() if q.encoding() != before[name]}
    # not that of the input, which no block computes
    assert len(changed) >= 3 if rate else not changed
    assert "x" not in changed
    if rate:
        assert qmodel.activation_quantizers()["relu6"].encoding().method == "reconstruct"
        check_rounded(qmodel, result, data)


def test_training_goes_on() -> None:
    qmodel, data = make(Residual, W4A4)
    reconstruct(qmodel, [data], scale_rate=0.01, **FEW)
    assert trains(qmodel, data)


def test_layers_are_fed_by_place_and_blocks_by_sample() -> None:
    qmodel, data = make(Residual)
    kinds: list[type] = []
    outputs: list[tuple[Tensor, Tensor]] = []

    def visit(found: Visit) -> None:
        feed = make_feed(found, 64, 0.0, 0)
        kinds.append(type(feed))
        outputs.append(feed.step())
        if isinstance(feed, PlaceFeed):
            # all places, in order
            whole = torch.cat(list(found.outputs()))
            whole = whole if found.unit.name == "head" else whole.movedim(1, -1).reshape(-1, whole.shape[1])
            torch.testing.assert_close(outputs[-1][0].reshape(whole.shape), whole, rtol=1e-4, atol=1e-4)

    sweep(qmodel, gather(qmodel, [data[:16]]), block_units(qmodel, "residual", "activation"), visit, progress=False)
    assert kinds == [PlaceFeed, SampleFeed, PlaceFeed, PlaceFeed]
    assert all(out.shape == target.shape for out, target in outputs)


# -- interruption


class InterruptedError_(Exception):
    """What a test interrupts with."""


def interrupted_after(units: int, monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    """Run `call`, and interrupt it when it has finished some units."""
    learn, count = engine.learn, 0

    def counting(*args: Any) -> Any:
        nonlocal count
        if count == units:
            raise InterruptedError_
        count += 1
        return learn(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "learn", counting)
        with pytest.raises(InterruptedError_):
            call()


def state_of(qmodel: PreparedModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in qmodel.state_dict().items()}


@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("method", [adaround, reconstruct])
def test_an_interrupted_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, units: int
) -> None:
    options = {**FEW, **({"scale_rate": 0.01} if method is reconstruct else {})}
    qmodel, data = make(Residual)
    before, whole, path = state_of(qmodel), copy.deepcopy(qmodel), tmp_path / "progress.safetensors"
    wanted = method(whole, [data], **options)
    interrupted_after(units, monkeypatch, lambda: method(qmodel, [data], checkpoint=path, **options))
    # the interrupted model is as it was, and the work is in the file
    assert all(torch.equal(value, before[key]) for key, value in state_of(qmodel).items())
    learn, learned = engine.learn, []
    monkeypatch.setattr(engine, "learn", lambda *args: learned.append(args[0].unit.name) or learn(*args))
    found = method(qmodel, [data], checkpoint=str(path), **options)
    assert learned == [u.name for u in wanted.units[units:]]
    assert found == wanted
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in state_of(qmodel).items())


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    qmodel, data = make(Linears)
    path = tmp_path / "sub" / "progress.safetensors"
    reconstruct(qmodel, [data], checkpoint=path, **FEW)
    with safe_open(str(path), "pt") as file:
        assert '"schema": "qat-reconstruction", "version": 1' in file.metadata()["qat"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    qmodel, data = make(Linears)
    first, path = copy.deepcopy(qmodel), tmp_path / "progress.safetensors"
    reconstruct(first, [data], checkpoint=path, **FEW)
    message = "is of another model, other data or other options; remove it to start anew, or give its own"
    other, _ = make(Linears, seed=1)
    for model, batch, options in ((other, data, {}), (qmodel, data * 2, {}), (qmodel, data, {"seed": 1})):
        with pytest.raises(CheckpointError, match=message):
            reconstruct(copy.deepcopy(model), [batch], checkpoint=path, **{**FEW, **options})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is truncated or no safetensors file"):
        reconstruct(qmodel, [data], checkpoint=path, **FEW)


def test_a_checkpoint_of_training_is_refused(tmp_path: Path) -> None:
    from qat.train.checkpoint import save_checkpoint

    qmodel, data = make(Linears)
    save_checkpoint(tmp_path / "c.safetensors", qmodel.state_dict())
    with pytest.raises(CheckpointError, match=r"c\.safetensors is no reconstruction that this version of qat reads"):
        reconstruct(qmodel, [data], checkpoint=tmp_path / "c.safetensors", **FEW)


# -- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 1.5}, "drop is 1.5; give a probability in [0, 1]"),
        ({"scale_rate": -1.0}, "scale_rate is -1.0; give a positive number, or 0 to learn none"),
        ({"iterations": -1}, "iterations is -1; give a positive number"),
        ({"blocks": "all"}, "unknown blocks 'all'; choose residual, layer, or give a list of module paths"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    qmodel, data = make(Linears)
    with pytest.raises(StateError) as caught:
        reconstruct(qmodel, [data], **{**FEW, **options})
    assert str(caught.value) == message


def test_a_block_with_a_shared_weight_is_left_alone() -> None:
    qmodel, data = make(Shared)
    with pytest.warns(QuantizationWarning, match=r"'twice\.weight' is shared by 2 layers"):
        result = reconstruct(qmodel, [data], **FEW)
    assert [u.weights for u in result.units] == [("once.weight",)]
