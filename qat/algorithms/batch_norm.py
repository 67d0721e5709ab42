"""Re-estimation of batch-norm statistics under quantization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from qat.algorithms.restore import restored
from qat.errors import DataError, StateError
from qat.graph.batches import first_samples, model_inputs, sample_count
from qat.graph.prepared import PreparedModel
from qat.quantizers import QUANTIZE


class _Moments:
    """Mean and variance of what a batch norm reads, over all batches."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm, self.momentum = norm, norm.momentum
        self.batches = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
        self.sum, self.square = (torch.zeros(norm.num_features, dtype=torch.float64) for _ in range(2))
        self.count = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG002 - a hook
        rows = inputs[0].detach().movedim(1, 0).flatten(1).to(torch.float64)
        self.sum += rows.sum(1).cpu()
        self.square += rows.square().sum(1).cpu()
        self.count += rows.shape[1]

    def release(self) -> None:
        self.norm.momentum = self.momentum
        if self.batches is not None and self.norm.num_batches_tracked is not None:
            self.norm.num_batches_tracked.copy_(self.batches)

    def store(self) -> None:
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        mean = self.sum / self.count
        variance = (self.square / self.count - mean**2).clamp(min=0.0) * self.count / max(self.count - 1, 1)
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(variance)


def reestimate_batch_norm(
    qmodel: PreparedModel, batches: Iterable[Any], *, samples: int | None = None, progress: bool | None = None
) -> tuple[str, ...]:
    """Set the statistics of all batch norms to what quantized layers really give them.

    Every batch is normalized by its own statistics, so that each layer sees what the corrected layers before it will
    give. Weights are quantized with a factor of the running variance: a grid by channel that is fixed, calibrated or
    learned, moves along with it, so that the codes stay; others that are fixed are chosen anew.

    Source: Sun et al., "Hybrid 8-bit Floating Point Training and Inference for Deep Neural Networks" (NeurIPS 2019),
    section 3.1; Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (ICML 2022), section 5.2.

    Args:
        qmodel: The calibrated model, which is changed. Do it before weights are rounded by `adaround` and its like.
        batches: As for `qat.calibrate`; batches of many samples are better.
        samples: Stop after this many samples; None for all.
        progress: Show a progress bar; None for only on a terminal.

    Returns:
        Module paths of the batch norms.

    Raises:
        StateError: The model was not calibrated, or has no batch norm that keeps statistics.
        DataError: No batch, or one that does not fit.
    """
    qmodel.encodings()  # says which tensor has no range
    norms = {
        name: module
        for name, module in qmodel.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise StateError("the model has no batch norm with running statistics", "leave the re-estimation out")
    moments = {name: _Moments(norm) for name, norm in norms.items()}
    factors = {key: quantizer.factor() for key, quantizer, _ in qmodel.weight_quantizers()}
    with restored(qmodel), torch.no_grad():
        qmodel.eval()
        qmodel.set_phase(QUANTIZE)
        hooks = [norms[name].register_forward_pre_hook(found) for name, found in moments.items()]
        try:
            for norm in norms.values():
                norm.train()
                # the running statistics stand still: the weights' factors are made of them
                norm.momentum = 0.0
            seen = _run(qmodel, batches, samples, progress)
        finally:
            for hook in hooks:
                hook.remove()
            for found in moments.values():
                found.release()
        if not seen:
            raise DataError("no data for the batch norms", "give at least one batch")
        for found in moments.values():
            if found.count:
                found.store()
        for key, quantizer, weight in qmodel.weight_quantizers():
            if quantizer.batch_norm is not None:
                quantizer.follow_batch_norm(weight, factors[key])
    return tuple(norms)


def _run(qmodel: PreparedModel, batches: Iterable[Any], samples: int | None, progress: bool | None) -> int:
    seen = 0
    hidden = None if progress is None else not progress
    for batch in tqdm(batches, desc="batch norm", unit="batch", leave=False, disable=hidden):
        inputs = model_inputs(qmodel, batch)
        if samples is not None:
            inputs = first_samples(qmodel, inputs, samples - seen)
        qmodel(*inputs)
        seen += sample_count(qmodel, inputs)
        if samples is not None and seen >= samples:
            break
    return seen
