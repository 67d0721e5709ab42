"""The registry of data sources."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qat.errors import DataError
from qat.train.data.arrays import array_data
from qat.train.data.base import Data
from qat.train.data.cifar10 import load_cifar10
from qat.train.data.digits import load_digits
from qat.train.data.fashion_mnist import load_fashion_mnist
from qat.train.data.image_folder import load_image_folder
from qat.train.data.spec import DataSpec, ImageFormat, Size


@dataclass(frozen=True)
class Source:
    """A source of data.

    Attributes:
        load: Makes the splits.
        native: Format of its images.
        size: (height, width) of its images, or None where they vary.
    """

    load: Callable[[DataSpec], Data]
    native: ImageFormat
    size: Size | None


#: every source by the name that a recipe uses
SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "digits": Source(lambda spec: array_data(load_digits(), spec), "GRAY", (8, 8)),
        "fashion_mnist": Source(lambda spec: array_data(load_fashion_mnist(spec.folder()), spec), "GRAY", (28, 28)),
        "cifar10": Source(lambda spec: array_data(load_cifar10(spec.folder()), spec), "RGB", (32, 32)),
        "image_folder": Source(load_image_folder, "RGB", None),
    }
)


def _source(name: str) -> Source:
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        raise DataError(
            f"unknown data {name!r}",
            f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(SOURCES)}",
        )
    return SOURCES[name]


def load_data(spec: DataSpec) -> Data:
    """Load the splits of a data set.

    Raises:
        DataError: The source is unknown, or its files are missing, unreadable, empty or of the wrong shape.
    """
    return _source(spec.name).load(spec)


def input_shape(spec: DataSpec) -> tuple[int, int, int] | None:
    """Return the shape (C, H, W) of the model's input without reading a file; None where only images tell.

    Raises:
        DataError: The source is unknown or the input specification contradicts itself.
    """
    source = _source(spec.name)
    return spec.input.shape(source.native, source.size)
