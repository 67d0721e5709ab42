"""Folders of JPEG and PNG files, read when they are needed."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from qat.errors import DataError
from qat.train.data.base import (
    Batch,
    Data,
    Share,
    Skipped,
    Split,
    empty_batch,
    fixed_subset,
    generator,
    held_out,
    index_batches,
)
from qat.train.data.spec import DataSpec
from qat.train.data.transforms import augment_tensor, image_pixels, place_image, random_area_image, to_values

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
_SKIP_MEND = "remove or replace it, or skip unreadable files with --skip-bad (data.skip_bad)"


@dataclass(frozen=True)
class _Files:
    """The files of a split with their class numbers (-1: unlabelled)."""

    folder: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]


def load_image_folder(spec: DataSpec) -> Data:
    """Find the images below `spec.root`.

    A split is a folder with one sub-folder a class, or a flat folder of images. Classes are numbered in the
    sorted order of the training folder's sub-folders, or as the labels file says: JSON, `{folder or file
    name: number}` or `{name: {"index": number}}`; or text, one class a line, whose first word is the folder's
        name. Hidden files are ignored.

    Raises:
        DataError: A folder is missing or empty, a file is no image, a class is unknown, or the sizes differ.
    """
    root = spec.folder()
    skipped = Skipped()
    numbers = read_labels(root / spec.labels) if spec.labels else None
    ignore = (root / spec.labels).resolve() if spec.labels else None
    train_folder = root / spec.train if spec.train and (root / spec.train).is_dir() else None
    test_folder = root / spec.test if spec.test and (root / spec.test).is_dir() else None
    if spec.calibration is not None:
        calibration_folder = root / spec.calibration
    else:
        calibration_folder = train_folder or test_folder or root
    if not calibration_folder.is_dir():
        raise DataError(f"calibration folder {calibration_folder} does not exist", "correct data.calibration")
    folders = {"train": train_folder, "calibration": calibration_folder, "test": test_folder}
    if numbers is None:
        named = train_folder or test_folder or calibration_folder
        numbers = {name: i for i, name in enumerate(sorted(p.name for p in _visible(named) if p.is_dir()))}
    found = {
        name: _limited(_list(folder, numbers, ignore, spec.skip_bad, skipped), spec, name)
        for name, folder in folders.items()
        if folder is not None
    }
    if spec.validation and "train" in found:
        stay, out = held_out(len(found["train"].paths), spec.validation, spec.seed)
        found["validation"], found["train"] = (_chosen(found["train"], part) for part in (out, stay))
        if spec.calibration is None:
            found["calibration"] = _limited(found["train"], spec, "calibration")
    shape = spec.input.shape("RGB", None) or _first_shape(found["calibration"], spec, skipped)
    splits = {name: _split(name, files, spec, shape, skipped) for name, files in found.items()}
    labelled = [files for files in found.values() if files.labels[0] >= 0]
    return Data(
        train=splits.get("train") if found.get("train") in labelled else None,
        calibration=splits["calibration"],
        test=splits.get("test") if found.get("test") in labelled else None,
        num_classes=max(numbers.values()) + 1 if labelled else 0,
        input_shape=shape,
        validation=splits.get("validation") if found.get("train") in labelled else None,
        skipped=skipped,
    )


def read_labels(path: Path) -> dict[str, int]:
    """Read a labels file; see `load_image_folder`.

    Raises:
        DataError: The file is missing or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the labels file {path} ({error.strerror})", "correct data.labels") from None
    except UnicodeDecodeError:
        raise DataError(f"the labels file {path} is not text", "correct data.labels") from None
    if path.suffix != ".json":
        names = [line.split()[0] for line in text.splitlines() if line.strip()]
        if not names or len(set(names)) != len(names):
            raise DataError(f"the labels file {path} is empty or names a class twice", "give one class a line")
        return {name: i for i, name in enumerate(names)}
    try:
        entries = json.loads(text)
        numbers = {str(k): int(v["index"] if isinstance(v, dict) else v) for k, v in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the labels file {path} is malformed ({error!r})", "write {name: number}") from None
    if not numbers or min(numbers.values()) < 0:
        raise DataError(f"the labels file {path} is empty or has a negative number", "write {name: number}")
    return numbers


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror})", "make it readable") from None


def _list(folder: Path, numbers: Mapping[str, int], ignore: Path | None, skip_bad: bool, skipped: Skipped) -> _Files:
    entries = [p for p in _visible(folder) if p.resolve() != ignore]
    classes = [p for p in entries if p.is_dir()]
    paths: list[Path] = []
    labels: list[int] = []

    def add(path: Path, label: int) -> None:
        if path.is_dir() or path.suffix.lower() not in _SUFFIXES:
            if not skip_bad:
                raise DataError(f"{path} is not a JPEG or PNG image", _SKIP_MEND)
            skipped.add(str(path), "not a JPEG or PNG image")
            return
        paths.append(path)
        labels.append(label)

    for entry in entries:
        if entry not in classes:
            # a flat folder is labelled by file name, and a stray file beside class folders is a mistake
            if classes and not skip_bad:
                raise DataError(f"{entry} lies beside class folders", _SKIP_MEND)
            if classes:
                skipped.add(str(entry), "beside class folders")
            else:
                add(entry, numbers.get(entry.name, -1))
            continue
        if entry.name not in numbers:
            raise DataError(f"the class folder {entry} is not among the {len(numbers)} classes", "correct data.labels")
        for path in _visible(entry):
            add(path, numbers[entry.name])
    if not paths:
        raise DataError(f"{folder} has no JPEG or PNG images", "put at least one there")
    if not classes and min(labels) < 0 <= max(labels):
        raise DataError(f"{paths[labels.index(-1)]} has no label", "add it to data.labels")
    return _Files(folder, tuple(paths), tuple(labels))


def _limited(files: _Files, spec: DataSpec, name: str) -> _Files:
    return _chosen(files, fixed_subset(len(files.paths), spec.limit.get(name), spec.seed))


def _chosen(files: _Files, index: Tensor) -> _Files:
    chosen = index.tolist()
    return replace(files, paths=tuple(files.paths[i] for i in chosen), labels=tuple(files.labels[i] for i in chosen))


def open_image(path: Path) -> Image.Image:
    """Decode an image file whole.

    Raises:
        DataError: It cannot be read, is no image, is truncated, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path} has pixels of more than 8 bits ({image.mode})", "convert it to 8 bits")
            return image.copy()
    except UnidentifiedImageError:
        raise DataError(f"{path} is not an image", _SKIP_MEND) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path} ({error})", _SKIP_MEND) from None


def _first_shape(files: _Files, spec: DataSpec, skipped: Skipped) -> tuple[int, int, int]:
    for path in files.paths:
        try:
            image = place_image(open_image(path), spec.input)
        except DataError as error:
            if not spec.skip_bad:
                raise
            skipped.add(str(path), str(error))
            continue
        return (spec.input.channels("RGB"), image.height, image.width)
    raise DataError(f"{files.folder} has no readable image", "put at least one there")


def _split(name: str, files: _Files, spec: DataSpec, shape: tuple[int, int, int], skipped: Skipped) -> Split:
    n, training = len(files.paths), name == "train"
    drop_last = training and n > spec.batch_size and spec.last_batch == "drop"
    size = shape[1:]

    def load(item: int, epoch: int) -> Tensor | None:
        path = files.paths[item]
        random = generator(spec.seed, epoch + 1, item + 1)
        try:
            image = open_image(path)
        except DataError as error:
            if not spec.skip_bad:
                raise
            skipped.add(str(path), str(error))
            return None
        if training and spec.augment.random_area is not None:
            image = random_area_image(image, spec.augment.random_area, size, spec.input, random)
        else:
            image = place_image(image, spec.input)
        if (image.height, image.width) != size:
            raise DataError(
                f"{path} is {image.height}x{image.width} where {size[0]}x{size[1]} was expected",
                "give data.input.size to stretch all images, or resize and crop",
            )
        pixels = image_pixels(image, spec.input.format or "RGB")
        return augment_tensor(pixels.unsqueeze(0), spec.augment, random)[0] if training else pixels

    def batches(epoch: int, first: int = 0, share: Share | None = None) -> Iterator[Batch]:
        random = generator(spec.seed, epoch + 1 if training else 0)
        order = torch.arange(n) if name in ("test", "validation") else torch.randperm(n, generator=random)
        asked = some = False
        chosen = index_batches(n, spec.batch_size, order, drop_last, first, share)
        for index, images in _ahead(chosen, load, epoch, spec.workers):
            asked = asked or bool(index)
            kept = [(image, files.labels[i]) for i, image in zip(index, images, strict=True) if image is not None]
            if kept:
                some = True
                pixels = torch.stack([image for image, _ in kept])
                yield to_values(pixels, spec.input), torch.tensor([label for _, label in kept])
            elif share is not None and share.by == "image":
                # the other processes may have some of this batch: they must not be a batch ahead
                yield empty_batch()
        if asked and not some and first == 0:
            raise DataError(f"{files.folder} has no readable image", "put at least one there")

    # a batch of unreadable files only is left out, so where those are skipped, batches cannot be counted unseen
    batches_from = None if spec.skip_bad else batches
    labelled = files.labels[0] >= 0
    return Split(name, n, spec.batch_size, batches, labelled, drop_last, batches_from, shares_from=batches)


def _ahead(
    batches: Iterator[Tensor], load: Callable[[int, int], Tensor | None], epoch: int, workers: int
) -> Iterator[tuple[list[int], list[Tensor | None]]]:
    """Load the images of each batch; `workers` threads load the next one while the caller uses this one."""
    if workers < 1:
        for index in batches:
            items = index.tolist()
            yield items, [load(i, epoch) for i in items]
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="qat-images")
    pending: deque[tuple[list[int], list[Future[Tensor | None]]]] = deque()
    try:
        for index in batches:
            items = index.tolist()
            pending.append((items, [pool.submit(load, i, epoch) for i in items]))
            if len(pending) > 1:
                ready, futures = pending.popleft()
                yield ready, [f.result() for f in futures]
        for ready, futures in pending:
            yield ready, [f.result() for f in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
