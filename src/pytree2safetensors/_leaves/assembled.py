"""Tensors assembled from leaves, as rules write them.

Specification: *Rules*.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.views import View, plain_view
from pytree2safetensors._tree.rule import Rule


class Member(NamedTuple):
    """A leaf that is a tensor or a part of one."""

    view: View
    number: int  # of the tensor, among the names of the view
    leaf: Any


class Assembled(NamedTuple):
    """A tensor to write, assembled from leaves or from parts of one."""

    name: str
    info: TensorInfo
    members: list[Member]


def whole_leaves(leaves: Iterable[Any]) -> Iterator[Any]:
    """Yield leaves as they are in a tree, with the members of assembled tensors in their place."""
    for leaf in leaves:
        if type(leaf) is Assembled:
            yield from (member.leaf for member in leaf.members)
        else:
            yield leaf


def with_leaves(tensors: Mapping[str, Any], found: Mapping[int, Any]) -> dict[str, Any]:
    """Replace leaves, by their identities, and those that tensors are made of. Remove the others."""
    replaced: dict[str, Any] = {}
    for name, leaf in tensors.items():
        if isinstance(leaf, Assembled):
            members = [
                m._replace(leaf=found[id(m.leaf)]) for m in leaf.members if id(m.leaf) in found
            ]
            if members:
                replaced[name] = leaf._replace(members=members)
        elif id(leaf) in found:
            replaced[name] = found[id(leaf)]
    return replaced


class Copy(NamedTuple):
    """A tensor that one leaf makes, or the leaves that are cut from it."""

    tensor: Assembled
    path: str  # of its first leaf


class Placed(NamedTuple):
    """A leaf, and its tensor or its view of several tensors."""

    route: str | View
    rule: Rule | None
    family: int  # the same for leaves that are cut from the same tensors
    path: str
    leaf: Any
    info: TensorInfo


def assemble(placed: Iterable[Placed]) -> dict[str, list[Copy]]:
    """Make tensors from leaves, by name: more than one if several leaves, or parts, have one name."""
    found: dict[str, dict[tuple[int, int], Copy]] = {}  # by family and part
    for route, _, family, path, leaf, info in placed:
        view = plain_view(route, info.shape) if isinstance(route, str) else route
        nbytes = math.prod(view.stored) * info.itemsize
        stored = TensorInfo(info.dtype, view.stored, nbytes)
        parts: Counter[str] = Counter()  # of the leaf, by name
        for number, name in enumerate(view.names):
            key = family, parts[name]
            parts[name] += 1
            copies = found.setdefault(name, {})
            if key not in copies:
                copies[key] = Copy(Assembled(name, stored, []), path)
            copies[key].tensor.members.append(Member(view, number, leaf))
    return {name: [*copies.values()] for name, copies in found.items()}
