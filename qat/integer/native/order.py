"""The physical order of the dimensions of a tensor.

An order is a permutation: physical dimension p is the logical dimension `order[p]`. The runner's tensors are row-major
in their physical order; those with spatial dimensions are channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Order = tuple[int, ...]

#: Stands for the batch size where products of sizes are compared: a prime beyond any size.
_BATCH = 2_147_483_647


def logical(rank: int) -> Order:
    """The order of PyTorch's contiguous tensors."""
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    """(N, C, *spatial) as (N, *spatial, C)."""
    return (0, *range(2, rank), 1) if rank > 2 else logical(rank)


def sizes_in(shape: Sequence[int], order: Order) -> tuple[int, ...]:
    """Physical sizes of a logical shape."""
    return tuple(shape[d] for d in order)


def same_memory(shape: Sequence[int], a: Order, b: Order) -> bool:
    """Whether two orders store a tensor alike: they agree but for dimensions of size 1."""
    return [d for d in a if shape[d] != 1] == [d for d in b if shape[d] != 1]


def permutation(a: Order, b: Order) -> tuple[int, ...]:
    """What takes physical order `a` to `b`: dimension p of the result is dimension `permutation[p]` of the source."""
    return tuple(a.index(d) for d in b)


def extended(order: Order, rank: int) -> Order:
    """The order of a tensor that was given leading dimensions of size 1 up to `rank`."""
    more = rank - len(order)
    return (*range(more), *(d + more for d in order))


@dataclass(frozen=True)
class Group:
    """Dimensions that a reshape merges or splits among themselves."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def groups_of(before: Sequence[int], after: Sequence[int]) -> list[Group]:
    """Split a reshape into the smallest groups of dimensions with equal products, in logical order.

    Dimensions of size 1 belong to the group of the dimension before them, those at the start to the first group.
    """
    sizes = [[-s * _BATCH if s < 0 else s for s in shape] for shape in (before, after)]
    dims = [[d for d, size in enumerate(side) if size != 1] for side in sizes]
    groups: list[tuple[list[int], list[int]]] = []
    at = [0, 0]
    while at[0] < len(dims[0]) or at[1] < len(dims[1]):
        members: tuple[list[int], list[int]] = ([], [])
        products = [1, 1]
        while not members[0] or products[0] != products[1]:
            side = 0 if products[0] <= products[1] else 1
            dim = dims[side][at[side]]
            members[side].append(dim)
            products[side] *= sizes[side][dim]
            at[side] += 1
        groups.append(members)
    groups = groups or [([], [])]
    for side in (0, 1):
        ends = [group[side][-1] for group in groups if group[side]]
        for dim in range(len(sizes[side])):
            if sizes[side][dim] == 1:
                groups[max(sum(end < dim for end in ends) - 1, 0)][side].append(dim)
    return [Group(tuple(sorted(b)), tuple(sorted(a))) for b, a in groups]


def reshaped(before: Sequence[int], after: Sequence[int], order: Order, wanted: Order) -> tuple[Order, Order]:
    """Choose the physical order in which a tensor is reshaped, and that of the result.

    Where the dimensions of every group lie side by side and in order, the reshape is free, and the groups stay where
    they are. Otherwise the tensor has to be copied, and the groups take the sequence of `wanted`, an order of the
    result.

    Returns:
        An order of the source, in which a plain reshape gives the result in the second order.
    """
    groups = groups_of(before, after)
    stay = _sequence(groups, [g.before for g in groups], before, order)
    source = tuple(d for g in stay for d in g.before)
    if not same_memory(before, source, order):
        stay = _sequence(groups, [g.after for g in groups], after, wanted)
        source = tuple(d for g in stay for d in g.before)
    return source, tuple(d for g in stay for d in g.after)


def _sequence(groups: list[Group], members: list[tuple[int, ...]], shape: Sequence[int], order: Order) -> list[Group]:
    first = [min((order.index(d) for d in dims if shape[d] != 1), default=0) for dims in members]
    return [groups[i] for i in sorted(range(len(groups)), key=first.__getitem__)]
