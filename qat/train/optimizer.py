"""The optimizer of a model: which parameters get what, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import CheckpointError, DataError
from qat.quantizers import Quantizer
from qat.train.settings import OptimizerSettings


def quantizer_parameters(model: nn.Module) -> set[int]:
    """Return the identities of the parameters that quantizers own, such as learned scales."""
    return {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}


def parameter_groups(model: nn.Module, settings: OptimizerSettings, quantizer_lr: float = 1.0) -> list[dict[str, Any]]:
    """Split the trainable parameters by weight decay and learning rate.

    Weights of two or more dimensions decay; biases, norms and scales (all of fewer dimensions) and the
    parameters of quantizers do not, unless `decay_all`.

    Args:
        model: The model.
        settings: Of the optimizer.
        quantizer_lr: Share of the learning rate for the parameters of quantizers.

    Returns:
        Groups as optimizers take them; `lr_share` is what the learning rate is multiplied with.

    Raises:
        DataError: The model has no trainable parameter.
    """
    of_quantizers = quantizer_parameters(model)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        learned = id(parameter) in of_quantizers
        decays = settings.decay_all or (parameter.ndim >= 2 and not learned)
        groups.setdefault((not decays, learned), []).append(parameter)
    if not groups:
        raise DataError("the model has no trainable parameter", "leave out the train stage, or unfreeze some")
    return [
        {
            "params": groups[key],
            "weight_decay": 0.0 if key[0] else settings.weight_decay,
            "lr_share": quantizer_lr if key[1] else 1.0,
        }
        for key in sorted(groups)
    ]


def make_optimizer(model: nn.Module, settings: OptimizerSettings, quantizer_lr: float = 1.0) -> torch.optim.Optimizer:
    """Make the optimizer of a model's trainable parameters."""
    groups = parameter_groups(model, settings, quantizer_lr)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(groups, settings.lr, betas=settings.betas)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, by its share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_share"]


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters in the order of the optimizer's state."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer (momenta, counts) by `name of the value/name of the parameter`."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": value
        for parameter in trained_parameters(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take back what `optimizer_tensors` returned.

    Raises:
        CheckpointError: A tensor belongs to no parameter that is trained, or does not fit it.
    """
    named = dict(model.named_parameters())
    index = {id(p): i for i, p in enumerate(trained_parameters(optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = named.get(name)
        if parameter is None or id(parameter) not in index or value.shape not in ((), parameter.shape):
            raise CheckpointError(
                f"the optimizer's {kind} of {name!r} does not fit the model", "resume with the same model and recipe"
            )
        # `load_state_dict` keeps what it is given where dtype and device are right, and steps write in place
        state.setdefault(index[id(parameter)], {})[kind] = value.clone()
    document = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": document["param_groups"]})
