"""What the parts of a recipe's schema share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def shorter(kinds: str, convert: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Let a value also be written in a shorter form, of JSON type `kinds`."""

    def extend(schema: dict[str, Any]) -> None:
        form = {k: schema.pop(k) for k in list(schema) if k not in ("title", "default", "description")}
        forms = form.pop("anyOf", [form])
        schema["anyOf"] = [*forms, {"type": kinds}]

    return BeforeValidator(convert), Field(json_schema_extra=extend)


NAME_SHORT = shorter("string", lambda v: {"name": v} if isinstance(v, str) else v)


class Part(BaseModel):
    """A part of a recipe: unknown keys are errors, values keep their types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
