"""The integer operators against those in PyTorch: every code, every type and grid, on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import integer_ops
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from integer_ops import DTYPES, ISAS, Codes, codes_of
from torch import Tensor

from qat.integer.kernels import elementwise, layer_norm, layout, normalize, pool, resize, table
from qat.integer.kernels.qparams import QParams
from qat.integer.kernels.requantize import dequantize, quantize, requantize_codes

quick = settings(deadline=None, max_examples=40)
Draw = Callable[[st.SearchStrategy[Any]], Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> integer_ops.Run:
    return integer_ops.compiled(Path(tmp_path_factory.mktemp("operators")))


@st.composite
def grids(draw: Draw, dtype: torch.dtype) -> QParams:
    info = torch.iinfo(dtype)
    low, high = info.min, info.max
    if draw(st.booleans()):
        # narrower, but still of more than 8 bits where the type is
        low, high = low + draw(st.integers(0, 40)), high - draw(st.integers(0, 40))
    scale = draw(st.sampled_from([1 / 256, 0.0235, 0.1, 0.5, 1.0])) * draw(st.sampled_from([1.0, 1.37, 0.003]))
    float_reader = info.bits == 8 and draw(st.sampled_from([False, False, False, True]))
    zero_point = draw(st.sampled_from([low, high, (low + high) // 2]) | st.integers(low, high))
    return QParams(scale, zero_point, low, high, float_reader)


@st.composite
def encodings(draw: Draw, bits: Sequence[int] = (8, 16)) -> tuple[torch.dtype, QParams]:
    dtype = draw(st.sampled_from([d for d in DTYPES.values() if torch.iinfo(d).bits in bits]))
    return dtype, draw(grids(dtype))


def shapes(low: int = 1, high: int = 4, most: int = 9) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, most), min_size=low, max_size=high)


def random_codes(shape: Sequence[int], q: QParams, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(q.qmin, q.qmax + 1, list(shape), generator=generator, dtype=torch.int32)
    # ends of the range, more often than by chance
    at = torch.randint(0, 8, list(shape), generator=generator)
    return torch.where(at == 0, q.qmin, torch.where(at == 1, q.qmax, x)).to(torch.int32)


def operand(codes: Tensor, encoding: tuple[torch.dtype, QParams]) -> Codes:
    return Codes(codes_of(codes, encoding[0]), encoding[1])


def integers(x: Tensor) -> Tensor:
    return x.view(torch.int16).to(torch.int32) & 0xFFFF if x.dtype == torch.uint16 else x.to(torch.int32)


def check(
    run: integer_ops.Run,
    name: str,
    operands: Sequence[Codes],
    encoding: tuple[torch.dtype, QParams],
    expected: Tensor,
    ints: Sequence[int] = (),
    number: float = 0.0,
    arrays: Sequence[Tensor | None] = (),
    in_place: bool = False,
) -> None:
    """Every instruction set, in one part and in many; the bytes around the result stay as they are."""
    for isa in ISAS:
        for split in (False, True):
            guarded = torch.full((expected.numel() + 128,), 77, dtype=torch.int32)
            memory = codes_of(guarded, encoding[0])
            result = memory[64:-64].view(expected.shape)
            given_operands = list(operands)
            if in_place and result.element_size() == operands[0].data.element_size():
                # as uint16 and int16 share memory only through views
                shared = result.view(operands[0].data.dtype)
                shared.copy_(operands[0].data)
                given_operands[0] = Codes(shared, operands[0].grid)
            run(name, isa, [*given_operands, Codes(result, encoding[1])], ints, number, arrays, split)
            wrong = (integers(result) != expected).sum()
            assert wrong == 0, f"{isa}, split {split}: {wrong} of {expected.numel()} codes"
            assert (integers(memory[:64]) == 77).all()
            assert (integers(memory[-64:]) == 77).all()


def last_first(x: Tensor) -> Tensor:
    """(N, C, H, W) to the channels-last memory that the kernels take."""
    return x.permute(0, 2, 3, 1).contiguous()


seeds = st.integers(0, 2**20)


@quick
@given(shape=shapes(1, 5), y=encodings(), seed=seeds, data=st.data())
def test_quantize_permutes_and_takes_nan_and_infinities(run: Any, shape: Any, y: Any, seed: int, data: Any) -> None:
    perm = data.draw(st.permutations(range(len(shape))))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * y[1].scale * y[1].levels
    # ties
    x = torch.where(
        torch.rand(shape, generator=generator) < 0.3, (x / y[1].scale).floor() * y[1].scale + y[1].scale / 2, x
    )
    x.view(-1)[0] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]))
    check(run, "quantize", [Codes(x)], y, quantize(x, y[1]).permute(perm).contiguous(), perm)


@pytest.mark.parametrize("shape", [(2, 3, 31, 33), (1, 130, 9, 40), (1, 4, 17, 17), (1, 2, 7, 50)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_images_to_channels_last_and_back(run: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q = QParams(0.02, 3, -100 if dtype == torch.int16 else 0, 255 if dtype == torch.uint8 else 400)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes = quantize(x, q)
    check(run, "quantize", [Codes(x)], (dtype, q), last_first(codes), [0, 2, 3, 1])
    for isa in ISAS:
        y = torch.empty(shape)
        run("dequantize", isa, [operand(last_first(codes), (dtype, q)), Codes(y)], [0, 3, 1, 2], split=True)
        assert torch.equal(y, dequantize(codes, q))


@quick
@given(shape=shapes(1, 5), x=encodings(), seed=seeds, data=st.data())
def test_dequantize_permutes(run: Any, shape: Any, x: Any, seed: int, data: Any) -> None:
    perm = data.draw(st.permutations(range(len(shape))))
    codes = random_codes(shape, x[1], seed)
    expected = dequantize(codes, x[1]).permute(perm).contiguous()
    for isa in ISAS:
        y = torch.empty(expected.shape)
        run("dequantize", isa, [operand(codes, x), Codes(y)], perm)
        assert torch.equal(y, expected)


@quick
@given(x=encodings(), y=encodings(), count=st.sampled_from([1, 7, 100, 511, 700]), same=st.booleans(), seed=seeds)
def test_requantize(run: Any, x: Any, y: Any, count: int, same: bool, seed: int) -> None:
    y = x if same else y
    codes = random_codes([count], x[1], seed)
    check(run, "requantize", [operand(codes, x)], y, requantize_codes(codes, x[1], y[1]), in_place=True)


@st.composite
def broadcast_shapes(draw: Draw) -> tuple[list[int], list[int]]:
    shape = draw(shapes(1, 4, 21))
    a, b = ([1 if draw(st.sampled_from([True, False, False])) else s for s in shape] for _ in range(2))
    # sizes of 1 that the other operand has lost altogether
    return a, b[draw(st.integers(0, len(b) - 1)) :]


BINARY = {"add": elementwise.add, "sub": elementwise.sub, "mul": elementwise.mul, "div": elementwise.div}


@pytest.mark.parametrize("name", BINARY)
@quick
@given(shapes=broadcast_shapes(), a=encodings(), b=encodings(), y=encodings(), seed=seeds)
def test_two_operands_broadcast(run: Any, name: str, shapes: Any, a: Any, b: Any, y: Any, seed: int) -> None:
    left, right = random_codes(shapes[0], a[1], seed), random_codes(shapes[1], b[1], seed + 1)
    expected = BINARY[name](left, a[1], right, b[1], y[1])
    swapped = (
        name == "add"
        and not (a[1].wide or b[1].wide or y[1].wide)
        and elementwise._left_is_scalar(left.shape, right.shape)
    )
    operands = [operand(left, a), operand(right, b)]
    check(run, name, operands[::-1] if swapped else operands, y, expected)


@pytest.mark.parametrize("name", BINARY)
@quick
@given(count=st.integers(1, 9000), a=encodings(bits=(8,)), b=encodings(bits=(8,)), y=encodings(bits=(8,)), seed=seeds)
def test_two_long_operands(run: Any, name: str, count: int, a: Any, b: Any, y: Any, seed: int) -> None:
    assume(name != "add" or count > 1)
    left, right = random_codes([count], a[1], seed), random_codes([count], b[1], seed + 1)
    expected = BINARY[name](left, a[1], right, b[1], y[1])
    check(run, name, [operand(left, a), operand(right, b)], y, expected, in_place=True)


# scales and zero points of a, b, y for which some sums are ties that a multiplication with a rounding of its own misses
TIES = [
    (2.05, 204, 0.1, 164, 1.2, 97),
    (0.078, 162, 0.014, 124, 0.06, 120),
    (0.267, 235, 0.168, 89, 0.03, 194),
    (0.128, 65, 3.04, 115, 0.96, 118),
]


@pytest.mark.parametrize("name", ["add", "mul"])
@pytest.mark.parametrize("ties", TIES)
def test_every_pair_of_codes(run: Any, name: str, ties: tuple[float, ...]) -> None:
    a, b, y = ((torch.uint8, QParams(ties[i], int(ties[i + 1]), 0, 255)) for i in (0, 2, 4))
    left = torch.arange(256, dtype=torch.int32)[:, None].expand(256, 256).contiguous()
    right = left.t().contiguous()
    expected = BINARY[name](left, a[1], right, b[1], y[1])
    check(run, name, [operand(left, a), operand(right, b)], y, expected)


@quick
@given(x=encodings(), y=encodings(), count=st.sampled_from([1, 63, 64, 65, 700]), seed=seeds)
def test_table(run: Any, x: Any, y: Any, count: int, seed: int) -> None:
    entries = random_codes([x[1].levels], y[1], seed + 1)
    codes = random_codes([count], x[1], seed)
    expected = table.apply_table(codes, entries, x[1])
    check(run, "table", [operand(codes, x)], y, expected, arrays=[codes_of(entries, y[0])], in_place=True)


@quick
@given(shape=shapes(2, 4, 12), x=encodings(), y=encodings(), one=st.booleans(), seed=seeds, data=st.data())
def test_prelu(run: Any, shape: Any, x: Any, y: Any, one: bool, seed: int, data: Any) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    slope = torch.randn(1 if one else shape[axis], generator=torch.Generator().manual_seed(seed))
    codes = random_codes(shape, x[1], seed)
    expected = table.prelu(codes, x[1], slope, y[1], axis)
    ints = [slope.numel(), axis]
    check(run, "prelu", [operand(codes, x)], y, expected, ints, arrays=[slope], in_place=True)


@quick
@given(shape=shapes(1, 3, 20), x=encodings(), y=encodings(), seed=seeds, data=st.data())
def test_softmax(run: Any, shape: Any, x: Any, y: Any, seed: int, data: Any) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    if data.draw(st.booleans()):
        y = (torch.uint8, normalize.PROBABILITY)
    codes = random_codes(shape, x[1], seed)
    check(run, "softmax", [operand(codes, x)], y, normalize.softmax(codes, x[1], y[1], axis), [axis])


@pytest.mark.parametrize("scale", [0.001, 0.03, 0.2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_softmax_of_long_rows(run: Any, scale: float, dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = (dtype, QParams(scale, info.min + 9, info.min, info.max))
    codes = random_codes([19, 197], x[1], 5)
    for y in ((torch.uint8, normalize.PROBABILITY), (torch.int8, QParams(1 / 255, -128, -128, 127))):
        check(run, "softmax", [operand(codes, x)], y, normalize.softmax(codes, x[1], y[1]), [1])


@quick
@given(
    shape=shapes(1, 3, 40),
    x=encodings(),
    y=encodings(),
    weighted=st.booleans(),
    biased=st.booleans(),
    seed=seeds,
    data=st.data(),
)
def test_layer_norm(run: Any, shape: Any, x: Any, y: Any, weighted: bool, biased: bool, seed: int, data: Any) -> None:
    dims = data.draw(st.integers(1, len(shape)))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape[-dims:], generator=generator) if weighted else None
    bias = torch.randn(shape[-dims:], generator=generator) if biased else None
    codes = random_codes(shape, x[1], seed)
    expected = layer_norm.layer_norm(codes, x[1], weight, bias, y[1], dims, 1e-5)
    check(run, "layer_norm", [operand(codes, x)], y, expected, [dims], 1e-5, [weight, bias], in_place=True)


@pytest.mark.parametrize("columns", [3, 7, 8, 61, 95, 768])
def test_layer_norm_to_the_last_bits(run: Any, columns: int) -> None:
    x, y = (torch.uint8, QParams(0.0371, 117, 0, 255)), (torch.int16, QParams(1.3e-4, 5, -32768, 32767))
    generator = torch.Generator().manual_seed(columns)
    weight, bias = torch.randn(columns, generator=generator), torch.randn(columns, generator=generator)
    codes = random_codes([4000 // columns + 20, columns], x[1], columns)
    for arrays in ([weight, bias], [weight, None], [None, bias], [None, None]):
        expected = layer_norm.layer_norm(codes, x[1], *arrays, y[1])
        check(run, "layer_norm", [operand(codes, x)], y, expected, [1], 1e-5, arrays)


@st.composite
def windows(draw: Draw, dilated: bool) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    stride = [draw(st.integers(1, 3)) for _ in range(2)]
    dilation = [draw(st.integers(1, 2)) if dilated else 1 for _ in range(2)]
    # less than the kernel, so that every window has an element
    begins, ends = ([draw(st.integers(0, k - 1)) for k in kernel] for _ in range(2))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sizes = [draw(st.integers(max(span, 2), span + 7)) for span in spans]
    return kernel, stride, [*begins, *ends], dilation, sizes


@quick
@given(geometry=windows(True), channels=st.sampled_from([1, 3, 33, 300]), x=encodings(), ceil=st.booleans(), seed=seeds)
def test_max_pool(run: Any, geometry: Any, channels: int, x: Any, ceil: bool, seed: int) -> None:
    kernel, stride, padding, dilation, sizes = geometry
    codes = random_codes([2, channels, *sizes], x[1], seed)
    expected = pool.max_pool(codes, kernel, stride, padding, dilation, ceil)
    ints = [*kernel, *stride, *padding, *dilation, 0]
    check(run, "max_pool", [operand(last_first(codes), x)], x, last_first(expected), ints)


def test_max_pool_of_large_windows(run: Any) -> None:
    x = (torch.uint8, QParams(0.1, 0, 0, 255))
    codes = random_codes([1, 5, 20, 20], x[1], 3) // 2
    expected = pool.max_pool(codes, [13, 11], 1)
    ints = [13, 11, 1, 1, 0, 0, 0, 0, 1, 1, 0]
    check(run, "max_pool", [operand(last_first(codes), x)], x, last_first(expected), ints)


@quick
@given(
    geometry=windows(False),
    channels=st.sampled_from([1, 3, 33, 300]),
    x=encodings(),
    y=encodings(),
    ceil=st.booleans(),
    include=st.booleans(),
    seed=seeds,
)
def test_avg_pool(run: Any, geometry: Any, channels: int, x: Any, y: Any, ceil: bool, include: bool, seed: int) -> None:
    kernel, stride, padding, dilation, sizes = geometry
    codes = random_codes([2, channels, *sizes], x[1], seed)
    expected = pool.avg_pool(codes, x[1], y[1], kernel, stride, padding, ceil, include)
    ints = [*kernel, *stride, *padding, *dilation, int(include)]
    check(run, "avg_pool", [operand(last_first(codes), x)], y, last_first(expected), ints)


@pytest.mark.parametrize(("scale", "target"), [(0.1, 0.07), (0.3, 0.25), (0.7, 0.9)])
def test_avg_pool_at_ties(run: Any, scale: float, target: float) -> None:
    x, y = (torch.uint8, QParams(scale, 20, 0, 255)), (torch.uint8, QParams(target, 10, 0, 255))
    codes = random_codes([1, 300, 30, 30], x[1], 11)
    expected = pool.avg_pool(codes, x[1], y[1], [3, 2], 1)
    ints = [3, 2, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    check(run, "avg_pool", [operand(last_first(codes), x)], y, last_first(expected), ints)


@quick
@given(shape=shapes(1, 5, 11), x=encodings(), y=encodings(), seed=seeds, data=st.data())
def test_mean(run: Any, shape: Any, x: Any, y: Any, seed: int, data: Any) -> None:
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    codes = random_codes(shape, x[1], seed)
    expected = pool.reduce_mean(codes, x[1], y[1], axes, keepdims=data.draw(st.booleans()))
    check(run, "mean", [operand(codes, x)], y, expected, [len(axes), *axes])


def test_mean_of_more_codes_than_32_bits_can_sum(run: Any) -> None:
    x, y = (torch.uint16, QParams(0.1, 0, 0, 65535)), (torch.uint16, QParams(0.1, 0, 0, 65535))
    codes = torch.full((70000, 3), 65535, dtype=torch.int32)
    check(run, "mean", [operand(codes, x)], y, pool.reduce_mean(codes, x[1], y[1], [0]), [1, 0])


@quick
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 2),
    out=st.tuples(*[st.integers(1, 19)] * 2),
    channels=st.sampled_from([1, 3, 70]),
    x=encodings(),
    y=encodings(),
    same=st.booleans(),
    seed=seeds,
)
def test_resize_nearest(run: Any, sizes: Any, out: Any, channels: int, x: Any, y: Any, same: bool, seed: int) -> None:
    y = x if same else y
    codes = random_codes([2, channels, *sizes], x[1], seed)
    expected = requantize_codes(resize.resize_nearest(codes, out), x[1], y[1])
    # the sources, from a map of positions
    rows, columns = (
        resize.resize_nearest(torch.arange(n).reshape(shape), out)[0, 0].to(torch.int32)
        for n, shape in ((sizes[0], (1, 1, sizes[0], 1)), (sizes[1], (1, 1, 1, sizes[1])))
    )
    arrays = [rows[:, 0].contiguous(), columns[0].contiguous()]
    check(run, "resize_nearest", [operand(last_first(codes), x)], y, last_first(expected), arrays=arrays)


@quick
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 2),
    out=st.tuples(*[st.integers(1, 19)] * 2),
    channels=st.sampled_from([1, 3, 300]),
    x=encodings(),
    y=encodings(),
    corners=st.booleans(),
    seed=seeds,
)
def test_resize_linear(run: Any, sizes: Any, out: Any, channels: int, x: Any, y: Any, corners: bool, seed: int) -> None:
    codes = random_codes([2, channels, *sizes], x[1], seed)
    expected = resize.resize_bilinear(codes, x[1], y[1], out, corners)
    arrays: list[Tensor | None] = []
    for size, length in zip(out, sizes, strict=True):
        low, high, to_low, _ = resize.linear_taps(size, None, length, corners)
        arrays += [low.to(torch.int32), high.to(torch.int32), to_low]
    check(run, "resize_linear", [operand(last_first(codes), x)], y, last_first(expected), arrays=arrays)


MODES = ("constant", "reflect", "replicate")


@quick
@given(shape=shapes(4, 4, 7), x=encodings(), mode=st.sampled_from(MODES), seed=seeds, data=st.data())
def test_pad(run: Any, shape: Any, x: Any, mode: Any, seed: int, data: Any) -> None:
    codes = random_codes(shape, x[1], seed)
    spatial = 4 if mode == "constant" else 2
    most = [3 if mode != "reflect" else size - 1 for size in shape[-spatial:]]
    pads = [(data.draw(st.integers(0, m)), data.draw(st.integers(0, m))) for m in most]
    value = data.draw(st.sampled_from([0.0, 0.37, -1000.0]))
    expected = layout.pad(codes, x[1], [side for pair in reversed(pads) for side in pair], mode, value)
    fill = int(quantize(torch.tensor(value), x[1]))
    every = [0] * 2 * (4 - spatial) + [side for pair in pads for side in pair]
    ints = [MODES.index(mode), fill, *every]
    check(run, "pad", [operand(codes, x)], x, expected, ints)
    # the same with the padding moved away from the innermost dimension
    order = [0, 2, 3, 1]
    moved = [MODES.index(mode), fill, *(side for d in order for side in every[2 * d : 2 * d + 2])]
    operands = [operand(codes.permute(order).contiguous(), x)]
    check(run, "pad", operands, x, expected.permute(order).contiguous(), moved)


@quick
@given(
    shape=shapes(1, 4),
    parts=st.lists(st.tuples(st.integers(1, 70), encodings(), st.booleans()), min_size=1, max_size=4),
    y=encodings(),
    seed=seeds,
    data=st.data(),
)
def test_concat(run: Any, shape: Any, parts: Any, y: Any, seed: int, data: Any) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    pieces = []
    for i, (length, encoding, same) in enumerate(parts):
        sizes = [length if d == axis else s for d, s in enumerate(shape)]
        own = y if same else encoding
        pieces.append((random_codes(sizes, own[1], seed + i), own))
    expected = layout.concat([(codes, own[1]) for codes, own in pieces], y[1], axis)
    check(run, "concat", [operand(codes, own) for codes, own in pieces], y, expected, [axis])


@quick
@given(shape=shapes(1, 5, 40), x=encodings(), seed=seeds, data=st.data())
def test_transpose(run: Any, shape: Any, x: Any, seed: int, data: Any) -> None:
    assume(math.prod(shape) < 100000)
    perm = data.draw(st.permutations(range(len(shape))))
    codes = random_codes(shape, x[1], seed)
    check(run, "transpose", [operand(codes, x)], x, codes.permute(perm).contiguous(), perm)


@quick
@given(shape=shapes(1, 4, 12), x=encodings(), seed=seeds, data=st.data())
def test_slice(run: Any, shape: Any, x: Any, seed: int, data: Any) -> None:
    codes = random_codes(shape, x[1], seed)
    starts, steps, expected = [], [], codes
    for d, size in enumerate(shape):
        step = data.draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        start = data.draw(st.integers(0, size - 1))
        picked = range(start, size if step > 0 else -1, step)
        picked = picked[: data.draw(st.integers(1, len(picked)))]
        expected = expected.index_select(d, torch.tensor(list(picked)))
        starts.append(start)
        steps.append(step)
    check(run, "slice", [operand(codes, x)], x, expected, [*starts, *steps])


@quick
@given(shape=shapes(1, 4, 12), x=encodings(), seed=seeds, data=st.data())
def test_expand(run: Any, shape: Any, x: Any, seed: int, data: Any) -> None:
    small = [1 if data.draw(st.booleans()) else s for s in shape]
    codes = random_codes(small[data.draw(st.integers(0, len(small) - 1)) :], x[1], seed)
    full = [*shape[: len(shape) - codes.dim()], *shape[len(shape) - codes.dim() :]]
    check(run, "expand", [operand(codes, x)], x, codes.expand(full).contiguous())


@quick
@given(shape=shapes(1, 4, 12), x=encodings(), seed=seeds, data=st.data())
def test_roll(run: Any, shape: Any, x: Any, seed: int, data: Any) -> None:
    shifts = [data.draw(st.integers(-30, 30)) for _ in shape]
    codes = random_codes(shape, x[1], seed)
    check(run, "roll", [operand(codes, x)], x, codes.roll(shifts, list(range(len(shape)))), shifts)
