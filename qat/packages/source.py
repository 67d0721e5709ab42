"""What a package is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from qat.encodings import Encodings
from qat.graph.prepared import PreparedModel
from qat.integer.model import IntegerModel, convert


@dataclass(frozen=True)
class Source:
    """A calibrated or trained model on its way into a package.

    Attributes:
        qmodel: The model.
        name: What it is called.
        batches: Float inputs of batch size 1 (or of the model's own fixed one), for the golden samples.
        targets: Names of the package's targets.
    """

    qmodel: PreparedModel
    name: str
    batches: tuple[tuple[Tensor, ...], ...]
    targets: tuple[str, ...]
    #: the simulations that were made, by profile: artifacts and golden samples share them
    _made: dict[str, IntegerModel] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def encodings(self) -> Encodings:
        """Encodings of every tensor and weight."""
        return self.qmodel.encodings()

    def simulation(self, numerics: str) -> IntegerModel:
        """Convert to a numerics profile, on the CPU."""
        if numerics not in self._made:
            self._made[numerics] = convert(self.qmodel, numerics).to("cpu")
        return self._made[numerics]
