"""The checkpoints of a training on disk: the newest ones and the best one, found again after whatever happened."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import CheckpointError, OutputError
from qat.files import atomic_write_bytes
from qat.train import processes
from qat.train.checkpoint import load_checkpoint, save_checkpoint
from qat.train.state import Snapshot

_NAME = re.compile(r"epoch-(\d+)-step-(\d+)\.safetensors")
_BEST = re.compile(r"best-(\d+)\.safetensors")


@dataclass(frozen=True)
class TrainingCheckpoints:
    """A folder with the checkpoints of one training: `epoch-0003-step-000120.safetensors`, `best-0002.safetensors`.

    Attributes:
        folder: The folder; it holds nothing else.
        keep: Newest checkpoints that are kept.
    """

    folder: Path
    keep: int = 3

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, whole or not at all; then remove those that are not wanted any more.

        Raises:
            OutputError: It cannot be written; earlier ones are as they were.
            CheckpointError: The model's state holds something other than tensors.
        """
        position = snapshot.position
        name = f"epoch-{position.epoch:04d}-step-{position.step:06d}.safetensors"
        save_checkpoint(self.folder / name, snapshot.tensors, {**snapshot.info, **circumstances()})
        for path in self._newest_first()[self.keep :]:
            path.unlink(missing_ok=True)
        # a best one that an older checkpoint names may be needed if the newest turns out damaged
        epochs = sorted((int(m[1]) for p in self._files() if (m := _BEST.fullmatch(p.name))), reverse=True)
        for epoch in epochs[self.keep + 1 :]:
            self._best(epoch).unlink(missing_ok=True)

    def save_best(self, model: Mapping[str, Tensor], epoch: int, score: float) -> None:
        """Write the state of the model as it was after its best epoch (from 1).

        Raises:
            OutputError: It cannot be written.
        """
        save_checkpoint(self._best(epoch), model, {"epoch": epoch, "score": score})

    def load_best(self, epoch: int) -> dict[str, Tensor]:
        """Read what `save_best` wrote.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        return dict(load_checkpoint(self._best(epoch)).tensors)

    def keep_best(self, path: Path) -> None:
        """Copy the model of the best epoch, if there is one, to a file that stays.

        Raises:
            OutputError: It cannot be written.
        """
        # later ones are better: only then are they written
        found = max((p for p in self._files() if _BEST.fullmatch(p.name)), default=None)
        if found is not None:
            atomic_write_bytes(path, found.read_bytes())

    def latest(self, say: Callable[[str], None]) -> Snapshot | None:
        """Read the newest checkpoint that is whole; each damaged one is named. None where there is none.

        Raises:
            CheckpointError: It was written by another number of processes.
        """
        for path in self._newest_first():
            try:
                found = load_checkpoint(path)
                snapshot = Snapshot(found.tensors, found.info)
                best = snapshot.position.best_epoch
                if best is not None:
                    self.load_best(best)
            except (CheckpointError, KeyError, TypeError) as error:
                say(f"warning: {path} cannot be used ({error}); going on from the one before")
                continue
            _check_circumstances(found.info, path)
            return snapshot
        return None

    def require_space(self, size: int) -> None:
        """Check that checkpoints of `size` bytes will fit on the disk.

        Raises:
            OutputError: They will not.
        """
        place = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        # while one is written those that it will replace are still there; and the best one
        needed, free = size * (self.keep + 2), shutil.disk_usage(place).free
        if free < needed:
            raise OutputError(
                f"the checkpoints of this training need {_mebi(needed)} in {self.folder} and {_mebi(free)} are free",
                "free some space, choose another folder, or keep fewer (checkpoint.keep)",
            )

    def _best(self, epoch: int) -> Path:
        return self.folder / f"best-{epoch:04d}.safetensors"

    def _files(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def _newest_first(self) -> list[Path]:
        found = [(int(m[1]), int(m[2]), path) for path in self._files() if (m := _NAME.fullmatch(path.name))]
        return [path for _, _, path in sorted(found, reverse=True)]


def circumstances() -> dict[str, Any]:
    """Return what a training's bits depend on besides its state."""
    return {"world_size": processes.size(), "torch": torch.__version__, "threads": torch.get_num_threads()}


def _check_circumstances(info: Mapping[str, Any], path: Path) -> None:
    """Compare `circumstances` as they were when a checkpoint was written with those of now.

    Raises:
        CheckpointError: The number of processes is another.
    """
    now = circumstances()
    if info.get("world_size") != now["world_size"]:
        raise CheckpointError(
            f"{path} was written by {info.get('world_size')} processes and now there are {now['world_size']}, each of "
            "which would need its own part of the data and its own random numbers",
            "resume with as many processes, or begin the run again with --overwrite",
        )
    for key, noun in (("torch", "torch"), ("threads", "threads:")):
        if info.get(key) != now[key]:
            warnings.warn(
                f"{path} was written with {noun} {info.get(key)}, and now there is {now[key]}: training goes on, but"
                " may end with other bits than it would have",
                stacklevel=3,
            )


def _mebi(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
