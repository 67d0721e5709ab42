"""The 8x8 digit scans that come with scikit-learn (Alpaydin and Kaynak 1998, UCI optdigits)."""

from __future__ import annotations

import torch

from qat.errors import DataError
from qat.train.data.arrays import Arrays

TEST_IMAGES = 360


def load_digits() -> Arrays:
    """Return 1437 training and 360 test scans, 1x8x8 with grey levels 0..16, in a fixed stratified split.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError:
        raise DataError("data 'digits' needs scikit-learn", "pip install scikit-learn") from None
    scans = datasets.load_digits()
    x_train, x_test, y_train, y_test = model_selection.train_test_split(
        scans.images, scans.target, test_size=TEST_IMAGES, stratify=scans.target, random_state=0
    )
    return Arrays(
        x_train=torch.from_numpy(x_train).to(torch.uint8).unsqueeze(1),
        y_train=torch.from_numpy(y_train).to(torch.int64),
        x_test=torch.from_numpy(x_test).to(torch.uint8).unsqueeze(1),
        y_test=torch.from_numpy(y_test).to(torch.int64),
        num_classes=10,
        brightest=16,
    )
