"""Small networks as plans, and what PyTorch's reference kernels compute for them."""

from __future__ import annotations

import torch
from int8_layers import Conv
from plans import PlanWriter
from torch import Tensor

from qat.integer.kernels import elementwise, layout, linear, normalize, pool, requantize
from qat.integer.kernels.qparams import QParams

X = QParams(0.02, 120, 0, 255)
A = QParams(0.05, 3, 0, 255)
B = QParams(0.04, 90, 0, 255)
SUM = QParams(0.07, 60, 0, 255)
C = QParams(0.06, 10, 0, 255)
E = QParams(0.03, -7, -128, 127)


def chain_constants() -> dict[str, Tensor]:
    """Weights and biases of `chain`."""
    g = torch.Generator().manual_seed(1)

    def integers(low: int, high: int, *sizes: int) -> Tensor:
        return torch.randint(low, high, sizes, generator=g)

    return {
        "w1": integers(-127, 128, 16, 3, 3, 3),
        "b1": integers(-2000, 2000, 16),
        "w2": integers(-127, 128, 16, 3, 3, 16),
        "w3": integers(-8, 8, 24, 1, 1, 16),
        "b3": integers(-2000, 2000, 24),
        "w4": integers(-127, 128, 24, 3, 3, 1),
        "w5": integers(-127, 128, 10, 1, 1, 24),
        "z5": integers(-20, 20, 10),
        "table": integers(0, 256, 256),
        "s16": torch.rand(16, generator=g) * 0.01 + 0.001,
        "s24": torch.rand(24, generator=g) * 0.01 + 0.001,
        "s10": torch.rand(10, generator=g) * 0.01 + 0.001,
    }


def chain() -> bytes:
    """Images (N, 3, 9, 11) to ten values: layers with residual and table, depthwise, pooling, mean, linear."""
    w, k = PlanWriter(), chain_constants()
    w.tensor("image", "f32", [-1, 3, 9, 11])
    w.tensor("x", "u8", [-1, 9, 11, 3], X)
    w.tensor("a", "u8", [-1, 9, 11, 16], A)
    w.tensor("sum", "u8", [-1, 9, 11, 16], SUM)
    w.tensor("c", "u8", [-1, 9, 11, 24], C)
    w.tensor("d", "u8", [-1, 5, 6, 24], C)
    w.tensor("pooled", "u8", [-1, 3, 3, 24], C)
    w.tensor("mean", "s8", [-1, 24], E)
    w.tensor("rows", "s8", [1, 1, -1, 24], E)
    w.tensor("product", "s8", [1, 1, -1, 10], E)
    w.tensor("codes", "s8", [-1, 10], E)
    w.tensor("result", "f32", [-1, 10])
    for name in ("w1", "w2", "w4", "w5"):
        w.constant(name, "s8", k[name])
    w.constant("w3", "s4", k["w3"])
    for name in ("b1", "b3", "z5"):
        w.constant(name, "s32", k[name])
    for name in ("s16", "s24", "s10"):
        w.constant(name, "f32", k[name])
    w.constant("table", "u8", k["table"])
    w.op("quantize", ["image"], "x", [0, 2, 3, 1])
    w.conv("1", {"x": "x", "weight": "w1", "scales": "s16", "bias": "b1"}, "a", ("u8", A), pads=(1, 1))
    w.conv("2", {"x": "a", "weight": "w2", "scales": "s16", "residual": "a"}, "sum", ("u8", B), pads=(1, 1))
    w.conv("3", {"x": "sum", "weight": "w3", "scales": "s24", "bias": "b3", "table": "table"}, "c", ("u8", C))
    w.conv("4", {"x": "c", "weight": "w4", "scales": "s24"}, "d", ("u8", C), stride=(2, 2), pads=(1, 1), groups=24)
    w.op("max_pool", ["d"], "pooled", [3, 2, 2, 2, 1, 0, 1, 0, 1, 1])
    w.op("mean", ["pooled"], "mean", [1, 2])
    w.op("reshape", ["mean"], "rows")
    w.conv("5", {"x": "rows", "weight": "w5", "scales": "s10", "zero_points": "z5"}, "product", ("s8", E))
    w.op("reshape", ["product"], "codes")
    w.op("dequantize", ["codes"], "result", [0, 1])
    return w.to_bytes(["image"], ["result"])


def chain_reference(image: Tensor) -> Tensor:
    k = chain_constants()
    x = requantize.quantize(image, X).permute(0, 2, 3, 1)
    sides = (1, 1, 1, 1)
    a = Conv(x, k["w1"], x_grid=X, y_grid=A, w_scale=k["s16"], bias=k["b1"], padding=sides).reference()
    total = Conv(
        a, k["w2"], x_grid=A, y_grid=B, w_scale=k["s16"], padding=sides, residual=a, residual_grid=A, sum_grid=SUM
    ).reference()
    c = Conv(total, k["w3"], x_grid=SUM, y_grid=C, w_scale=k["s24"], bias=k["b3"], table=k["table"]).reference()
    d = Conv(c, k["w4"], x_grid=C, y_grid=C, w_scale=k["s24"], stride=(2, 2), padding=sides, groups=24).reference()
    pooled = pool.max_pool(d.permute(0, 3, 1, 2), (3, 2), 2, (1, 0, 1, 0))
    mean = pool.reduce_mean(pooled, C, E, [2, 3])
    weight = k["w5"][:, 0, 0] - k["z5"][:, None]
    codes = linear.linear(mean, E, weight, k["s10"], None, E)
    return requantize.dequantize(codes, E)


def attention() -> bytes:
    """Codes (N, 6, 8) and (N, 6, 8): products, softmax, sums in place, concatenation and several outputs."""
    w = PlanWriter()
    wide = QParams(0.001, 0, -32768, 32767)
    w.tensor("q", "u8", [-1, 6, 8], A)
    w.tensor("k", "s8", [-1, 6, 8], E)
    w.tensor("scores", "u8", [-1, 6, 6], SUM)
    w.tensor("shares", "u8", [-1, 6, 6], normalize.PROBABILITY)
    w.tensor("context", "s8", [-1, 6, 8], E)
    w.tensor("sum", "s8", [-1, 6, 8], E)
    w.tensor("twice", "s8", [-1, 6, 8], E)
    w.tensor("wide", "s16", [-1, 6, 8], wide)
    w.tensor("all", "u8", [-1, 6, 16], B)
    w.tensor("turned", "u8", [-1, 16, 6], B)
    w.op("matmul", ["q", "k"], "scores", [1])
    w.op("softmax", ["scores"], "shares", [2])
    w.op("matmul", ["shares", "k"], "context", [0])
    w.op("add", ["context", "k"], "sum")
    w.op("mul", ["sum", "sum"], "twice")
    w.op("requantize", ["twice"], "wide")
    w.op("concat", ["q", "twice"], "all", [2])
    w.op("transpose", ["all"], "turned", [0, 2, 1])
    return w.to_bytes(["q", "k"], ["turned", "wide", "scores", "k"])


def attention_reference(q: Tensor, k: Tensor) -> list[Tensor]:
    wide = QParams(0.001, 0, -32768, 32767)
    scores = linear.matmul(q, A, k.transpose(1, 2), E, SUM)
    shares = normalize.softmax(scores, SUM, normalize.PROBABILITY, 2)
    context = linear.matmul(shares, normalize.PROBABILITY, k, E, E)
    total = elementwise.add(context, E, k, E, E)
    twice = elementwise.mul(total, E, total, E, E)
    joined = layout.concat([(q, A), (twice, E)], B, 2)
    return [joined.transpose(1, 2), requantize.requantize_codes(twice, E, wide), scores, k]
