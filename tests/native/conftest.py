"""What the tests of the native operators share: each instruction set in turn, and tensors of every layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qat import native

ISAS = ("portable", "avx2", "avx512", "neon")


@pytest.fixture
def operators() -> None:
    """Skip, with the reason, where the extension is not in use."""
    if not native.status().active:
        pytest.skip(f"native extension: {native.status().reason}")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, operators: None) -> Iterator[str]:
    """Force one instruction set; those that this processor lacks are skipped."""
    try:
        before = torch.ops.qat._use_isa(request.param)
    except RuntimeError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    torch.ops.qat._use_isa(before)
