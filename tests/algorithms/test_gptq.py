"""GPTQ: the solution of a straightforward reference, and a smaller error for every layer that there is."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rounding_checks import check_rounded, float_output, output_error, trains, weight_codes
from small_nets import Linears, Residual, Shared, Transposed, calibrated, make
from torch import Tensor, nn

import qat
from qat.algorithms.correction import corrected
from qat.algorithms.gptq import gptq, solve
from qat.algorithms.unfolded import WeightMatrix
from qat.algorithms.units import quantized_layers
from qat.errors import DataError, QuantizationWarning, StateError
from qat.graph.prepared import PreparedModel

PER_TENSOR = {"weights": {"dtype": "int4", "granularity": "per_tensor"}}
PER_GROUP = {"weights": {"dtype": "int4", "granularity": "per_group", "group_size": 8}}


def reference(weight: Tensor, moments: Tensor, step: Tensor, damping: float, activation: bool) -> Tensor:
    """One matrix, one column after the other; the inverse is computed anew for what is left (OBQ with an order)."""
    columns = weight.shape[1]
    moments = moments + damping * moments.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    order = moments.diagonal().argsort(descending=True, stable=True).tolist() if activation else list(range(columns))
    left, weight = list(order), weight.clone()
    for k in order:
        inverse = torch.linalg.inv(moments[left][:, left])
        at = left.index(k)
        rounded = torch.clamp(torch.round(weight[:, k] / step[:, k]), -8, 7) * step[:, k]
        error = (weight[:, k] - rounded) / inverse[at, at]
        weight[:, left] -= error[:, None] * inverse[at][None, :]
        weight[:, k] = rounded
        left.remove(k)
    return weight


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("block_size", [1, 4, 128])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_solution_is_that_of_the_reference(order: str, block_size: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    weight = torch.randn(groups, 5, 12, dtype=torch.float64, generator=generator)
    rows = torch.randn(groups, 40, 12, dtype=torch.float64, generator=generator)
    rows = rows @ torch.randn(12, 12, dtype=torch.float64, generator=generator)
    moments = rows.transpose(1, 2) @ rows
    step = torch.rand(groups, 5, 12, dtype=torch.float64, generator=generator) + 0.1

    def nearest(column: Tensor, index: Tensor) -> Tensor:
        s = torch.stack([step[g, :, int(index[g])] for g in range(groups)])
        return torch.clamp(torch.round(column / s), -8, 7) * s

    found = solve(weight, moments, nearest, damping=0.02, block_size=block_size, order=order)  # type: ignore[arg-type]
    assert found is not None
    for g in range(groups):
        wanted = reference(weight[g], moments[g], step[g], 0.02, order == "activation")
        torch.testing.assert_close(found[g], wanted, rtol=0, atol=1e-6)


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 7, 8)),
    (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 6)),
    (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 4, 4)),
    (nn.ConvTranspose2d(4, 6, (2, 3), stride=(1, 2), groups=2, dilation=(2, 1)), (2, 4, 4, 4)),
    (nn.Linear(5, 3), (2, 4, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[str(layer) for layer, _ in LAYERS])
def test_a_layer_is_a_product_of_matrices(layer: nn.Module, shape: tuple[int, ...]) -> None:
    net = nn.Sequential(copy.deepcopy(layer))
    x = torch.randn(shape)
    qmodel = qat.prepare(net, x, target=qat.load_target("onnxruntime-cpu"))
    (found,) = quantized_layers(qmodel).values()
    form = WeightMatrix(found.op, tuple(found.weight.shape))
    unfolded = form.unfold(x)
    weight = form.matrix(found.weight)
    assert torch.equal(form.weight(weight), found.weight)
    out = (unfolded.rows(unfolded.base) @ weight.transpose(1, 2)).transpose(0, 1).flatten(1) + layer.bias
    wanted = layer(x)
    wanted = wanted if isinstance(layer, nn.Linear) else wanted.movedim(1, -1)
    torch.testing.assert_close(out, wanted.reshape(out.shape), rtol=1e-4, atol=1e-5)
    other = torch.randn(shape)
    moments = form.moments([(x[:1], other[:1]), (x[1:], other[1:])])
    rows, others = unfolded.rows(unfolded.base).double(), form.unfold(other).rows(unfolded.base).double()
    assert moments.count == rows.shape[1]
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(moments.second, rows.transpose(1, 2) @ rows)
    close(moments.cross, (others - rows).transpose(1, 2) @ rows)
    close(moments.quantized, rows.mean(1))
    close(moments.difference, (others - rows).mean(1))
    rows, others = rows - rows.mean(1, True), others - others.mean(1, True)
    close(moments.second_about, rows.transpose(1, 2) @ rows)
    close(moments.cross_about, (others - rows).transpose(1, 2) @ rows)


def test_moments_about_the_mean_do_not_cancel() -> None:
    qmodel, _ = make(Linears)
    found = quantized_layers(qmodel)
    layer = found[next(iter(found))]
    form = WeightMatrix(layer.op, tuple(layer.weight.shape))
    x = torch.randn(256, form.columns) * 1e-3 + 100.0
    moments = form.moments([(x[:100], x[:100]), (x[100:], x[100:])])
    centered = x.double() - x.double().mean(0)
    torch.testing.assert_close(moments.second_about[0], centered.T @ centered, rtol=0.05, atol=1e-5)
    assert bool((torch.linalg.eigvalsh(moments.second_about[0]) > 0).all())


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize(
    ("kind", "scheme", "factor"),
    [
        (Residual, None, 0.6),
        (Residual, PER_TENSOR, 0.6),
        (Transposed, None, 0.8),
        (Linears, None, 0.4),
        (Linears, PER_GROUP, 0.4),
    ],
)
def test_the_error_is_smaller_than_that_of_rounding_to_nearest(
    kind: type[nn.Module], scheme: dict[str, Any] | None, factor: float, order: Any
) -> None:
    qmodel, data = make(kind, scheme)
    wanted = float_output(qmodel, data)
    before = output_error(qmodel, wanted, data)
    with warnings.catch_warnings():
        # a layer may keep its rounding, and says so
        warnings.simplefilter("ignore", QuantizationWarning)
        result = gptq(qmodel, [data], order=order, progress=False)
    assert output_error(qmodel, wanted, data) < factor * before
    check_rounded(qmodel, result, data)


def scales(qmodel: PreparedModel) -> dict[str, Tensor]:
    """Scales of every quantized weight, as they are."""
    return {key: quantizer.folded_grid(weight)[0].clone() for key, quantizer, weight in qmodel.weight_quantizers()}


def test_scales_that_fit_and_codes_that_move_once_more_have_the_smallest_errors() -> None:
    errors, moved = [], []
    for options in ({"fit_scales": False, "passes": 0}, {"fit_scales": False}, {}):
        qmodel, data = make(Residual)
        before = scales(qmodel)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QuantizationWarning)
            result = gptq(qmodel, [data], progress=False, **options)  # type: ignore[arg-type]
        errors.append(result.units[0].after)
        moved.append(not torch.equal(before["stem.0.weight"], scales(qmodel)["stem.0.weight"]))
        check_rounded(qmodel, result, data)
    assert errors[0] >= errors[1] > errors[2]
    assert moved == [False, False, True]


@pytest.mark.parametrize(
    "weights", [{"granularity": "per_tensor"}, {"granularity": "per_group", "group_size": 8}, {"power_of_two": True}]
)
def test_scales_that_are_not_a_channels_own_or_not_free_stay(weights: dict[str, Any]) -> None:
    qmodel, data = make(Linears, {"weights": {"dtype": "int4", **weights}})
    before = scales(qmodel)
    gptq(qmodel, [data], progress=False)
    assert all(torch.equal(scale, before[key]) for key, scale in scales(qmodel).items())


@pytest.mark.parametrize("correct", [True, False])
def test_the_bias_takes_the_mean_error(correct: bool) -> None:
    qmodel, data = make(Linears)
    torch.manual_seed(1)
    data = data + 2.0
    qmodel = calibrated(Linears(), data)
    wanted = float_output(qmodel, data)
    biases = {key: value.clone() for key, value in qmodel.float_state_dict().items() if "bias" in key}
    gptq(qmodel, [data], correct=correct, progress=False)
    after = {key: value for key, value in qmodel.float_state_dict().items() if "bias" in key}
    assert any(not torch.equal(after[key], biases[key]) for key in biases) == correct
    qmodel.eval()
    with torch.no_grad():
        mean = (qmodel(data) - wanted).mean(0)
    step = qmodel.encodings()[qmodel.opgraph.outputs[0]].scale[0]
    # the output is quantized after it
    assert (float(mean.abs().max()) < 0.2 * step) == correct


def test_training_goes_on() -> None:
    qmodel, data = make(Residual)
    gptq(qmodel, [data], progress=False)
    assert trains(qmodel, data)


def test_inputs_that_are_never_seen() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)
            self.last = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(F.relu(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    data = torch.randn(64, 8) * torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1])
    qmodel = calibrated(Half(), data)
    before = weight_codes(qmodel)
    gptq(qmodel, [data], progress=False)
    # nothing is known of what reads them: they stay where they are
    assert torch.equal(weight_codes(qmodel)["layer.weight"][:, :2], before["layer.weight"][:, :2])


def test_a_constant_input_of_zero_keeps_every_weight() -> None:
    qmodel, data = make(Linears)
    before = weight_codes(qmodel)
    gptq(qmodel, [torch.zeros_like(data)], progress=False)
    assert torch.equal(weight_codes(qmodel)["first.weight"], before["first.weight"])


def test_a_shared_weight_stays_rounded_to_nearest() -> None:
    qmodel, data = make(Shared)
    with pytest.warns(QuantizationWarning, match=r"'twice\.weight' is shared by 2 layers"):
        result = gptq(qmodel, [data], progress=False)
    assert [u.weights for u in result.units] == [("once.weight",)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping is 0.0; give a share in (0, 1)"),
        ({"damping": 1.0}, "damping is 1.0; give a share in (0, 1)"),
        ({"block_size": 0}, "block_size is 0; give a positive number"),
        ({"order": "random"}, "order is 'random'; choose activation or natural"),
        ({"passes": -1}, "passes is -1; give 0 or more"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    qmodel, data = make(Linears)
    with pytest.raises(StateError) as caught:
        gptq(qmodel, [data], progress=False, **options)
    assert str(caught.value) == message


def test_few_samples() -> None:
    qmodel, data = make(Linears)
    with pytest.warns(QuantizationWarning, match="gptq on 20 samples only, which it may fit and no others; 50 or more"):
        gptq(qmodel, [data], samples=20, progress=False)


def test_no_data() -> None:
    qmodel, _ = make(Linears)
    with pytest.raises(DataError, match="no calibration data; give at least one batch"):
        gptq(qmodel, [])


def test_correction_is_the_damped_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, q, f = (torch.randn(2, n, 6, dtype=torch.float64, generator=generator) for n in (3, 40, 40))
    moments, cross = q.transpose(1, 2) @ q, (f - q).transpose(1, 2) @ q
    found = corrected(weight, moments, cross, 0.1)
    pull = 0.1 * moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    gradient = (found @ q.transpose(1, 2) - weight @ f.transpose(1, 2)) @ q + pull * (found - weight)
    assert float(gradient.abs().max()) < 1e-9
