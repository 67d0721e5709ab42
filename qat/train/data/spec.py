"""What a recipe says of its data: the source, how an image becomes a tensor, how training images are varied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qat.errors import DataError

ImageFormat = Literal["RGB", "BGR", "GRAY"]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
Size = tuple[int, int]


@dataclass(frozen=True)
class InputSpec:
    """How an image becomes the model's input: `(pixels * scale / 255 - mean) / std`, float32, (C, H, W).

    The steps are taken in this order: decode to `format`, `resize`, central `crop`, values.

    Attributes:
        size: (height, width) that the model takes; alone, images are stretched to it; with `resize` or
            `crop`, a check.
        format: Order of the channels; None for the source's own (GRAY for grey scans, else RGB).
        resize: Length of the shorter side, aspect kept, or the exact (height, width).
        crop: (height, width) of the central crop; smaller images are padded with black.
        interpolation: Of the resizing, always with antialiasing except for `nearest`.
        scale: What the brightest pixel becomes before mean and standard deviation: 1 or 255.
        mean: One value a channel, on that scale.
        std: One value a channel, on that scale.
    """

    size: Size | None = None
    format: ImageFormat | None = None
    resize: int | Size | None = None
    crop: Size | None = None
    interpolation: Interpolation = "bilinear"
    scale: Literal[1, 255] = 1
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def channels(self, native: ImageFormat) -> int:
        """Number of channels, given the source's own format."""
        return 1 if (self.format or native) == "GRAY" else 3

    def shape(self, native: ImageFormat, native_size: Size | None) -> tuple[int, int, int] | None:
        """Shape (C, H, W) of the model's input, or None where only the images can tell.

        Raises:
            DataError: `size` contradicts `crop` or `resize`, or `mean` or `std` does not fit the channels.
        """
        channels = self.channels(native)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != channels:
                raise DataError(
                    f"data.input.{name} has {len(values)} values for {channels} channels ({self.format or native})",
                    "give one value a channel",
                )
        if self.std is not None and any(not value > 0.0 for value in self.std):
            raise DataError("data.input.std has a value that is not positive", "give positive values")
        made = self.crop or (self.resize if isinstance(self.resize, tuple) else None)
        if made is not None and self.size is not None and made != self.size:
            raise DataError(
                f"data.input.size is {_by(self.size)} but resize and crop make {_by(made)}", "make them agree"
            )
        final = made or self.size or (native_size if self.resize is None else None)
        return None if final is None else (channels, *final)


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


@dataclass(frozen=True)
class AugmentSpec:
    """How training images are varied, drawn from the epoch's own generator.

    Attributes:
        flip: Mirror half of the images left to right.
        crop_padding: Pad with black by so many pixels on each side and crop at a random place; 0 for none.
        random_area: (smallest, largest) share of the image area that a random crop (aspect 3:4 to 4:3) keeps
            before it is stretched to the input size, as in Inception training; None for none. Image folders
            only.
    """

    flip: bool = False
    crop_padding: int = 0
    random_area: tuple[float, float] | None = None


@dataclass(frozen=True)
class DataSpec:
    """Where images come from and how they are fed.

    Attributes:
        name: Name of the source.
        root: Folder of the source; None for those that need none.
        batch_size: Images in a batch.
        input: How an image becomes the model's input.
        augment: Variation of training images.
        seed: Seed of shuffling and augmentation.
        limit: Largest number of images of a split (`train`, `calibration`, `test`), drawn evenly by the seed.
        validation: Training images that are held out to watch training by; 0 for none.
        last_batch: `drop` leaves the last batch of a training epoch out where it would be smaller than the others
            (and is not the only one); `keep` trains on it too.
        skip_bad: Skip files that cannot be read as an image, and count them, instead of stopping.
        workers: Threads that decode images; only image folders use them.
        train: Sub-folder of training images (image folders).
        calibration: Sub-folder of calibration images (image folders); None for the training images.
        test: Sub-folder of test images (image folders).
        labels: File, below `root` or absolute, that gives class folders (or files) their class numbers; None
            to number class folders in sorted order.
    """

    name: str
    root: Path | None = None
    batch_size: int = 64
    input: InputSpec = field(default_factory=InputSpec)
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    seed: int = 0
    limit: Mapping[str, int] = field(default_factory=dict)
    validation: int = 0
    last_batch: Literal["drop", "keep"] = "drop"
    skip_bad: bool = False
    workers: int = 1
    train: str | None = "train"
    calibration: str | None = None
    test: str | None = "val"
    labels: str | None = None

    def folder(self) -> Path:
        """The existing root folder.

        Raises:
            DataError: There is none.
        """
        if self.root is None:
            raise DataError(f"data {self.name!r} needs a folder", "give data.root")
        if not self.root.is_dir():
            raise DataError(f"data folder {self.root} does not exist", "correct data.root")
        return self.root
