"""Patterns: the axes of a tensor and those of a leaf, in the notation of einops.

pattern : dims "->" dims
dims    : { axis | "1" | "..." | "(" { axis | "1" } ")" }

An axis of size 1 has no name, and "..." stands for any number of axes.

Specification: *Rules*.
"""

import re
from collections.abc import Collection
from itertools import pairwise
from typing import Final, TypeAlias

Dims: TypeAlias = tuple[tuple[str, ...], ...]  # for each dimension the axes that it is made of

REST: Final = ("...",)  # stands for any number of dimensions

_DIMS: Final = re.compile(r"\(([^()]*)\)|(\.\.\.|\w+|\S)")


def read_pattern(text: str) -> tuple[Dims, Dims]:
    """Read a pattern. Raise a ValueError if it is invalid."""
    sides = text.split("->")
    if len(sides) != 2:
        raise ValueError("a pattern has one arrow, as in '(h d) e -> e h d'")
    left, right = map(_read_dims, sides)
    if left.count(REST) > 1 or right.count(REST) > 1:
        raise ValueError("a side of a pattern has at most one '...'")
    if (REST in left) != (REST in right):
        raise ValueError("a pattern has '...' on both sides or neither")
    return left, right


def _read_dims(side: str) -> Dims:
    dims = []
    for found in _DIMS.finditer(side):
        group, single = found.groups()
        axes = tuple(group.split()) if single is None else (single,)
        for axis in axes:
            if not axis.isidentifier() and axis != "1" and not (single and axis == "..."):
                hint = "; only names and paths have placeholders in braces" if axis in "{}" else ""
                raise ValueError(f"the pattern has {axis!r}, which is not an axis{hint}")
        dims.append(tuple(axis for axis in axes if axis != "1"))
    return tuple(dims)


def spread(dims: Dims, rank: int) -> Dims | None:
    """Replace "..." with dimensions so that there are `rank`; return None if this is impossible."""
    if REST not in dims:
        return dims if len(dims) == rank else None
    at = dims.index(REST)
    count = rank - len(dims) + 1
    more = tuple((f"...{number}",) for number in range(count))
    return (*dims[:at], *more, *dims[at + 1 :]) if count >= 0 else None


def merged(left: Dims, right: Dims, given: Collection[str]) -> tuple[Dims, Dims]:
    """Join two axes that are adjacent in groups on both sides, unless a size is given for one."""
    for pair in (pair for dim in right for pair in pairwise(dim)):
        if not set(pair) & set(given) and any(pair in pairwise(dim) for dim in left):
            return merged(_joined(left, pair), _joined(right, pair), given)
    return left, right


def _joined(dims: Dims, pair: tuple[str, str]) -> Dims:
    return tuple(
        (*dim[: dim.index(pair[0])], " ".join(pair), *dim[dim.index(pair[1]) + 1 :])
        if pair in pairwise(dim)
        else dim
        for dim in dims
    )
