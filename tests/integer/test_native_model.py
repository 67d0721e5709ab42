"""`IntegerModel` on the native runner: equal to PyTorch in every bit, and a model like any other."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_networks import NETWORKS, SCHEMES, image
from torch import Tensor, nn
from torch.nn import functional as F
from whole_networks import Fn, conv, flat, prepared

import qat
from qat.errors import DataError, StateError
from qat.integer.model import IntegerModel
from qat.integer.native.execution import NativeProgram
from qat.native import runner

pytestmark = pytest.mark.skipif(not runner.status().active, reason=f"native runner: {runner.status().reason}")


def reference(imodel: IntegerModel, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs from PyTorch."""
    found = imodel.run(inputs)
    return [found[name] for name in imodel.program.outputs]


def unequal(imodel: IntegerModel, inputs: tuple[Tensor, ...], threads: tuple[int, ...] = (1, 2)) -> list[Any]:
    """(batch size, threads, number of the output) of every output that differs from PyTorch's."""
    assert imodel.native.active
    assert imodel.native.parts >= 1
    wrong = []
    before = torch.get_num_threads()
    for batch in (3, 1):
        some = tuple(x[:batch] for x in inputs)
        expected = reference(imodel, some)
        for count in threads:
            torch.set_num_threads(count)
            found = flat(imodel(*some))
            torch.set_num_threads(before)
            pairs = zip(expected, found, strict=True)
            wrong += [(batch, count, i) for i, (want, have) in enumerate(pairs) if not torch.equal(want, have)]
    return wrong


def unequal_tensors(imodel: IntegerModel, inputs: tuple[Tensor, ...]) -> list[str]:
    """Tensors in which the runner differs from PyTorch where every operator is one of its own and gives its result."""
    program = imodel.program
    batch = inputs[0].shape[0]
    expected = imodel.run(inputs, set(program.tensors))
    values = {name: imodel.constants.get_buffer(key) for name, key in imodel._keys.items()}
    every = NativeProgram(program, values, keep=frozenset(program.tensors))
    found = every.run(imodel._inputs(inputs, {}), batch, imodel._run_op)
    assert len(found) == len(program.tensors)
    return [name for name, value in found.items() if not torch.equal(value, expected[name])]


# results ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_networks_of_every_kind(name: str, scheme: str) -> None:
    model, inputs = NETWORKS[name]()
    imodel = qat.convert(prepared(model, *inputs, **SCHEMES[scheme]))
    assert unequal_tensors(imodel, inputs) == []
    assert unequal(imodel, inputs) == []


@st.composite
def small_networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    channels = draw(st.integers(1, 9))
    size = draw(st.integers(5, 12)), draw(st.integers(5, 12))
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(3, channels, *size) * draw(st.sampled_from([0.1, 1.0, 5.0])) + draw(
        st.sampled_from([0.0, 1.0, -3.0])
    )
    layers: list[nn.Module] = []
    height, width = size
    for _ in range(draw(st.integers(1, 4))):
        kernel = draw(st.sampled_from([1, 2, 3, (3, 1), (1, 3)]))
        tall, wide = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = draw(st.integers(0, tall // 2)), draw(st.integers(0, wide // 2))
        stride = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        groups = draw(st.sampled_from([g for g in (1, 2, 3, channels) if channels % g == 0]))
        outputs = groups * draw(st.integers(1, 5))
        dilation = draw(st.integers(1, 2))
        reach = (dilation * (tall - 1) + 1, dilation * (wide - 1) + 1)
        if height + 2 * padding[0] < reach[0] or width + 2 * padding[1] < reach[1]:
            continue
        layers.append(nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, bias=draw(st.booleans())))
        height = (height + 2 * padding[0] - reach[0]) // stride[0] + 1
        width = (width + 2 * padding[1] - reach[1]) // stride[1] + 1
        channels = outputs
        layers += draw(st.sampled_from([[], [nn.ReLU()], [nn.ReLU6()], [nn.SiLU()], [nn.BatchNorm2d(channels)]]))
        if height > 3 and width > 3 and draw(st.booleans()):
            layers.append(draw(st.sampled_from([nn.MaxPool2d(2, 2), nn.AvgPool2d(2, 1)])))
            step = layers[-1].stride
            height, width = (height - 2) // step + 1, (width - 2) // step + 1
    layers += [nn.Conv2d(channels, channels, 1), nn.Flatten(), nn.Linear(channels * height * width, 3)]
    return nn.Sequential(*layers), x


@settings(max_examples=25)
@given(small_networks(), st.sampled_from(list(SCHEMES)))
def test_random_networks(network: tuple[nn.Module, Tensor], scheme: str) -> None:
    model, x = network
    imodel = qat.convert(prepared(model, x, **SCHEMES[scheme]))
    assert unequal(imodel, (x,), threads=(2,)) == []


# what is asked of it ------------------------------------------------------------------------------------------------


def test_a_network_without_islands_is_one_call() -> None:
    imodel = qat.convert(prepared(nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(252, 3)), *image()))
    assert imodel.native.parts == 1
    assert str(imodel.native) == "the native runner runs 5 of 5 operators, in 1 call"


def test_what_runs_in_pytorch_is_told() -> None:
    model, inputs = NETWORKS["islands"]()
    text = str(qat.convert(prepared(model, *inputs)).native)
    assert "three in PyTorch: 3 spatial dimensions" in text


def test_channels_last_inputs_and_other_strides() -> None:
    imodel = qat.convert(prepared(conv(), *image()))
    (x,) = image()
    expected = reference(imodel, (x,))[0]
    assert torch.equal(imodel(x.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(imodel(x.mT.contiguous().mT), expected)
    assert torch.equal(imodel(x.double()), expected)


def test_results_stay_when_the_next_ones_are_computed() -> None:
    imodel = qat.convert(prepared(conv(), *image()))
    first = imodel(*image())
    kept = first.clone()
    imodel(*image())
    assert torch.equal(first, kept)


def test_a_loaded_state_is_used() -> None:
    imodel = qat.convert(prepared(conv(), *image()))
    x = image()
    before = imodel(*x)
    other = copy.deepcopy(imodel)
    with torch.no_grad():
        other.constants.get_buffer("bias").add_(1000)
    assert not torch.equal(other(*x), before)
    imodel.load_state_dict(other.state_dict())
    assert torch.equal(imodel(*x), other(*x))


def test_copies_and_files_work_and_are_independent() -> None:
    x = image()
    imodel = qat.convert(prepared(nn.Sequential(conv(), nn.ReLU()), *x))
    before = imodel(*x)
    file = io.BytesIO()
    torch.save(imodel, file)
    file.seek(0)
    # what is loaded here was written three lines above
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(*x), before)
    assert torch.equal(copy.deepcopy(imodel)(*x), before)


def test_what_the_library_holds_is_freed_with_the_model() -> None:
    imodel = qat.convert(prepared(conv(), *image()))
    imodel(*image())
    program = imodel._native
    assert program is not None
    network = weakref.ref(next(iter(program._loaded.values())).network)
    assert network() is not None
    del imodel, program
    gc.collect()
    assert network() is None


def test_threads_of_python_share_a_model() -> None:
    imodel = qat.convert(prepared(nn.Sequential(conv(), nn.ReLU(), conv()), *image()))
    inputs = [torch.randn(2, 4, 9, 7) for _ in range(4)]
    expected = [reference(imodel, (x,))[0] for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        wrong.extend(number for _ in range(20) if not torch.equal(imodel(inputs[number]), expected[number]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_many_batch_sizes_keep_few_sessions() -> None:
    imodel = qat.convert(prepared(conv(), *image()))
    for batch in range(1, 12):
        imodel(torch.randn(batch, 4, 9, 7))
    assert imodel._native is not None
    assert len(imodel._native._idle) <= 4


def test_inference_mode_and_autocast_change_nothing() -> None:
    imodel = qat.convert(prepared(nn.Sequential(conv(), nn.Hardswish(), conv()), *image()))
    x = image()
    expected = reference(imodel, x)[0]
    with torch.inference_mode():
        assert torch.equal(imodel(*x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(imodel(*x), expected)


def test_a_plan_that_is_none_is_refused_with_the_librarys_words() -> None:
    with pytest.raises(StateError, match=r"native runner: .*QAT_NOT_A_PLAN"):
        runner.Network(b"nothing")


# the profile --------------------------------------------------------------------------------------------------------


def test_the_profile_has_every_operator() -> None:
    model, inputs = NETWORKS["islands"]()
    imodel = qat.convert(prepared(model, *inputs))
    profile = imodel.profile(*inputs, rounds=2)
    assert {entry.where for entry in profile.entries} == {"native", "pytorch"}
    names = {entry.name for entry in profile.entries}
    assert {"a", "b", "c", "three"} <= names
    assert sum(entry.macs for entry in profile.entries) == 3 * sum(op.macs for op in imodel.program.ops)
    assert profile.seconds > 0
    assert len(profile.to_json()["operators"]) == len(profile.entries)
    lines = str(profile).splitlines()
    assert lines[0].startswith("batch size 3, ")
    assert lines[-1].startswith("all ")
    with pytest.raises(DataError, match="nothing to measure"):
        imodel.profile(*inputs, rounds=0)


def test_gradients_are_not_asked_for() -> None:
    model = Fn(lambda m, x: F.relu(m.a(x)), a=conv())
    imodel = qat.convert(prepared(model, *image()))
    assert not imodel(image()[0].requires_grad_()).requires_grad
