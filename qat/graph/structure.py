"""The structure of what a model returns, apart from the tensors in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Structure:
    """How flat tensors become what the user's model returns.

    Attributes:
        kind: Type of the container; None for a leaf.
        form: How it is built: `leaf`, `constant`, `sequence`, `fields` (named tuple), `mapping`, `dataclass`.
        keys: Keys of a mapping or a data class.
        children: Structures of the items.
        constant: Value of a constant, such as None.
    """

    kind: Any = None
    form: str = "leaf"
    keys: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()
    constant: Any = None

    def pack(self, flat: Sequence[Any]) -> Any:
        """Build what the user's model returns from its tensors (and sizes) in order.

        Raises:
            ValueError: `flat` has not as many items as there are leaves.
        """
        if len(flat) != self.count:
            raise ValueError(f"{len(flat)} values for {self.count} outputs")
        return self._pack(iter(flat))

    def restore(self, plain: Any) -> Any:
        """Give plain containers (tuple, list, dict), as generated code returns them, the user's types again."""
        return self.pack(list(self.flatten(plain)))

    def flatten(self, plain: Any) -> Iterator[Any]:
        """Yield the leaves of plain containers, or of the user's, in order."""
        if self.form == "leaf":
            yield plain
        for key, child in zip(self._positions(plain), self.children, strict=True):
            yield from child.flatten(getattr(plain, key) if isinstance(key, _Attribute) else plain[key])

    @property
    def count(self) -> int:
        """Number of leaves."""
        return 1 if self.form == "leaf" else sum(child.count for child in self.children)

    def _positions(self, plain: Any) -> Sequence[Any]:
        if self.form == "dataclass" and not isinstance(plain, Mapping):
            return [_Attribute(key) for key in self.keys]
        return self.keys if self.form in ("mapping", "dataclass") else range(len(self.children))

    def _pack(self, flat: Iterator[Any]) -> Any:
        if self.form == "leaf":
            return next(flat)
        if self.form == "constant":
            return self.constant
        items = [child._pack(flat) for child in self.children]
        if self.form == "fields":
            return self.kind(*items)
        if self.form == "mapping":
            return self.kind(zip(self.keys, items, strict=True))
        if self.form == "dataclass":
            return self.kind(**dict(zip(self.keys, items, strict=True)))
        return self.kind(items)


class _Attribute(str):
    """A key that is read as an attribute."""

    __slots__ = ()


def describe(value: Any, is_leaf: Callable[[Any], bool]) -> tuple[Structure, Any]:
    """Split a returned value into its structure and the same in plain containers.

    Args:
        value: Nested tuples, named tuples, lists, mappings and data classes.
        is_leaf: Whether something is a tensor or size; everything else that is no container is a constant.

    Returns:
        The structure, and `value` with named tuples as tuples, mappings and data classes as dicts.
    """
    if is_leaf(value):
        return Structure(), value
    kind: Any = type(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        keys = tuple(f.name for f in dataclasses.fields(value) if f.init)
        return _described(Structure(kind, "dataclass", keys), [getattr(value, k) for k in keys], is_leaf)
    if isinstance(value, Mapping):
        return _described(Structure(kind, "mapping", tuple(value)), list(value.values()), is_leaf)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _described(Structure(kind, "fields"), value, is_leaf)
    if isinstance(value, tuple | list):
        return _described(Structure(kind, "sequence"), value, is_leaf)
    return Structure(form="constant", constant=value), value


def _described(structure: Structure, items: Sequence[Any], is_leaf: Callable[[Any], bool]) -> tuple[Structure, Any]:
    children, plain = [], []
    for item in items:
        child, plain_item = describe(item, is_leaf)
        children.append(child)
        plain.append(plain_item)
    structure = dataclasses.replace(structure, children=tuple(children))
    if structure.form in ("mapping", "dataclass"):
        return structure, dict(zip(structure.keys, plain, strict=True))
    return structure, plain if structure.kind is list else tuple(plain)
