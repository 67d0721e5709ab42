"""Nearest and bilinear interpolation on the codes.

Sources: TensorFlow Lite `kernels/internal/reference/resize_nearest_neighbor.h`, and `ResizeBilinearInteger` in
`kernels/internal/reference/reference_ops.h`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def nearest_source(size: int, length: int) -> Tensor:
    """Source index of every output index of TFLite's nearest neighbour along one dimension, int64."""
    step = torch.tensor(length, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)
    source = torch.floor(torch.arange(size, dtype=torch.float32) * step).to(torch.int64)
    return source.clamp(max=length - 1)


def _taps(size: int, length: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Low and high neighbour of every output index, and the distance to the low one in 1024ths; int64."""
    if align_corners and size > 1:
        scale = (1024 * (length - 1) + (size - 1) // 2) // (size - 1)
    else:
        scale = (1024 * length + size // 2) // size
    position = torch.arange(size, dtype=torch.int64) * scale
    if not align_corners:
        position = position + scale // 2 - 512
    low = torch.div(position, 1024, rounding_mode="trunc").clamp(min=0)
    high = torch.div(position + 1023, 1024, rounding_mode="trunc").clamp(max=length - 1)
    return low, high, position - 1024 * low


def resize_bilinear(codes: Tensor, sizes: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear interpolation in 1024ths of a step; the encoding is kept.

    Args:
        codes: int8 codes, shape (N, C, H, W).
        sizes: Output height and width.
        align_corners: `align_corners` coordinates; else half pixel centres.

    Returns:
        int32 codes, shape (N, C, *sizes).
    """
    x = codes.to(torch.int64)
    top, bottom, down = (t.to(x.device) for t in _taps(sizes[0], x.shape[2], align_corners))
    left, right, along = (t.to(x.device) for t in _taps(sizes[1], x.shape[3], align_corners))
    down = down[:, None]
    above, below = x.index_select(2, top), x.index_select(2, bottom)
    total = above.index_select(3, left) * (1024 - down) * (1024 - along)
    total = total + above.index_select(3, right) * (1024 - down) * along
    total = total + below.index_select(3, left) * down * (1024 - along)
    total = total + below.index_select(3, right) * down * along
    half = torch.where(total > 0, 1 << 19, -(1 << 19))
    return torch.div(total + half, 1 << 20, rounding_mode="trunc").to(torch.int32)
