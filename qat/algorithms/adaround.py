"""AdaRound: each weight of a layer is rounded down or up, whichever is better for the layer's output.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (ICML 2020).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from qat.algorithms.learn import Learning
from qat.algorithms.reconstruct import reconstruct_units
from qat.algorithms.rounding import Rounding, roundable
from qat.algorithms.sweep import DEFAULT_MEMORY
from qat.algorithms.units import layer_units
from qat.graph.prepared import PreparedModel


def adaround(
    qmodel: PreparedModel,
    batches: Iterable[Any],
    *,
    iterations: int = 500,
    batch_size: int = 32,
    learning_rate: float = 1e-2,
    reg_param: float = 0.01,
    beta_range: tuple[float, float] = (20.0, 2.0),
    warm_start: float = 0.2,
    seed: int = 0,
    correct: bool = False,
    samples: int | None = None,
    memory: int = DEFAULT_MEMORY,
    float_model: nn.Module | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> Rounding:
    """Learn the rounding of the weights of a calibrated model, layer by layer, and fix them on their grids.

    The output that a layer is to reproduce is that after its folded batch norm, its clamp (ReLU), and the activation
    function that alone reads it (leaky ReLU, SiLU). What it reads is quantized, by the layers before it that are
    rounded already, while the output to reproduce is the float model's.

    Args:
        qmodel: The calibrated model, which is changed: its weights become values of their grids.
        batches: As for `calibrate`.
        iterations: Steps of gradient descent a layer.
        batch_size: Samples a step.
        learning_rate: Of the rounding variables.
        reg_param: Weight of the term that drives each weight to a decision.
        beta_range: Its exponent at its start and at the end.
        warm_start: Share of the iterations before that term acts.
        seed: Of the choice of samples.
        correct: First change the weights so that they make up for the error of what the layer reads, as `gptq` does;
            codes may then be further than a step from the weight. False: the original algorithm.
        samples: Take at most as many; None for all.
        memory: Bytes for activations (see `gather`); fewer samples are taken where they do not fit.
        float_model: The model that `qmodel` was made of, where its weights have been changed since.
        progress: Show a progress bar; None for only on a terminal.
        checkpoint: File that holds what is done so far; where it is there and fits, the work goes on from it.

    Returns:
        The error of every layer before and after.

    Raises:
        DataError: No batch, one that does not fit, or not even one sample fits the memory.
        StateError: The model was not calibrated, has no quantized weight, or an option is out of range.
        CheckpointError: The checkpoint is damaged, or of another model, other data or other options.
        OutputError: The checkpoint cannot be written.
    """
    learning = Learning(
        iterations, batch_size, learning_rate, reg_param, beta_range, warm_start, seed=seed, correct=correct
    )
    learning.check()
    units = roundable(qmodel, layer_units(qmodel, "activation"))
    return reconstruct_units(
        qmodel, batches, units, learning, "adaround", samples=samples, memory=memory, float_model=float_model,
        progress=progress, checkpoint=checkpoint,
    )  # fmt: skip
