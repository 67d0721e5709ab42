"""The observer whose range is chosen by what it does behind the tensor: candidates from one histogram."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from qat.observers.binning import BinnedObserver
from qat.observers.divergence import KLObserver
from qat.observers.histogram import HistogramObserver
from qat.observers.ifmr import IFMRObserver
from qat.observers.losses import LpObserver
from qat.observers.options import Option
from qat.observers.percentile import PercentileObserver
from qat.scheme import Scheme

#: name, kind and options of each candidate besides min-max
_CANDIDATES: tuple[tuple[str, type[BinnedObserver], Mapping[str, Any]], ...] = (
    ("percentile 99.99", PercentileObserver, {"percentile": 99.99}),
    ("percentile 99.9", PercentileObserver, {"percentile": 99.9}),
    ("histogram", HistogramObserver, {}),
    ("kl", KLObserver, {}),
    ("ifmr", IFMRObserver, {}),
    ("lp", LpObserver, {}),
)


class AutoObserver(BinnedObserver):
    """Collects one histogram, from which several methods give candidates; what they do behind the tensor decides.

    `qat.calibrate` looks at the data a second time and, for each tensor with this observer, takes the candidate with
    the least squared error at the outputs of the model, or with `error: layer` of the layers that read the tensor
    (`qat.algorithms.auto_ranges`). By itself, as for a weight, it is the candidate with the least squared error of the
    tensor: `histogram`.

    Memory and merging: as `BinnedObserver`, with 8 mantissa bits: 1 MiB a tensor; 64 KiB a channel.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {
            "error": Option(str, "output", choices=("output", "layer"), about="whose error counts"),
            "mantissa_bits": Option(int, None, 0, 10, about="fineness of the bins; 8, or 4 by channel"),
        }
    )
    about: ClassVar[str] = "of several methods the one with the least error behind the tensor"
    source: ClassVar[str] = "qat's own"
    fineness: ClassVar[tuple[int, int]] = (8, 4)

    def _range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        low, high = self._view(HistogramObserver, {}).range(scheme)
        return low.cpu(), high.cpu()

    def _range_of_counts(
        self, negative: Tensor, positive: Tensor, edges: Tensor, low: Tensor, high: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError  # the candidates do it

    def candidates(self, scheme: Scheme) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the range that each candidate method gives, by its name; `minmax` is the first.

        Args:
            scheme: What the ranges are for.

        Returns:
            Bounds as `range`.

        Raises:
            StateError: Nothing was observed.
            DataError: Nothing finite was observed.
        """
        bounds = self.min_val.double() + 0.0, self.max_val.double() + 0.0
        views = {name: self._view(kind, options) for name, kind, options in _CANDIDATES}
        return {"minmax": bounds, **{name: view.range(scheme) for name, view in views.items()}}

    def _view(self, kind: type[BinnedObserver], options: Mapping[str, Any]) -> BinnedObserver:
        """Return an observer of another kind over the same counts, in its own bins if these are fewer."""
        bits = min(self.mantissa_bits, kind.fineness[self.channels is not None])
        view = kind(self.granularity, self.channels, self.name, **options, mantissa_bits=bits)
        for key in ("min_val", "max_val", "samples", "nonfinite"):
            view.register_buffer(key, self.get_buffer(key))
        # neighbours in the order of the bit patterns differ in their last bits
        view.register_buffer("counts", self.counts.reshape(*view.counts.shape, -1).sum(-1))
        return view
