"""One operator a plan, and what PyTorch's reference kernels compute for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from int8_layers import Conv
from plans import PlanWriter
from runtime_networks import A, B, E
from torch import Tensor

from qat.integer.kernels import elementwise, layer_norm, layout, pool, requantize, resize, table
from qat.integer.kernels.qparams import QParams

#: Type, grid and sizes of a tensor.
Description = tuple[str, QParams, Sequence[int]]


def codes(q: QParams, *sizes: int, seed: int = 0) -> Tensor:
    return torch.randint(q.qmin, q.qmax + 1, sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@dataclass(frozen=True)
class Case:
    """An operator; `reference` takes and gives int32 codes."""

    inputs: Sequence[Description]
    output: Description
    ints: Sequence[int]
    reference: Callable[..., Tensor]
    floats: Sequence[float] = ()
    constants: Sequence[tuple[str, Tensor]] = ()


CASES: dict[str, Case] = {}


def case(name: str, *args: object, **kwargs: object) -> None:
    CASES[name] = Case(*args, **kwargs)  # type: ignore[arg-type]


U16 = QParams(0.0007, 30000, 0, 65535)
IMAGE = ("u8", A, [2, 5, 6, 7])
_SLOPE = torch.tensor([0.1, -0.3, 0.0, 2.0, 1.0, 0.25, -1.0])
_WEIGHT, _OFFSET = torch.linspace(-2, 2, 42), torch.linspace(-1, 3, 42)
_TABLE = codes(U16, 256, seed=4)


def _first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


case("requantize", [IMAGE], ("s8", E, IMAGE[2]), [], lambda x: requantize.requantize_codes(x, A, E))
case("add", [IMAGE, ("s8", E, [6, 1])], ("u8", B, IMAGE[2]), [], lambda a, b: elementwise.add(a, A, b, E, B))
case("sub", [("s8", E, [7]), IMAGE], ("u8", B, IMAGE[2]), [], lambda a, b: elementwise.sub(a, E, b, A, B))
case("mul", [IMAGE, ("s8", E, [2, 5, 6, 7])], ("u8", B, IMAGE[2]), [], lambda a, b: elementwise.mul(a, A, b, E, B))
case("div", [IMAGE, ("s8", E, [1])], ("u8", B, IMAGE[2]), [], lambda a, b: elementwise.div(a, A, b, E, B))
case(
    "avg_pool", [IMAGE], ("u8", B, [2, 3, 5, 7]), [3, 2, 2, 1, 1, 0, 1, 0, 0],
    lambda x: _last(pool.avg_pool(_first(x), A, B, (3, 2), (2, 1), (1, 0, 1, 0), count_include_pad=False)),
)  # fmt: skip
case("mean", [IMAGE], ("s8", E, [2, 1, 6, 1]), [1, 3], lambda x: pool.reduce_mean(x, A, E, [1, 3], keepdims=True))
case(
    "resize_nearest", [IMAGE], ("u8", A, [2, 10, 6, 7]), [], lambda x: _last(resize.resize_nearest(_first(x), (10, 6))),
    constants=[("s32", torch.arange(10) // 2), ("s32", torch.arange(6))],
)  # fmt: skip
_TAPS = [t for out, size in ((7, 5), (9, 6)) for t in resize.linear_taps(out, None, size, False)[:3]]
case(
    "resize_linear", [IMAGE], ("u8", B, [2, 7, 9, 7]), [],
    lambda x: _last(resize.resize_bilinear(_first(x), A, B, (7, 9))),
    constants=[("f32" if t.is_floating_point() else "s32", t) for t in _TAPS],
)  # fmt: skip
case(
    "pad", [IMAGE], ("u8", A, [2, 8, 7, 7]), [0, 9, 0, 0, 1, 2, 0, 1, 0, 0],
    lambda x: torch.nn.functional.pad(x, (0, 0, 0, 1, 1, 2), value=9),
)  # fmt: skip
case("transpose", [IMAGE], ("u8", A, [7, 2, 6, 5]), [3, 0, 2, 1], lambda x: x.permute(3, 0, 2, 1))
case(
    "slice", [IMAGE], ("u8", A, [2, 2, 3, 7]), [0, 4, 1, 0, 1, -3, 2, 1],
    lambda x: x[:, [4, 1]][:, :, [1, 3, 5]],
)  # fmt: skip
case("expand", [("u8", A, [5, 1, 7])], ("u8", A, [2, 5, 6, 7]), [], lambda x: x.expand(2, 5, 6, 7))
case("roll", [IMAGE], IMAGE, [0, 2, -1, 9], lambda x: x.roll((2, -1, 9), (1, 2, 3)))
case(
    "layer_norm", [IMAGE], ("s8", E, IMAGE[2]), [2],
    lambda x: layer_norm.layer_norm(x, A, _WEIGHT.view(6, 7), _OFFSET.view(6, 7), E, 2, 1e-5),
    floats=[1e-5], constants=[("f32", _WEIGHT.view(6, 7)), ("f32", _OFFSET.view(6, 7))],
)  # fmt: skip
case("prelu", [IMAGE], ("u8", B, IMAGE[2]), [3], lambda x: table.prelu(x, A, _SLOPE, B, 3), constants=[("f32", _SLOPE)])
case("table", [IMAGE], ("s8", E, IMAGE[2]), [], lambda x: (_TABLE % 256 - 128)[x.long()],
     constants=[("s8", _TABLE % 256 - 128)])  # fmt: skip
case("concat", [IMAGE, ("s8", E, [2, 5, 2, 7])], ("u8", A, [2, 5, 8, 7]), [2],
     lambda a, b: layout.concat([(a, A), (b, E)], A, 2))  # fmt: skip


def operator_plan(name: str) -> bytes:
    """The plan of a case."""
    c = CASES[name]
    w = PlanWriter()
    names = [w.tensor(f"in{i}", kind, sizes, q) for i, (kind, q, sizes) in enumerate(c.inputs)]
    w.tensor("y", c.output[0], c.output[2], c.output[1])
    extra = [w.constant(f"constant{i}", kind, values) for i, (kind, values) in enumerate(c.constants)]
    w.op(name, [*names, *extra], "y", c.ints, c.floats)
    return w.to_bytes(names, ["y"])


def fixed_point(double_rounding: bool) -> tuple[bytes, Conv]:
    """A convolution in the profile tflite, and the layer for a batch of two."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randint(-127, 128, (5, 3, 3, 4), generator=g)
    fixed = torch.randint(2**30, 2**31 - 1, (5,), generator=g)
    shift = torch.tensor([-7, -8, -6, -9, -7])
    w = PlanWriter(profile=1 if double_rounding else 2)
    w.tensor("x", "s8", [-1, 6, 6, 4], E)
    w.tensor("y", "s8", [-1, 4, 4, 5], E)
    w.constant("weight", "s8", weight)
    w.constant("scales", "f32", torch.full((5,), 0.01))
    w.constant("multipliers", "s32", fixed)
    w.constant("shifts", "s32", shift)
    w.conv("c", {n: n for n in ("x", "weight", "scales", "multipliers", "shifts")}, "y", ("s8", E))
    x = codes(E, 2, 6, 6, 4, seed=3)
    layer = Conv(x, weight, "s8", "s8", E, E, fixed=fixed, shift=shift, double_rounding=double_rounding)
    return w.to_bytes(["x"], ["y"]), layer


def convolution(layer: Conv) -> bytes:
    """A plan of one layer, for its batch size."""
    w = PlanWriter()
    height, width = layer.out_size
    last = layer.y_grid if layer.residual is None else layer.sum_grid
    names = ["x", "weight", "scales"]
    w.tensor("x", layer.x_type, [-layer.x.shape[0], *layer.x.shape[1:]], layer.x_grid)
    w.tensor("y", layer.y_type, [-layer.x.shape[0], height, width, layer.weight.shape[0]], last)
    if layer.residual is not None:
        names.append("residual")
        w.tensor("residual", layer.residual_type, [-layer.x.shape[0], *layer.residual.shape[1:]], layer.residual_grid)
    w.constant("weight", "s4" if layer.four_bits else "s8", layer.weight)
    w.constant("scales", "f32", layer.scales)
    for name, kind, values in (
        ("zero_points", "s32", layer.w_zero),
        ("bias", "s32", layer.bias),
        ("table", layer.y_type, layer.table),
    ):
        if values is not None:
            names.append(name)
            w.constant(name, kind, values)
    w.conv(
        "c", {n: n for n in names}, "y", (layer.y_type, layer.y_grid), stride=layer.stride, pads=layer.padding[:2],
        dilation=layer.dilation, groups=layer.groups, transposed=layer.transposed, residual_first=layer.residual_first,
    )  # fmt: skip
    return w.to_bytes(["x", "residual"] if layer.residual is not None else ["x"], ["y"])


def layers() -> dict[str, Conv]:
    """A convolution for each way in which the kernels compute one."""
    g = torch.Generator().manual_seed(8)

    def integers(*sizes: int) -> Tensor:
        return torch.randint(-100, 100, sizes, generator=g)

    def image(*sizes: int) -> Tensor:
        return torch.randint(0, 256, sizes, generator=g)

    wide = QParams(0.0004, -100, -32768, 32767)
    return {
        "folded": Conv(image(1, 7, 9, 3), integers(8, 3, 3, 3), padding=(1, 1, 1, 1), stride=(2, 1)),
        "dilated": Conv(image(1, 9, 9, 2), integers(4, 2, 3, 2), dilation=(2, 2), bias=integers(4)),
        "grouped": Conv(image(1, 5, 5, 12), integers(6, 3, 2, 4), groups=3, w_zero=integers(6) // 2),
        "depthwise": Conv(image(1, 6, 7, 20), integers(20, 3, 3, 1), groups=20, padding=(1, 1, 1, 1)),
        "depthwise5": Conv(image(1, 6, 7, 20), integers(20, 5, 5, 1), groups=20, padding=(2, 2, 2, 2), stride=(2, 2)),
        "transposed": Conv(
            image(1, 4, 5, 6), integers(5, 3, 3, 6), transposed=True, stride=(2, 3), padding=(1, 0, 1, 0)
        ),
        "four bits": Conv(image(1, 5, 5, 7), integers(9, 1, 1, 7) // 13, four_bits=True),
        "16 bits": Conv(image(1, 5, 5, 7) * 100, integers(9, 3, 2, 7), x_type="s16", x_grid=wide),
        "residual": Conv(image(1, 5, 5, 8), integers(8, 1, 1, 8), residual=image(1, 5, 5, 8), residual_first=True),
        "table": Conv(image(1, 5, 5, 8), integers(40, 1, 1, 8), table=image(256)),
    }
