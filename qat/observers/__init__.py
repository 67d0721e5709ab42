"""Observers: streaming, fixed-memory, mergeable statistics that choose the range of a tensor."""

from qat.observers.aliases import ALIASES, Alias
from qat.observers.auto import AutoObserver
from qat.observers.base import Observer
from qat.observers.binning import BinnedObserver
from qat.observers.channels import channel_count
from qat.observers.histogram import HistogramObserver
from qat.observers.minmax import MinMaxObserver
from qat.observers.moving_average import MovingAverageObserver
from qat.observers.options import Option
from qat.observers.overflow import overflow_rate
from qat.observers.percentile import PercentileObserver
from qat.observers.registry import OBSERVERS, check_observer, make_observer, resolve_observer
from qat.observers.weights import weight_range

__all__ = [
    "ALIASES",
    "OBSERVERS",
    "Alias",
    "AutoObserver",
    "BinnedObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "Option",
    "PercentileObserver",
    "channel_count",
    "check_observer",
    "make_observer",
    "overflow_rate",
    "resolve_observer",
    "weight_range",
]
