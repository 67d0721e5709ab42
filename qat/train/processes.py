"""Several processes that work as one: who they are, and what they tell each other besides gradients.

All of it is the default group of `torch.distributed`; nothing is kept here. Without a group, or alone in one, a process
is the first of one, and every function returns what it was given. What is told goes as bytes and numbers between
processes of one run: nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat.errors import ProcessError

#: how long a process waits for the others; one that ends is noticed at once
PATIENCE = timedelta(minutes=30)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: without these, the other variables are those of a batch system and mean nothing to us
_MARKS = ("RANK", "LOCAL_RANK")


@dataclass(frozen=True)
class Place:
    """The place of a process among those that torchrun started.

    Attributes:
        rank: Number of the process, from 0.
        size: Number of processes.
        local_rank: Number of the process on its machine, and of the GPU that it uses.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def place_by_environment(environment: Mapping[str, str] | None = None) -> Place:
    """Return the place of this process by torchrun's variables; that of a single process where there are none.

    Args:
        environment: The variables; None for those of the process.

    Raises:
        ProcessError: Some are missing, or make no sense.
    """
    variables = os.environ if environment is None else environment
    if not any(name in variables for name in _MARKS):
        return Place()
    missing = [name for name in _VARIABLES if name not in variables]
    if missing:
        given = next(name for name in _MARKS if name in variables)
        raise ProcessError(
            f"the environment has {given} but not {', '.join(missing)}",
            f"start several processes with torchrun, or unset {given}",
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = variables[name]
        if not text.isdecimal():
            raise ProcessError(f"the variable {name} is {text!r}", "start several processes with torchrun")
        numbers[name] = int(text)
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise ProcessError(
            f"the variable RANK is {numbers['RANK']} and WORLD_SIZE is {numbers['WORLD_SIZE']}",
            "start several processes with torchrun",
        )
    return Place(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"])


def size() -> int:
    """Return the number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Tell whether this is the process that writes and speaks for all."""
    return rank() == 0


@contextlib.contextmanager
def joined(device: torch.device, patience: timedelta = PATIENCE) -> Iterator[None]:
    """Join the processes that torchrun started with this one, and leave them at the end.

    Does nothing in a process that was started alone or has a group already. Tensors of the CPU go by gloo, those of
    GPUs by NCCL.

    Args:
        device: Where is trained.
        patience: How long to wait for the others, at the beginning and later.

    Raises:
        ProcessError: The processes cannot reach each other, or another one ended before this one.
    """
    place = place_by_environment()
    if place.size == 1 or (dist.is_available() and dist.is_initialized()):
        with answered():
            yield
        return
    if not dist.is_available():
        raise ProcessError("this torch was built without torch.distributed", "install another, or use one process")
    if device.type == "cuda" and not dist.is_nccl_available():
        raise ProcessError("this torch has no NCCL, which several processes on GPUs need", "set device: cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, init_method="env://", timeout=patience)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ProcessError(
            f"process {place.rank} of {place.size} cannot reach the others at {address} ({_first_line(error)})",
            "start all of them with torchrun, and check --rdzv-endpoint and the network",
        ) from None
    with answered():
        yield
        dist.barrier()
    # threads of the group may be letting go of tensors, for which they need Python's lock, which the next call holds
    time.sleep(0.05)
    # after an error nothing is torn down in order: the other processes may be anywhere, and this one ends
    dist.destroy_process_group()


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Say so where another process ended, or did not answer in time.

    Raises:
        ProcessError: That happened while the block ran.
    """
    try:
        yield
    except RuntimeError as error:
        if size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        # what torch says names sockets and no cause; --debug shows it
        raise ProcessError("another process ended, or does not answer", "see what it said") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# -- what they tell each other


def summed(values: Sequence[float]) -> list[float]:
    """Return the sums of each value over all processes, in float64."""
    if size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return [float(v) for v in sums]


def of_each(value: int) -> list[int]:
    """Return the value of each process, in their order."""
    if size() == 1:
        return [value]
    return [int(t) for t in tensor_of_each(torch.tensor(value))]


def tensor_of_each(tensor: Tensor) -> list[Tensor]:
    """Return the tensor of each process, in their order; all have one shape and dtype."""
    if size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def text_of_first(make: Callable[[], str]) -> str:
    """Return what a function returns in the first process, which alone calls it.

    Raises:
        ProcessError: It failed, in the other processes; the first one raises what the function raised.
    """
    if size() == 1:
        return make()
    content, failure = b"", None
    if is_first():
        try:
            content = make().encode()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait
            failure = error
    length = torch.tensor(-1 if failure is not None else len(content))
    dist.broadcast(length, 0)
    if failure is not None:
        raise failure
    if int(length) < 0:
        raise ProcessError("process 0 failed", "see what it said")
    buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else _bytes(int(length))
    if len(buffer):
        dist.broadcast(buffer, 0)
    return bytes(buffer.tolist()).decode()


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


def text_of_each(text: str) -> list[str]:
    """Return the text of each process, in their order."""
    if size() == 1:
        return [text]
    content = text.encode()
    lengths = of_each(len(content))
    mine = _bytes(max(1, *lengths)).zero_()
    mine[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    parts = tensor_of_each(mine)
    return [bytes(part[:length].tolist()).decode() for part, length in zip(parts, lengths, strict=True)]


def tensors_of_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the first process, on the CPU; those of the others are not looked at."""
    if size() == 1:
        return dict(tensors)
    names = text_of_first(
        lambda: json.dumps([[k, str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in tensors.items()])
    )
    result = {}
    for name, dtype, shape in json.loads(names):
        if is_first():
            value = tensors[name].detach().to("cpu").contiguous()
        else:
            value = torch.empty(shape, dtype=getattr(torch, dtype))
        if value.numel():
            # gloo does not know every dtype
            dist.broadcast(value.reshape(-1).view(torch.uint8), 0)
        result[name] = value
    return result


def share_state(module: nn.Module) -> None:
    """Give a module the state that it has in the first process; state that is no tensor stays what it is."""
    if size() == 1:
        return
    own = module.state_dict()
    shared = tensors_of_first({key: value for key, value in own.items() if isinstance(value, Tensor)})
    if not is_first():
        module.load_state_dict({**own, **shared})
