"""Saving with other names: the tensors that rules make of the leaves of a tree.

Specification: *Rules*.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from pytree2safetensors._errors import FileFormatError, UnsupportedLeafError, WeightsMismatchError
from pytree2safetensors._format.layout import check_name
from pytree2safetensors._format.tensor import COMPLEX128, NOTED_DTYPES, SCALARS, WEAK, TensorInfo
from pytree2safetensors._leaves.assembled import Assembled, Copy, Placed, assemble
from pytree2safetensors._leaves.families import Lost
from pytree2safetensors._leaves.ownership import is_global
from pytree2safetensors._leaves.regions import Shape
from pytree2safetensors._leaves.renaming import Rename, renamed
from pytree2safetensors._leaves.routes import Routes, describe_unused
from pytree2safetensors._leaves.spread import assembled_chunks
from pytree2safetensors._leaves.views import View
from pytree2safetensors._messages import listed, plural, shorten
from pytree2safetensors._tree.rule import Rule
from pytree2safetensors._tree.rule_index import with_dots
from pytree2safetensors._types import Chunk

# Kinds of leaves that need no note.
_PLAIN: Final = frozenset({None, "weak", *SCALARS} - {"complex"})
_NOTHING: Final = memoryview(b"")


def place(
    rename: Rename, found: Sequence[tuple[str, Any, TensorInfo | None]]
) -> tuple[list[Placed], list[tuple[str, Any]]]:
    """Find out where to store the leaves of a tree, except those that are not in the file.

    Args:
        rename: Rules, names or a function.
        found: The paths and the leaves of the tree, and infos of those that a file can hold.

    Returns:
        The leaves that a file can hold, and the paths and leaves of the others.

    Raises:
        WeightsMismatchError: A leaf has no place in the file, and a file can hold all others.
    """
    paths = [path for path, _, _ in found]
    shapes = [_shape_of(info) for _, _, info in found]
    routes = renamed(rename, paths, shapes, complete=True)
    placed: list[Placed] = []
    unstorable: list[tuple[str, Any]] = []
    lost: list[tuple[str, Rule | None, str]] = []
    ways = zip(routes.routes, routes.rules, routes.families, strict=True)
    for (route, rule, family), (path, leaf, info) in zip(ways, found, strict=True):
        if route is not None and info is None:
            unstorable.append((path, leaf))
        elif isinstance(route, Lost):
            lost.append((path, rule, route.reason))
        elif route is not None and info is not None:
            placed.append(Placed(route, rule, family, path, leaf, info))
    lost += other_dtypes(placed)
    if lost and not unstorable:
        raise misfit_error(lost, paths, routes)
    return placed, unstorable


def _shape_of(info: TensorInfo | None) -> Shape | None:
    """Return the shape of a leaf whose axes can be rearranged."""
    if info is None or isinstance(info.kind, list):
        return None
    is_array = info.kind in {None, *WEAK, *COMPLEX128, *NOTED_DTYPES}
    return info.array_shape if is_array else None


def other_dtypes(placed: Iterable[Placed]) -> Iterator[tuple[str, Rule | None, str]]:
    """Yield the leaves that a rule joins with a leaf of another dtype."""
    firsts: dict[int, Placed] = {}  # of each family
    for item in placed:
        if not isinstance(item.route, View):
            continue
        first = firsts.setdefault(item.family, item)
        ours, others = (np.dtype(one.leaf.dtype).newbyteorder("=") for one in (item, first))
        if ours != others:
            reason = (
                f"{item.rule!r} joins it, a leaf of {ours}, with {shorten(first.path)} of {others}"
            )
            yield item.path, item.rule, reason


def misfit_error(
    lost: Sequence[tuple[str, Rule | None, str]], paths: Sequence[str], routes: Routes
) -> WeightsMismatchError:
    """Make the error for leaves without a place in the file."""
    parts = ["rename= does not fit the tree:"]
    lines = (
        f"{with_dots(path) if rule is None else shorten(path)}: {reason}"
        for path, rule, reason in lost
    )
    parts += listed(lines, len(lost))
    if routes.idle:
        parts.append("  rules that no leaf of the tree uses:")
        parts += listed(describe_unused(routes, paths), len(routes.idle))
    missing = [path for path, rule, _ in lost if rule is None]
    parts.append(
        'As the last rule, Rule("{=}", "{=}") stores leaves under their own names; '
        "Rule(None, path) leaves one out."
        if missing
        else "Change the rule, or put Rule(None, path) before it to leave the leaf out."
    )
    mismatched = [f"{path!r}: {reason}" for path, rule, reason in lost if rule is not None]
    return WeightsMismatchError("\n".join(parts), missing, (), mismatched)


def tensors_of(placed: Sequence[Placed]) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Make the tensors of a file, and what they are made of: a leaf, or an `Assembled`.

    Raises:
        UnsupportedLeafError: A leaf needs a note.
        FileFormatError: Two leaves that differ are stored as one tensor, or a tensor has a name that
            no header can hold.
    """
    ruled = any(item.rule is not None for item in placed)
    _check_kinds(placed, ruled)
    found = assemble(placed)
    made: dict[str, Any] = {}
    for name, copies in found.items():
        check_name(name, copies[0].path)
        for other in copies[1:]:
            _check_equal(copies[0], other, ruled)
        view, _, leaf = copies[0].tensor.members[0]
        made[name] = leaf if view.is_plain else copies[0].tensor
    return {name: copies[0].tensor.info for name, copies in found.items()}, made


def _check_kinds(placed: Iterable[Placed], ruled: bool) -> None:
    """Raise an error for leaves that need a note."""
    noted = [
        f"{shorten(item.path)}: {kind[0] if isinstance(kind, list) else kind}"
        for item in placed
        if isinstance(kind := item.info.kind, list) or kind not in _PLAIN
    ]
    if noted:
        needing = plural(len(noted), "leaf of the tree needs", "leaves of the tree need")
        first = f"{needing} a note, which a file saved with rename= does not have:"
        last = f"Convert them, {_leave_out('them', ruled)}, or save without rename=."
        raise UnsupportedLeafError("\n".join([first, *listed(noted, len(noted)), last]))


def _check_equal(one: Copy, other: Copy, ruled: bool) -> None:
    """Check that leaves that are stored as one tensor have the same bytes."""
    places = one.path, other.path, one.tensor.name, ruled
    if one.tensor.info == other.tensor.info:
        if not one.tensor.info.nbytes or _is_same(one.tensor, other.tensor):
            return
        members = [*one.tensor.members, *other.tensor.members]
        if any(is_global(member.leaf) for member in members):
            raise incomparable(*places)
        if have_same_bytes(assembled_chunks(one.tensor), assembled_chunks(other.tensor)):
            return
    raise differ(*places)


def have_same_bytes(one: Iterable[Chunk], other: Iterable[Chunk]) -> bool:
    """Return whether adjacent chunks have the same bytes, wherever they are cut."""
    ones, others = (piece for _, piece in one), (piece for _, piece in other)
    first = second = _NOTHING
    while True:
        first, second = first or next(ones, _NOTHING), second or next(others, _NOTHING)
        count = min(len(first), len(second))
        if not count:
            return len(first) == len(second)
        if not np.array_equal(first[:count], second[:count]):
            return False
        first, second = first[count:], second[count:]


def differ(one: str, other: str, name: str, ruled: bool) -> FileFormatError:
    """Make the error for the leaves at two paths that would be one tensor, by rules or other names."""
    return FileFormatError(
        f"{_both(one, other)} are both stored as {shorten(name)}, but they differ; "
        f"give one of them another name, or {_leave_out('it', ruled)}"
    )


def incomparable(one: str, other: str, name: str, ruled: bool) -> FileFormatError:
    """Make the error for leaves that would be one tensor, if no process can compare them."""
    return FileFormatError(
        f"{_both(one, other)} are both stored as {shorten(name)}, but they are "
        f"spread over several processes, which cannot compare them; {_leave_out('one of them', ruled)}"
    )


def _leave_out(what: str, ruled: bool) -> str:
    """Say how to leave out a leaf; a function or a mapping of names cannot do it."""
    return f"leave {what} out with Rule(None, path)" if ruled else f"take {what} out of the tree"


def _both(one: str, other: str) -> str:
    return (
        f"two parts of {shorten(one)}" if one == other else f"{shorten(one)} and {shorten(other)}"
    )


def _is_same(one: Assembled, other: Assembled) -> bool:
    """Return whether tensors are made of the same leaf objects in the same way."""
    ours, others = ([(id(m.leaf), m.number, m.view) for m in t.members] for t in (one, other))
    return ours == others
