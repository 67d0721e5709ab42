"""Names of other systems, their options, and what is near to what is not legal."""

from __future__ import annotations

import pytest
import torch

import qat
from qat.errors import SchemeError
from qat.observers import ALIASES, OBSERVERS, make_observer, resolve_observer
from qat.quantizers import FakeQuantize, WeightFakeQuantize
from qat.scheme import PER_TENSOR, ObserverSpec, Scheme
from qat.schemes import change_scheme


def test_every_alias_stands_for_options_that_exist():
    for name, alias in ALIASES.items():
        options = OBSERVERS[alias.observer].OPTIONS
        assert set(alias.values) <= set(options), name
        assert {*alias.renames.values(), *alias.powers.values(), *sum(alias.pairs.values(), ())} <= set(options), name
        assert all(options[key].is_legal(value) for key, value in alias.values.items())
        assert alias.about
        assert name not in OBSERVERS or name == alias.observer
        make_observer(ObserverSpec(name), PER_TENSOR, None, "t")


@pytest.mark.parametrize(
    ("name", "options", "own", "values"),
    [
        ("mse", {}, "histogram", {}),
        ("mse", {"negative_weight": 0.5}, "histogram", {"negative_weight": 0.5}),
        ("dnnlibrary", {}, "minmax", {}),
        ("EMA", {}, "moving_average", {"momentum": 0.01}),
        ("EMA", {"momentum": 0.1}, "moving_average", {"momentum": 0.1}),
        ("moving_average", {"moving_average_weight": 0.004}, "moving_average", {"momentum": 0.004}),
        ("KL", {}, "kl", {"min_area": 100}),
        ("kl_divergence", {"divergence_first_quantize_bits": 12}, "kl", {"bins": 4096}),
        ("kl", {"divergence_nbins": 1024}, "kl", {"bins": 1024}),
        ("hfmg_quantize", {"num_of_bins": 8192}, "hfmg", {"bins": 8192}),
        ("ifmr_quantize", {"search_step": 0.02}, "ifmr", {"search_step": 0.02}),
        ("ifmr", {"search_range": [0.8, 1.2]}, "ifmr", {"search_range_start": 0.8, "search_range_end": 1.2}),
        ("MLE", {"start": "minmax"}, "mle", {"start": "minmax"}),
    ],
)
def test_resolved(name, options, own, values):
    found = resolve_observer(ObserverSpec(name, options))
    assert (found.name, dict(found.options)) == (own, values)
    assert resolve_observer(found) == found


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ObserverSpec("ifmr_quantise"), r"unknown observer 'ifmr_quantise'; did you mean 'ifmr_quantize'\?"),
        (ObserverSpec("kl_divergense"), r"did you mean 'kl_divergence'\?"),
        (ObserverSpec("kl", {"divergence_first_quantise_bits": 9}), r"did you mean 'divergence_first_quantize_bits'\?"),
        (ObserverSpec("kl", {"divergence_first_quantize_bits": 30}), r"is 30; give N for which 2\*\*N is an integer"),
        (ObserverSpec("kl", {"divergence_first_quantize_bits": 2.5}), r"is 2\.5; give N for which"),
        (ObserverSpec("kl", {"bins": 64, "divergence_nbins": 128}), r"option bins of observer kl is given twice"),
        (ObserverSpec("ifmr", {"search_range": 1.2}), r"search_range of observer ifmr is 1\.2; give two numbers"),
        (ObserverSpec("ifmr", {"search_range": [0.7]}), r"search_range of observer ifmr is \[0\.7\]; give two numbers"),
        (ObserverSpec("ifmr", {"search_range": [0.7, "x"]}), r"search_range_end of observer ifmr is 'x'"),
        (ObserverSpec("ifmr", {"search_range": [1.3, 0.7]}), r"search_range_start 1\.3 .* is above search_range_end"),
        (ObserverSpec("ifmr", {"search_range": [0.7, 1.3], "search_range_end": 1}), r"search_range_end .* given twice"),
        (ObserverSpec("ifmr", {"search_rang": [0.7, 1.3]}), r"did you mean 'search_range'\?"),
        (ObserverSpec("mace", {"percentile": 51}), r"percentile of observer mace is 51; give a number in \[0, 50\]"),
        (ObserverSpec("mace", {"enhance": 1}), r"enhance of observer mace is 1; give true or false"),
        (ObserverSpec("mle", {"start": "kl"}), r"start of observer mle is 'kl'; give one of minmax, percentile, mean"),
        (ObserverSpec("lp", {"p": 0.5}), r"p of observer lp is 0\.5; give a number in \[1, 8\]"),
        (ObserverSpec("sqnr", {"gamma": 0}), r"gamma of observer sqnr is 0"),
        (ObserverSpec("hfmg", {"bins": 512}), r"bins of observer hfmg is 512; give an integer in \[1024, 8192\]"),
        (ObserverSpec("admm", {"iterations": 0}), r"iterations of observer admm is 0"),
        (ObserverSpec("arq", {"bins": 1}), r"observer arq has no option 'bins'; leave the options out"),
    ],
)
def test_what_is_not_legal_is_named(spec, message):
    with pytest.raises(SchemeError, match=message):
        resolve_observer(spec)


def test_quantizers_know_the_registered_name():
    # a weight whose observer is min-max follows the weight in training, by whatever name
    weight = WeightFakeQuantize(Scheme("int8", True, observer=ObserverSpec("MAX_ABS")), "w", (2, 3))
    assert weight.follows
    activation = FakeQuantize(Scheme(observer=ObserverSpec("mse")), "x")
    activation.observer.observe(torch.randn(8, 5))
    activation.finish()
    assert activation.encoding().method == "histogram"


def test_clamp_values_are_the_integer_range():
    base = Scheme("int8", symmetric=True)
    for key in ("feature_clamp_value", "weight_clamp_value"):
        assert change_scheme(base, {key: 100}, "scheme.weights").code_range == (-100, 100)
    for changes, message in (
        ({"feature_clamp_value": 0}, r"scheme\.a\.feature_clamp_value is 0; give a positive integer"),
        ({"weight_clamp_value": 127, "qmax": 100}, r"scheme\.a has both weight_clamp_value and qmax"),
        ({"weight_clamp_value": 500}, r"\[-500, 500\] is empty or outside int8"),
        ({"weight_clamp_valeu": 5}, r"did you mean 'weight_clamp_value'"),
    ):
        with pytest.raises(SchemeError, match=message):
            change_scheme(base, changes, "scheme.a")


def test_in_a_prepared_model():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    scheme = {
        "activations": {"observer": {"name": "kl_divergence", "divergence_first_quantize_bits": 9}},
        "weights": {"observer": "ADMM", "weight_clamp_value": 63},
    }
    x = torch.randn(64, 3, 8, 8)
    qmodel = qat.prepare(model, x[:2], target=qat.load_target("arm-cpu"), scheme=scheme)
    qat.calibrate(qmodel, [x])
    encodings = qmodel.encodings()
    assert encodings["1"].method == "kl"
    assert encodings["0.weight"].method == "admm"
    assert encodings["0.weight"].qmax == 63
    with pytest.raises(SchemeError, match=r"'0\.weight'.*did you mean 'ADMM'|observer 'ADMN'"):
        qat.plan(model, x[:2], target=qat.load_target("arm-cpu"), scheme={"weights": {"observer": "ADMN"}})
