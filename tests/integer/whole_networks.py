"""Small networks from float model to verified ONNX file, for the tests of lowering and execution."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qat
from qat.export.difference import Verification
from qat.export.verify import ExportResult
from qat.graph.prepared import PreparedModel
from qat.integer.model import IntegerModel
from qat.integer.program import Program

_BORDERS = frozenset({"quantize", "dequantize", "requantize"})


@dataclass(frozen=True)
class Whole:
    """A network in all its forms.

    Attributes:
        model: The float model in evaluation.
        qmodel: Prepared and calibrated.
        imodel: Converted.
        result: The export; every quantized tensor was compared.
        inputs: What it was calibrated with.
    """

    model: nn.Module
    qmodel: PreparedModel
    imodel: IntegerModel
    result: ExportResult
    inputs: tuple[Tensor, ...]

    @property
    def program(self) -> Program:
        return self.imodel.program

    @property
    def verification(self) -> Verification:
        assert self.result.verification is not None
        return self.result.verification

    def kinds(self) -> list[str]:
        """Kinds of all operators in order."""
        return [op.kind for op in self.program.ops]

    def float_kinds(self) -> set[str]:
        """Kinds of the operators that are computed in float."""
        tensors = self.program.tensors
        ops = [op for op in self.program.ops if op.kind not in _BORDERS]
        return {op.kind for op in ops if tensors[op.outputs[0]].encoding is None}

    def outputs(self) -> list[Tensor]:
        return flat(self.imodel(*self.inputs))


def prepared(
    model: nn.Module, *inputs: Tensor, scheme: Mapping[str, Any] | None = None, target: str = "onnxruntime-cpu"
) -> PreparedModel:
    """Prepare and calibrate on `inputs` themselves."""
    settle(model)
    qmodel = qat.prepare(model, inputs, target=qat.load_target(target), scheme=scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qat.calibrate(qmodel, [inputs])
    return qmodel


def take(
    model: nn.Module,
    *inputs: Tensor,
    scheme: Mapping[str, Any] | None = None,
    target: str = "onnxruntime-cpu",
    bound: float = 0.0,
    steps: float = 2.0,
    error: float = 0.1,
    floats: frozenset[str] | set[str] = frozenset(),
    **options: Any,
) -> Whole:
    """Take a model through everything and hold the four forms of it against each other.

    The exported file is executed at the batch sizes 1, 2 and that of `inputs`.

    Args:
        model: The float model.
        *inputs: Example, calibration data and samples; batch (the first size) at least 3.
        scheme: As for `prepare`.
        target: Name of the target.
        bound: Largest difference in codes between ONNX Runtime and the integer model, in any quantized tensor.
        steps: Largest difference of the integer model's outputs from the fake-quantized ones, in codes.
        error: Largest difference of the integer model's outputs from the float ones, in parts of the largest value.
        floats: Kinds that may, and must, be computed in float.
        **options: Further arguments of `export_onnx`.
    """
    qmodel = prepared(model, *inputs, scheme=scheme, target=target)
    batches = [inputs, tuple(x[:1] for x in inputs), tuple(x[1:3] for x in inputs)]
    with tempfile.TemporaryDirectory() as folder:
        result = qat.export_onnx(
            qmodel, Path(folder) / "m.onnx", samples=batches, verify="layers", bound=1e9, unequal_share=None, **options
        )
    whole = Whole(model, qmodel, qat.convert(qmodel), result, inputs)
    assert max(t.max_difference for t in whole.verification.tensors) <= bound, str(whole.verification)
    assert whole.float_kinds() == floats
    with torch.no_grad():
        apart = steps_from(whole, flat(qmodel.eval()(*inputs)))
        assert max(apart) <= steps + 0.01, apart
        wrong = [
            float((want - have).abs().max() / want.abs().max())
            for want, have in zip(flat(model(*inputs)), whole.outputs(), strict=True)
        ]
        assert max(wrong) <= error, wrong
    return whole


def settle(model: nn.Module) -> None:
    """Give batch norms statistics and parameters that are not the trivial ones."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, -0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    model.eval()


def steps_from(whole: Whole, expected: list[Tensor]) -> list[float]:
    """Largest difference of each output of the integer model from another one, in codes."""
    sources = {op.outputs[0]: op.inputs[0] for op in whole.program.ops if op.kind == "dequantize"}
    apart = []
    for name, want, have in zip(whole.program.outputs, expected, whole.outputs(), strict=True):
        assert want.shape == have.shape
        assert want.dtype == have.dtype
        info = whole.program.tensors.get(sources.get(name, name))
        encoding = info.encoding if info is not None else None
        step = encoding.scale[0] if encoding is not None else float(want.abs().max()) / 255
        apart.append(float((want - have).abs().max()) / step)
    return apart


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of any structure of outputs, in order."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


class Fn(nn.Module):
    """A function with modules as a model: `Fn(lambda m, x: m.a(x).relu(), a=nn.Conv2d(...))`."""

    def __init__(self, call: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)
        self.call = call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self, *inputs)


def conv(channels_in: int = 4, channels_out: int = 4, kernel: int = 3) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)
