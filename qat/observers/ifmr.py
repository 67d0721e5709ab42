"""AMCT's IFMR: multiples of the largest value, searched for the least squared error."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.errors import SchemeError
from qat.observers.binning import BinnedObserver
from qat.observers.density import Counts, Density, density_of, grid_errors
from qat.observers.fallback import warn_of_fallback
from qat.observers.linear import signed
from qat.observers.options import Option
from qat.observers.percentile import value_at
from qat.observers.scales import code_sides, extent_of, range_of_scale
from qat.scheme import Scheme

#: what a quotient of two decimal numbers may miss a whole one by
_SLACK = 1e-9
#: with fewer elements a percentile would take a good part of the tensor for outliers
_FEW = 1000


class IFMRObserver(BinnedObserver):
    """The best multiple of the (percentile) maximum, as AMCT's `ifmr_quantize`.

    max is the int(max_percentile n)-th smallest of n elements, min mirrored by `min_percentile`; zero is put between
    them. Candidates are c = r max, r from `search_range_start` to `search_range_end`, that one included, in
    `search_step`.

    *Affine*: scale = (c - min) / (qmax - qmin); the loss is the mean of (Q(x) - x)^2, Q(x) = round(clip(x, min, c) /
    scale) scale: without the zero point, as theirs. Only the upper end is searched, as theirs; with `two_sided` (ours)
    then the lower end is, over the same multiples of min. *Symmetric*: m = max(max, |min|), candidates r m, scale =
    r m / 127, or / 128 where |min| is larger (int8; the codes of that side).

    A percentile below 1 leaves at least one element out, however few there are. Where there are fewer than 1000, the
    largest and the smallest are taken instead, with a warning (ours).

    The first of equally good candidates wins. The loss is integrated over the bins (`qat.observers.density`), and ranks
    are interpolated in them. A scale that is nearly zero is raised to `qat.numerics.SCALE_FLOOR`, where AMCT takes 1 or
    stops.

    Memory and merging: as `BinnedObserver`.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = MappingProxyType(
        {
            **BinnedObserver.OPTIONS,
            "search_range_start": Option(float, 0.7, 0.0, 10.0, low_open=True, about="smallest multiple"),
            "search_range_end": Option(float, 1.3, 0.0, 10.0, low_open=True, about="largest multiple"),
            "search_step": Option(float, 0.01, 0.0001, 10.0, about="from one multiple to the next"),
            "max_percentile": Option(float, 0.999999, 0.5, 1.0, low_open=True, about="share of elements below max"),
            "min_percentile": Option(float, 0.999999, 0.5, 1.0, low_open=True, about="share of elements above min"),
            "two_sided": Option(bool, False, about="search the lower end too (affine schemes)"),
        }
    )
    about: ClassVar[str] = "multiple of the percentile maximum with the least squared error"
    source: ClassVar[str] = "AMCT `ifmr_quantize`"
    gives_scale: ClassVar[bool] = True

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse a search range whose start is beyond its end, and steps longer than it."""
        start, end, step = (options[f"search_{key}"] for key in ("range_start", "range_end", "step"))
        if start > end:
            raise SchemeError(
                f"search_range_start {start:g} of observer ifmr is above search_range_end {end:g}",
                "give a start that is not above the end",
            )
        if start < end and step > (end - start) * (1 + _SLACK):
            raise SchemeError(
                f"search_step {step:g} of observer ifmr is longer than the range from {start:g} to {end:g}",
                "give a shorter step",
            )

    def _multiples(self) -> Tensor:
        start, end, step = (self.options[f"search_{key}"] for key in ("range_start", "range_end", "step"))
        count = int((end - start) / step + _SLACK) + 1
        multiples: Tensor = start + step * torch.arange(count, dtype=torch.float64)
        return multiples

    def _range_of_counts(
        self, negative: Tensor, positive: Tensor, edges: Tensor, low: Tensor, high: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        counts, by_value = signed(negative, positive, edges)
        number = counts.sum(-1).to(torch.float64)
        few = number < _FEW
        shares = [self.options[f"{end}_percentile"] for end in ("max", "min")]
        if bool(few.any()) and min(shares) < 1.0:
            cause = f"it has fewer than {_FEW} elements, too few for a percentile"
            warn_of_fallback(self.name, cause, "ifmr starts from its extremes", int(few.sum()), len(few))
        top, bottom = (torch.where(few, number, torch.floor(share * number)) for share in shares)
        upper = _ranked(counts, by_value, low, high, top / number.clamp(min=1.0))
        lower = -_ranked(counts.flip(-1), -by_value.flip(0), -high, -low, bottom / number.clamp(min=1.0))
        upper, lower = torch.clamp(upper, min=0.0), torch.clamp(lower, max=0.0)
        span = torch.maximum(upper, -lower)
        narrowest = torch.where(span > 0, span, 1.0) * self.options["search_range_start"]
        elements = Counts(negative.to(torch.float64), positive.to(torch.float64), edges, low, high).trimmed()
        resolution = narrowest / (scheme.code_range[1] - scheme.code_range[0]) / 4
        density = density_of(elements, resolution)
        multiples = self._multiples()
        if scheme.symmetric:
            extent, codes = extent_of(lower, upper, scheme)
            above, below = code_sides(scheme)
            scales = multiples * (extent / codes)[:, None]
            errors = grid_errors(
                density,
                torch.where(scales > 0, scales, 1.0),
                torch.full_like(scales, -below),
                torch.full_like(scales, above),
            )
            return range_of_scale(_best(scales, errors), scheme)
        steps = scheme.code_range[1] - scheme.code_range[0]
        uppers = upper[:, None] * multiples
        upper = _best(uppers, _affine_errors(density, lower[:, None], uppers, steps))
        if self.options["two_sided"]:
            lowers = lower[:, None] * multiples
            lower = _best(lowers, _affine_errors(density, lowers, upper[:, None], steps))
        return lower, upper


def _ranked(counts: Tensor, edges: Tensor, low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    """Return the value below which a share of each channel's elements lie, (C,)."""
    rows = []
    for c, part in enumerate(share.tolist()):
        one = slice(c, c + 1)
        # one element is its own percentile
        rows.append(value_at(counts[one], edges, low[one], high[one], part) if part > 0 else high[one])
    return torch.cat(rows)


def _affine_errors(density: Density, low: Tensor, high: Tensor, steps: int) -> Tensor:
    """Return the squared error of rounding to multiples of (high - low) / steps inside [low, high], (C, K)."""
    scale = (high - low) / steps
    scale = torch.where(scale > 0, scale, 1.0)
    return grid_errors(density, scale, torch.round(low / scale), torch.round(high / scale))


def _best(candidates: Tensor, errors: Tensor) -> Tensor:
    return candidates.gather(-1, errors.argmin(-1, keepdim=True))[:, 0]
