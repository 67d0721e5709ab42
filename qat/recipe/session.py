"""A recipe brought to life: its data, its float model and its prepared model, made when they are first needed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qat.encodings import Encodings
from qat.errors import CheckpointError, DataError
from qat.graph.plan import Plan
from qat.graph.prepared import PreparedModel
from qat.recipe import stages as steps
from qat.recipe.convert import data_spec
from qat.recipe.folder import RunFolder
from qat.recipe.load import expand
from qat.recipe.schema import Recipe
from qat.train import processes
from qat.train.checkpoint import load_checkpoint, load_state
from qat.train.data import Data, Split, load_data


class Session:
    """What the steps of a run share.

    Args:
        recipe: A validated recipe; variables are expanded here, or, where they are not set, missed when they are
            needed.
        skip_bad: Skip unreadable images even where the recipe does not say so.
        run: Folder of a run whose checkpoints are to be used, or None.
        stages: Use only the checkpoints of so many of its stages; None for all of them.

    Raises:
        RecipeError: A GPU is asked for and there is none.
    """

    def __init__(
        self, recipe: Recipe, *, skip_bad: bool = False, run: RunFolder | None = None, stages: int | None = None
    ) -> None:
        # a variable that is not set stops only what needs it: a plan can be made where the data is not
        self.recipe = expand(recipe, keep_unset=True)
        self.spec = data_spec(self.recipe, skip_bad=skip_bad)
        self.device = steps.choose_device(self.recipe)
        self.run = run
        self._stages = stages
        if self.recipe.threads is not None:
            torch.set_num_threads(self.recipe.threads)

    @functools.cached_property
    def data(self) -> Data:
        """The data."""
        expand(self.recipe, part="data")
        return load_data(self.spec)

    @property
    def test(self) -> Split:
        """The labelled test images.

        Raises:
            DataError: There are none.
        """
        if self.data.test is None:
            raise DataError("the data has no labelled test images", "give data.test with class folders or labels")
        return self.data.test

    @functools.cached_property
    def model(self) -> nn.Module:
        """The float model: of the last float checkpoint of the run, else as the recipe makes it."""
        expand(self.recipe, part="model")
        model = steps.build_model(self.recipe.model, self.recipe.seed).to(self.device)
        checkpoint = self._checkpoint("float")
        if checkpoint is not None:
            load_state(model, load_checkpoint(checkpoint).tensors, str(checkpoint))
        # a factory may draw from a generator that has no seed, and only the first process reads the run's folder
        processes.share_state(model)
        return model

    def example(self, *, with_data: bool = True) -> Tensor:
        """Two images on the device of the model."""
        return steps.example_inputs(self.spec, self.data if with_data else None).to(self.device)

    def plan(self, target: Sequence[str] | None = None) -> Plan:
        """The plan, for other targets than the recipe's where they are given.

        The data need not be there where the recipe tells the shape of the images.
        """
        try:
            example = self.example(with_data=False)
        except DataError:
            example = self.example()
        recipe = self.recipe.model_copy(update={"target": list(target)}) if target else self.recipe
        return steps.make_plan(recipe, self.model, example)

    def prepare(self) -> PreparedModel:
        """The prepared model: of the last quantized checkpoint of the run, else fresh."""
        qmodel = steps.prepare(self.recipe, self.model, self.example()).to(self.device)
        checkpoint = self._checkpoint("quantized")
        if checkpoint is not None:
            load_state(qmodel, load_checkpoint(checkpoint).tensors, str(checkpoint))
            qmodel.set_phase("quantize")
        processes.share_state(qmodel)
        return qmodel.eval()

    def quantized(self, encodings: Path | None = None) -> PreparedModel:
        """A model that can be exported: of the run's last checkpoint, or with ranges from a file.

        Raises:
            CheckpointError: There are neither.
            EncodingError: The file does not fit the model.
        """
        if encodings is None and self._checkpoint("quantized") is None:
            place = (
                "the recipe alone has no ranges" if self.run is None else f"{self.run.path} has no quantized checkpoint"
            )
            raise CheckpointError(place, "give the folder of a finished run, or --encodings")
        qmodel = self.prepare()
        if encodings is not None:
            qmodel.load_encodings(Encodings.load(encodings))
            qmodel.set_phase("quantize")
        return qmodel

    def _checkpoint(self, which: str) -> Path | None:
        if self.run is None:
            return None
        found = [s for s in self.run.state().stages[: self._stages] if (s.label == "float") == (which == "float")]
        return self.run.path / found[-1].checkpoint if found else None
