"""Learning the rounding of a unit's weights, and optionally the scales of its activations, by gradient.

Sources: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (ICML 2020); Li et al., "BRECQ:
Pushing the Limit of Post-Training Quantization by Block Reconstruction" (ICLR 2021); Esser et al., "Learned Step Size
Quantization" (ICLR 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qat.algorithms.correction import corrected, correction_damping, input_pairs
from qat.algorithms.feed import is_by_place, make_feed
from qat.algorithms.rounding import Rounded, check_option
from qat.algorithms.sweep import Visit
from qat.algorithms.unfolded import WeightMatrix
from qat.algorithms.units import Layer
from qat.quantizers import FakeQuantize, LearnedRounding
from qat.quantizers.learned import fake_quantize_learned

#: of the correction, as `gptq`'s
_DAMPING = 0.01


@dataclass(frozen=True)
class Learning:
    """Options of the learning; the defaults of the AMCT toolkit where it has them.

    Attributes:
        iterations: Steps of gradient descent a unit.
        batch_size: Samples a step.
        learning_rate: Of the rounding variables (Adam).
        reg_param: Weight of the term that drives each weight to a decision.
        beta_range: Its exponent at its start and at the end; a high one leaves weights alone that are undecided.
        warm_start: Share of the iterations before that term acts.
        drop: Probability with which an element of a quantized activation is replaced by its float value.
        scale_rate: Learning rate of the logarithms of the activations' scales; 0 leaves them as they are.
        seed: Of the choice of samples and elements.
        correct: Learn the rounding of weights that make up for the error of what a single layer reads, in place of its
            own (see `correction`); the codes may then be further from the weight than a step.
    """

    iterations: int
    batch_size: int = 32
    learning_rate: float = 1e-2
    reg_param: float = 0.01
    beta_range: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2
    drop: float = 0.0
    scale_rate: float = 0.0
    seed: int = 0
    correct: bool = False

    def check(self) -> None:
        """Refuse options out of range.

        Raises:
            StateError: One is; it is named.
        """
        for name in ("iterations", "batch_size"):
            check_option(getattr(self, name) >= 1, name, getattr(self, name), "give a positive number")
        for name in ("learning_rate", "reg_param"):
            value = getattr(self, name)
            check_option(math.isfinite(value) and value > 0, name, value, "give a positive number")
        high, low = self.beta_range
        check_option(
            high >= low > 0, "beta_range", self.beta_range, "give a start and a smaller positive end, as (20, 2)"
        )
        check_option(0 <= self.warm_start < 1, "warm_start", self.warm_start, "give a share in [0, 1)")
        check_option(0 <= self.drop <= 1, "drop", self.drop, "give a probability in [0, 1]")
        rate = self.scale_rate
        check_option(
            math.isfinite(rate) and rate >= 0, "scale_rate", rate, "give a positive number, or 0 to learn none"
        )

    def cooled(self, iteration: int) -> float:
        """Return the share of the scales' learning rate that is left (cosine)."""
        return 0.5 * (1 + math.cos(iteration / self.iterations * math.pi))

    def beta(self, iteration: int) -> float | None:
        """Return the exponent of the regularisation, None during the warm start (cosine annealing)."""
        start = self.warm_start * self.iterations
        if iteration < start:
            return None
        high, low = self.beta_range
        share = (iteration - start) / max(self.iterations - start, 1)
        return low + 0.5 * (high - low) * (1 + math.cos(share * math.pi))


def learn(visit: Visit, learning: Learning) -> Rounded:
    """Learn the codes of a unit's weights, and the scales of its activations; nothing is changed.

    The loss is the squared error of the unit's output against the float model, summed over channels and averaged over
    samples and places, the inputs being those of the quantized path (asymmetric reconstruction), plus
    `reg_param * sum(1 - |2 h - 1|**beta)`. A fake quantizer that ends the unit is learned by an error of its own: what
    it does to the output is nothing that the weights could make up for.

    Args:
        visit: The unit with its data.
        learning: Options.
    """
    roundings = {}
    for layer in visit.unit.layers:
        steps, step, zero_point = layer.quantizer.steps(layer.weight)
        if learning.correct and is_by_place(visit):
            steps = _corrected(visit, layer, steps, step)
        roundings[layer.key] = LearnedRounding(steps, step, zero_point, (layer.quantizer.qmin, layer.quantizer.qmax))
    scales = {path: _Scale(quantizer) for path, quantizer in _free(visit).items()} if learning.scale_rate else {}
    try:
        for layer in visit.unit.layers:
            layer.quantizer.learn_rounding(roundings[layer.key])
        with torch.enable_grad():
            _descend(visit, roundings, scales, learning)
    finally:
        for layer in visit.unit.layers:
            layer.quantizer.learn_rounding(None)
    return Rounded(
        {key: rounding.codes() for key, rounding in roundings.items()},
        activation_scales={path: scale.value().detach() for path, scale in scales.items()},
    )


def _corrected(visit: Visit, layer: Layer, steps: Tensor, step: Tensor) -> Tensor:
    """Return the steps of the corrected weight."""
    form = WeightMatrix(layer.op, tuple(layer.weight.shape))
    weight = form.matrix((steps * step).to(torch.float64))
    moments = form.moments(input_pairs(visit))
    damping = correction_damping(visit, form, _DAMPING)
    return form.weight(corrected(weight, moments.second, moments.cross, damping)).to(torch.float32) / step


def _descend(
    visit: Visit, roundings: Mapping[str, LearnedRounding], scales: Mapping[str, _Scale], learning: Learning
) -> None:
    groups = [{"params": [r.logits for r in roundings.values()], "lr": learning.learning_rate}]
    if scales:
        groups.append({"params": [s.logarithm for s in scales.values()], "lr": learning.scale_rate})
    optimizer = torch.optim.Adam(groups)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def quantize(node: fx.Node, x: Tensor) -> Tensor | None:
        scale = scales.get(str(node.target))
        return None if scale is None else scale(x)

    feed = make_feed(visit, learning.batch_size, learning.drop, learning.seed, quantize if scales else None)
    channels = visit.targets[0].shape[-1 if visit.unit.layers[-1].op.kind == "linear" else 1]
    for iteration in range(learning.iterations):
        out, target = feed.step()
        loss = (out - target).square().mean() * channels
        if feed.unquantized is not None:
            loss = loss + (feed.unquantized - target).square().mean() * channels
        beta = learning.beta(iteration)
        if beta is not None:
            loss = loss + learning.reg_param * torch.stack([r.indecision(beta) for r in roundings.values()]).sum()
        if scales:
            optimizer.param_groups[1]["lr"] = learning.scale_rate * learning.cooled(iteration)
        # not `backward`: the parameters of the network, which stay, would get gradients too
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


def _free(visit: Visit) -> dict[str, FakeQuantize]:
    """Return the fake quantizers of a unit whose scale is its own and not given by the tensor's nature."""
    paths = [str(node.target) for node in visit.unit.nodes if node.meta.get("quantizes") is not None]
    found = {path: visit.root.get_submodule(path) for path in paths}
    return {
        path: quantizer
        for path, quantizer in found.items()
        if isinstance(quantizer, FakeQuantize) and quantizer.fixed is None and not quantizer.tied
    }


class _Scale:
    """The scale of an activation while it is learned, as `scale * exp(logarithm)`."""

    def __init__(self, quantizer: FakeQuantize) -> None:
        self.quantizer = quantizer
        self.logarithm = torch.zeros_like(quantizer.scale).requires_grad_()

    def value(self) -> Tensor:
        """Return the scale."""
        return self.quantizer.scale * self.logarithm.exp()

    def __call__(self, x: Tensor) -> Tensor:
        """Fake-quantize."""
        q = self.quantizer
        return fake_quantize_learned(x, self.value(), q.zero_point.float(), q.qmin, q.qmax, q.scheme.granularity)
