"""Every quantizer on a small network: trained, converted, exported and executed, compiled, on two processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import qat
from qat import numerics
from qat.graph.prepared import PreparedModel
from qat.quantizers import Quantizer

TARGET = qat.load_target("onnxruntime-cpu")
GENERATOR = torch.Generator().manual_seed(3)
X, Y = torch.randn(64, 2, 8, 8, generator=GENERATOR), torch.arange(64) % 4


class Net(nn.Module):
    """Batch norms, a residual, a tie of two, a softmax (fixed range), a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8))
        self.side = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = torch.relu(y + self.body(y))
        y = torch.cat([y, torch.softmax(self.side(y), 1)], 1)
        return self.head(y.mean((2, 3)))


#: quantizers of activations and of weights
PAIRS: dict[str, tuple[Any, Any]] = {
    "lsq": ("lsq", "lsq"),
    "lsq+": ("lsq+", {"name": "lsq+", "init": "sigma"}),
    "pact and dorefa": ({"name": "pact", "decay": 0.01}, "dorefa"),
    "dorefa and static": ("dorefa", "static"),
    "tqt": ("tqt", "tqt"),
    "ulq": ("ulq", "ulq"),
    "ulq, fixed": ({"name": "ulq", "fixed_min": True}, {"name": "lsq", "init": "mean"}),
    "qdrop": ("qdrop", "lsq"),
    "lsq with drop": ({"name": "lsq", "drop": 0.5}, "static"),
}


def prepare(activations: Any, weights: Any, observer: str = "minmax", **kwargs: Any) -> PreparedModel:
    torch.manual_seed(0)
    model = Net().train()
    with torch.no_grad():
        for _ in range(20):
            model(X)
    scheme = {
        "activations": {"dtype": "uint4", "quantizer": activations},
        "weights": {"dtype": "int4", "quantizer": weights, "observer": observer},
    }
    qmodel = qat.prepare(model, X[:2], target=TARGET, scheme=scheme, **kwargs)
    qat.calibrate(qmodel, [X], progress=False)
    return qmodel


def train(qmodel: PreparedModel, steps: int = 6, forward: Any = None, seed: int = 0) -> list[float]:
    torch.manual_seed(seed)
    qmodel.train()
    qmodel.set_phase("track")
    learned = dict(qmodel.quantizer_parameters())
    others = [p for name, p in qmodel.named_parameters() if name not in learned]
    groups: list[dict[str, Any]] = [{"params": others}]
    if learned:
        groups.append({"params": list(learned.values()), "lr": 0.005})
    optimizer = torch.optim.Adam(groups, lr=0.01)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(qmodel(X) if forward is None else forward(X), Y)
        decay = qmodel.quantizer_loss()
        optimizer.zero_grad()
        (loss if decay is None else loss + decay).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("pair", PAIRS)
def test_what_was_trained_is_what_is_converted_and_exported(pair: str, tmp_path: Path) -> None:
    qmodel = prepare(*PAIRS[pair])
    before = qmodel.encodings()
    losses = train(qmodel)
    assert losses[-1] < losses[0]
    qmodel.eval()
    seen: dict[str, Tensor] = {}
    hooks = [
        q.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
        for name, q in qmodel.activation_quantizers().items()
    ]
    with torch.no_grad():
        simulated = qmodel(X)
    for hook in hooks:
        hook.remove()
    table = qmodel.encodings()
    # activations lie on the grid of their encodings, the very one
    for name, y in seen.items():
        assert torch.equal(table[name].dequantize(table[name].quantize(y)), y), name
    # and so do weights: the module's weight is that of the codes, over the batch norm's factor
    for key, quantizer, latent in qmodel.weight_quantizers():
        codes, encoding = quantizer.codes(latent)
        assert encoding == table[key]
        values = numerics.dequantize(codes, encoding.scale_tensor, encoding.zero_point_tensor, encoding.granularity)
        factor = quantizer.factor()
        values = values if factor is None else values / factor.reshape(-1, *([1] * (latent.dim() - 1)))
        module = qmodel.get_submodule(key.removesuffix(".weight"))
        assert torch.equal(module.weight, values), key  # type: ignore[arg-type]
    learns = {name for name, q in qmodel.activation_quantizers().items() if q.method.names}
    for name in learns:
        assert (table[name].provenance, table[name].method) in (
            ("qat", qmodel.activation_quantizers()[name].method.name), ("ptq", before[name].method),
        )  # fmt: skip
    if learns and "tqt" not in pair:
        assert any(table[name].provenance == "qat" for name in learns)
    imodel = qat.convert(qmodel)
    step = imodel.program.encoding_of("head")
    assert step is not None
    # biases are rounded, which at 4 bits moves some codes by one; powers of two have many ties besides
    off = (imodel(X) - simulated).abs() / step.scale[0]
    assert float(off.mean()) < 0.5
    result = qat.export_onnx(qmodel, tmp_path / "model.onnx")
    assert result is not None
    # frozen, it is the same model
    qmodel.set_phase("quantize")
    with torch.no_grad():
        assert torch.equal(qmodel(X), simulated)
    assert qmodel.encodings() == table


@pytest.mark.parametrize("pair", ["lsq", "pact and dorefa", "lsq with drop"])
def test_fused_equals_single_modules(pair: str) -> None:
    qmodels = [prepare(*PAIRS[pair], fused=fused) for fused in (True, False)]
    losses = [train(q, 4, seed=5) for q in qmodels]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    states = [dict(q.quantizer_parameters()) for q in qmodels]
    for name, p in states[0].items():
        torch.testing.assert_close(p, states[1][name], rtol=0.02, atol=0.002)


def test_quantizer_parameters_are_those_of_the_quantizers() -> None:
    qmodel = prepare("lsq", "lsq")
    owned = {id(p) for m in qmodel.modules() if isinstance(m, Quantizer) for p in m.parameters(recurse=False)}
    found = dict(qmodel.quantizer_parameters())
    assert {id(p) for p in found.values()} == owned
    names = dict(qmodel.named_parameters())
    assert all(names[name] is p for name, p in found.items())
    assert "stem.0.parametrizations.weight.0.step" in found
    assert "quantizers.stem/2.step" in found
    # a softmax's range is fixed, and tied tensors share one quantizer
    assert sum(name.startswith("quantizers.") for name in found) == sum(
        q.fixed is None for q in qmodel.activation_quantizers().values()
    )
    # none of it is in the float model
    assert set(qmodel.float_state_dict()) == set(Net().state_dict())


def test_pact_decay_is_a_term_of_the_loss_while_it_learns() -> None:
    qmodel = prepare({"name": "pact", "decay": 0.25}, "static")
    assert qmodel.quantizer_loss() is None
    qmodel.set_phase("track")
    loss = qmodel.quantizer_loss()
    alphas = [p for name, p in qmodel.quantizer_parameters() if name.endswith("alpha")]
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(0.125 * sum(float(a.detach()) ** 2 for a in alphas), rel=1e-6)
    for alpha, gradient in zip(alphas, torch.autograd.grad(loss, alphas), strict=True):
        assert float(gradient) == pytest.approx(0.25 * float(alpha.detach()), rel=1e-6)
    none = prepare({"name": "pact", "decay": 0.0}, "lsq")
    none.set_phase("track")
    assert none.quantizer_loss() is None


def test_a_checkpoint_in_the_middle_of_training_goes_on_to_the_same_bits() -> None:
    whole, first = prepare("lsq+", "lsq"), prepare("lsq+", "lsq")
    train(whole, 3)
    train(whole, 3)
    train(first, 3)
    second = prepare("lsq+", "lsq")
    second.load_state_dict(first.state_dict())
    assert second.encodings() == first.encodings()
    train(second, 3)
    assert second.encodings() == whole.encodings()
    assert all(torch.equal(a, whole.state_dict()[k]) for k, a in second.state_dict().items())


@pytest.mark.parametrize("phase", ["track", "quantize"])
@pytest.mark.parametrize("weights", ["lsq", "ulq", "tqt", "static", "follows"])
def test_batch_norm_re_estimation_keeps_codes(weights: str, phase: str) -> None:
    qmodel = prepare("lsq", "static") if weights == "follows" else prepare("lsq", weights, observer="histogram")
    train(qmodel, 4)
    qmodel.set_phase(phase)
    before = {key: q.codes(w) for key, q, w in qmodel.weight_quantizers()}
    factors = {key: q.factor() for key, q, _ in qmodel.weight_quantizers()}
    qat.reestimate_batch_norm(qmodel, [1.5 * X], progress=False)
    for key, quantizer, weight in qmodel.weight_quantizers():
        codes, encoding = quantizer.codes(weight)
        factor, old = quantizer.factor(), factors[key]
        if factor is None or old is None or quantizer.scheme.granularity.kind != "per_channel":
            continue
        assert not torch.allclose(factor, old, rtol=0.01)
        if weights == "tqt":  # its scales are powers of two, which stay
            assert encoding.scale == before[key][1].scale
            continue
        # but for ties of the float product
        assert float((codes != before[key][0]).float().mean()) < 0.01
        expected = before[key][1].scale_tensor * (factor / old).abs()
        torch.testing.assert_close(encoding.scale_tensor, expected, rtol=1e-5, atol=0)


@pytest.mark.heavy
@pytest.mark.parametrize("pair", ["lsq+", "pact and dorefa", "tqt"])
def test_the_training_step_compiles(pair: str) -> None:
    torch._dynamo.reset()
    plain, qmodel = prepare(*PAIRS[pair]), prepare(*PAIRS[pair])
    qmodel.train()
    qmodel.set_phase("track")
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    assert train(qmodel, 3, compiled) == pytest.approx(train(plain, 3), rel=5e-3)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    qmodel = prepare("lsq", "lsq")
    ddp = DistributedDataParallel(qmodel)
    qmodel.train()
    qmodel.freeze_batch_norm()
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.05, momentum=0.9)
    tables = []
    for phase in ("follow", "follow", "track", "track", "quantize", "quantize", "float", "float", "quantize"):
        qmodel.set_phase(phase)
        optimizer.zero_grad()
        F.cross_entropy(ddp(X[rank::2]), Y[rank::2]).backward()
        optimizer.step()
        tables.append({n: qmodel.encodings()[n] for n in qmodel.activation_quantizers()})
    assert tables[4] == tables[-1] != tables[1]
    torch.save({k: v for k, v in qmodel.state_dict().items() if "step" in k or "scale" in k}, f"{folder}/{rank}.pt")
    dist.barrier()
    # as in tests/system/test_training.py
    os._exit(0)


@pytest.mark.heavy
def test_two_processes_learn_the_same_in_every_phase(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert states[0]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
