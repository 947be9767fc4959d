"""The outline of a tree: one row for each node and leaf, with what repeats folded into one."""

import heapq
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from pytree2safetensors._cli.summary import Leaf, kind_text
from pytree2safetensors._collector import collector_paused
from pytree2safetensors._errors import KeyPathError
from pytree2safetensors._tree.keypath import cut, join, split
from pytree2safetensors._types import Kind

MOST_ROWS: Final = 200  # of an outline that is not asked to show everything
_FIRST: Final = 50  # children that are shown of a node that has too many
_ALIKE: Final = 3  # from here on siblings that differ in a number alone are folded
_ORDERED: Final = 1000  # names that are put in order by the value of their numbers
_RUNS: Final = 4  # of numbers that a folded row lists

# The last number of a segment, at most what a 64-bit integer holds.
_NUMBERED: Final = re.compile(r"(.*?)([0-9]{1,18})([^0-9]*)", re.DOTALL)
_FOREIGN: Final = "="  # begins the segment that a name is which spells no key path
_DIGITS: Final = re.compile(r"([0-9]{1,18})")


class Row(NamedTuple):
    """A line of an outline.

    Attributes:
        depth: How many rows stand above it in the tree.
        name: The spelled name, with ranges such as `0..31` where rows are folded.
        times: How many nodes or leaves the row stands for.
        leaf: The leaf, of a row that shows one.
        kind: What the note says of the node.
        leaves: How many leaves are at and below each of them.
        nbytes: The bytes of all of them.
        left_out: Whether it stands for siblings that are not shown.
        closed: Whether there is more below it than is shown.
    """

    depth: int
    name: str
    times: int
    leaf: Leaf | None
    kind: str
    leaves: int
    nbytes: int
    left_out: bool = False
    closed: bool = False


class _Node:
    """A node of the names: its children by segment, and what stands at the node itself."""

    __slots__ = ("children", "kind", "leaf", "leaves", "nbytes", "whole")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.leaf: Leaf | None = None
        self.kind = ""
        self.leaves, self.nbytes = 0, 0
        self.whole = 0  # equal for nodes that differ in nothing but their segments


class _Group(NamedTuple):
    """Siblings that are shown as one: how their segments print, and the first of them."""

    segment: str
    times: int
    node: _Node


class _Item(NamedTuple):
    """A node that has a row: its place, its name, and how many it stands for."""

    depth: int
    name: str
    times: int
    node: _Node


def outline(
    leaves: Iterable[Leaf], nodes: Mapping[str, Kind], *, everything: bool = False
) -> list[Row]:
    """Outline a tree, in a bounded number of rows.

    Args:
        leaves: Its leaves. Their names need not be key paths.
        nodes: What the note says of its nodes.
        everything: Fold nothing and leave nothing out.

    Returns:
        The rows, parents before children.
    """
    with collector_paused():
        root = _grow(leaves, nodes)
        top = _Item(-1, "", 1, root)
        return list(_rows(top, _choose(top, everything)))


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
        except KeyPathError:  # a foreign name is shown as it is
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
    """Count leaves and bytes, and number what is alike, children first."""
    numbers: dict[object, int] = {}
    for node in reversed(order):
        parts: tuple[tuple[str, int], ...] = ()
        if node.children:
            strip_prefix = node.children.values()
            node.leaves = sum([child.leaves for child in strip_prefix])
            node.nbytes = sum([child.nbytes for child in strip_prefix])
            parts = tuple(sorted([(name, child.whole) for name, child in node.children.items()]))
        leaf = node.leaf
        if leaf is not None:
            node.leaves += 1
            node.nbytes += leaf.nbytes
        content = (leaf and leaf[1:], node.kind, parts)  # a leaf without its name
        node.whole = numbers.setdefault(content, len(numbers))


# --- what is shown ----------------------------------------------------------------------------


def _choose(top: _Item, everything: bool) -> dict[int, tuple[list[_Item], list[_Group]]]:
    """Decide which nodes open, by id: the rows below each, and the groups that are left out."""
    shown: dict[int, tuple[list[_Item], list[_Group]]] = {}
    room = MOST_ROWS
    waiting: list[tuple[int, int, int, _Item, list[_Group]]] = []

    def consider(item: _Item) -> None:
        if item.node.children:
            groups = _groups(item.node, fold=not everything)
            heapq.heappush(waiting, (item.depth, len(groups), next(numbers), item, groups))

    numbers = itertools.count()  # so that no two compare equal
    consider(top)
    while waiting:  # the shallow first, and of these the small
        *_, item, groups = heapq.heappop(waiting)
        taken = len(groups)
        if taken > room and not everything:
            taken = min(_FIRST, room) if room >= _FIRST // 2 or item is top else 0
        if not taken:
            continue
        room -= taken
        strip_prefix = [_follow(item, group, fold=not everything) for group in groups[:taken]]
        shown[id(item)] = strip_prefix, groups[taken:]
        for child in strip_prefix:
            consider(child)
    return shown


def _follow(above: _Item, group: _Group, fold: bool) -> _Item:
    """The row of a group, down to where the tree first branches or ends."""
    segment, times, node = group
    segments, total = [segment], above.times * times
    while node.leaf is None and not node.kind:
        groups = _groups(node, fold)
        if len(groups) != 1:
            break
        segment, times, node = groups[0]
        segments.append(segment)
        total *= times
    foreign = segments[0].startswith(_FOREIGN)
    name = "".join(segments)[1:] if foreign else join(above.name, *segments)
    return _Item(above.depth + 1, name, total, node)


def _groups(node: _Node, fold: bool) -> list[_Group]:
    """The children in natural order, those alike but for a number in one group."""
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
    by_value = len(found) <= _ORDERED
    found.sort(key=lambda group: _natural(group[0]) if by_value else group[0])
    return [group for _, group in found]


def _families(node: _Node, fold: bool) -> Iterable[list[tuple[str, str, _Node]]]:
    """The children that are alike but for the last number of their segments, with that number."""
    families: dict[tuple[str, str, int], list[tuple[str, str, _Node]]] = {}
    for segment, child in node.children.items():
        found = _NUMBERED.fullmatch(segment) if fold else None
        if found is None:
            families[segment, "", -1] = [("", segment, child)]
        else:
            key = found[1], found[3], child.whole
            families.setdefault(key, []).append((found[2], segment, child))
    return families.values()


def _natural(segment: str) -> list[Any]:
    """Order numbers in segments by value."""
    parts = _DIGITS.split(segment)
    return [(int(part), part) if place % 2 else (0, part) for place, part in enumerate(parts)]


def _fits(numbers: Iterable[str]) -> bool:
    """Whether a range says how each number is written: all as wide, or none with a zero first."""
    texts = list(numbers)
    return len({*map(len, texts)}) == 1 or not any(len(t) > 1 and t[0] == "0" for t in texts)


def _ranges(numbers: list[str]) -> str:
    """Write numbers in order: `0..31`, `0,2,4..7`, and the middle left out of what is long."""
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


# --- rows -------------------------------------------------------------------------------------


def _rows(top: _Item, shown: dict[int, tuple[list[_Item], list[_Group]]]) -> Iterator[Row]:
    pending: list[_Item | Row] = [top]
    while pending:
        item = pending.pop()
        if isinstance(item, Row):
            yield item
            continue
        node = item.node
        strip_prefix, left_out = shown.get(id(item), ([], []))
        if item is not top or node.leaf is not None or node.kind:
            yield _row(item, closed=bool(node.children) and id(item) not in shown)
        if left_out:
            pending.append(_rest(item, strip_prefix, left_out))
        pending.extend(reversed(strip_prefix))


def _row(item: _Item, closed: bool) -> Row:
    depth, name, times, node = item
    nbytes = node.nbytes * times
    leaf, kind, leaves = node.leaf, node.kind, node.leaves
    return Row(max(depth, 0), name, times, leaf, kind, leaves, nbytes, closed=closed)


def _rest(item: _Item, strip_prefix: list[_Item], left_out: list[_Group]) -> Row:
    times = item.times * sum(group.times for group in left_out)
    leaves = item.times * sum(group.times * group.node.leaves for group in left_out)
    nbytes = item.times * sum(group.times * group.node.nbytes for group in left_out)
    return Row(strip_prefix[0].depth, item.name, times, None, "", leaves, nbytes, left_out=True)
