"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017) from its four IDX files; nothing is downloaded."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat.errors import DataError
from qat.train.data.arrays import Arrays

#: IDX type code of unsigned bytes (yann.lecun.com/exdb/mnist, "the IDX file format")
_UNSIGNED_BYTE = 0x08


def load_fashion_mnist(root: Path) -> Arrays:
    """Read 60000 training and 10000 test images, 1x28x28, from `root`, `root/raw` or `root/FashionMNIST/raw`.

    Raises:
        DataError: A file is missing, truncated or no IDX file.
    """
    folders = [root / "FashionMNIST" / "raw", root / "raw", root]
    parts: list[Tensor] = []
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        file = f"{name}-ubyte"
        candidates = [folder / (file + suffix) for folder in folders for suffix in (".gz", "")]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise DataError(
                f"fashion_mnist: {file}.gz is not in {folders[0]}",
                "put the four Fashion-MNIST files there, or correct data.root",
            )
        parts.append(read_idx(found))
    x_train, y_train, x_test, y_test = parts
    return Arrays(x_train.unsqueeze(1), y_train.long(), x_test.unsqueeze(1), y_test.long(), num_classes=10)


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes.

    Raises:
        DataError: The file is unreadable, truncated or no such file.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} ({error})", "copy the file again") from None
    if len(raw) < 4 or raw[0] != 0 or raw[1] != 0 or raw[2] != _UNSIGNED_BYTE:
        raise DataError(f"{path} is no IDX file of unsigned bytes", "copy the file again")
    rank = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    count = int(np.prod(shape))
    if len(raw) != 4 + 4 * rank + count:
        raise DataError(f"{path} is truncated: {len(raw)} bytes for {shape}", "copy the file again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())
