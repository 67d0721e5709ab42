"""Data sets that fit in memory: small images of equal size, held as uint8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import DataError
from qat.train.data.base import (
    Batch,
    Data,
    Share,
    Split,
    empty_batch,
    fixed_subset,
    generator,
    held_out,
    index_batches,
)
from qat.train.data.spec import DataSpec, ImageFormat
from qat.train.data.transforms import draw_variation, place_tensor, to_format, to_values, vary


@dataclass(frozen=True)
class Arrays:
    """Decoded images.

    Attributes:
        x_train: (N, C, H, W) uint8, C = 1 grey or 3 RGB.
        y_train: (N,) int64 class numbers.
        x_test: As `x_train`.
        y_test: As `y_train`.
        num_classes: Number of classes.
        brightest: Largest pixel value.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    brightest: int = 255


def array_data(arrays: Arrays, spec: DataSpec) -> Data:
    """Make the splits of images in memory; calibration images are training images in a fixed random order.

    Raises:
        DataError: A split is empty, or the input specification contradicts itself or the images.
    """
    if spec.augment.random_area is not None:
        raise DataError(f"data {spec.name!r} has no data.augment.random_area", "use flip and crop_padding")
    native: ImageFormat = "GRAY" if arrays.x_train.shape[1] == 1 else "RGB"
    size = (int(arrays.x_train.shape[2]), int(arrays.x_train.shape[3]))
    shape = spec.input.shape(native, size)
    for name, x, y in (("train", arrays.x_train, arrays.y_train), ("test", arrays.x_test, arrays.y_test)):
        if x.shape[0] == 0:
            raise DataError(f"data {spec.name!r} has no {name} images", "give at least one")
        if x.shape[0] != y.shape[0]:
            raise DataError(f"data {spec.name!r}: {x.shape[0]} {name} images, {y.shape[0]} labels", "make them agree")
    placed = place_tensor(to_format(arrays.x_train[:1], spec.input.format), spec.input).shape[1:]
    if shape is not None and tuple(placed) != shape:
        raise DataError(
            f"data.input makes images of shape {tuple(placed)} where {shape} was asked for",
            "correct size, resize or crop",
        )
    # the calibration images are drawn from those that are trained on, so that a limit never widens the data
    # seen
    x, y = _limited(arrays.x_train, arrays.y_train, spec, "train")
    validation = None
    if spec.validation:
        stay, out = held_out(x.shape[0], spec.validation, spec.seed)
        validation = _split("validation", x[out], y[out], spec, arrays.brightest)
        x, y = x[stay], y[stay]
    return Data(
        train=_split("train", x, y, spec, arrays.brightest),
        calibration=_split("calibration", *_limited(x, y, spec, "calibration"), spec, arrays.brightest),
        test=_split("test", *_limited(arrays.x_test, arrays.y_test, spec, "test"), spec, arrays.brightest),
        num_classes=arrays.num_classes,
        input_shape=(int(placed[0]), int(placed[1]), int(placed[2])),
        validation=validation,
    )


def _limited(x: Tensor, y: Tensor, spec: DataSpec, name: str) -> tuple[Tensor, Tensor]:
    chosen = fixed_subset(x.shape[0], spec.limit.get(name), spec.seed)
    return (x, y) if len(chosen) == x.shape[0] else (x[chosen], y[chosen])


def _split(name: str, x: Tensor, y: Tensor, spec: DataSpec, brightest: int) -> Split:
    n, training = int(x.shape[0]), name == "train"
    drop_last = training and n > spec.batch_size and spec.last_batch == "drop"

    def batches(epoch: int, first: int = 0, share: Share | None = None) -> Iterator[Batch]:
        random = generator(spec.seed, epoch + 1 if training else 0)
        order = torch.arange(n) if name in ("test", "validation") else torch.randperm(n, generator=random)
        # drawn for the whole epoch at once: what an image gets does not depend on which batches are made
        draws = draw_variation(n, spec.augment, random) if training else None
        for index in index_batches(n, spec.batch_size, order, drop_last, first, share):
            if len(index) == 0:
                yield empty_batch()
                continue
            pixels = place_tensor(to_format(x[index], spec.input.format), spec.input)
            if draws is not None:
                pixels = vary(pixels, draws.of(index))
            yield to_values(pixels, spec.input, brightest), y[index]

    return Split(name, n, spec.batch_size, batches, drop_last=drop_last, batches_from=batches, shares_from=batches)
