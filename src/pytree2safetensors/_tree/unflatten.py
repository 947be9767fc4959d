"""Building trees: from spelled names to a trie, and from the trie to nodes.

Specification: *Trees and flat dicts*.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pytree2safetensors._errors import KeyPathError, TreeStructureError
from pytree2safetensors._messages import node_at, shorten
from pytree2safetensors._tree.containers import PyTreeContainer, UnkeyedContainer, container_of
from pytree2safetensors._tree.depth import DEEP, TOO_DEEP, DepthCheck, too_deep, unsortable
from pytree2safetensors._tree.keypath import (
    has_stray_backslash,
    read_segment,
    split,
    string2keypath,
)
from pytree2safetensors._tree.keys import DictKey, GetAttrKey, SequenceKey
from pytree2safetensors._tree.paths import cut
from pytree2safetensors._tree.spelling import (
    ATTR,
    INDEX,
    ITEM,
    UNKEYED,
    join,
    spell_attr,
    spell_flat_index,
    spell_index,
    spell_item,
)
from pytree2safetensors._types import Kind

MAX_GAPS = 2**20  # list indices without a leaf in a tree


class _Node:
    """A node under construction: the marker of its children, and the children by key."""

    __slots__ = ("depth", "entries", "key", "kind", "marker", "parent")

    def __init__(self, parent: "_Node | None", key: Any, depth: int) -> None:
        self.parent, self.key, self.depth = parent, key, depth
        self.marker = ""
        self.entries: dict[Any, Any] = {}
        self.kind: Kind | None = None


def build(leaves: Mapping[str, Any], kinds: Mapping[str, Kind], file: str) -> Any:
    """Build the tree in a file from its leaves and the note's kinds of nodes."""
    try:
        return build_tree(leaves, kinds)
    except (KeyPathError, TreeStructureError) as error:
        old = "; if pytree2safetensors 0.1.4 wrote the file, load it into a template with rename={path: name}"
        raise type(error)(
            f"the names in {file} do not form a tree: {error}; load_into_pytree loads them into a template, "
            "load_pytree(..., separator='.') splits them at dots, and load_abstract(..., flat=True) lists them"
            + (old if any(map(has_stray_backslash, leaves)) else "")
        ) from None


def build_tree(leaves: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Any:
    """Build a tree from leaves and the kinds of nodes of a checked note."""
    trie = _Trie()
    try:
        for name, leaf in leaves.items():
            trie.insert(name, leaf)
        # Longest first, so that a node's children are known before the node.
        for name in sorted(kinds, key=len, reverse=True):
            trie.note(name, kinds[name])
        return trie.finish()
    finally:
        trie.clear()


class _Trie:
    """A trie of spelled names."""

    def __init__(self) -> None:
        self.top = _Node(None, None, 0)  # holds the root under the key ""
        self.top.marker = "top"
        self.nodes: list[_Node] = []  # parents before children
        self.parents: dict[str, _Node] = {}  # of leaves, by spelled name
        self.segments: dict[str, tuple[str, Any]] = {}
        self.last = ("", self.top)  # the parent of the previous leaf, unless it is the root
        self.depth = DepthCheck()
        self.gaps = 0

    def insert(self, name: str, leaf: Any) -> None:
        if not name:
            if name in self.top.entries:
                raise self.taken(self.top, name, name)
            self.top.entries[name] = leaf
            return
        prefix, parent = self.last
        known = None
        if prefix and name.startswith(prefix):
            known = self.segments.get(name[len(prefix) :])
        if known is None:  # not a sibling of the previous leaf
            try:
                prefix, segment = cut(name)
                parent = self.parents.get(prefix) or self.descend(prefix, name)
                known = self.segments.get(segment) or self.read(segment)
            except KeyPathError:
                string2keypath(name)  # raises the same, with the position in the whole name
                raise  # pragma: no cover - string2keypath has raised
            self.parents[prefix] = parent
            if prefix:
                self.last = prefix, parent
        marker, key = known
        if not parent.marker:
            parent.marker = marker
        elif parent.marker != marker:
            raise self.mixed(parent, name)
        entries = parent.entries
        if key in entries:
            raise self.taken(parent, key, name)
        entries[key] = leaf

    def read(self, segment: str) -> tuple[str, Any]:
        key = read_segment(segment)
        if isinstance(key, GetAttrKey):
            found: tuple[str, Any] = (ATTR, key.name)
        elif isinstance(key, DictKey):
            found = (ITEM, key.key)
        elif isinstance(key, SequenceKey):
            found = (INDEX, key.idx)
        else:
            found = (UNKEYED, key.key)
        self.segments[segment] = found
        return found

    def descend(self, prefix: str, name: str) -> _Node:
        """Return the node at `prefix`; make it if it is missing."""
        if not prefix:
            return self.child(self.top, "", name)
        above, segment = cut(prefix)
        node = self.parents.get(above)  # known if a leaf has cousins
        segments = [segment]
        if node is None:
            segments = split(prefix)
            if len(segments) > TOO_DEEP:
                raise too_deep(name)
            node = self.child(self.top, "", name)
        for number, segment in enumerate(segments, 1):
            if number == len(segments):
                self.parents[above] = node
            marker, key = self.segments.get(segment) or self.read(segment)
            if not node.marker:
                node.marker = marker
            elif node.marker != marker:
                raise self.mixed(node, name)
            node = self.child(node, key, name)
        return node

    def child(self, parent: _Node, key: Any, name: str) -> _Node:
        node = parent.entries.get(key)
        if node is None and key not in parent.entries:
            node = parent.entries[key] = _Node(parent, key, parent.depth + 1)
            self.nodes.append(node)
        elif not isinstance(node, _Node) or not _same(node.key, key):
            raise self.taken(parent, key, name)
        return node

    def name_of(self, node: _Node) -> str:
        segments: list[str] = []
        while node.parent is not None and node.parent is not self.top:
            segments.append(_SPELLERS[node.parent.marker](node.key))
            node = node.parent
        return join("", *reversed(segments))

    def mixed(self, node: _Node, name: str) -> TreeStructureError:
        other = next(iter(node.entries))
        return TreeStructureError(
            f"{shorten(name)} and {shorten(self.at(node, other))} make the node at "
            f"{node_at(self.name_of(node))} two kinds of node at once"
        )

    def taken(self, parent: _Node, key: Any, name: str) -> TreeStructureError:
        there = next(other for other in parent.entries if other == key)
        named = self.at(parent, there)
        if not _same(there, key):
            reason = "have dict keys that are equal in Python"
        else:
            reason = "name a leaf and a node at the same place"
            node = parent.entries[there]
            while isinstance(node, _Node) and node.entries:
                named = self.at(node, next(iter(node.entries)))
                node = next(iter(node.entries.values()))
        return TreeStructureError(f"{shorten(named)} and {shorten(name)} {reason}")

    def at(self, node: _Node, key: Any) -> str:
        return "" if node is self.top else join(self.name_of(node), _SPELLERS[node.marker](key))

    # --- what a note adds ---

    def note(self, name: str, kind: Kind) -> None:
        node = self.find(name)
        if node is None:
            empty = _EMPTY[kind[0] if isinstance(kind, list) else kind]()
            self.insert(name, empty)
            if len(name) >= DEEP:
                self.depth.check(1 + len(split(name)), type(empty), name, has_children=False)
            return
        node.kind = kind

    def find(self, name: str) -> _Node | None:
        node = self.top.entries.get("")
        for segment in split(name):
            if not isinstance(node, _Node):
                return None
            marker, key = self.segments.get(segment) or self.read(segment)
            node = node.entries.get(key) if node.marker == marker else None
            if isinstance(node, _Node) and not _same(node.key, key):
                return None
        return node if isinstance(node, _Node) else None

    # --- from nodes under construction to the tree ---

    def finish(self) -> Any:
        if max((node.depth for node in self.nodes), default=0) >= DEEP:
            deepest = {
                node.marker: node for node in sorted(self.nodes, key=lambda node: node.depth)
            }
            for node in deepest.values():
                self.depth.check(node.depth, _TYPES[node.marker], self.name_of(node))
        self.parents.clear()
        while self.nodes:  # children first; finished nodes are removed
            node = self.nodes.pop()
            if node.parent is not None:  # pragma: no branch - only the top has none
                node.parent.entries[node.key] = self.finished(node)
        return self.top.entries.get("", {})  # without names, an empty dict

    def clear(self) -> None:
        """Free the nodes that are not finished. They and their parents would keep the leaves in cycles."""
        for node in (self.top, *self.nodes):
            node.entries.clear()

    def finished(self, node: _Node) -> Any:
        entries = node.entries
        if node.marker == ITEM:
            if isinstance(node.kind, list):
                return self.ordered(node, node.kind[1])
            return self.in_order(node)
        if node.marker == ATTR:
            return container_of(entries)
        length = max(entries) + 1
        missing = length - len(entries)
        if node.marker == UNKEYED:
            if missing:
                raise TreeStructureError(
                    f"the node without keys at {node_at(self.name_of(node))} lacks {missing} of "
                    f"its {length} children"
                )
            return UnkeyedContainer([entries[index] for index in range(length)])
        self.gaps += missing
        if self.gaps > MAX_GAPS:
            raise TreeStructureError(
                f"the list at {node_at(self.name_of(node))} would have {length} elements, and "
                f"the tree would have more than {MAX_GAPS} gaps"
            )
        children = [entries.get(index) for index in range(length)]
        return tuple(children) if node.kind == "tuple" else children

    def in_order(self, node: _Node) -> dict[Any, Any]:
        entries = node.entries
        try:
            keys = sorted(entries)
        except TypeError:
            raise unsortable(self.name_of(node), entries) from None
        return entries if keys == [*entries] else {key: entries[key] for key in keys}

    def ordered(self, node: _Node, segments: Sequence[str]) -> "OrderedDict[Any, Any]":
        keys = {spell_item(key): key for key in node.entries}
        return OrderedDict((keys[segment], node.entries[keys[segment]]) for segment in segments)


def _same(key: Any, other: Any) -> bool:
    """Return whether two keys that are equal in Python have the same spelling."""
    return type(key) is str or ascii(key) == ascii(other)


_SPELLERS: dict[str, Callable[[Any], str]] = {
    ATTR: spell_attr,
    ITEM: spell_item,
    INDEX: spell_index,
    UNKEYED: spell_flat_index,
}
_TYPES = {ATTR: PyTreeContainer, ITEM: dict, INDEX: list, UNKEYED: UnkeyedContainer}
_EMPTY: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "dict": dict,
    "list": list,
    "tuple": tuple,
    "OrderedDict": OrderedDict,
    "PyTreeContainer": PyTreeContainer,
    "UnkeyedContainer": UnkeyedContainer,
}
