"""The C API of `csrc/runtime` by ctypes: plans as `Network`, their execution for one batch size as `Session`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qat.errors import StateError
from qat.native import loading


class Network:
    def __init__(self, plan: bytes) -> None:
        raise NotImplementedError


class Session:
    def __init__(self, network: Network, batch: int, threads: int) -> None:
        raise NotImplementedError

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], timed: bool = False) -> list[float]:
        raise NotImplementedError


def status() -> loading.Status:
    return loading.status()
