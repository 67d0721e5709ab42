"""Post-training algorithms as stages of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qat.errors import RecipeError
from qat.recipe import stages
from qat.recipe.folder import RunFolder
from qat.recipe.load import parse_recipe
from qat.recipe.run import run_recipe
from qat.recipe.schema import Recipe, Stage
from qat.recipe.schema_ptq import ALGORITHMS
from qat.train.checkpoint import load_checkpoint

FLOAT = {"train": {"phase": "float", "epochs": 2, "optimizer": {"name": "adamw", "lr": 0.02}}}
CALIBRATE = {"calibrate": {"images": 96}}


def recipe(*given: Any) -> Recipe:
    return parse_recipe(
        {
            "version": 1,
            "name": "tiny",
            "threads": 1,
            "model": {"factory": "qat.models:digits_cnn", "kwargs": {"width": 4}},
            "data": {"name": "digits", "batch_size": 32, "limit": {"train": 192, "test": 60}},
            "scheme": {"weights": {"dtype": "int4"}},
            "stages": [FLOAT, *given],
        }
    )


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_algorithm_is_a_stage() -> None:
    assert set(ALGORITHMS) == set(Stage.model_fields) - {"calibrate", "train"}
    for name, part in ALGORITHMS.items():
        assert Stage.model_fields[name].annotation == part | None


def test_a_run_goes_through_all_of_them_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (
        {"equalize": {"images": 64}},
        {"absorb_high_bias": {"images": 64}},
        CALIBRATE,
        {"correct_bias": {"images": 64}},
        {"gptq": {"images": 64}},
        {"adaround": {"images": 64, "iterations": 20}},
        {"correct_bias": {"images": 64}},
    )
    lines: list[str] = []
    whole = run_recipe(recipe(*given), tmp_path / "whole", say=lines.append, quiet=True)
    told = [line.split(":")[0] for line in lines]
    for name in ("equalize", "absorb_high_bias", "correct_bias", "gptq", "adaround"):
        assert name in told
    losses = [whole.state.results[label]["loss"] for label in ("float", "PTQ")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    # one that stops in the middle and goes on ends with the same bits
    function = stages.algorithm

    def stops(*args: Any, **kwargs: Any) -> Any:
        if args[2] == "adaround":
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(stages, "algorithm", stops)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(*given), tmp_path / "parts", quiet=True)
    monkeypatch.undo()
    parts = run_recipe(recipe(*given), tmp_path / "parts", resume=True, quiet=True)
    ends = [
        load_checkpoint(folder / RunFolder(folder).state().stages[-1].checkpoint).tensors
        for folder in (whole.folder, parts.folder)
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_other_systems_names() -> None:
    given = recipe(
        {"dmq_balancer": {"migration_strength": 0.3}}, CALIBRATE, {"ada_quantize": {"num_iteration": 7}},
        {"nuq_quantize": {"num_steps": 16, "num_of_iteration": 2}}, "reestimate_batch_norm",
    )  # fmt: skip
    _, equalize, _, adaround, nuq, norm = given.stages
    assert equalize.equalize is not None
    assert (equalize.equalize.method, equalize.equalize.strength) == ("activations", 0.3)
    assert adaround.adaround is not None
    assert adaround.adaround.iterations == 7
    assert nuq.nuq is not None
    assert (nuq.nuq.steps, nuq.nuq.iterations) == (16, 2)
    assert norm.kind == "reestimate_batch_norm"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"gptq": {}}, CALIBRATE], r"stages\[1\].gptq needs ranges; put a calibrate stage before it"),
        ([CALIBRATE, {"equalize": {}}], r"stages\[2\].equalize would make the ranges wrong"),
        ([{"equalize": {}}, FLOAT, CALIBRATE], "train.phase is float after an algorithm"),
        ([CALIBRATE, {"nuq": {"steps": 8}}], r"stages\[2\].nuq.steps"),
        ([CALIBRATE, {"adaround": {"iteration": 8}}], "iteration.*did you mean"),
        ([CALIBRATE, {"adaroud": {}}], "adaroud.*adaround"),
        ([CALIBRATE, {"reconstruct": {"drop": 1.5}}], "reconstruct.drop"),
    ],
)
def test_what_is_wrong_is_named(given: list[Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(*given)
