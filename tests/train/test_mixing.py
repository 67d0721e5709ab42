"""Ranges of training and of calibration in one model and in one table."""

from __future__ import annotations

import torch
from training_cases import blobs, small

import qat
from qat.encodings import Encodings
from qat.graph.prepared import PreparedModel
from qat.train.settings import OptimizerSettings, TrainSettings
from qat.train.trainer import fit

TARGET = qat.load_target("onnxruntime-cpu")


def fresh() -> PreparedModel:
    return qat.prepare(small(), next(iter(blobs()))[0], target=TARGET)


def activations(qmodel: PreparedModel) -> set[str]:
    return set(qmodel.activation_quantizers())


def test_what_training_left_open_is_calibrated_and_the_rest_stays() -> None:
    trained = fresh()
    fit(trained, blobs(), TrainSettings(epochs=3, optimizer=OptimizerSettings(lr=0.1)))
    qat_table = trained.encodings()
    names = sorted(activations(trained))
    kept, left_open = names[::2], names[1::2]
    assert kept
    assert left_open

    mixed = fresh()
    mixed.load_float_state_dict(trained.float_state_dict())
    mixed.load_encodings(Encodings({name: qat_table[name] for name in kept}))
    qat.calibrate(mixed, [x for x, _ in blobs()], only="missing")
    table = mixed.encodings()
    assert {table[name].provenance for name in kept} == {"qat"}
    assert all(table[name].scale == qat_table[name].scale for name in kept)
    assert {table[name].provenance for name in left_open} == {"ptq"}

    # the same by tables alone
    calibrated = fresh()
    calibrated.load_float_state_dict(trained.float_state_dict())
    qat.calibrate(calibrated, [x for x, _ in blobs()])
    merged = Encodings({name: qat_table[name] for name in kept}).merge(calibrated.encodings(), prefer="qat")
    assert {n: merged[n] for n in names} == {n: table[n] for n in names}
    assert calibrated.encodings().merge(qat_table, prefer="ptq")[kept[0]].provenance == "ptq"

    rows = {line.split()[0]: line.split() for line in str(table).splitlines()[1:]}
    assert all("qat" in rows[name] for name in kept)
    assert all("ptq" in rows[name] for name in left_open)


def test_nothing_that_training_has_set_is_lost() -> None:
    qmodel = fresh()
    qat.calibrate(qmodel, [x for x, _ in blobs()])
    fit(qmodel, blobs(), TrainSettings(epochs=2, optimizer=OptimizerSettings(lr=0.1)))
    before = qmodel.encodings()
    qat.calibrate(qmodel, [2 * x for x, _ in blobs()], only="missing")
    assert qmodel.encodings() == before
    assert {before[name].provenance for name in activations(qmodel)} == {"qat"}
    qat.calibrate(qmodel, [2 * x for x, _ in blobs()])
    after = qmodel.encodings()
    assert {after[name].provenance for name in activations(qmodel)} == {"ptq"}


def test_a_merged_model_computes_with_the_merged_ranges() -> None:
    qmodel = fresh()
    qat.calibrate(qmodel, [x for x, _ in blobs()])
    table = qmodel.encodings()
    name = min(activations(qmodel))
    wider = qat.Encoding.from_range(-9.0, 9.0, qmodel.activation_quantizers()[name].scheme, provenance="qat")
    qmodel.load_encodings(table.merge(Encodings({name: wider}), prefer="qat"))
    assert torch.equal(qmodel.activation_quantizers()[name].scale, wider.scale_tensor)
