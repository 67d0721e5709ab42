"""The names by which other systems call observers and their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Alias:
    """What a name of another system stands for here.

    Attributes:
        observer: Registered name of the observer.
        values: Options that the name implies; given ones win.
        renames: Options by their name there.
        powers: Options, by their name there, whose value N stands for 2**N.
        pairs: Options, by their name there, whose two values are two options here.
        about: Whose name it is.
    """

    observer: str
    values: Mapping[str, Any] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    powers: Mapping[str, str] = field(default_factory=dict)
    pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    about: str = ""


_ACUITY_KL = MappingProxyType({"divergence_nbins": "bins"})
_ACUITY_BITS = MappingProxyType({"divergence_first_quantize_bits": "bins"})
_AMCT_RANGE = MappingProxyType({"search_range": ("search_range_start", "search_range_end")})
_ACUITY_AVERAGE = MappingProxyType({"moving_average_weight": "momentum"})

#: names of other systems; a registered name is here where options of it have other names elsewhere
ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "mse": Alias("histogram", about="squared error, the usual name"),
        "max_abs": Alias("minmax", about="MNN, `weight_quantize_method`"),
        "MAX_ABS": Alias("minmax", about="MNN, `weight_quantize_method`"),
        "dnnlibrary": Alias("minmax", about="DNNLibrary, global minimum and maximum"),
        "normal": Alias("minmax", about="ACUITY, `--algorithm normal`"),
        "quantize_stat": Alias("mace", about="MACE, `quantize_stat.py`"),
        "KL": Alias("kl", {"min_area": 100}, about="MNN, `feature_quantize_method`"),
        "kl": Alias("kl", renames=_ACUITY_KL, powers=_ACUITY_BITS, about="ACUITY's options"),
        "kl_divergence": Alias("kl", renames=_ACUITY_KL, powers=_ACUITY_BITS, about="ACUITY, `--algorithm`"),
        "ADMM": Alias("admm", about="MNN, `feature_quantize_method` and `weight_quantize_method`"),
        "EMA": Alias("moving_average", {"momentum": 0.01}, about="MNN, `feature_quantize_method`"),
        "ema": Alias("moving_average", {"momentum": 0.01}, about="MNN, `feature_quantize_method`"),
        "moving_average": Alias("moving_average", renames=_ACUITY_AVERAGE, about="ACUITY's option"),
        "ifmr": Alias("ifmr", pairs=_AMCT_RANGE, about="AMCT's option"),
        "ifmr_quantize": Alias("ifmr", pairs=_AMCT_RANGE, about="AMCT"),
        "hfmg": Alias("hfmg", renames={"num_of_bins": "bins"}, about="AMCT's option"),
        "hfmg_quantize": Alias("hfmg", renames={"num_of_bins": "bins"}, about="AMCT"),
        "arq_quantize": Alias("arq", about="AMCT"),
        "MLE": Alias("mle", about="ACUITY, `--MLE`"),
        "minimize_layer_error": Alias("mle", about="acuitylite"),
        "tf_enhanced": Alias("sqnr", about="AIMET"),
    }
)
