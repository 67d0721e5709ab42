"""Block reconstruction: the rounding of all weights of a block is learned together.

Sources: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (ICLR 2021); Wei et
al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization" (ICLR 2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from qat.algorithms.blocks import Blocks, block_units
from qat.algorithms.learn import Learning, learn
from qat.algorithms.resume import Progress, digest
from qat.algorithms.rounding import (
    Rounded,
    Rounding,
    UnitRounding,
    count_samples,
    refuse_nonfinite,
    roundable,
    set_rounding,
    take_over,
)
from qat.algorithms.sweep import DEFAULT_MEMORY, Visit, gather, sweep
from qat.algorithms.units import Unit
from qat.graph.prepared import PreparedModel


def reconstruct(
    qmodel: PreparedModel,
    batches: Iterable[Any],
    *,
    blocks: Blocks = "residual",
    iterations: int = 500,
    batch_size: int = 32,
    learning_rate: float = 1e-2,
    scale_rate: float = 0.0,
    drop: float = 0.5,
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
    """Learn the rounding of the weights of a calibrated model, block by block, and fix them on their grids.

    As `adaround`, but what is to be reproduced is the output of a block of several layers, so that the errors of its
    layers can make up for each other.

    Args:
        qmodel: The calibrated model, which is changed: its weights become values of their grids.
        batches: As for `calibrate`.
        blocks: Which pieces are reconstructed as one (see `block_units`); layers in none are pieces of their own.
        iterations: Steps of gradient descent a block.
        batch_size: Samples a step.
        learning_rate: Of the rounding variables.
        scale_rate: Of the logarithms of the scales of the blocks' activations, which are learned too (LSQ); 0 leaves
            them as calibrated. Advisable for activations of 4 bits.
        drop: Probability with which an element of a quantized activation is float during the learning.
        reg_param: Weight of the term that drives each weight to a decision.
        beta_range: Its exponent at its start and at the end.
        warm_start: Share of the iterations before that term acts.
        seed: Of the choice of samples and elements.
        correct: Layers that are in no block make up for the error of what they read, as in `adaround`.
        samples: Take at most as many; None for all.
        memory: Bytes for activations (see `gather`); fewer samples are taken where they do not fit.
        float_model: The model that `qmodel` was made of, where its weights have been changed since.
        progress: Show a progress bar; None for only on a terminal.
        checkpoint: File that holds what is done so far; where it is there and fits, the work goes on from it, to the
            same bits as without the interruption.

    Returns:
        The error of every block before and after.

    Raises:
        DataError: No batch, one that does not fit, or not even one sample fits the memory.
        StateError: The model was not calibrated, has no quantized weight, or an option is out of range.
        CheckpointError: The checkpoint is damaged, or of another model, other data or other options.
        OutputError: The checkpoint cannot be written.
    """
    learning = Learning(
        iterations, batch_size, learning_rate, reg_param, beta_range, warm_start, drop, scale_rate, seed, correct
    )
    learning.check()
    units = roundable(qmodel, block_units(qmodel, blocks, "quantizer" if scale_rate else "activation"))
    return reconstruct_units(
        qmodel, batches, units, learning, "reconstruct", samples=samples, memory=memory, float_model=float_model,
        progress=progress, checkpoint=checkpoint,
    )  # fmt: skip


def reconstruct_units(
    qmodel: PreparedModel,
    batches: Iterable[Any],
    units: Sequence[Unit],
    learning: Learning,
    method: str,
    *,
    samples: int | None,
    memory: int,
    float_model: nn.Module | None,
    progress: bool | None,
    checkpoint: str | Path | None,
) -> Rounding:
    """Learn the rounding of some units, in order (see `reconstruct` for the arguments and errors)."""
    data = gather(qmodel, batches, samples=samples, memory=memory, batch_size=learning.batch_size)
    count = count_samples(qmodel, data, method)
    options = {"method": method, "units": [unit.name for unit in units], **asdict(learning)}
    path = None if checkpoint is None else Path(checkpoint)
    done = Progress(path, digest(qmodel, data, options, float_model) if path is not None else "")
    results: list[UnitRounding] = []

    def visit(found: Visit) -> None:
        result = done.done.get(found.unit.name)
        if result is not None:
            if not result.kept:
                tensors = done.tensors(found.unit.name)
                rounded = Rounded(_part(tensors, "codes"), activation_scales=_part(tensors, "scale"))
                set_rounding(found, rounded, method)
        else:
            refuse_nonfinite(found)
            # of its own, so that a unit does not depend on how often numbers were drawn before it
            learned = learn(found, replace(learning, seed=learning.seed + len(results)))
            result = take_over(found, learned, method)
            tensors = {f"codes:{key}": value for key, value in learned.codes.items()}
            tensors |= {f"scale:{key}": value for key, value in learned.activation_scales.items()}
            done.add(result, {} if result.kept else tensors)
        results.append(result)

    sweep(qmodel, data, units, visit, float_model=float_model, progress=progress, title=method)
    return Rounding(method, tuple(results), count)


def _part(tensors: dict[str, Any], kind: str) -> dict[str, Any]:
    return {k.removeprefix(f"{kind}:"): v for k, v in tensors.items() if k.startswith(f"{kind}:")}
