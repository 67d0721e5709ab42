"""Recipes: validation with errors that name the key, overrides, variables, YAML's traps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qat.errors import RecipeError
from qat.recipe.convert import data_spec, train_settings
from qat.recipe.load import expand, load_recipe, parse_recipe, recipe_problems
from qat.recipe.overrides import apply_overrides, split_path
from qat.recipe.schema import json_schema
from qat.recipe.text import dump_yaml, parse_yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def small(**changes: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "small",
        "model": {"factory": "qat.models:digits_cnn"},
        "data": {"name": "digits"},
        "stages": [{"calibrate": {"images": 64}}],
        **changes,
    }


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_states_its_contract(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.expect.top1 is not None
    assert recipe.expect.max_drop is not None
    assert recipe.export.onnx is not None
    jsonschema.validate(parse_yaml(path.read_text(), path.name), json_schema())


def test_the_resolved_recipe_is_the_same_recipe() -> None:
    data = small(
        target="arm-cpu",
        scheme={
            "activations": {"observer": "histogram", "quantizer": {"name": "lsq", "drop": 0.5}},
            "weights": {"quantizer": "lsq"},
            "layers": {"stem.*": "float", "classifier": {"weights": {"dtype": "int4"}}},
        },
        stages=["calibrate", {"train": {"epochs": 1, "distill": {"weight": 0.3}}}, {"calibrate": None}],
    )
    recipe = parse_recipe(data)
    text = dump_yaml(recipe.to_data())
    again = parse_recipe(parse_yaml(text, "resolved"))
    assert again.to_data() == recipe.to_data()
    assert dump_yaml(again.to_data()) == text
    assert recipe.scheme_data() == {
        "activations": {"observer": {"name": "histogram"}, "quantizer": {"name": "lsq", "drop": 0.5}},
        "weights": {"quantizer": {"name": "lsq"}},
        "layers": {"stem.*": "float", "classifier": {"weights": {"dtype": "int4"}}},
    }
    assert [stage.kind for stage in recipe.stages] == ["calibrate", "train", "calibrate"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": {}}, "unknown key modle; did you mean 'model'?"),
        ({"data": {"name": "digits", "batchsize": 3}}, "unknown key data.batchsize; did you mean 'batch_size'?"),
        (
            {"stages": ["calibrate", {"train": {"epochs": 1, "optimizer": {"lrr": 1.0}}}]},
            "unknown key stages[1].train.optimizer.lrr; did you mean 'lr'?",
        ),
        ({"stages": [{"adaruond": {}}]}, "unknown key stages[0].adaruond; did you mean 'adaround'?"),
        (
            {"scheme": {"layers": {"features.0": {"weigths": {}}}}},
            "unknown key scheme.layers.'features.0'.weigths; did you mean 'weights'?",
        ),
        (
            {"stages": ["calibrate", {"train": {"epochs": 1, "distill": {"form": "float"}}}]},
            "unknown key stages[1].train.distill.form; did you mean 'from'?",
        ),
        ({"data": {"name": "digist"}}, "data.name is 'digist'; did you mean 'digits'?"),
        ({"data": {"name": "digits", "batch_size": "64"}}, "data.batch_size is '64'; it should be an integer"),
        ({"data": {"name": "digits", "batch_size": 0}}, "data.batch_size is 0; it should be greater than 0"),
        ({"data": {"name": "digits", "batch_size": 1.5}}, "data.batch_size is 1.5; it should be an integer"),
        ({"data": {"name": "digits", "skip_bad": "yes"}}, "data.skip_bad is 'yes'; it should be a boolean"),
        ({"data": ["digits"]}, "data is ['digits']; write a mapping"),
        (
            {"data": {"name": "digits", "input": {"resize": "big"}}},
            "data.input.resize is 'big'; it should be an integer",
        ),
        ({"model": {}}, "the key model.factory is missing; add it"),
        ({"model": {"factory": "os.system"}}, "model.factory is 'os.system'; write package.module:callable"),
        ({"name": "../evil"}, "name is '../evil'; use letters, digits"),
        ({"version": 2}, "version is 2; choose from 1"),
        ({"expect": {"top1": 93.0}}, "expect.top1 is 93.0; it should be less than or equal to 1"),
        ({"target": "arm_cpu"}, "unknown target 'arm_cpu'; did you mean arm-cpu?"),
        ({"scheme": {"weights": {"qmin": 5, "qmax": 4}}}, "scheme.weights: integer range [5, 4] is empty"),
        ({"scheme": {"activations": {"observer": "histogarm"}}}, "unknown observer 'histogarm'"),
        (
            {"scheme": {"layers": {"a": {"weights": {"observer": {"name": "percentile", "percentil": 9}}}}}},
            "observer percentile has no option 'percentil'",
        ),
        ({"scheme": {"weights": {"quantizer": "lsk"}}}, "unknown quantizer 'lsk'; did you mean 'lsq'?"),
        ({"scheme": {"weights": {"quantizer": "pact"}}}, "quantizer pact is not for a weight"),
        ({"scheme": {"weights": {"quantizer": {"drop": 0.5}}}}, "the key scheme.weights.quantizer.name is missing"),
        (
            {"scheme": {"layers": {"a": {"activations": {"quantizer": {"name": "lsq", "dorp": 0.5}}}}}},
            "quantizer lsq of an activation has no option 'dorp'; did you mean 'drop'?",
        ),
        (
            {"scheme": {"activations": {"quantizer": {"name": "lsq", "drop": 2}}}},
            "option drop of quantizer lsq is 2; give a number in [0, 1]",
        ),
        (
            {"stages": [{"calibrate": {}, "train": {"epochs": 1}}]},
            "stages[0] has calibrate, train; a stage has exactly one",
        ),
        ({"stages": [{}]}, "stages[0] has nothing; a stage has exactly one key"),
        ({"stages": [{"train": {"epochs": 1}}]}, "stages[0].train comes before any calibrate stage"),
        (
            {"stages": ["calibrate", {"train": {"phase": "float", "epochs": 1}}]},
            "stages[1].train.phase is float after a calibrate stage",
        ),
        (
            {"stages": [{"train": {"phase": "float", "epochs": 1, "distill": {}}}]},
            "stages[0].train.distill has no meaning for the float model",
        ),
        (
            {"stages": [{"train": {"phase": "float", "epochs": 1, "quantize_after": 0.5}}]},
            "stages[0].train.quantize_after has no meaning for the float model",
        ),
        (
            {"stages": ["calibrate", {"train": {"epochs": 2, "quantize_after": 2}}]},
            "stages[1].train.quantize_after is 2 of 2 epochs; give less",
        ),
        (
            {"stages": ["calibrate", {"train": {"epochs": 2, "guard": {"factor": 1.0}}}]},
            "stages[1].train.guard.factor is 1.0; it should be less than 1",
        ),
        (
            {"stages": ["calibrate", {"train": {"epochs": 2, "checkpoint": {"every_step": 5}}}]},
            "unknown key stages[1].train.checkpoint.every_step; did you mean 'every_steps'?",
        ),
        (
            {"stages": ["calibrate", {"train": {"epochs": 2, "ema": 1.0}}]},
            "stages[1].train.ema is 1.0; it should be less than 1",
        ),
        ({"stages": [], "export": {"onnx": {}}}, "export.onnx needs ranges; add a calibrate stage"),
        ({"stages": [], "expect": {"top1": 0.5}}, "expect.top1 and expect.max_drop speak of the quantized model"),
    ],
)
def test_what_is_wrong_is_named_with_its_key_and_the_mend(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(small(**changes), "my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_problem_is_listed_and_the_first_one_says_how_many() -> None:
    data = small(seed=-1, colour="red", threads="two")
    assert len(recipe_problems(data)) == 3
    with pytest.raises(RecipeError, match=r"\(and 2 more: qat recipe lint\)"):
        parse_recipe(data)


def test_the_json_schema_accepts_the_short_forms_and_refuses_unknown_keys() -> None:
    schema = json_schema()
    data = small(
        target="arm-cpu",
        data={"name": "digits", "input": {"size": 8}},
        scheme={"activations": {"observer": "histogram", "quantizer": "lsq"}, "layers": {"a": "float"}},
        stages=["calibrate", {"train": {"epochs": 1, "optimizer": "adam", "schedule": {"name": "step"}}}],
    )
    jsonschema.validate(data, schema)
    assert not recipe_problems(data)
    jsonschema.validate(parse_recipe(data).to_data(), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(small(colour="red"), schema)
    json.dumps(schema)


# -- YAML


def test_a_key_given_twice_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"a\.yaml, line 3: the key 'lr' is given twice"):
        parse_yaml("x:\n  lr: 1\n  lr: 2\n", "a.yaml")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "1.e-4", "0.0001"])
def test_small_numbers_are_numbers(text: str) -> None:
    assert parse_yaml(f"lr: {text}", "a.yaml") == {"lr": 1e-4}


def test_words_with_digits_stay_words() -> None:
    assert parse_yaml("[1e4x, e4, 1_a, v1.0]", "a.yaml") == ["1e4x", "e4", "1_a", "v1.0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "a.yaml, line 1: expected"),
        ("a: !!python/object/apply:os.system ['touch owned']", "a.yaml, line 1: could not determine a constructor"),
        ("data: {root: ${DATA}/x, name: digits}", r'in quotes: root: "${VAR}/folder"'),
        ("a: \x00", "a.yaml"),
    ],
)
def test_yaml_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: Any, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "a.yaml")
    assert message in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_files_that_are_no_recipe_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match=r"list\.yaml is not a mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"bytes\.yaml is not UTF-8"):
        load_recipe(tmp_path / "bytes.yaml")


# -- overrides


def test_overrides_reach_everything_and_leave_the_original_alone() -> None:
    data = small(stages=["calibrate", {"train": {"epochs": 3}}, {"train": {"epochs": 4}}])
    changed = apply_overrides(
        data,
        [
            "data.batch_size=32",
            "data.input.size=[9, 9]",
            "stages.calibrate.images=10",
            "stages.1.train.optimizer.lr=1e-3",
            "scheme.layers.'features.0'.weights.dtype=int4",
            "expect={top1: 0.5}",
        ],
    )
    assert changed["data"] == {"name": "digits", "batch_size": 32, "input": {"size": [9, 9]}}
    assert changed["stages"][0] == {"calibrate": {"images": 10}}
    assert changed["stages"][1]["train"] == {"epochs": 3, "optimizer": {"lr": 1e-3}}
    assert changed["scheme"]["layers"] == {"features.0": {"weights": {"dtype": "int4"}}}
    assert changed["expect"] == {"top1": 0.5}
    assert data["stages"][0] == "calibrate"
    assert "scheme" not in data


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size", "has no '='"),
        ("=3", "malformed key ''"),
        ("data.=3", "malformed key"),
        ("data..x=3", "malformed key"),
        ("stages.7.train.epochs=1", "there are only 3 items"),
        ("stages.train.epochs=1", "2 items called 'train'; give the index"),
        ("stages.export.epochs=1", "no item called 'export'"),
        ("name.first=1", "nothing can be set there"),
        ("name.first.second=1", "name has no keys"),
        ("data.batch_size=[", "override 'data.batch_size=['"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    data = small(stages=["calibrate", {"train": {"epochs": 3}}, {"train": {"epochs": 4}}])
    with pytest.raises(RecipeError) as caught:
        apply_overrides(data, [override])
    assert message in str(caught.value)


def test_quoted_parts_of_a_path() -> None:
    assert split_path("a.'b.c'.\"d.e\".3") == ["a", "b.c", "d.e", "3"]


# -- variables


def test_variables_are_expanded_in_paths_only() -> None:
    recipe = parse_recipe(
        small(
            model={"factory": "qat.models:digits_cnn", "kwargs": {"width": 4}, "weights": "${A}/w.pth"},
            data={"name": "image_folder", "root": "${B:-/tmp/x}/y", "labels": "${A}-${A}.json"},
        )
    )
    done = expand(recipe, {"A": "/a"})
    assert done.model.weights == "/a/w.pth"
    assert done.data.root == "/tmp/x/y"
    assert done.data.labels == "/a-/a.json"
    assert expand(recipe, {"A": "/a", "B": "b"}).data.root == "b/y"
    with pytest.raises(RecipeError, match=r"model\.weights: the environment variable A is not set; export A=\.\.\."):
        expand(recipe, {})
    assert expand(recipe, {}, keep_unset=True).model.weights == "${A}/w.pth"


# -- conversion


def test_settings_are_those_of_the_recipe() -> None:
    recipe = parse_recipe(
        small(
            seed=3,
            data={
                "name": "digits",
                "batch_size": 5,
                "input": {"size": 9, "mean": [0.5], "std": [0.25], "scale": 255},
                "limit": {"train": 7},
                "augment": {"flip": True},
            },
            stages=[
                "calibrate",
                {
                    "train": {
                        "epochs": 2,
                        "optimizer": {"name": "adamw", "lr": 0.5, "betas": [0.1, 0.2]},
                        "schedule": {"name": "step", "step_epochs": 4},
                        "distill": {"from": "float", "weight": 0.25},
                        "freeze_bn_after": 1,
                    }
                },
            ],
        )
    )
    spec = data_spec(recipe, skip_bad=True)
    assert (spec.seed, spec.batch_size, spec.input.size, spec.input.mean, spec.input.scale) == (
        3,
        5,
        (9, 9),
        (0.5,),
        255,
    )
    assert spec.limit == {"train": 7}
    assert spec.augment.flip
    assert spec.skip_bad
    assert recipe.stages[1].train is not None
    settings = train_settings(recipe.stages[1].train)
    assert (settings.optimizer.name, settings.optimizer.lr, settings.optimizer.betas) == ("adamw", 0.5, (0.1, 0.2))
    assert settings.schedule.step_epochs == 4
    assert settings.distill is not None
    assert settings.distill.weight == 0.25
    assert (settings.freeze_bn_after, settings.freeze_ranges_after) == (1, None)
