"""The native extension: compiled kernels as torch operators, and the knowledge of whether they are there."""

from qat.native.learned import fake_quantize_learned
from qat.native.loading import Status, status
from qat.native.observers import clip_errors, fake_quantize_histogram, observe_histogram, observe_minmax, observe_range
from qat.native.operators import fake_quantize, fake_quantize_observe
from qat.native.ranges import BatchNormFactor, GridRule, fake_quantize_track, fake_quantize_weight

__all__ = [
    "BatchNormFactor",
    "GridRule",
    "Status",
    "clip_errors",
    "fake_quantize",
    "fake_quantize_histogram",
    "fake_quantize_learned",
    "fake_quantize_observe",
    "fake_quantize_track",
    "fake_quantize_weight",
    "observe_histogram",
    "observe_minmax",
    "observe_range",
    "status",
]
