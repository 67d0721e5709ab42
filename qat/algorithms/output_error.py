"""What quantizing a tensor does to the outputs of the model, to first order: one backward pass for all tensors.

Source: the Gauss-Newton view of quantization error (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training
Quantization", ICML 2020, section 3; Li et al., "BRECQ", ICLR 2021, section 3.1), with the products of the Jacobian
estimated by random signs (Hutchinson 1989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat.graph.prepared import PreparedModel
from qat.quantizers import FakeQuantize

#: gets one batch of a tensor, and the derivative of each sample's projected outputs by it
Visit = Callable[[Tensor, Tensor], None]


def visit_gradients(
    qmodel: PreparedModel,
    quantizers: Mapping[str, FakeQuantize],
    batches: Iterable[tuple[Tensor, ...]],
    visit: Mapping[str, Visit],
) -> None:
    """Run the model forward and back on each batch and show every tensor together with its gradient.

    With J the Jacobian of a sample's outputs by a tensor, and r a vector of random signs, the gradient is `r J`. For
    a small change d of the tensor `(r J d)^2` is in the mean `|J d|^2`, the squared change of the outputs, whatever
    the layers in between; for scores see `score_signs`. The signs are drawn from the bits of the sample, so that it
    does not matter in which batch, or on which process, it comes.

    Args:
        qmodel: The model, in the phase `float` and in evaluation mode. Its parameters get no gradients.
        quantizers: Whose inputs are looked at, by name.
        batches: The inputs of the model, batch by batch.
        visit: What to call for each of `quantizers`, by name, with its input and the gradient, both (N, ...) float. A
            tensor that the outputs do not depend on is not shown.
    """
    handles = [q.register_forward_pre_hook(_watch(visit[name])) for name, q in quantizers.items()]
    try:
        with without_parameters(qmodel), torch.enable_grad():
            for inputs in batches:
                project_back(qmodel(*(x.detach().clone() for x in inputs)), inputs)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_parameters(qmodel: PreparedModel) -> Iterator[None]:
    """Let a model's parameters get no gradients meanwhile."""
    parameters = [p for p in qmodel.parameters() if p.requires_grad]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def project_back(outputs: Any, inputs: tuple[Tensor, ...]) -> None:
    """Go back from the outputs of a batch, times random signs; those of scores are `score_signs`."""
    projected = []
    for y in tree_leaves(outputs):
        if isinstance(y, Tensor) and y.requires_grad:
            signs = random_signs(inputs, y.shape).to(y.device, y.dtype)
            projected.append(((score_signs(signs, y.detach()) if y.dim() == 2 and y.shape[1] > 1 else signs) * y).sum())
    if projected:
        torch.stack([p.double() for p in projected]).sum().backward()  # type: ignore[no-untyped-call]


def score_signs(signs: Tensor, scores: Tensor) -> Tensor:
    """Return `g` such that the mean of `(g d)**2` over the signs is the importance of a change d of scores.

    With q half the scores' softmax and half the same share for each class, it is the variance of d under q: `g = v -
    q sum(v)`, `v = signs sqrt(q)`. With the softmax alone it would be twice the Kullback-Leibler divergence, to second
    order; the other half keeps an eye on classes that these samples do not show. A shift of all scores is nothing.

    Args:
        signs: +-1, (N, classes).
        scores: Likewise.
    """
    share = (scores.softmax(1) + 1.0 / scores.shape[1]) / 2
    weighted = signs * share.sqrt()
    return weighted - share * weighted.sum(1, keepdim=True)


def _watch(visit: Visit) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if not torch.is_grad_enabled() or not x.is_floating_point():
            return args
        # the first tensors of a model depend on nothing that has a gradient; operators in place may change the copy
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = x.detach()

        def show(gradient: Tensor) -> None:
            with torch.no_grad():
                visit(value, gradient)

        x.register_hook(show)
        return (x.clone(), *args[1:])

    return before


def random_signs(inputs: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
    """Return +-1 in the shape of an output, float32: for each sample by a hash of its inputs' bits."""
    count = shape[0] if shape else 1
    seed = torch.zeros(count, dtype=torch.int64)
    for x in inputs:
        if x.dim() == 0 or x.shape[0] != count:
            continue
        bits = x.detach().cpu().to(torch.float32).contiguous().view(torch.int32).reshape(count, -1).to(torch.int64)
        places = _mix(torch.arange(bits.shape[1], dtype=torch.int64))
        seed = _mix(seed ^ _mix(bits ^ places).sum(1))
    places = torch.arange(max(1, shape.numel() // max(1, count)), dtype=torch.int64)
    hashed = _mix(seed[:, None] ^ _mix(places + 1))
    return torch.where(hashed & (1 << 40) != 0, 1.0, -1.0).reshape(shape)


def _mix(x: Tensor) -> Tensor:
    """Return a hash of 64 bits for each element (the finalizer of splitmix64, Steele et al. 2014)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _signed(x: int) -> int:
    """Return the signed integer of the same 64 bits."""
    return x - (1 << 64) if x >= 1 << 63 else x
