"""One 8-bit layer in the native kernels and in PyTorch's reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat import numerics
from qat.integer.kernels import elementwise, linear
from qat.integer.kernels.accumulate import conv_accumulate
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import multiplier

DTYPES = {"u8": torch.uint8, "s8": torch.int8, "u16": torch.uint16, "s16": torch.int16}
RANGES = {"u8": (0, 255), "s8": (-128, 127), "u16": (0, 65535), "s16": (-32768, 32767)}
#: Behind an activation or a residual the kernels may read this many bytes.
SLACK = 64


def padded(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the codes as `dtype`, contiguous, in the middle of a larger allocation."""
    size = torch.empty((), dtype=dtype).element_size()
    memory = torch.zeros(codes.numel() + SLACK // size, dtype=torch.int32)
    memory[: codes.numel()] = codes.flatten()
    return memory.to(dtype)[: codes.numel()].view(codes.shape)


X_GRID = QParams(0.02, 3, 0, 255)
Y_GRID = QParams(0.1, 7, 0, 255)
RESIDUAL_GRID = QParams(0.05, 20, 0, 255)
SUM_GRID = QParams(0.12, 5, 0, 255)


@dataclass
class Conv:
    """A layer; weights (O, kh, kw, I / groups), codes of x (N, H, W, C)."""

    x: Tensor
    weight: Tensor
    x_type: str = "u8"
    y_type: str = "u8"
    x_grid: QParams = X_GRID
    y_grid: QParams = Y_GRID
    w_scale: Tensor | None = None
    w_zero: Tensor | None = None
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    # top, left, bottom, right; of a transposed convolution, what is cropped
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, int] = (0, 0)
    wide: bool = False
    four_bits: bool = False
    fixed: Tensor | None = None
    shift: Tensor | None = None
    double_rounding: bool = True
    residual: Tensor | None = None
    residual_grid: QParams = RESIDUAL_GRID
    residual_type: str = "u8"
    residual_first: bool = False
    sum_grid: QParams = SUM_GRID
    table: Tensor | None = None

    @property
    def scales(self) -> Tensor:
        """One scale of the weight for each output channel."""
        if self.w_scale is None:
            return torch.full((self.weight.shape[0],), 0.01)
        return self.w_scale

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        sizes = []
        for d in (0, 1):
            kernel = (self.weight.shape[1 + d] - 1) * self.dilation[d] + 1
            pad = self.padding[d] + self.padding[2 + d]
            size = self.x.shape[1 + d]
            if self.transposed:
                sizes.append((size - 1) * self.stride[d] - pad + kernel + self.output_padding[d])
            else:
                sizes.append((size + pad - kernel) // self.stride[d] + 1)
        return sizes[0], sizes[1]

    @property
    def is_wide(self) -> bool:
        """Whether the result is rounded from its real value."""
        return self.wide or self.x_grid.wide or self.y_grid.wide

    def reference(self) -> Tensor:
        """Codes (N, H, W, O), int32, from PyTorch."""
        weight = self.weight.long()
        if self.w_zero is not None:
            weight = weight - self.w_zero[:, None, None, None]
        x = self.x.permute(0, 3, 1, 2)
        top, left, bottom, right = self.padding
        if self.transposed:
            # (O, kh, kw, I / g) to (I, O / g, kh, kw)
            g = self.groups
            parts = weight.reshape(g, -1, *weight.shape[1:]).permute(0, 4, 1, 2, 3)
            acc = _float_conv_transpose(x.long() - self.x_grid.zero_point, parts.flatten(0, 1), self)
        else:
            centred = torch.nn.functional.pad(x.long() - self.x_grid.zero_point, (left, right, top, bottom))
            acc = conv_accumulate(
                centred, 0, weight.permute(0, 3, 1, 2), self.stride, 0, self.dilation, self.groups
            ).long()
        if self.bias is not None:
            acc = acc + self.bias[:, None, None]
        if self.fixed is not None and self.shift is not None:
            codes = numerics.requantize_fixed_point(
                acc,
                self.fixed[:, None, None],
                self.shift[:, None, None],
                self.y_grid.zero_point,
                self.y_grid.qmin,
                self.y_grid.qmax,
                double_rounding=self.double_rounding,
            )
        else:
            codes = linear._finish(acc, None, self.x_grid, self.scales, self.y_grid, 1, self.is_wide)
        codes = codes.permute(0, 2, 3, 1)
        if self.residual is not None:
            other = (self.residual, self.residual_grid)
            own = (codes, self.y_grid)
            first, second = (other, own) if self.residual_first else (own, other)
            # the innermost sizes of one are the caller's matter, so the operands are broadcast in one dimension
            codes = elementwise._qlinear_add(*first, *second, self.sum_grid)
        elif self.table is not None:
            codes = self.table.int()[(codes - self.y_grid.qmin).long()]
        return codes

    def native(self, isa: str) -> Tensor:
        """Codes (N, H, W, O), int32, from the kernels of `isa`."""
        return self.run(isa, 1)[0]

    def run(self, isa: str, repeats: int) -> tuple[Tensor, float]:
        """The codes, and the seconds that so many runs took."""
        height, width = self.out_size
        outputs, kernel_h, kernel_w, _ = self.weight.shape
        y = torch.zeros(self.x.shape[0], height, width, outputs, dtype=torch.int32).to(DTYPES[self.y_type])
        profile = 0 if self.fixed is None else 1 if self.double_rounding else 2
        ints = [*self.x.shape[:3], height, width, *self.stride, *self.padding[:2], *self.dilation, self.transposed]
        ints += [outputs, self.x.shape[3], self.groups, kernel_h, kernel_w, self.four_bits]
        ints += [profile, self.is_wide, self.residual_first]
        grids = (self.x_grid, self.y_grid, self.residual_grid, self.sum_grid)
        for grid in grids:
            ints += [grid.zero_point, grid.qmin, grid.qmax, grid.wide]
        weight = self.weight.to(torch.int8).contiguous()
        if self.four_bits:
            flat = torch.nn.functional.pad(weight.flatten(), (0, weight.numel() % 2)).to(torch.int32) & 15
            weight = (flat[::2] | flat[1::2] << 4).to(torch.uint8)
        seconds = torch.ops.qat._int8_conv(
            isa,
            padded(self.x, DTYPES[self.x_type]),
            weight,
            None if self.w_zero is None else self.w_zero.int(),
            multiplier(self.x_grid.scale, self.scales, self.y_grid.scale).contiguous(),
            self.scales.double() * self.x_grid.scale,
            None if self.fixed is None else self.fixed.int(),
            None if self.shift is None else self.shift.int(),
            None if self.bias is None else self.bias.int(),
            None if self.residual is None else padded(self.residual, DTYPES[self.residual_type]),
            self.table,
            [int(i) for i in ints],
            [grid.scale for grid in grids],
            y,
            repeats,
        )
        return y.to(torch.int32), seconds


def _float_conv_transpose(x: Tensor, weight: Tensor, layer: Conv) -> Tensor:
    """Exact while the sums stay below 2**53."""
    top, left, _, _ = layer.padding
    full = torch.nn.functional.conv_transpose2d(
        x.double(), weight.double(), None, layer.stride, 0, 0, layer.groups, layer.dilation
    )
    height, width = layer.out_size
    beyond = (0, max(0, left + width - full.shape[3]), 0, max(0, top + height - full.shape[2]))
    return torch.nn.functional.pad(full, beyond)[:, :, top : top + height, left : left + width].long()
