"""What training minimizes: cross-entropy, mixed with what the float model teaches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.errors import TrainError
from qat.train import processes
from qat.train.evaluate import evaluation_mode
from qat.train.settings import DistillSettings, TrainSettings


def classification_loss(
    scores: Tensor, y: Tensor, settings: TrainSettings, teacher_scores: Tensor | None = None
) -> Tensor:
    """Return the loss of a batch: cross-entropy, mixed with distillation where there is a teacher."""
    scores = scores.float()
    loss = functional.cross_entropy(scores, y, label_smoothing=settings.label_smoothing)
    if settings.distill is None or teacher_scores is None:
        return loss
    t = settings.distill.temperature
    soft = functional.kl_div(
        functional.log_softmax(scores / t, 1),
        functional.log_softmax(teacher_scores.float() / t, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1.0 - settings.distill.weight) * loss + settings.distill.weight * t * t * soft


def feature_loss(mine: Tensor, theirs: Tensor, settings: DistillSettings) -> Tensor:
    """Return how far an inner activation (N, ...) is from the float model's (see `DistillSettings.feature_loss`).

    Of several processes all must call this.
    """
    a, b = mine.float().flatten(1), theirs.detach().float().flatten(1)
    if settings.feature_loss == "cosine":
        return (1.0 - functional.cosine_similarity(a, b, dim=1)).mean()
    # relative, so that layers of different scales weigh the same
    return functional.mse_loss(a, b) / _mean_square(b).clamp(min=1e-12)


def _mean_square(values: Tensor) -> Tensor:
    """Return the mean square, a scalar, over the images of all processes."""
    if processes.size() == 1:
        return values.square().mean()
    squares, count = processes.summed([float(values.square().sum()), values.numel()])
    return values.new_tensor(squares / count)


class Features:
    """The outputs of some modules, as the last forward pass gave them.

    Args:
        model: The model.
        paths: Module paths.
        whose: Noun for messages.

    Raises:
        TrainError: There is no such module.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], whose: str) -> None:
        self.whose = whose
        self.outputs: dict[str, Tensor] = {}
        self._handles = []
        modules = dict(model.named_modules())
        for path in paths:
            if path not in modules:
                self.close()
                raise TrainError(f"the {whose} has no module {path!r} (distill.features)", "give module paths")
            self._handles.append(modules[path].register_forward_hook(self._keeper(path)))

    def _keeper(self, path: str) -> _Keep:
        return _Keep(self.outputs, path)

    def of(self, path: str) -> Tensor:
        """Return a module's output.

        Raises:
            TrainError: The module was not called, or gave no tensor.
        """
        if path not in self.outputs:
            raise TrainError(
                f"module {path!r} of the {self.whose} gives no tensor in a forward pass (distill.features)",
                "choose a module that is called and gives one tensor",
            )
        return self.outputs[path]

    def close(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()


class _Keep:
    def __init__(self, outputs: dict[str, Tensor], path: str) -> None:
        self.outputs, self.path = outputs, path

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:  # noqa: ARG002 - a hook
        if isinstance(output, Tensor):
            self.outputs[self.path] = output


class Objective:
    """The loss of a batch.

    Args:
        model: The model that is trained.
        settings: How.
        teacher: The float model, where `settings.distill` is given; not changed.

    Raises:
        TrainError: Distillation without a float model, or from a module that there is not.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings, teacher: nn.Module | None) -> None:
        if settings.distill is not None and teacher is None:
            raise TrainError("distillation without a float model", "pass the teacher, or leave out distill")
        self.settings = settings
        self.teacher = teacher if settings.distill is not None else None
        paths = () if settings.distill is None else settings.distill.features
        self._mine = Features(model, paths, "model")
        try:
            self._theirs = Features(self.teacher or nn.Module(), paths, "float model")
        except TrainError:
            self._mine.close()
            raise

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the teacher in evaluation mode, and take every hook off at the end."""
        try:
            with contextlib.nullcontext() if self.teacher is None else evaluation_mode(self.teacher):
                yield
        finally:
            self._mine.close()
            self._theirs.close()

    def __call__(self, x: Tensor, scores: Tensor, y: Tensor) -> Tensor:
        """Return the loss, a scalar, of scores (N, classes) that the model has just given for images and labels."""
        distill = self.settings.distill
        if self.teacher is None or distill is None:
            return classification_loss(scores, y, self.settings)
        with torch.no_grad():
            teacher_scores: Tensor = self.teacher(x)
        loss = classification_loss(scores, y, self.settings, teacher_scores)
        if distill.features:
            terms = [feature_loss(self._mine.of(p), self._theirs.of(p), distill) for p in distill.features]
            loss = loss + distill.feature_weight * torch.stack(terms).mean()
        # the graph of a step must not outlive it
        self._mine.outputs.clear()
        self._theirs.outputs.clear()
        return loss
