"""Every kind of node in the trees of JAX users."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax

from pytree2safetensors._tree.containers import PyTreeContainer, UnkeyedContainer
from pytree2safetensors._tree.keypath import read_segment


class Pair(NamedTuple):
    """A namedtuple."""

    first: Any
    second: Any


class Nothing(NamedTuple):
    """A namedtuple without fields."""


@dataclass(frozen=True)
class Record:
    """A dataclass, with a field that is part of the structure."""

    weight: Any
    bias: Any
    name: str = "record"


class Keyed:
    """A node registered with keys of several kinds, given by their spellings."""

    def __init__(self, children: Mapping[str, Any]) -> None:
        self.children: dict[str, Any] = dict(children)

    def __repr__(self) -> str:
        return f"Keyed({self.children!r})"


class Unkeyed:
    """A node registered without keys."""

    def __init__(self, children: Iterable[Any]) -> None:
        self.children: list[Any] = list(children)

    def __repr__(self) -> str:
        return f"Unkeyed({self.children!r})"


def _flatten_keyed(node: Keyed) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    pairs = [(read_segment(segment), child) for segment, child in node.children.items()]
    return pairs, tuple(node.children)


jax.tree_util.register_dataclass(Record, data_fields=["weight", "bias"], meta_fields=["name"])
jax.tree_util.register_pytree_with_keys(
    Keyed, _flatten_keyed, lambda names, children: Keyed(dict(zip(names, children, strict=True)))
)
jax.tree_util.register_pytree_node(
    Unkeyed, lambda node: (node.children, None), lambda _, children: Unkeyed(children)
)

# The nodes that keep their types without a template.
SELF_DESCRIBING: Final[tuple[type, ...]] = (
    dict, list, tuple, type(None), OrderedDict, PyTreeContainer, UnkeyedContainer,
)  # fmt: skip
# Every kind of node. Nodes that give two children the same key are left out: they cannot be saved.
NODES: Final[tuple[type, ...]] = (
    *SELF_DESCRIBING, defaultdict, Pair, Nothing, Record, Keyed, Unkeyed,
)  # fmt: skip
