"""What the parts of a recipe's schema share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Part(BaseModel):
    """A part of a recipe: unknown keys are errors, values keep their types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
