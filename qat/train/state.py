"""Where a training is: everything that it needs to go on to the very same bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import CheckpointError, TrainError
from qat.train import processes
from qat.train.checkpoint import load_state
from qat.train.ema import WeightAverage
from qat.train.guard import Guard
from qat.train.hooks import EpochRecord, Hook
from qat.train.optimizer import load_optimizer_tensors, optimizer_tensors, trained_parameters
from qat.train.rng import random_states, set_random_state


@dataclass
class Tally:
    """Sums over images.

    Attributes:
        loss: Sum of the losses, each weighted by its images.
        right: Images that were classified rightly.
        n: Images.
    """

    loss: float = 0.0
    right: int = 0
    n: int = 0

    def add(self, loss: float, right: int, n: int) -> None:
        """Add a batch of mean loss `loss`."""
        self.loss, self.right, self.n = self.loss + loss * n, self.right + right, self.n + n

    @property
    def mean(self) -> float:
        """Mean loss."""
        return self.loss / max(1, self.n)

    @property
    def top1(self) -> float:
        """Share of right answers."""
        return self.right / max(1, self.n)


@dataclass
class Position:
    """How far a training has come.

    Attributes:
        epoch: The epoch, from 0.
        step: Batches of it that are done.
        lr: Learning rate of the last step.
        seconds: Wall time of the epoch so far.
        tally: Over the epoch so far.
        window: Since the last line of the log.
        records: Of the finished epochs.
        best_epoch: Number (from 1) of the best epoch so far, or None.
        best_score: Its score; more is better.
        stopped: Training ended before its time.
    """

    epoch: int = 0
    step: int = 0
    lr: float = 0.0
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    window: Tally = field(default_factory=Tally)
    records: list[EpochRecord] = field(default_factory=list)
    best_epoch: int | None = None
    best_score: float = 0.0
    stopped: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object; floats keep every bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Position:
        """Read the JSON object."""
        values = dict(data)
        values["tally"], values["window"] = Tally(**values["tally"]), Tally(**values["window"])
        values["records"] = [EpochRecord(**record) for record in values["records"]]
        return cls(**values)


@dataclass(frozen=True)
class Snapshot:
    """A training at one moment.

    Attributes:
        tensors: Copies on the CPU, by `part/name`: `model`, `optimizer`, `ema`, `hook/<name>`, `random`, and of other
            processes `random-<rank>`; all else is the same in all of them.
        info: The rest, as JSON values.
    """

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any]

    @property
    def position(self) -> Position:
        """Where the training was."""
        return Position.from_json(self.info["position"])

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one part."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


@dataclass(frozen=True)
class Parts:
    """What of a training has state.

    Attributes:
        model: The model.
        optimizer: Its optimizer.
        average: The average of its weights, or None.
        hooks: What takes part.
        guard: What watches the loss.

    Raises:
        TrainError: Two hooks that keep state or give numbers have the same name.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    hooks: Sequence[Hook]
    guard: Guard

    def __post_init__(self) -> None:
        names = [
            h.name
            for h in self.hooks
            if type(h).state_dict is not Hook.state_dict or type(h).metrics is not Hook.metrics
        ]
        for name in names:
            if names.count(name) > 1:
                raise TrainError(f"two hooks of the training are called {name!r}", "give each a name of its own")

    def size(self) -> int:
        """Return about how many bytes a snapshot has once the optimizer has taken a step."""
        # sgd keeps a momentum, the others two moments
        slots = 1 if isinstance(self.optimizer, torch.optim.SGD) else 2
        averages = [] if self.average is None else list(self.average.state_dict().values())
        tensors = [t for t in (*self.model.state_dict().values(), *averages) if isinstance(t, Tensor)]
        tensors += trained_parameters(self.optimizer) * slots
        return sum(t.numel() * t.element_size() for t in tensors)

    def snapshot(self, position: Position, extra: Mapping[str, Any]) -> Snapshot:
        """Copy everything; of several processes all must call this.

        Args:
            position: Where the training is.
            extra: More JSON values to note.
        """
        randoms, random_values = random_states()
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
            "ema": {} if self.average is None else self.average.state_dict(),
            **{f"hook/{hook.name}": hook.state_dict() for hook in self.hooks},
            **{_random(i): tensors for i, tensors in enumerate(randoms)},
        }
        tensors = {f"{part}/{key}": _copy(value) for part, values in parts.items() for key, value in values.items()}
        info = {
            **extra,
            "position": position.to_json(),
            "guard": self.guard.state_dict(),
            **{_random(i): values for i, values in enumerate(random_values)},
        }
        return Snapshot(tensors, info)

    def restore(self, snapshot: Snapshot, source: str) -> Position:
        """Put everything back as it was; return the position.

        Args:
            snapshot: What `snapshot` returned.
            source: Noun for messages.

        Raises:
            CheckpointError: It is of another model, or of other settings.
        """
        load_state(self.model, snapshot.part("model"), source)
        load_optimizer_tensors(self.model, self.optimizer, snapshot.part("optimizer"))
        if self.average is not None:
            self.average.load_state_dict(snapshot.part("ema"))
        for hook in self.hooks:
            state = snapshot.part(f"hook/{hook.name}")
            if state or type(hook).state_dict is not Hook.state_dict:
                hook.load_state_dict(state)
        try:
            self.guard.load_state_dict(snapshot.info["guard"])
            own = _random(processes.rank())
            set_random_state(snapshot.part(own), snapshot.info[own])
            return snapshot.position
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{source} is no checkpoint of a training ({error!r})", "resume from another checkpoint"
            ) from None


def _random(rank: int) -> str:
    """Name of the random numbers of a process."""
    return f"random-{rank}" if rank else "random"


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    # extra state of a user's module; kept in memory it may be anything
    return copy.deepcopy(value)
