"""The outline of a tree: one row for each node and leaf, with similar siblings folded into one."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from pytree2safetensors._cli.summary import Leaf, kind_text
from pytree2safetensors._errors import KeyPathError
from pytree2safetensors._tree.keypath import split
from pytree2safetensors._tree.paths import cut
from pytree2safetensors._tree.separated import natural
from pytree2safetensors._tree.spelling import join
from pytree2safetensors._types import Kind

_MOST_ROWS: Final = 200  # of an outline after `clip`
_ALIKE: Final = 3  # so many siblings that differ only in a number are folded into one row
_RUNS: Final = 4  # of numbers that a folded row lists

# The last number of a segment, at most what a 64-bit integer holds.
_NUMBERED: Final = re.compile(r"(.*?)([0-9]{1,18})([^0-9]*)", re.DOTALL)
_FOREIGN: Final = "="  # begins the segment of a name that is not a key path


class Row(NamedTuple):
    """A line of an outline.

    Attributes:
        depth: How many rows are above it in the tree.
        name: The spelled name, with ranges such as `0..31` in folded rows.
        label: The part of the name that the row above in the tree does not have.
        times: How many nodes or leaves the row represents.
        leaf: The leaf, or the first of them.
        kind: The kind of a node in the note.
        leaves: How many leaves each of the nodes has.
        parameters: How many elements the arrays of each have.
        nbytes: How many bytes each of them has.
        closed: Whether `clip` left out the rows below it.
    """

    depth: int
    name: str
    label: str
    times: int
    leaf: Leaf | None
    kind: str
    leaves: int
    parameters: int
    nbytes: int
    closed: bool = False


class _Node:
    """A node of the names: its children by segment, and the leaf or kind at the node itself."""

    __slots__ = ("children", "kind", "leaf", "leaves", "nbytes", "parameters", "whole")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.leaf: Leaf | None = None
        self.kind = ""
        self.leaves, self.parameters, self.nbytes = 0, 0, 0
        self.whole = 0  # equal for nodes that differ only in their segments


class _Group(NamedTuple):
    """Siblings in one row: their segments, their number, and the first of them."""

    segment: str
    times: int
    node: _Node


def outline(leaves: Iterable[Leaf], nodes: Mapping[str, Kind], *, fold: bool = True) -> list[Row]:
    """Outline a tree.

    Args:
        leaves: Its leaves. Their names need not be key paths.
        nodes: The kinds of nodes in the note.
        fold: Whether similar siblings share a row.

    Returns:
        The rows, parents before children.
    """
    return list(_rows(_grow(leaves, nodes), fold))


def clip(rows: list[Row]) -> tuple[list[Row], int]:
    """Leave out the deepest levels until the remaining rows fit on a few screens.

    Returns:
        The remaining rows, and how many rows of the first level are left out.
    """
    levels = Counter(row.depth for row in rows)
    deepest, total = 0, levels[0]
    while levels[deepest + 1] and total + levels[deepest + 1] <= _MOST_ROWS:
        deepest += 1
        total += levels[deepest]
    below = [*(row.depth for row in rows[1:]), 0]
    kept = [
        row._replace(closed=row.depth == deepest and after > deepest)
        for row, after in zip(rows, below, strict=False)
        if row.depth <= deepest
    ]
    return kept[:_MOST_ROWS], max(0, len(kept) - _MOST_ROWS)


# --- the tree of the names --------------------------------------------------------------------


def _grow(leaves: Iterable[Leaf], kinds: Mapping[str, Kind]) -> _Node:
    root = _Node()
    order = [root]  # parents before children
    known: dict[str, _Node] = {"": root}

    def node_at(name: str) -> _Node:
        if name in known:
            return known[name]
        try:
            segments = split(name)
        except KeyPathError:  # a foreign name stays whole
            segments = [_FOREIGN + name]
        node = root
        for segment in segments:
            node = child_of(node, segment)
        known[name] = node
        return node

    def child_of(node: _Node, segment: str) -> _Node:
        child = node.children.get(segment)
        if child is None:
            child = node.children[segment] = _Node()
            order.append(child)
        return child

    for leaf in leaves:
        try:
            prefix, segment = cut(leaf.name)
            node = child_of(node_at(prefix), segment)
        except ValueError:  # a foreign name, or the empty path, which has no last segment
            node = node_at(leaf.name)
        node.leaf = leaf
    for path, kind in kinds.items():
        node_at(path).kind = kind_text(kind)
    _sum_up(order)
    return root


def _sum_up(order: list[_Node]) -> None:
    """Count leaves, parameters and bytes, and number similar nodes, children first."""
    numbers: dict[object, int] = {}
    for node in reversed(order):
        parts: tuple[tuple[str, int], ...] = ()
        if node.children:
            children = node.children.values()
            node.leaves = sum([child.leaves for child in children])
            node.parameters = sum([child.parameters for child in children])
            node.nbytes = sum([child.nbytes for child in children])
            parts = tuple(sorted([(name, child.whole) for name, child in node.children.items()]))
        leaf = node.leaf
        if leaf is not None:
            node.leaves += 1
            node.parameters += leaf.parameters
            node.nbytes += leaf.nbytes
        content = (leaf and leaf[1:], node.kind, parts)  # a leaf without its name
        node.whole = numbers.setdefault(content, len(numbers))


# --- rows -------------------------------------------------------------------------------------


def _rows(root: _Node, fold: bool) -> Iterator[Row]:
    if root.leaf is not None or root.kind:
        yield _row(0, "", "", 1, root)
    pending = [(0, "", 1, group) for group in reversed(_groups(root, fold))]
    while pending:
        depth, above, times, group = pending.pop()
        segments, count, node, below = _follow(group, fold)
        times *= count
        label = "".join(segments)
        if label.startswith(_FOREIGN):
            name = label = label.removeprefix(_FOREIGN)
        else:
            name = join(above, *segments)
        yield _row(depth, name, label if above else name, times, node)
        pending.extend((depth + 1, name, times, child) for child in reversed(below))


def _follow(group: _Group, fold: bool) -> tuple[list[str], int, _Node, list[_Group]]:
    """Go down from a group to where the tree first branches or ends, and return what is below."""
    segment, times, node = group
    segments = [segment]
    below = _groups(node, fold)
    while len(below) == 1 and node.leaf is None and not node.kind:
        segment, count, node = below[0]
        segments.append(segment)
        times *= count
        below = _groups(node, fold)
    return segments, times, node, below


def _row(depth: int, name: str, label: str, times: int, node: _Node) -> Row:
    leaf, kind = node.leaf, node.kind
    return Row(depth, name, label, times, leaf, kind, node.leaves, node.parameters, node.nbytes)


# --- folding ----------------------------------------------------------------------------------


def _groups(node: _Node, fold: bool) -> list[_Group]:
    """Group the children that differ only in a number. Return them in natural order."""
    found: list[tuple[str, _Group]] = []  # each with the first of its segments
    for family in _families(node, fold):
        if len(family) < _ALIKE or not _fits(number for number, _, _ in family):
            found.extend((segment, _Group(segment, 1, child)) for _, segment, child in family)
            continue
        family.sort(key=lambda member: int(member[0]))
        number, segment, child = family[0]
        start = segment.rindex(number)
        numbers = _ranges([number for number, _, _ in family])
        folded = segment[:start] + numbers + segment[start + len(number) :]
        found.append((segment, _Group(folded, len(family), child)))
    found.sort(key=lambda group: natural(group[0]))
    return [group for _, group in found]


def _families(node: _Node, fold: bool) -> Iterable[list[tuple[str, str, _Node]]]:
    """Find children that differ only in the last number of their segments, with this number."""
    families: dict[tuple[str, str, int], list[tuple[str, str, _Node]]] = {}
    for segment, child in node.children.items():
        found = _NUMBERED.fullmatch(segment) if fold else None
        if found is None:
            families[segment, "", -1] = [("", segment, child)]
        else:
            key = found[1], found[3], child.whole
            families.setdefault(key, []).append((found[2], segment, child))
    return families.values()


def _fits(numbers: Iterable[str]) -> bool:
    """Return whether a range is unambiguous: all numbers are equally wide, or have no leading zero."""
    texts = list(numbers)
    return len({*map(len, texts)}) == 1 or not any(len(t) > 1 and t[0] == "0" for t in texts)


def _ranges(numbers: list[str]) -> str:
    """Write sorted numbers as ranges, `0..31` or `0,2,4..7`. Leave out the middle of a long list."""
    runs: list[list[str]] = []
    for number in numbers:
        if runs and int(number) == int(runs[-1][-1]) + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    shown = ["..".join(run) for run in runs]
    if len(shown) > _RUNS:
        shown[_RUNS - 1 : -1] = [".."]
    return ",".join(shown)
