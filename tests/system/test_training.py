"""Training of a prepared model: any optimizer, compiled, in bfloat16, on two processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

import qat
from qat.errors import DataError
from qat.graph.prepared import PreparedModel

TARGET = qat.load_target("onnxruntime-cpu")
CLASSES = 4


class Net(nn.Module):
    """Convolutions with batch norm, a tie of three, an average, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.left = nn.Conv2d(8, 4, 3, padding=1)
        self.right = nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = F.hardswish(self.norm(torch.cat([self.left(y), self.right(y)], 1)))
        return self.head(y.mean((2, 3)))


def problem(count: int = 64) -> tuple[Tensor, Tensor]:
    """Noisy images of one bright quarter each; which one is the class."""
    generator = torch.Generator().manual_seed(7)
    y = torch.arange(count) % CLASSES
    x = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for i, quarter in enumerate(y.tolist()):
        row, column = divmod(quarter, 2)
        x[i, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0 + quarter
    return x, y


X, Y = problem()


def prepare() -> PreparedModel:
    """A prepared model whose batch norms know the data, as those of a trained model do."""
    torch.manual_seed(0)
    model = Net().train()
    with torch.no_grad():
        for _ in range(30):
            model(X)
    return qat.prepare(model, X[:2], target=TARGET)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the same order here and in the processes that are started, and no thread that waits for a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made() -> PreparedModel:
    qmodel = prepare()
    qat.calibrate(qmodel, [X])
    return qmodel


@pytest.fixture
def qmodel(made: PreparedModel) -> PreparedModel:
    return copy.deepcopy(made)


def train(qmodel: nn.Module, optimizer: torch.optim.Optimizer, steps: int, forward: Any = None) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(qmodel(X) if forward is None else forward(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("phase", ["quantize", "track"])
def test_training_learns_with_any_optimizer(qmodel: PreparedModel, name: str, phase: str) -> None:
    qmodel.train()
    qmodel.set_phase(phase)
    losses = train(qmodel, OPTIMIZERS[name](qmodel.parameters()), 25)
    # the logits of an untrained network have a narrow range, which holds learning back
    assert losses[-1] < 0.75 * losses[0]
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in qmodel.parameters())
    qmodel.eval()
    with torch.no_grad():
        simulated = qmodel(X)
    step = qat.convert(qmodel).program.encoding_of("head")
    assert step is not None
    # what was trained is what the integer model computes, but for codes at the border of two
    assert (qat.convert(qmodel)(X) - simulated).abs().max() <= 1.001 * step.scale[0]


def test_lbfgs_and_gradient_accumulation(qmodel: PreparedModel) -> None:
    qmodel.train()
    qmodel.freeze_batch_norm()
    optimizer = torch.optim.LBFGS(qmodel.parameters(), lr=0.2, max_iter=8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        for part in (slice(0, 32), slice(32, 64)):
            (F.cross_entropy(qmodel(X[part]), Y[part]) / 2).backward()
        return F.cross_entropy(qmodel(X), Y)

    before = float(closure().detach())
    optimizer.step(closure)
    assert float(closure().detach()) < before


def test_tracked_ranges_follow_the_activations(qmodel: PreparedModel) -> None:
    before = qmodel.encodings()["x"].scale[0]
    qmodel.train()
    qmodel.set_phase("track")
    with torch.no_grad():
        for _ in range(20):
            qmodel(2 * X)
    table = qmodel.encodings()
    assert before < table["x"].scale[0] < 2 * before
    assert table["x"].provenance == "qat"
    qmodel.set_phase("quantize")
    with torch.no_grad():
        qmodel(X)
    # weights follow the statistics of their batch norms, activations stay
    assert all(qmodel.encodings()[name] == table[name] for name in qmodel.activation_quantizers())
    qmodel.eval()
    qmodel.set_phase("track")
    with torch.no_grad():
        qmodel(5 * X)
    assert qmodel.encodings()["x"].scale == table["x"].scale


def test_training_without_calibration(qmodel: PreparedModel) -> None:
    fresh = prepare().train()
    fresh.set_phase("track")
    losses = train(fresh, torch.optim.Adam(fresh.parameters(), lr=0.01), 15)
    assert losses[-1] < losses[0]
    fresh.eval()
    assert {e.provenance for e in fresh.encodings().values()} <= {"qat", "ptq", "derived"}
    assert qat.convert(fresh)(X).shape == (64, CLASSES)


def test_training_in_bfloat16(qmodel: PreparedModel) -> None:
    qmodel.train()
    qmodel.set_phase("track")
    seen = []
    qmodel.get_submodule("head").register_forward_hook(lambda m, a, out: seen.append(out.dtype))

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = qmodel(x)
        return out.float()

    losses = train(qmodel, torch.optim.Adam(qmodel.parameters(), lr=0.01), 25, forward)
    assert set(seen) == {torch.bfloat16}
    assert losses[-1] < 0.75 * losses[0]
    assert all(p.dtype == torch.float32 for p in qmodel.parameters())
    assert all(b.dtype != torch.bfloat16 for b in qmodel.buffers())


# -- torch.compile


def same_losses(qmodel: PreparedModel, backend: Any, steps: int = 3) -> None:
    torch._dynamo.reset()
    qmodel.train()
    qmodel.set_phase("track")
    plain = copy.deepcopy(qmodel)
    compiled = torch.compile(qmodel, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (qmodel, plain)]
    mine = train(qmodel, optimizers[0], steps, compiled)
    theirs = train(plain, optimizers[1], steps)
    assert mine == pytest.approx(theirs, rel=1e-3)
    for name, encoding in plain.encodings().items():
        assert qmodel.encodings()[name].scale == pytest.approx(encoding.scale, rel=1e-2), name


@pytest.mark.heavy
def test_the_training_step_compiles_as_one_graph(qmodel: PreparedModel) -> None:
    same_losses(qmodel, "aot_eager")


@pytest.mark.heavy
def test_the_training_step_compiles_with_inductor(qmodel: PreparedModel) -> None:
    same_losses(qmodel, "inductor")


def test_a_change_of_phase_costs_one_compilation(qmodel: PreparedModel) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(qmodel, fullgraph=True, backend=counter)
    qmodel.train()
    for number, phase in enumerate(["float", "quantize", "track"], 1):
        qmodel.set_phase(phase)
        for _ in range(3):
            compiled(X)
        assert counter.frame_count == number
    for phase in ("float", "track", "quantize"):
        qmodel.set_phase(phase)
        compiled(X)
    qmodel.encodings()
    compiled(X)
    assert counter.frame_count == 3
    qmodel.freeze_batch_norm()
    compiled(X)
    compiled(X)
    assert counter.frame_count == 4


# -- several processes


def start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)


def steps_of(qmodel: PreparedModel, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Three steps with tracking. Batch norms are frozen: their statistics would be those of half a batch."""
    qmodel.train()
    qmodel.set_phase("track")
    qmodel.freeze_batch_norm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def result(qmodel: PreparedModel) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in qmodel.state_dict().items() if not k.endswith("_extra_state")}


#: the same batches everywhere, for a network's own rounding may depend on their size
BATCHES = [X[:10], X[10:24], X[24:40], X[40:]]


def worker(rank: int, folder: str) -> None:
    start(rank, folder)
    qmodel = prepare()
    qat.calibrate(qmodel, [BATCHES[:3], BATCHES[3:]][rank])
    calibrated = qmodel.encodings()
    ddp = DistributedDataParallel(qmodel)
    steps_of(qmodel, ddp, X[rank::2], Y[rank::2])
    torch.save(result(qmodel), f"{folder}/{rank}.pt")
    calibrated.save(f"{folder}/{rank}.json")
    qmodel.encodings().save(f"{folder}/{rank}-trained.json")
    # a process without data is no error as long as another has some
    qat.calibrate(qmodel, [[X], []][rank])
    qmodel.encodings().save(f"{folder}/{rank}-one.json")
    # but bad data on one process must not leave the other waiting
    messages = []
    for batches in ([[X[:, :, :4]], [X]][rank], [[], []][rank]):
        try:
            qat.calibrate(qmodel, batches)
        except DataError as error:
            messages.append(str(error))
    Path(folder, f"{rank}.txt").write_text("\n".join(messages), encoding="utf-8")
    dist.barrier()
    # gloo's destructor joins a thread that may wait for the GIL which the destructor holds (torch 2.13): skip it
    os._exit(0)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return folder


def test_two_processes_equal_one(processes: Path) -> None:
    tables = [qat.Encodings.load(processes / f"{rank}.json") for rank in (0, 1)]
    states = [torch.load(processes / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = prepare()
    qat.calibrate(alone, BATCHES)
    assert tables[0] == tables[1]
    assert tables[0] == alone.encodings()
    steps_of(alone, alone, torch.cat([X[0::2], X[1::2]]), torch.cat([Y[0::2], Y[1::2]]))
    expected = result(alone)
    ranges = {key for key in expected if key.startswith("quantizers.")}
    assert ranges
    for key, value in expected.items():
        counts = key.endswith((".tracked", ".samples"))
        if key in ranges or not counts:
            assert torch.equal(states[0][key], states[1][key]), key
        if not counts:
            torch.testing.assert_close(states[0][key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    trained = [qat.Encodings.load(processes / f"{rank}-trained.json") for rank in (0, 1)]
    assert trained[0] == trained[1]
    assert trained[0]["x"].provenance == "qat"
    assert trained[0]["x"].scale == pytest.approx(alone.encodings()["x"].scale, rel=1e-6)


def test_processes_fail_together(processes: Path) -> None:
    tables = [qat.Encodings.load(processes / f"{rank}-one.json") for rank in (0, 1)]
    assert tables[0] == tables[1]
    first, second = (Path(processes, f"{rank}.txt").read_text(encoding="utf-8").splitlines() for rank in (0, 1))
    assert "has shape (64, 1, 4, 8)" in first[0]
    assert second[0] == "calibration failed on another process; see its message"
    assert first[1] == second[1] == "no calibration data; give at least one batch"
