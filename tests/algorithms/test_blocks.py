"""Units of reconstruction: where blocks are, and what is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_nets import Linears, Residual, calibrated, images, make
from torch import Tensor, nn

from qat.algorithms.blocks import block_units
from qat.errors import StateError


class Shortcut(nn.Module):
    """A block whose shortcut has a layer, in the root's own forward; its input is read by a third layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.right = nn.Conv2d(4, 4, 1)
        self.side = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return torch.cat([F.relu(self.left(y) + self.right(y)), self.side(y)], 1)


class Leaky(nn.Module):
    """A path that is read from outside of the block too: no block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.first(x))
        left = F.relu(self.left(y))
        return left + y, left * 2


def names(net: nn.Module, **options: str) -> list[tuple[str, list[str]]]:
    qmodel = calibrated(net, images(8))
    return [(u.name, [layer.name for layer in u.layers]) for u in block_units(qmodel, **options)]  # type: ignore[arg-type]


def test_a_residual_block_is_one_unit() -> None:
    assert names(Residual()) == [
        ("stem.2", ["stem.0"]),
        ("block.relu#2", ["block.conv1", "block.conv2"]),
        ("relu6", ["depthwise"]),
        ("head", ["head"]),
    ]


def test_blocks_need_no_module() -> None:
    assert names(Shortcut()) == [("relu", ["first"]), ("relu#2", ["left", "right"]), ("side", ["side"])]


def test_a_value_that_leaves_the_block_makes_it_none() -> None:
    assert names(Leaky()) == [("relu", ["first"]), ("relu#2", ["left"])]


def test_layers_alone() -> None:
    assert names(Residual(), blocks="layer")[1:3] == [
        ("block.relu", ["block.conv1"]),
        ("block.bn2", ["block.conv2"]),
    ]


def test_modules_as_blocks() -> None:
    qmodel, _ = make(Residual)
    units = block_units(qmodel, ["stem", "block"])
    assert [(u.name, len(u.layers)) for u in units] == [("stem.2", 1), ("block.relu#2", 2), ("relu6", 1), ("head", 1)]
    assert all(u.output.meta.get("quantizes") for u in units)
    assert not any(u.output.meta.get("quantizes") for u in block_units(qmodel, ["stem", "block"], "activation"))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("modules", "unknown blocks 'modules'; choose residual, layer, or give a list of module paths"),
        (["nowhere"], "no tensor of the model is computed in a module 'nowhere'; give a path as in print(plan)"),
        (["stem", "stem.0"], "the blocks 'stem', 'stem.0' overlap; give modules beside each other"),
        (["stem.2"], "'stem.2' is no block: it has no quantized layer; choose another module"),
    ],
)
def test_what_is_no_block(blocks: str | list[str], message: str) -> None:
    qmodel, _ = make(Residual)
    with pytest.raises(StateError) as caught:
        block_units(qmodel, blocks)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_model_of_layers_only() -> None:
    qmodel, _ = make(Linears)
    assert [u.name for u in block_units(qmodel)] == ["relu", "second"]
