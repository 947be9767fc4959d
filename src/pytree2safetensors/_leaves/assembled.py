"""Tensors assembled from leaves, as rules write them.

Specification: *Rules*.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.extents import shape_of
from pytree2safetensors._leaves.views import View, plain_view
from pytree2safetensors._tree.rule import Rule


class Member(NamedTuple):
    """A leaf that is a tensor or a part of one."""

    view: View
    leaf: Any


class Assembled(NamedTuple):
    """A tensor to write, assembled from leaves or from parts of one."""

    name: str
    info: TensorInfo
    members: list[Member]

    @property
    def is_complete(self) -> bool:
        """Return whether the members cover the tensor."""
        sizes = (math.prod(shape_of(member.view.region)) for member in self.members)
        return sum(sizes) >= math.prod(self.info.shape)


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
    """A tensor that leaves make by one rule."""

    tensor: Assembled
    rule: Rule | None
    path: str  # of its first leaf


class Placed(NamedTuple):
    """A leaf, and its tensor or its view of several tensors."""

    route: str | View
    rule: Rule | None
    path: str
    leaf: Any
    info: TensorInfo


def assemble(placed: Iterable[Placed]) -> dict[str, list[Copy]]:
    """Make tensors from leaves, by name: more than one if several leaves have the same tensor."""
    found: dict[str, list[Copy]] = {}
    for route, rule, path, leaf, info in placed:
        view = plain_view(route, info.shape) if isinstance(route, str) else route
        nbytes = math.prod(view.stored) * info.itemsize
        stored = TensorInfo(info.dtype, view.stored, nbytes)
        for name in view.names:
            copies = found.setdefault(name, [])
            last = copies[-1] if copies else None
            if last is None or last.rule is not rule or last.tensor.is_complete:
                last = Copy(Assembled(name, stored, []), rule, path)
                copies.append(last)
            last.tensor.members.append(Member(view, leaf))
    return found
