"""Fake quantizers for activations and weights, their methods by name, and the phases that drive them."""

from __future__ import annotations

from qat.quantizers.activation import FakeQuantize
from qat.quantizers.base import Phase, Quantizer
from qat.quantizers.phases import (
    FLOAT,
    FOLLOW,
    OBSERVE,
    QUANTIZE,
    TRACK,
    freeze_batch_norm,
    pack_frozen,
    set_phase,
    unpack_frozen,
)
from qat.quantizers.registry import QUANTIZER_ALIASES, QUANTIZERS, make_method, resolve_quantizer
from qat.quantizers.rounding import LearnedRounding
from qat.quantizers.static import fake_quantize
from qat.quantizers.weight import WeightFakeQuantize

__all__ = [
    "FLOAT",
    "FOLLOW",
    "OBSERVE",
    "QUANTIZE",
    "QUANTIZERS",
    "QUANTIZER_ALIASES",
    "TRACK",
    "FakeQuantize",
    "LearnedRounding",
    "Phase",
    "Quantizer",
    "WeightFakeQuantize",
    "fake_quantize",
    "freeze_batch_norm",
    "make_method",
    "pack_frozen",
    "resolve_quantizer",
    "set_phase",
    "unpack_frozen",
]
