"""Claims: what a note says about nodes, checked against all names of its file.

Specification: *The note*.
"""

from collections.abc import Mapping

from pytree2safetensors._errors import FileFormatError, KeyPathError, TreeStructureError
from pytree2safetensors._messages import shorten
from pytree2safetensors._tree.keypath import split, string2keypath
from pytree2safetensors._tree.spelling import ATTR, INDEX, ITEM, MARKERS, UNKEYED
from pytree2safetensors._types import Kind

_CHILDREN = {"tuple": INDEX, "OrderedDict": ITEM}  # what follows the path of such a node


def check_nodes(kinds: Mapping[str, Kind], leaves: Mapping[str, object], file: str) -> None:
    """Raise an error if a note contradicts the names of its file, or if its own are not key paths.

    This costs as much as sorting the names, however deep or many they are. Names of tensors that
    are not key paths are ignored.
    """
    if not kinds:
        return
    try:
        for path in kinds:
            string2keypath(path)
        _check_names(kinds, leaves)
    except (KeyPathError, TreeStructureError) as error:
        raise FileFormatError(f"the note of {file} contradicts its tensors: {error}") from None


def _check_names(kinds: Mapping[str, Kind], leaves: Mapping[str, object]) -> None:
    """Compare each name with the nearest noted node above it. Other nodes above need no comparison."""
    for name in kinds.keys() & leaves.keys():
        raise _at_a_leaf(name, name)
    segments: dict[str, set[str]] = {path: set() for path in kinds if isinstance(kinds[path], list)}
    # Names that the current name begins with as text, which need not be above it in the tree; and
    # for each, the nearest noted node and a leaf that are above it.
    prefixes: list[tuple[str, str | None, str | None]] = []
    names = sorted([*leaves, *kinds])
    for name, following in zip(names, [*names[1:], ""], strict=True):
        while prefixes and not name.startswith(prefixes[-1][0]):
            prefixes.pop()
        node = leaf = None
        if prefixes:
            last, node, leaf = prefixes[-1]
            if not last or name[len(last)] in MARKERS:
                node = last if last in kinds else node
                leaf = last if last in leaves and _is_key_path(last) else leaf
        if leaf is not None and name in kinds:
            raise _at_a_leaf(leaf, name)
        if node is not None:
            fits = _may_be_below(name, node, kinds[node])
            if (not fits or node in segments) and _is_key_path(name):
                if not fits:
                    raise _differs(node, kinds[node])
                segments[node].add(split(name[len(node) :])[0])
        if following.startswith(name):
            prefixes.append((name, node, leaf))
    for path, found in segments.items():
        _check_keys(path, kinds[path], found)


def _at_a_leaf(leaf: str, name: str) -> TreeStructureError:
    return TreeStructureError(
        f"{shorten(leaf)} and {shorten(name)} name a leaf and a node at the same place"
    )


def _is_key_path(name: str) -> bool:
    try:
        string2keypath(name)
    except KeyPathError:
        return False
    return True


def _may_be_below(name: str, path: str, kind: Kind) -> bool:
    """Return whether a node of this kind has such children."""
    first = name[len(path)]
    marker = first if first in MARKERS else ATTR  # below the root it is left out
    return marker == _CHILDREN.get(_word(kind)) and not name.startswith(UNKEYED, len(path))


def _differs(path: str, kind: Kind) -> TreeStructureError:
    return TreeStructureError(f"{shorten(path)} is noted as {_word(kind)}, and its children differ")


def _word(kind: Kind) -> str:
    return str(kind[0]) if isinstance(kind, list) else kind


def _check_keys(path: str, kind: Kind, found: set[str]) -> None:
    """Raise an error if the keys of an `OrderedDict` are not those of its children."""
    segments = kind[1]
    if segments and not found:
        raise TreeStructureError(f"the noted keys of {shorten(path)} have no leaves")
    if len(segments) != len(found) or {*segments} != found:
        raise TreeStructureError(
            f"the noted keys of the OrderedDict {shorten(path)} are not those of its children"
        )
