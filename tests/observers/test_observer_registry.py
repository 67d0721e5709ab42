from __future__ import annotations

import pytest

from qat.errors import SchemeError
from qat.observers import OBSERVERS, check_observer, make_observer
from qat.scheme import PER_TENSOR, ObserverSpec


def test_names():
    assert set(OBSERVERS) == {
        "minmax", "moving_average", "percentile", "histogram", "mace", "kl", "admm", "ifmr", "hfmg", "lp", "sqnr",
        "mle", "arq", "dynamic_fixed_point", "auto",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_made_by_name_with_default_options(name):
    observer = make_observer(ObserverSpec(name), PER_TENSOR, None, "features.0")
    assert type(observer) is check_observer(ObserverSpec(name)) is OBSERVERS[name]
    assert observer.name == "features.0"
    assert set(observer.options) == set(OBSERVERS[name].OPTIONS)
    assert "features.0" in repr(observer)


def test_options_are_taken():
    observer = make_observer(ObserverSpec("percentile", {"percentile": 90, "mantissa_bits": 3}), PER_TENSOR, None, "x")
    assert observer.options == {"percentile": 90, "mantissa_bits": 3}
    assert observer.counts.shape == (4096,)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ObserverSpec("min_max"), r"unknown observer 'min_max'; did you mean 'minmax'\?"),
        (ObserverSpec("zzz"), r"unknown observer 'zzz'; choose one of minmax, moving_average"),
        (ObserverSpec("percentile", {"percentil": 99}), r"no option 'percentil'; did you mean 'percentile'\?"),
        (ObserverSpec("minmax", {"momentum": 0.1}), r"minmax has no option 'momentum'; leave the options out"),
        (ObserverSpec("percentile", {"percentile": 50}), r"percentile is 50; give a number in \(50, 100\]"),
        (ObserverSpec("percentile", {"percentile": 100.5}), "100.5"),
        (ObserverSpec("percentile", {"percentile": float("nan")}), "nan"),
        (ObserverSpec("percentile", {"percentile": "99"}), "'99'"),
        (ObserverSpec("percentile", {"percentile": None}), "None"),
        (ObserverSpec("moving_average", {"momentum": 0}), r"momentum .* is 0; give a number in \(0, 1\]"),
        (ObserverSpec("moving_average", {"momentum": True}), "True"),
        (ObserverSpec("histogram", {"mantissa_bits": 11}), r"give an integer in \[0, 10\]"),
        (ObserverSpec("histogram", {"mantissa_bits": 4.0}), r"give an integer"),
    ],
)
def test_what_is_not_legal_is_named_with_the_nearest_that_is(spec, message):
    with pytest.raises(SchemeError, match=message):
        make_observer(spec, PER_TENSOR, None, "x")
