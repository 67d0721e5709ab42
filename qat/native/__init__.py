"""The native extension: compiled kernels as torch operators, and the knowledge of whether they are there."""

from qat.native.learned import fake_quantize_learned, fake_quantize_weight_learned
from qat.native.loading import Status, runs_on, status
from qat.native.norm import Drop, Grid, Norm, add_quantize, drop_numbers, norm_quantize
from qat.native.norm_learned import LearnedGrid, add_quantize_learned, norm_quantize_learned
from qat.native.norm_statistics import add_observe, norm_observe
from qat.native.observers import (
    Statistics,
    clip_ranges,
    fake_quantize_observe,
    observe,
    observe_histogram,
    observe_minmax,
    observe_range,
)
from qat.native.operators import fake_quantize
from qat.native.oscillation import OscillationState, oscillation_step
from qat.native.ranges import BatchNormFactor, GridRule, fake_quantize_track, fake_quantize_weight
from qat.native.tanh import tanh_weight

__all__ = [
    "BatchNormFactor",
    "Drop",
    "Grid",
    "GridRule",
    "LearnedGrid",
    "Norm",
    "OscillationState",
    "Statistics",
    "Status",
    "add_observe",
    "add_quantize",
    "add_quantize_learned",
    "clip_ranges",
    "drop_numbers",
    "fake_quantize",
    "fake_quantize_learned",
    "fake_quantize_observe",
    "fake_quantize_track",
    "fake_quantize_weight",
    "fake_quantize_weight_learned",
    "norm_observe",
    "norm_quantize",
    "norm_quantize_learned",
    "observe",
    "observe_histogram",
    "observe_minmax",
    "observe_range",
    "oscillation_step",
    "runs_on",
    "status",
    "tanh_weight",
]
