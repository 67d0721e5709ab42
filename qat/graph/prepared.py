"""`PreparedModel`: the user's modules with fake quantization at the planned places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat import native
from qat.encoding import Encoding
from qat.encodings import Encodings
from qat.errors import EncodingError, PlanError, StateError
from qat.graph.fuse import fuse
from qat.graph.opgraph import OpGraph
from qat.graph.plan import Plan
from qat.graph.state import check_state, check_tensors
from qat.graph.structure import Structure
from qat.quantizers import FakeQuantize, Phase, Quantizer, WeightFakeQuantize
from qat.quantizers.phases import (
    FLOAT,
    FOLLOW,
    OBSERVE,
    QUANTIZE,
    TRACK,
    freeze_batch_norm,
    pack_frozen,
    set_phase,
    unpack_frozen,
)

QUANTIZERS = "quantizers"
_OWN_ATTRIBUTES = frozenset(
    {QUANTIZERS, "opgraph", "plan", "input_dtypes", "structure", "samples", "_frozen", "_graph", "_fused", "_run"}
)
PHASES: Mapping[str, Phase] = {
    "float": FLOAT,
    "observe": OBSERVE,
    "follow": FOLLOW,
    "track": TRACK,
    "quantize": QUANTIZE,
}


def quantizer_key(name: str) -> str:
    """Key of a tensor's quantizer in the module dictionary (a key may not hold a dot)."""
    return name.replace(".", "/")


class PreparedModel(nn.Module):
    """A float model with fake quantization; trainable with any loop.

    The user's modules keep their names, so `model.features[0]` is still there. Weights are parametrized, activations
    pass through the modules in `quantizers`. `forward` takes the arguments of the user's model.

    Args:
        root: A private copy of the user's model; its module tree is adopted.
        graph: Traced graph whose quantizer calls are inserted already.
        opgraph: The same model as named operators.
        plan: The plan that was followed.
        quantizers: Activation quantizers by tensor name.
        input_dtypes: Element type of each tensor input.
        structure: What the user's model returns.

    Raises:
        PlanError: A member of the model has a name that a prepared model needs.

    Attributes:
        samples: A few real inputs that calibration keeps, for the verification of exports; not part of the state.
    """

    quantizers: nn.ModuleDict

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        opgraph: OpGraph,
        plan: Plan,
        quantizers: Mapping[str, FakeQuantize],
        input_dtypes: Mapping[str, torch.dtype],
        structure: Structure,
    ) -> None:
        super().__init__()
        _refuse_names(root)
        self._modules.update(root._modules)
        self._parameters.update(root._parameters)
        self._buffers.update(root._buffers)
        self._non_persistent_buffers_set.update(root._non_persistent_buffers_set)
        self.quantizers = nn.ModuleDict({quantizer_key(name): q for name, q in quantizers.items()})
        self.opgraph = opgraph
        self.plan = plan
        self.input_dtypes = dict(input_dtypes)
        self.structure = structure
        self.samples: tuple[Tensor, ...] = ()
        self.training = root.training
        self._frozen: tuple[str, ...] = ()
        self._graph = graph
        self._fused = False
        self._run = _compile(graph)

    @property
    def graph(self) -> fx.Graph:
        """The torch.fx graph that `forward` executes, one call an operator."""
        return self._graph

    @property
    def fused(self) -> bool:
        """Whether `forward` executes the fused form of `graph` (see `qat.optimize_for_training`)."""
        return self._fused

    @fused.setter
    def fused(self, fused: bool) -> None:
        self._fused = fused
        self._compile()

    def _compile(self) -> None:
        if self._fused:
            native.status()  # loads the library, which `torch.compile` cannot
        self._run = _compile(fuse(self._graph, self) if self._fused else self._graph)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with fake quantization, as the current phase says."""
        result = self._run(self, *args, **kwargs)
        return result if self.structure.form == "leaf" else self.structure.restore(result)

    # -- copying and state

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_run"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()

    def get_extra_state(self) -> Tensor:
        """Names of the frozen batch norms, as a tensor."""
        return pack_frozen(self._frozen)

    def set_extra_state(self, state: object) -> None:
        """Restore which batch norms are frozen."""
        self.freeze_batch_norm(unpack_frozen(state))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave: weights, ranges, phases and frozen batch norms.

        Args:
            state_dict: The state.
            strict: Its keys must be the model's.
            assign: Take the tensors over instead of copying them (as torch's).

        Raises:
            CheckpointError: A key is missing or unknown, or a value does not fit; the first one is named, and nothing
                is loaded.
        """
        check_state(self, state_dict, strict=strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def train(self, mode: bool = True) -> PreparedModel:
        """Switch between training and evaluation; frozen batch norms stay in evaluation."""
        super().train(mode)
        freeze_batch_norm(self, self._frozen)
        return self

    # -- phases

    def set_phase(self, phase: Phase | str) -> None:
        """Set the phase of every quantizer: `float`, `observe`, `follow`, `track`, `quantize`, or a `Phase`.

        Raises:
            StateError: There is no such phase.
        """
        if isinstance(phase, str):
            if phase not in PHASES:
                raise StateError(f"unknown phase {phase!r}", f"choose one of {', '.join(PHASES)}")
            phase = PHASES[phase]
        set_phase(self, phase)

    def freeze_batch_norm(self, names: Iterable[str] | None = None) -> None:
        """Keep batch norms in evaluation, their statistics fixed, also while training.

        Args:
            names: Module paths; None for all of them; an empty list lets all of them train again.
        """
        self._frozen = freeze_batch_norm(self, names)
        self.train(self.training)

    # -- what quantizers learn

    def quantizer_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the learned parameters of quantizers by name, such as for an optimizer group of their own."""
        for path, module in self.named_modules():
            if isinstance(module, Quantizer):
                for name, parameter in module.named_parameters(recurse=False):
                    yield f"{path}.{name}", parameter

    def quantizer_loss(self) -> Tensor | None:
        """Return what quantizers add to the loss while they learn (PACT's decay), a scalar; None for nothing."""
        terms = []
        for module in self.modules():
            if isinstance(module, Quantizer) and module.learning:
                term = module.method.penalty(module.learned_parameters())
                terms += [] if term is None else [term]
        return torch.stack(terms).sum() if terms else None

    # -- encodings

    def activation_quantizers(self) -> dict[str, FakeQuantize]:
        """Quantizers of activations by the name of the tensor, or of the head of its tie group."""
        heads = dict.fromkeys(
            e.quantizer for e in self.plan if e.decision == "integer" and e.role != "weight" and e.quantizer
        )
        return {name: self.quantizers[quantizer_key(name)] for name in heads}  # type: ignore[misc]

    def weight_quantizers(self) -> Iterator[tuple[str, WeightFakeQuantize, Tensor]]:
        """Yield the `state_dict` key, the quantizer and the float value of every quantized weight."""
        owners = {op.weight.key: op.weight for op in self.opgraph.ops.values() if op.weight is not None}
        for entry in self.plan:
            if entry.role != "weight" or entry.decision != "integer":
                continue
            # not by the key: of modules that share a weight, the one that it is named after may never be called
            owner = self.get_submodule(owners[entry.name].module)
            chain: Any = owner.parametrizations[owners[entry.name].attribute]  # type: ignore[index]
            yield entry.name, chain[0], chain.original

    def encodings(self) -> Encodings:
        """Return the encodings of every quantized tensor and weight.

        Raises:
            StateError: A tensor was not calibrated yet.
        """
        table: dict[str, Encoding] = {}
        quantizers = self.activation_quantizers()
        for entry in self.plan:
            if entry.role == "weight" or entry.decision not in ("integer", "inherits"):
                continue
            if entry.decision == "integer" and entry.quantizer:
                encoding = quantizers[entry.quantizer].encoding()
                table[entry.name] = (
                    encoding if entry.quantizer == entry.name else encoding.derived(f"tied to {entry.quantizer}")
                )
            elif entry.source_tensor:
                table[entry.name] = self._inherited(entry.name, table[entry.source_tensor])
        for key, quantizer, weight in self.weight_quantizers():
            with torch.no_grad():
                table[key] = quantizer.codes(weight)[1]
        return Encodings(table, {"target": self.plan.target})

    def _inherited(self, name: str, encoding: Encoding) -> Encoding:
        op = self.opgraph.ops[name]
        if op.kind != "rescale":
            return encoding.derived(f"{op.kind} of {op.tensors[0]}")
        return rescaled(encoding, float(op.attrs["factor"]), f"{op.tensors[0]} times {op.attrs['factor']:g}")

    def load_encodings(self, encodings: Encodings) -> None:
        """Use other ranges for activations; entries of derived tensors and weights are not needed.

        Raises:
            EncodingError: An entry does not fit its tensor, or no entry names a quantized tensor of this model.
        """
        known = self.activation_quantizers()
        used = [name for name in known if name in encodings]
        if not used:
            raise EncodingError("none of the encodings names a tensor of this model", "check that they belong to it")
        for name in used:
            known[name].load_encoding(encodings[name])

    # -- float weights in and out

    def float_state_dict(self) -> dict[str, Tensor]:
        """Return the weights under the keys of the user's float model."""
        out: dict[str, Tensor] = {}
        for key, value in self.state_dict().items():
            if key.startswith(QUANTIZERS + ".") or key.endswith("_extra_state"):
                continue
            path, found, rest = key.partition(".parametrizations.")
            if found:
                attribute, _, which = rest.partition(".")
                if which == "original":
                    out[f"{path}.{attribute}"] = value
            elif key.startswith("parametrizations."):
                attribute, _, which = key.removeprefix("parametrizations.").partition(".")
                if which == "original":
                    out[attribute] = value
            else:
                out[key] = value
        return out

    def load_float_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights of the user's float model; ranges are kept.

        Raises:
            CheckpointError: A key is missing or unknown, or a shape differs; the first one is named.
        """
        mine = self.float_state_dict()
        check_tensors(mine, state, "the float state")
        with torch.no_grad():
            for key, value in state.items():
                mine[key].copy_(value)


def _refuse_names(root: nn.Module) -> None:
    """Refuse members of the user's model under names that `PreparedModel` needs.

    Raises:
        PlanError: There is one; it is named.
    """
    own = {name for name in dir(PreparedModel) if not name.startswith("__")} - set(dir(nn.Module)) | _OWN_ATTRIBUTES
    for table in (root._modules, root._parameters, root._buffers):
        for name in table:
            if name in own:
                raise PlanError(f"the model has a member {name!r}, a name that a prepared model needs", "rename it")


def rescaled(encoding: Encoding, factor: float, method: str) -> Encoding:
    """Return the encoding of `factor` times a tensor whose codes stay as they are."""
    scales = torch.tensor(encoding.scale, dtype=torch.float32) * torch.tensor(factor, dtype=torch.float32)
    scaled = replace(
        encoding,
        scale=tuple(scales.tolist()),
        min=None if encoding.min is None else tuple(v * factor for v in encoding.min),
        max=None if encoding.max is None else tuple(v * factor for v in encoding.max),
    )
    return scaled.derived(method)


def _compile(graph: fx.Graph) -> Callable[..., Any]:
    """Turn a graph into a function of the module and its arguments."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<qat.PreparedModel.forward>", "exec"), scope)  # noqa: S102 - generated by torch.fx above
    run: Callable[..., Any] = scope["forward"]
    return run
