"""Runs a plan in PyTorch, by the page docs/plan_format.md: what the native runner is to compute."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qat.integer.kernels import elementwise, layer_norm, linear, normalize, pool
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import dequantize, quantize, requantize_codes
from qat.integer.model import IntegerModel
from qat.integer.native.lowering import SegmentPlan, lower_segment
from qat.integer.native.planfile import Grid, Kind, PlanConstant, PlanOp, PlanTensor, Type
from qat.integer.native.segments import reasons, split

_NUMPY = {Type.U8: "u1", Type.S8: "i1", Type.U16: "<u2", Type.S16: "<i2", Type.S32: "<i4", Type.F32: "<f4"}


def params(grid: Grid) -> QParams:
    plain = QParams(grid.scale, grid.zero_point, grid.qmin, grid.qmax)
    # a transposed convolution, or a tensor in 16 bits
    return QParams(grid.scale, grid.zero_point, grid.qmin, grid.qmax, float_reader=grid.wide and not plain.wide)


def constant(item: PlanConstant) -> Tensor:
    if item.type == Type.S4:
        data = np.frombuffer(item.data, "u1").astype("i4")
        halves = np.stack([data & 15, data >> 4], 1).flatten()[: math.prod(item.sizes)]
        return torch.from_numpy((halves ^ 8) - 8).reshape(item.sizes)
    values = torch.from_numpy(
        np.frombuffer(item.data, _NUMPY[item.type]).copy().astype("f4" if item.type == Type.F32 else "i4")
    )
    return values.reshape(item.sizes)


class Interpreter:
    def __init__(self, plan: SegmentPlan, batch: int) -> None:
        self.segment, self.plan, self.batch = plan, plan.plan, batch
        self.things: dict[str, PlanTensor | PlanConstant] = {
            t.name: t for t in (*self.plan.tensors, *self.plan.constants)
        }
        self.values = {c.name: constant(c) for c in self.plan.constants}
        self.plan.to_bytes()

    def sizes(self, name: str) -> list[int]:
        return [-s * self.batch if s < 0 else s for s in self.things[name].sizes]

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Logical tensors in, logical tensors out."""
        for value, x in zip(self.segment.inputs, inputs, strict=True):
            self.values[value.tensor] = x.permute(value.order).contiguous()
        for op in self.plan.ops:
            result = self.step(op)
            assert list(result.shape) == self.sizes(op.output), (op, result.shape)
            self.values[op.output] = result
        back = []
        for value in self.segment.outputs:
            order = torch.tensor(value.order).argsort().tolist()
            back.append(self.values[value.tensor].permute(order))
        return back

    def grid(self, name: str) -> QParams:
        return params(self.things[name].grid)

    def step(self, op: PlanOp) -> Tensor:
        x = self.values[op.inputs[0]]
        ints = list(op.ints)
        kind = op.kind
        if kind == Kind.QUANTIZE:
            return quantize(x.permute(ints), self.grid(op.output))
        if kind == Kind.DEQUANTIZE:
            return dequantize(x.permute(ints), self.grid(op.inputs[0]))
        if kind == Kind.CONV:
            return self.conv(op)
        if kind == Kind.RESHAPE:
            assert self.things[op.inputs[0]].grid == self.things[op.output].grid
            assert self.things[op.inputs[0]].type == self.things[op.output].type
            return x.reshape(self.sizes(op.output))
        if kind in (Kind.TRANSPOSE, Kind.SLICE, Kind.EXPAND, Kind.PAD):
            return self.move(op, x, ints)
        if kind == Kind.CONCAT:
            parts = [requantize_codes(self.values[n], self.grid(n), self.grid(op.output)) for n in op.inputs]
            return torch.cat(parts, ints[0])
        return self.compute(op, x, ints, self.grid(op.inputs[0]), self.grid(op.output))

    def move(self, op: PlanOp, x: Tensor, ints: list[int]) -> Tensor:
        if op.kind == Kind.TRANSPOSE:
            return x.permute(ints)
        if op.kind == Kind.EXPAND:
            return x.expand(self.sizes(op.output))
        if op.kind == Kind.SLICE:
            for d, (start, step) in enumerate(zip(ints[: x.dim()], ints[x.dim() :], strict=True)):
                x = x.index_select(d, start + step * torch.arange(self.sizes(op.output)[d]))
            return x
        mode, code, sides = ints[0], ints[1], ints[2:]
        if mode == 0:
            pads = [s for d in reversed(range(x.dim())) for s in sides[2 * d : 2 * d + 2]]
            return F.pad(x, pads, value=code)
        for d in range(x.dim()):
            begin, end = sides[2 * d : 2 * d + 2]
            index = torch.arange(-begin, x.shape[d] + end)
            last = x.shape[d] - 1
            index = last - (last - index.abs()).abs() if mode == 1 else index.clamp(0, last)
            x = x.index_select(d, index)
        return x

    def compute(self, op: PlanOp, x: Tensor, ints: list[int], p: QParams, q: QParams) -> Tensor:
        kind = op.kind
        others = [self.values[n] if n else None for n in op.inputs[1:]]
        if kind == Kind.REQUANTIZE:
            return requantize_codes(x, p, q)
        if kind == Kind.TABLE:
            assert len(others[0]) == p.levels
            return others[0][(x - p.qmin).long()]
        if kind == Kind.MATMUL:
            right = others[0].mT if ints[0] else others[0]
            return linear.matmul(x, p, right, self.grid(op.inputs[1]), q)
        if kind in (Kind.ADD, Kind.SUB, Kind.MUL, Kind.DIV):
            other = self.grid(op.inputs[1])
            if kind == Kind.ADD and not (p.wide or other.wide or q.wide):
                return elementwise._qlinear_add(x, p, others[0], other, q)
            run = getattr(elementwise, kind.name.lower())
            return run(x, p, others[0], other, q)
        if kind in (Kind.MAX_POOL, Kind.AVG_POOL):
            return self.pool(op, x, ints, p, q)
        if kind == Kind.MEAN:
            return pool.reduce_mean(x, p, q, ints).reshape(self.sizes(op.output))
        if kind == Kind.RESIZE_NEAREST:
            found = x.index_select(1, others[0]).index_select(2, others[1])
            return requantize_codes(found, p, q)
        if kind == Kind.RESIZE_LINEAR:
            return self.resize(x, others, p, q)
        if kind == Kind.SOFTMAX:
            return normalize.softmax(x, p, q, ints[0])
        if kind == Kind.LAYER_NORM:
            return layer_norm.layer_norm(x, p, others[0], others[1], q, ints[0], op.floats[0])
        assert kind == Kind.PRELU
        real, slope = dequantize(x, p), others[0]
        if slope.numel() > 1:
            slope = slope.reshape([-1 if d == ints[0] else 1 for d in range(x.dim())])
        return quantize(torch.where(real > 0, real, real * slope), q)

    def resize(self, x: Tensor, taps: list[Tensor], p: QParams, q: QParams) -> Tensor:
        real = dequantize(x, p)
        top, bottom, dy, left, right, dx = taps
        above, below = real.index_select(1, top), real.index_select(1, bottom)
        dx, dy = dx[:, None], dy[:, None, None]
        total = ((1 - dx) * (1 - dy)) * above.index_select(2, left)
        total = total + (dx * (1 - dy)) * above.index_select(2, right)
        total = total + ((1 - dx) * dy) * below.index_select(2, left)
        return quantize(total + (dx * dy) * below.index_select(2, right), q)

    def pool(self, op: PlanOp, x: Tensor, ints: list[int], p: QParams, q: QParams) -> Tensor:
        kernel, stride, pads, rest = ints[0:2], ints[2:4], ints[4:8], ints[8:]
        out = self.sizes(op.output)[1:3]
        dilation = rest if op.kind == Kind.MAX_POOL else [1, 1]
        ceil = any(
            o > (n + b + e - d * (k - 1) - 1) // s + 1
            for o, n, b, e, d, k, s in zip(out, x.shape[1:3], pads[:2], pads[2:], dilation, kernel, stride, strict=True)
        )
        x = x.permute(0, 3, 1, 2)
        if op.kind == Kind.MAX_POOL:
            assert p == q
            y = pool.max_pool(x, kernel, stride, pads, dilation, ceil)
        else:
            y = pool.avg_pool(x, p, q, kernel, stride, pads, ceil, bool(rest[0]))
        return y.permute(0, 2, 3, 1)

    def conv(self, op: PlanOp) -> Tensor:
        x, weight, zeros, scales, bias, _, _, residual, table = (self.values[n] if n else None for n in op.inputs)
        sh, sw, top, left, dh, dw, groups, transposed, first, own_type, zero, qmin, qmax, wide = op.ints
        p, q = self.grid(op.inputs[0]), self.grid(op.output)
        own_grid = Grid(op.floats[0], zero, qmin, qmax, bool(wide))
        own = params(own_grid)
        assert own_type in (1, 2, 3, 4)
        if residual is None and table is None:
            assert (own.scale, zero, qmin, qmax) == (q.scale, q.zero_point, q.qmin, q.qmax)
        centred = (weight - (0 if zeros is None else zeros[:, None, None, None])).double()
        x64 = (x - p.zero_point).double().permute(0, 3, 1, 2)
        height, width = self.sizes(op.output)[1:3]
        if transposed:
            parts = centred.reshape(groups, -1, *centred.shape[1:]).permute(0, 4, 1, 2, 3).flatten(0, 1)
            full = F.conv_transpose2d(x64, parts, None, (sh, sw), 0, 0, groups, (dh, dw))
            full = F.pad(full, (0, max(0, left + width - full.shape[3]), 0, max(0, top + height - full.shape[2])))
            acc = full[:, :, top : top + height, left : left + width]
        else:
            span = [(o - 1) * s + (k - 1) * d + 1 for o, s, k, d in
                    ((height, sh, weight.shape[1], dh), (width, sw, weight.shape[2], dw))]  # fmt: skip
            x64 = F.pad(x64, (left, span[1] - left - x.shape[2], top, span[0] - top - x.shape[1]))
            acc = F.conv2d(x64, centred.permute(0, 3, 1, 2), None, (sh, sw), 0, (dh, dw), groups)
        acc = acc.permute(0, 2, 3, 1).long()
        if bias is not None:
            acc = acc + bias
        codes = linear._finish(acc, None, p, scales, own, -1, p.wide or bool(wide))
        if residual is not None:
            parts = [(codes, own), (residual, self.grid(op.inputs[7]))]
            (a, b) = reversed(parts) if first else parts
            assert residual.shape == codes.shape
            codes = elementwise._qlinear_add(*a, *b, q)
        if table is not None:
            assert len(table) == own.levels
            codes = table[(codes - qmin).long()]
        return codes


def differing(imodel: IntegerModel, inputs: tuple[Tensor, ...], *, every: bool) -> list[str]:
    """Tensors in which the plans of a model, interpreted, differ from the model in PyTorch.

    `every` keeps every tensor of the program and fuses nothing.
    """
    program = imodel.program
    in_pytorch = reasons(program)
    batch = imodel._batch(imodel._inputs(inputs, {}))
    expected = imodel.run(inputs, set(program.tensors))
    constants = {name: imodel.constants.get_buffer(key) for name, key in imodel._keys.items()}
    wrong, compared = [], 0
    for segment in split(program, in_pytorch, set(program.tensors) if every else ()):
        if segment.native:
            plan = lower_segment(program, segment, constants, single=batch == 1, fuse=not every)
            found = Interpreter(plan, batch).run([expected[name] for name in segment.inputs])
            compared += len(found)
            wrong += [n for n, y in zip(segment.outputs, found, strict=True) if not torch.equal(y, expected[n])]
    assert compared >= (sum(op.outputs[0] not in in_pytorch for op in program.ops) if every else 1)
    return wrong
