"""CIFAR-10 (Krizhevsky 2009) from any of three layouts; nothing is downloaded."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat.errors import DataError
from qat.train.data.arrays import Arrays

_RECORD = 1 + 3 * 32 * 32


def load_cifar10(root: Path) -> Arrays:
    """Read CIFAR-10, 3x32x32 RGB, from what is in `root`.

    Known layouts: `cifar10.npz` (x_train, x_test (N, 32, 32, 3) uint8; y_train, y_test (N,)); the official
    binary version, `cifar-10-batches-bin/`; torchvision's, `cifar-10-batches-py/`.

    Raises:
        DataError: There is none of these, or one that is damaged.
    """
    if (root / "cifar10.npz").is_file():
        return _from_npz(root / "cifar10.npz")
    if (root / "cifar-10-batches-bin").is_dir():
        return _from_binary(root / "cifar-10-batches-bin")
    if (root / "cifar-10-batches-py").is_dir():
        return _from_torchvision(root)
    raise DataError(
        f"cifar10: {root} has no cifar10.npz, cifar-10-batches-bin or cifar-10-batches-py",
        "unpack CIFAR-10 there, or correct data.root",
    )


def _from_npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            x = {part: torch.from_numpy(file[f"x_{part}"]) for part in ("train", "test")}
            y = {part: torch.from_numpy(file[f"y_{part}"]).long() for part in ("train", "test")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path} ({error})", "it must have x_train, y_train, x_test, y_test") from None
    for part, images in x.items():
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != torch.uint8:
            raise DataError(
                f"{path}: x_{part} is {images.dtype} {tuple(images.shape)}", "it must be uint8 (N, 32, 32, 3)"
            )
    return _arrays(x["train"].permute(0, 3, 1, 2), y["train"], x["test"].permute(0, 3, 1, 2), y["test"])


def _from_binary(folder: Path) -> Arrays:
    def read(names: list[str]) -> tuple[Tensor, Tensor]:
        parts = []
        for name in names:
            path = folder / name
            try:
                raw = np.fromfile(path, np.uint8)
            except OSError as error:
                raise DataError(f"cannot read {path} ({error.strerror})", "unpack CIFAR-10 again") from None
            if raw.size == 0 or raw.size % _RECORD:
                raise DataError(f"{path} is truncated ({raw.size} bytes)", "unpack CIFAR-10 again")
            parts.append(torch.from_numpy(raw.reshape(-1, _RECORD)))
        records = torch.cat(parts)
        return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()

    return _arrays(*read([f"data_batch_{i}.bin" for i in range(1, 6)]), *read(["test_batch.bin"]))


def _from_torchvision(root: Path) -> Arrays:
    from qat.torchvision import import_torchvision

    parts: list[Tensor] = []
    for train in (True, False):
        try:
            # the files of this layout are pickled: torchvision opens them only if their published MD5 sums
            # are right
            images = import_torchvision("datasets").CIFAR10(str(root), train=train, download=False)
        except RuntimeError as error:
            raise DataError(f"cifar10: {root / 'cifar-10-batches-py'} ({error})", "unpack CIFAR-10 again") from None
        parts += [torch.from_numpy(images.data).permute(0, 3, 1, 2), torch.tensor(images.targets)]
    return _arrays(*parts)


def _arrays(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> Arrays:
    return Arrays(x_train.contiguous(), y_train, x_test.contiguous(), y_test, num_classes=10)
