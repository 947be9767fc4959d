"""Claims: what a note says of nodes, checked against all names of its file.

Specification: *The note*.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping

from pytree2safetensors._errors import FileFormatError, KeyPathError, TreeStructureError, shorten
from pytree2safetensors._tree.keypath import INDEX, ITEM, MARKERS, UNKEYED, string2keypath
from pytree2safetensors._types import Kind

_CHILDREN = {"tuple": INDEX, "OrderedDict": ITEM}  # what follows the path of a node of this kind


def check_nodes(kinds: Mapping[str, Kind], leaves: Mapping[str, object], file: str) -> None:
    """Refuse a note that contradicts the names of its file, or that gives a kind to no path.

    The cost is that of sorting the names, however deep or many they are. Names that spell nothing
    are no concern of the note.
    """
    if not kinds:
        return
    names = _Names([*leaves, *kinds])
    try:
        for path, kind in kinds.items():
            string2keypath(path)
            _check_children(names, path, kind)
        _check_places(names, kinds, leaves)
    except (KeyPathError, TreeStructureError) as error:
        raise FileFormatError(f"the note of {file} contradicts its tensors: {error}") from None


class _Names:
    """Names in order: those that start with a text follow each other."""

    def __init__(self, names: Iterable[str]) -> None:
        self.sorted = sorted(names)

    def starting(self, text: str) -> int:
        """How many names start with a text."""
        after = text[:-1] + chr(ord(text[-1]) + 1)
        return bisect_left(self.sorted, after) - bisect_left(self.sorted, text)

    def at(self, path: str) -> int:
        """How many names are a path."""
        position = bisect_left(self.sorted, path)
        return self.sorted[position : position + 2].count(path)

    def below(self, path: str) -> int:
        """How many names are below a path."""
        if not path:
            return len(self.sorted) - self.at("")
        return sum(self.starting(path + marker) for marker in MARKERS)


def _check_children(names: _Names, path: str, kind: Kind) -> None:
    """Refuse a kind that the children of its node do not fit."""
    word = kind[0] if isinstance(kind, list) else kind
    below = names.below(path)
    if below:
        marker = _CHILDREN.get(word)
        fitting = names.starting(path + marker) if marker else 0
        if marker == INDEX:
            fitting -= names.starting(path + UNKEYED)
        if fitting != below:
            raise TreeStructureError(f"{shorten(path)} is noted as {word}, and its children differ")
    if isinstance(kind, list):
        _check_keys(names, path, kind[1], below)


def _check_keys(names: _Names, path: str, segments: list[str], below: int) -> None:
    """Refuse an `OrderedDict` whose keys are not those of its children."""
    if segments and not below:
        raise TreeStructureError(f"the noted keys of {shorten(path)} have no leaves")
    children = {path + segment for segment in segments if _is_key(segment)}
    found = [names.at(child) + names.below(child) for child in children]
    if len(children) != len(segments) or not all(found) or sum(found) != below:
        raise TreeStructureError(
            f"the noted keys of the OrderedDict {shorten(path)} are not those of its children"
        )


def _is_key(segment: str) -> bool:
    try:
        return len(string2keypath(segment)) == 1
    except KeyPathError:
        return False


def _check_places(names: _Names, kinds: Mapping[str, Kind], leaves: Mapping[str, object]) -> None:
    """Refuse a node at a leaf or below one."""
    # Leaves that the name begins with, each with whether it is below another of them.
    open_leaves: list[tuple[str, bool]] = []
    for name in names.sorted:
        while open_leaves and not name.startswith(open_leaves[-1][0]):
            open_leaves.pop()
        above, is_below = open_leaves[-1] if open_leaves else ("", False)
        if open_leaves and len(name) > len(above):
            is_below = is_below or not above or name[len(above)] in MARKERS
        if name in kinds and (is_below or name in leaves):
            leaf = name if name in leaves else above
            raise TreeStructureError(
                f"{shorten(leaf)} and {shorten(name)} name a leaf and a node at one place"
            )
        if name in leaves:
            open_leaves.append((name, is_below))
