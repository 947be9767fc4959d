"""The names, and the noted nodes, below a prefix.

Specification: *Loading*.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Final

from pytree2safetensors._errors import KeyPathError, TreeStructureError, WeightsMismatchError
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._messages import nearest, shorten
from pytree2safetensors._tree.keypath import split, string2keypath
from pytree2safetensors._tree.paths import strip_prefix
from pytree2safetensors._tree.spelling import join
from pytree2safetensors._types import Kind

_COMPARED: Final = 2000  # names to search for a similar prefix


def names_below(
    checkpoint: OpenCheckpoint, prefix: str, wanted: Iterable[str] = (), separator: str = ""
) -> dict[str, str]:
    """Map the names relative to `prefix` to the names in the file.

    `wanted` are the key paths to report as missing if there is nothing. With a separator, names and
    prefix are not key paths.
    """
    if not prefix:
        return {name: name for name in sorted(checkpoint.infos)}
    found = {}
    if separator:
        found = _names_after(prefix, separator, checkpoint)
    else:
        string2keypath(prefix)
        for name in sorted(checkpoint.infos):
            rest = strip_prefix(prefix, name)
            if rest is not None:
                found[rest] = name
    if not found and (separator or not nodes_below(checkpoint, prefix)):
        near = _nearest_node(checkpoint, prefix, separator)
        raise WeightsMismatchError(
            f"{checkpoint.label} has nothing at the prefix {shorten(prefix)}{near}; "
            f"{_beginning(checkpoint)}",
            missing=tuple(wanted),
        )
    return found


def _names_after(prefix: str, separator: str, checkpoint: OpenCheckpoint) -> dict[str, str]:
    """Map what follows `prefix` and a separator to the names that begin with them."""
    start = prefix + separator
    if {prefix, start} <= checkpoint.infos.keys():
        raise TreeStructureError(
            f"in {checkpoint.label}, {shorten(prefix)} and {shorten(start)} are at the same place below "
            f"the prefix {shorten(prefix)}; load_abstract(..., flat=True) without a prefix lists them"
        )
    names = (name for name in sorted(checkpoint.infos) if name == prefix or name.startswith(start))
    return {name[len(start) :]: name for name in names}


def _beginning(checkpoint: OpenCheckpoint) -> str:
    """Say what the names of a file begin with."""
    names = ", ".join(map(shorten, sorted(checkpoint.infos)[:5]))
    return f"its names begin with {names}" if names else "it has no leaves"


def _nearest_node(checkpoint: OpenCheckpoint, prefix: str, separator: str) -> str:
    """Return a hint with the prefix that the caller may have meant."""
    nodes: dict[str, None] = {}
    if separator:
        count = len(prefix.removesuffix(separator).split(separator))
        for name in islice(checkpoint.infos, _COMPARED):
            nodes[separator.join(name.split(separator)[:count])] = None
        return nearest(prefix, list(nodes))
    count = len(split(prefix))
    for name in islice(checkpoint.infos, _COMPARED):
        with suppress(KeyPathError):  # a foreign name has no prefix
            nodes[join("", *split(name)[:count])] = None
    return nearest(prefix, list(nodes))


def nodes_below(checkpoint: OpenCheckpoint, prefix: str) -> Mapping[str, Kind]:
    """Return the noted kinds of the nodes below `prefix`, by path relative to it."""
    if not prefix:
        return checkpoint.note.nodes
    found = ((strip_prefix(prefix, path), kind) for path, kind in checkpoint.note.nodes.items())
    return {path: kind for path, kind in found if path is not None}
