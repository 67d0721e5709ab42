"""Turning pixels into the model's input, for stacks of equal images (tensors) and for single images (PIL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from qat.train.data.spec import AugmentSpec, ImageFormat, InputSpec, Size

_PIL_FILTER = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
#: ITU-R BT.601 luma, the weights that Pillow uses
_LUMA = (0.299, 0.587, 0.114)


def to_format(pixels: Tensor, wanted: ImageFormat | None) -> Tensor:
    """Change the channels of uint8 images (N, C, H, W), C = 1 grey or 3 RGB, to a format."""
    channels = pixels.shape[1]
    if wanted is None or (wanted, channels) in {("GRAY", 1), ("RGB", 3)}:
        return pixels
    if channels == 1:
        return pixels.expand(-1, 3, -1, -1)
    if wanted == "BGR":
        return pixels.flip(1)
    weights = torch.tensor(_LUMA).reshape(1, 3, 1, 1)
    return (pixels.float() * weights).sum(1, keepdim=True).round().to(torch.uint8)


def short_side(height: int, width: int, short: int) -> Size:
    """Return the (height, width) with the shorter side `short`; the longer is rounded down, as by torchvision."""
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def _crop_box(height: int, width: int, crop: Size) -> tuple[int, int]:
    return round((height - crop[0]) / 2.0), round((width - crop[1]) / 2.0)


def place_tensor(pixels: Tensor, spec: InputSpec) -> Tensor:
    """Resize and crop uint8 images (N, C, H, W); the values stay in 0..255, uint8."""
    height, width = pixels.shape[-2:]
    target: Size | None = None
    if isinstance(spec.resize, int):
        target = short_side(height, width, spec.resize)
    elif spec.resize is not None:
        target = spec.resize
    elif spec.crop is None:
        target = spec.size
    if target is not None and target != (height, width):
        smooth: Literal["bilinear", "bicubic"] | None = None if spec.interpolation == "nearest" else spec.interpolation
        resized = functional.interpolate(
            pixels.float(), size=target, mode=smooth or "nearest", antialias=smooth is not None
        )
        pixels = resized.round().clamp(0, 255).to(torch.uint8)
    if spec.crop is not None:
        top, left = _crop_box(pixels.shape[-2], pixels.shape[-1], spec.crop)
        pads = [max(0, -left), max(0, spec.crop[1] - pixels.shape[-1] + left)]
        pads += [max(0, -top), max(0, spec.crop[0] - pixels.shape[-2] + top)]
        pixels = functional.pad(pixels, pads)
        top, left = max(0, top), max(0, left)
        pixels = pixels[..., top : top + spec.crop[0], left : left + spec.crop[1]]
    return pixels


def to_values(pixels: Tensor, spec: InputSpec, brightest: int = 255) -> Tensor:
    """Turn pixels (N, C, H, W) of 0..`brightest` into float32 values: scale, mean, standard deviation."""
    values = pixels.to(torch.float32) * (spec.scale / brightest)
    if spec.mean is not None:
        values = values - torch.tensor(spec.mean).reshape(1, -1, 1, 1)
    if spec.std is not None:
        values = values / torch.tensor(spec.std).reshape(1, -1, 1, 1)
    return values


@dataclass(frozen=True)
class Variation:
    """How each of some images is varied.

    Attributes:
        padding: Pixels of black on each side before the crop.
        corners: (N, 2) upper left corner (top, left) of each crop of the padded image; None for no crop.
        mirrored: (N,) whether the image is mirrored left to right; None for never.
    """

    padding: int
    corners: Tensor | None
    mirrored: Tensor | None

    def of(self, index: Tensor) -> Variation:
        """Return the variation of some of the images."""
        corners, mirrored = (None if v is None else v[index] for v in (self.corners, self.mirrored))
        return Variation(self.padding, corners, mirrored)


def draw_variation(count: int, spec: AugmentSpec, random: torch.Generator) -> Variation:
    """Draw how `count` images are varied."""
    pad = spec.crop_padding
    corners = torch.randint(0, 2 * pad + 1, (count, 2), generator=random) if pad else None
    mirrored = torch.rand(count, generator=random) < 0.5 if spec.flip else None
    return Variation(pad, corners, mirrored)


def vary(pixels: Tensor, variation: Variation) -> Tensor:
    """Vary pixels (N, C, H, W): padded crop, then mirror."""
    height, width = pixels.shape[-2:]
    if variation.corners is not None:
        pad = variation.padding
        wide = functional.pad(pixels, (pad, pad, pad, pad))
        pixels = torch.stack(
            [
                image[:, top : top + height, left : left + width]
                for image, (top, left) in zip(wide, variation.corners.tolist(), strict=True)
            ]
        )
    if variation.mirrored is not None:
        pixels = torch.where(variation.mirrored.reshape(-1, 1, 1, 1), pixels.flip(-1), pixels)
    return pixels


def augment_tensor(pixels: Tensor, spec: AugmentSpec, random: torch.Generator) -> Tensor:
    """Vary a batch of pixels (N, C, H, W): padded random crop, then mirror."""
    return vary(pixels, draw_variation(pixels.shape[0], spec, random))


def place_image(image: Image.Image, spec: InputSpec) -> Image.Image:
    """Resize and crop one decoded image."""
    size: Size | None = None
    if isinstance(spec.resize, int):
        size = short_side(image.height, image.width, spec.resize)
    elif spec.resize is not None:
        size = spec.resize
    elif spec.crop is None:
        size = spec.size
    if size is not None and size != (image.height, image.width):
        image = image.resize((size[1], size[0]), _PIL_FILTER[spec.interpolation])
    if spec.crop is not None:
        top, left = _crop_box(image.height, image.width, spec.crop)
        # Pillow fills what lies outside with black
        image = image.crop((left, top, left + spec.crop[1], top + spec.crop[0]))
    return image


def random_area_image(
    image: Image.Image, share: tuple[float, float], size: Size, spec: InputSpec, random: torch.Generator
) -> Image.Image:
    """Cut a random area (aspect 3:4 to 4:3) and stretch it to `size` (Szegedy et al. 2015, section 6)."""
    area = image.height * image.width
    for _ in range(10):
        draw = torch.rand(4, generator=random).tolist()
        wanted = area * (share[0] + (share[1] - share[0]) * draw[0])
        aspect = float(np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * draw[1]))
        width, height = round((wanted * aspect) ** 0.5), round((wanted / aspect) ** 0.5)
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = int(draw[2] * (image.width - width + 1)), int(draw[3] * (image.height - height + 1))
            box = (left, top, left + width, top + height)
            return image.resize((size[1], size[0]), _PIL_FILTER[spec.interpolation], box=box)
    side = min(image.height, image.width)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size[1], size[0]), _PIL_FILTER[spec.interpolation], box=box)


def image_pixels(image: Image.Image, wanted: ImageFormat) -> Tensor:
    """Return the pixels (C, H, W) uint8 of one image in a format."""
    array = np.array(image.convert("L" if wanted == "GRAY" else "RGB"))
    pixels = torch.from_numpy(array)
    pixels = pixels.unsqueeze(0) if wanted == "GRAY" else pixels.permute(2, 0, 1)
    return pixels.flip(0) if wanted == "BGR" else pixels
