"""Flattening: a spelled name for every leaf of a tree, and what the names do not express.

Specification: *Trees and flat dicts*, *The note*.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeAlias, cast

import jax
import numpy as np

from pytree2safetensors._errors import KeyPathError
from pytree2safetensors._messages import shorten, type_name
from pytree2safetensors._tree.containers import PyTreeContainer, UnkeyedContainer, attrs_of
from pytree2safetensors._tree.depth import DEEP, DepthCheck, too_deep, unsortable
from pytree2safetensors._tree.orders import is_order_known
from pytree2safetensors._tree.spelling import (
    join,
    located,
    spell_attr,
    spell_flat_index,
    spell_item,
    spell_key,
)
from pytree2safetensors._types import Kind


class Flat(NamedTuple):
    """A flattened tree: a spelled name for each leaf, and what the names do not express."""

    names: list[str]
    leaves: list[Any]
    kinds: dict[str, Kind]
    is_deep: bool = False  # too deep for JAX where the stack already has many frames
    is_keyed: bool = False  # only a treedef with keys certainly has the leaves in this order


def flatten(tree: Any, *, is_template: bool = False) -> Flat:
    """Walk a tree as JAX does, and spell the names. For a template, find out about its treedef."""
    walk = _Walk(is_template)
    walk.run(tree)
    return walk.flat._replace(is_deep=walk.depth.limit > 0, is_keyed=walk.is_keyed)


def open_once(node: Any) -> list[tuple[Any, Any]]:
    """Return the children of a node with their key paths, one level deep.

    Raises:
        RecursionError: The node is its own child.
    """
    meetings = 0

    def is_leaf(part: Any) -> bool:
        nonlocal meetings
        meetings += part is node
        # JAX may look twice, and would visit a node that is its own child forever. If this raised an
        # exception, JAX would lose count of the stack.
        return part is not node or meetings > 2

    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_leaf)
    if meetings > 2:
        raise RecursionError
    return cast("list[tuple[Any, Any]]", pairs)


Children: TypeAlias = Iterator[tuple[str, Any]]  # the spelled segment of each child, and the child


class _Walk:
    """One flattening, which remembers the types of leaves and the spelling of keys."""

    def __init__(self, is_template: bool) -> None:
        self.is_template, self.is_keyed = is_template, False
        self.flat = Flat([], [], {})
        self.leaf_types: set[type] = {int, float, bool, complex, str, np.ndarray}
        self.items: dict[str, str] = {}
        self.depth = DepthCheck()
        # Functions, because bound methods would keep this object, and so the leaves, in a cycle.
        self.openers = {**_OPENERS}

    def run(self, tree: Any) -> None:
        names, leaves, *_ = self.flat
        # JAX registers no class that cannot be hashed.
        root = self.open(tree, "") if type(type(tree)).__hash__ is not None else None
        if root is None:
            names.append("")
            leaves.append(tree)
            return
        leaf_types = self.leaf_types
        pending = [("", root)]
        while pending:
            prefix, children = pending[-1]
            for segment, child in children:
                name = prefix + segment if prefix else join("", segment)
                try:
                    is_known = type(child) in leaf_types
                except TypeError:  # its class cannot be hashed
                    is_known = True
                if not is_known:
                    opened = self.open(child, name)
                    if opened is not None:
                        if len(pending) >= DEEP:
                            opened = self.within_limit(child, opened, len(pending) + 1, name)
                        pending.append((name, opened))
                        break
                names.append(name)
                leaves.append(child)
            else:
                pending.pop()

    def within_limit(self, node: Any, children: Children, depth: int, name: str) -> Children:
        """Return the children of a node that is not too deep."""
        found = [*children]
        self.depth.check(depth, type(node), name, has_children=bool(found))
        return iter(found)

    def open(self, node: Any, name: str) -> Children | None:
        """Return the children of a node; None for a leaf."""
        opener = self.openers.get(type(node))
        if opener is not None:
            return opener(self, node, name)
        if jax.tree_util.all_leaves([node]):
            # For JAX, only the type distinguishes leaves from nodes.
            self.leaf_types.add(type(node))
            return None
        self.openers[type(node)] = _Walk.open_registered
        children = self.open_registered(node, name)
        if _is_plain_namedtuple(node):  # JAX need not look at the next one of its type
            segments = [_spelled(spell_attr, field, name) for field in node._fields]
            self.openers[type(node)] = lambda _, other, __: zip(segments, other, strict=True)
        return children

    def open_dict(self, node: dict[Any, Any], name: str) -> Children:
        if not node:
            self.flat.kinds[name] = "dict"
        try:
            keys = sorted(node)
        except Exception:  # noqa: BLE001 - comparing foreign keys may raise anything
            for key in node:
                self.item(key, name)  # the better reason is a key without a spelling
            raise unsortable(name, node) from None
        return ((self.item(key, name), node[key]) for key in keys)

    def open_ordered_dict(self, node: dict[Any, Any], name: str) -> Children:
        segments = [self.item(key, name) for key in node]
        self.flat.kinds[name] = ["OrderedDict", segments]
        return zip(segments, node.values(), strict=True)

    def open_list(self, node: list[Any], name: str) -> Children:
        if not node:
            self.flat.kinds[name] = "list"
        return ((f"#{index}", child) for index, child in enumerate(node))

    def open_tuple(self, node: tuple[Any, ...], name: str) -> Children:
        self.flat.kinds[name] = "tuple"
        return ((f"#{index}", child) for index, child in enumerate(node))

    def open_none(self, _: None, name: str) -> Children:
        self.flat.kinds[name] = "None"
        return iter(())

    def open_container(self, node: PyTreeContainer, name: str) -> Children:
        attrs = attrs_of(node)
        if not attrs:
            self.flat.kinds[name] = "PyTreeContainer"
        return ((_spelled(spell_attr, key, name), attrs[key]) for key in sorted(attrs))

    def open_unkeyed(self, node: UnkeyedContainer, name: str) -> Children:
        if not len(node):
            self.flat.kinds[name] = "UnkeyedContainer"
        return ((spell_flat_index(index), child) for index, child in enumerate(node))

    def open_registered(self, node: Any, name: str) -> Children:
        """Return the children of any other node, as registered with JAX."""
        try:
            pairs = open_once(node)
        except (SystemError, RecursionError):
            raise too_deep(name) from None
        if not pairs:
            self.flat.kinds[name] = "PyTreeContainer"
        if self.is_template and not is_order_known(node, [child for _, child in pairs], name):
            self.is_keyed = True
        children = [(_spelled(spell_key, key, name), child) for (key,), child in pairs]
        if len(dict(children)) != len(children):
            raise _repeated(type(node), [segment for segment, _ in children], name)
        return iter(children)

    def item(self, key: object, name: str) -> str:
        if type(key) is not str:  # a cache cannot tell 1, 1.0 and True apart
            return _spelled(spell_item, key, name)
        segment = self.items.get(key)
        if segment is None:
            segment = self.items[key] = _spelled(spell_item, key, name)
        return segment


_OPENERS: Final[Mapping[type, Callable[[_Walk, Any, str], Children]]] = {
    dict: _Walk.open_dict,
    defaultdict: _Walk.open_dict,
    OrderedDict: _Walk.open_ordered_dict,
    list: _Walk.open_list,
    tuple: _Walk.open_tuple,
    type(None): _Walk.open_none,
    PyTreeContainer: _Walk.open_container,
    UnkeyedContainer: _Walk.open_unkeyed,
}


def _is_plain_namedtuple(node: Any) -> bool:
    """Return whether JAX treats a node as a namedtuple that nobody registered."""
    if not isinstance(node, tuple) or not node or type(node).__iter__ is not tuple.__iter__:
        return False
    structure: Any = jax.tree_util.tree_structure(node, is_leaf=lambda part: part is not node)
    data = structure.node_data()
    if data is None or data[1] is not None:  # it differs between registrations, and may not print
        return False
    # Only printing tells the two kinds of namedtuple apart.
    return str(structure).startswith(f"PyTreeDef(CustomNode(namedtuple[{type(node).__name__}], ")


def _repeated(kind: type, segments: list[str], name: str) -> KeyPathError:
    twice = next(segment for segment, count in Counter(segments).items() if count > 1)
    return KeyPathError(
        f"two children of one node have the key path {shorten(join(name, twice))}: "
        f"the node type {type_name(kind)} gives both one key"
    )


def _spelled(speller: Callable[[Any], str], key: Any, name: str) -> str:
    try:
        return speller(key)
    except KeyPathError as error:
        raise located(error, name) from None
