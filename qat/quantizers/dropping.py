"""QDrop: elements that keep their float value in training, chosen by their place in memory and a seed.

Source: Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization" (ICLR
2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat import native

_WORD = 0xFFFFFFFF
_NUMBERS = 1 << 24


def draw_seed() -> Tensor:
    """Return a seed from torch's global generator, int64, one value; of the CPU, whose state a checkpoint holds."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")


def place_numbers(like: Tensor, seed: Tensor) -> Tensor:
    """Return a whole number in [0, 2**24) for each element, float32, in the shape and order of memory of `like`.

    A hash of the place in memory, as csrc/kernels/drop_hash.h: in any order, and again in a backward pass.

    Args:
        like: Any shape and dtype.
        seed: What `draw_seed` returned.
    """
    if like.dtype == torch.float32 and native.runs_on(like.device):
        return native.drop_numbers(like, seed)
    made = torch.empty_like(like, dtype=torch.float32)
    place = torch.arange(like.numel(), device=like.device)
    high = ((seed >> 32) + (place >> 32) * 0x9E3779B9) & _WORD
    v = (place ^ seed) & _WORD
    v = ((v ^ (v >> 16)) * 0x7FEB352D + high) & _WORD
    # the factor is 0x846CA68B modulo 2**32, and no product leaves int64
    v = ((v ^ (v >> 15)) * (0x846CA68B - (1 << 32))) & _WORD
    numbers = ((v ^ (v >> 16)) >> 8).to(torch.float32)
    return numbers.as_strided(made.shape, made.stride())


def keep_some(x: Tensor, y: Tensor, probability: float, seed: Tensor) -> Tensor:
    """Return `y`, and with this probability `x`, element by element.

    Args:
        x: Floating point, any shape.
        y: Of the same shape.
        probability: In [0, 1].
        seed: What `draw_seed` returned.
    """
    return torch.where(place_numbers(x.detach(), seed) < round(probability * _NUMBERS), x, y)
