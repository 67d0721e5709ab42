"""The native extension: compiled kernels as torch operators, and the knowledge of whether they are there."""

from qat.native.loading import Status, status
from qat.native.operators import (
    fake_quantize,
    fake_quantize_observe,
    observe_histogram,
    observe_minmax,
)

__all__ = [
    "Status",
    "fake_quantize",
    "fake_quantize_observe",
    "observe_histogram",
    "observe_minmax",
    "status",
]
