"""Batches of any common form, and what is said of those that do not fit."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import DataError
from qat.graph.batches import first_samples, join_samples, model_inputs, sample_count
from qat.graph.prepared import PreparedModel

TARGET = qat.load_target("onnxruntime-cpu")


class Two(nn.Module):
    """Two batched inputs, one of them with two rows a sample, and one without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, indices: Tensor, bias: Tensor) -> Tensor:
        return self.a(x) + self.b(x) * indices[:, None] + bias


@pytest.fixture(scope="module")
def one() -> PreparedModel:
    return qat.prepare(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(2, 3, 4, 4), target=TARGET)


@pytest.fixture(scope="module")
def two() -> PreparedModel:
    example = (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(3))
    return qat.prepare(Two(), example, target=TARGET)


X = torch.arange(5 * 3 * 16.0).reshape(5, 3, 4, 4)
Labelled = namedtuple("Labelled", ["image", "label"])


@pytest.mark.parametrize(
    "batch", [X, (X,), [X, torch.zeros(5)], {"input": X, "y": 0}, Labelled(X, 3), ((X,), 1), ({"input": X}, 1)]
)
def test_forms_of_a_batch(one: PreparedModel, batch: Any) -> None:
    (x,) = model_inputs(one, batch)
    assert torch.equal(x, X)
    assert sample_count(one, (x,)) == 5
    assert torch.equal(first_samples(one, (x,), 2)[0], X[:2])
    assert torch.equal(join_samples(one, [(X,), (X[:1],)])[0], torch.cat([X, X[:1]]))
    assert join_samples(one, []) == ()


def test_several_inputs(two: PreparedModel) -> None:
    x, i, b = torch.rand(5, 4), torch.arange(5, dtype=torch.int32), torch.rand(3)
    for batch in ((x, i, b), (x, i, b, "label"), {"bias": b, "x": x, "indices": i}, ((x, i, b), "label")):
        inputs = model_inputs(two, batch)
        assert inputs[1].dtype == torch.int64
        assert sample_count(two, inputs) == 5
        cut = first_samples(two, inputs, 2)
        assert [tuple(t.shape) for t in cut] == [(2, 4), (2,), (3,)]
        assert [tuple(t.shape) for t in join_samples(two, [inputs, cut])] == [(7, 4), (7,), (3,)]


def test_floating_point_inputs_get_the_models_type(one: PreparedModel) -> None:
    assert model_inputs(one, X.double())[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X[0], r"the input 'input' of a batch has shape \(3, 4, 4\); give batch x 3 x 4 x 4"),
        (X[:, :2], r"has shape \(5, 2, 4, 4\); give batch x 3 x 4 x 4"),
        (X.to(torch.uint8), "the input 'input' of a batch has dtype torch.uint8; convert it to torch.float32"),
        ([X.numpy()], "the input 'input' of a batch is a ndarray; give a tensor"),
        ("text", "a batch is a str"),
        (None, "a batch is a NoneType"),
        ((), "a batch has 0 tensors and the model takes 1"),
        ({"image": X}, "a batch lacks the input 'input'; give input"),
    ],
)
def test_a_batch_that_does_not_fit(one: PreparedModel, batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model_inputs(one, batch)


def test_inputs_that_do_not_fit_each_other(two: PreparedModel) -> None:
    with pytest.raises(DataError, match=r"different numbers of samples \(x: 5, indices: 4\)"):
        model_inputs(two, (torch.rand(5, 4), torch.arange(4), torch.rand(3)))
    with pytest.raises(DataError, match="a batch has 2 tensors and the model takes 3; give x, indices, bias"):
        model_inputs(two, (torch.rand(5, 4), torch.arange(5)))
    with pytest.raises(DataError, match=r"'indices' of a batch has dtype torch\.float32; convert it to torch\.int64"):
        model_inputs(two, (torch.rand(5, 4), torch.rand(5), torch.rand(3)))


def test_a_fixed_batch_size() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + torch.ones(len(x), 1)

    prepared = qat.prepare(Fixed(), torch.zeros(6, 4), target=TARGET)
    x = torch.rand(6, 4)
    inputs = model_inputs(prepared, x)
    assert sample_count(prepared, inputs) == 6
    assert first_samples(prepared, inputs, 2)[0].shape == (6, 4)
    assert join_samples(prepared, [inputs, inputs])[0].shape == (12, 4)
    with pytest.raises(DataError, match=r"has shape \(5, 4\); give 6 x 4"):
        model_inputs(prepared, x[:5])
