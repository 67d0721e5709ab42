"""Data sets by name, behind one interface."""

from qat.train.data.base import Batch, Data, Share, Skipped, Split
from qat.train.data.load import SOURCES, Source, input_shape, load_data
from qat.train.data.spec import AugmentSpec, DataSpec, InputSpec

__all__ = [
    "SOURCES",
    "AugmentSpec",
    "Batch",
    "Data",
    "DataSpec",
    "InputSpec",
    "Share",
    "Skipped",
    "Source",
    "Split",
    "input_shape",
    "load_data",
]
