"""Two processes with gloo: equal ranges on both ranks, equal to one process that saw all the data."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from qat.observers import OBSERVERS, make_observer
from qat.scheme import PER_TENSOR, Granularity, ObserverSpec, Scheme

pytestmark = pytest.mark.filterwarnings("ignore::qat.errors.QuantizationWarning")
SCHEME = Scheme("int8", symmetric=True)
KINDS = [(PER_TENSOR, None), (Granularity("per_channel", axis=1), 3)]


def data():
    return torch.randn(40, 3, 4, generator=torch.Generator().manual_seed(0))


def observers():
    return [
        make_observer(ObserverSpec(name), granularity, channels, name)
        for name in sorted(OBSERVERS)
        for granularity, channels in KINDS
    ]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # parts of unequal size, one of them with a nan
    part = data()[:13] if rank == 0 else data()[13:]
    results = []
    for observer in observers():
        observer.observe(part)
        if rank == 1:
            observer.observe(torch.full((1, 3, 4), float("nan")))
        observer.all_reduce()
        results.append((observer.range(SCHEME), observer.state_dict()))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_reduce(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for observer, *results in zip(observers(), *ranks, strict=True):
        (range0, state0), (range1, state1) = results
        assert all(torch.equal(a, b) for a, b in zip(range0, range1, strict=True))
        assert all(torch.equal(state0[key], state1[key]) for key in state0)
        assert int(state0["samples"]) == 41
        assert int(state0["nonfinite"]) == 12
        if not observer.order_dependent:
            observer.observe(data())
            assert all(torch.equal(a, b) for a, b in zip(range0, observer.range(SCHEME), strict=True))


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_without_processes_nothing_happens(name):
    observer = make_observer(ObserverSpec(name), PER_TENSOR, None, "x")
    observer.observe(data())
    before = observer.range(SCHEME)
    observer.all_reduce()
    assert observer.range(SCHEME) == before
    assert int(observer.samples) == 40
