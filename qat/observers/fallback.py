"""Saying that a method could not be used as it is defined, and what was done instead."""

from __future__ import annotations

import warnings

from qat.errors import QuantizationWarning


def warn_of_fallback(name: str, cause: str, instead: str, count: int = 1, of: int = 1) -> None:
    """Warn with `QuantizationWarning` that the range of a tensor is not what its observer is for.

    Args:
        name: Name of the tensor.
        cause: Why.
        instead: What was done.
        count: In how many of its channels.
        of: Number of its channels.
    """
    where = "" if count == of else f" in {count} of {of} channels"
    warnings.warn(f"{name!r}{where}: {cause}; {instead}", QuantizationWarning, stacklevel=2)
