"""What all tests share: the data folder, seeds, threads, and hypothesis' profile."""

from __future__ import annotations

import os
import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

_ROOT = Path(__file__).resolve().parent.parent
_ARM64_ROOT = os.environ.get("QAT_ARM64_ROOT")
_NO_DATA = "needs the data folder: set QAT_DATA, or have it as ../shared/data"

# Derandomized: a change is judged by the same examples every time. No deadline and no complaint about slow
# generation: nothing is timed in a test, and the first example may compile or load something.
hypothesis.settings.register_profile(
    "qat",
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("qat")


def _find_data() -> Path | None:
    """The folder of the real image sets and weights, or None where there is none."""
    named = os.environ.get("QAT_DATA")
    if named:
        folder = Path(named).expanduser().resolve()
        if not folder.is_dir():
            raise pytest.UsageError(f"QAT_DATA names {named}, which is no folder; correct it or unset it")
        return folder
    beside = _ROOT.parent / "shared" / "data"
    return beside if beside.is_dir() else None


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a wrong QAT_DATA at once, and keep every process to one thread where several share the cores."""
    _find_data()
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs data, skip it where there is none, and put the whole flows last."""
    found = _find_data()
    for item in items:
        if "data_root" in getattr(item, "fixturenames", ()):
            item.add_marker("data")
        if found is None and item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=_NO_DATA))
    system = _ROOT / "tests" / "system"
    items.sort(key=lambda item: item.path.is_relative_to(system))


@pytest.hookimpl(tryfirst=True)  # before the fixtures of modules
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave the emulated ONNX Runtime and LiteRT, half a minute a package, to the heavy tests."""
    heavy = item.get_closest_marker("heavy") is not None
    os.environ.pop("QAT_ARM64_ROOT", None)
    if not heavy:
        os.environ["QAT_ARM64_ROOT"] = os.devnull
    elif _ARM64_ROOT is not None:
        os.environ["QAT_ARM64_ROOT"] = _ARM64_ROOT


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that QAT_DATA names, or ../shared/data; without either the test is skipped."""
    folder = _find_data()
    if folder is None:
        pytest.skip(_NO_DATA)
    return folder


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator before every test, so that no test depends on the ones before it."""
    value = 0
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - libraries under test may draw from the global generator
    torch.manual_seed(value)
    return value
