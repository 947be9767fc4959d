"""The note: what key paths and tensors do not express about a tree, as JSON in the metadata; and reserved entries.

Specification: *The note*.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from pytree2safetensors._errors import FileFormatError, unread
from pytree2safetensors._format.strict_json import read_json, write_json
from pytree2safetensors._format.tensor import LEAF_KINDS
from pytree2safetensors._messages import shorten
from pytree2safetensors._types import Kind

VERSION: Final = 1
NOTE: Final = "pytree2safetensors"  # the metadata entry
FORMAT: Final = {"format": "flax"}  # the metadata of every file that this package writes
_NODE_KINDS: Final = frozenset(
    {"tuple", "None", "dict", "list", "PyTreeContainer", "UnkeyedContainer"}
)
_NEEDS_ARGUMENT: Final = frozenset({"key", "str"})
_BIG: Final = re.compile(r"-?0x[1-9a-f][0-9a-f]{15,}")


def is_reserved(key: str) -> bool:
    """Return whether a metadata entry belongs to this package, in this version or another."""
    return key == NOTE or key.startswith(NOTE + ".")


class Note(NamedTuple):
    """The kinds of nodes and leaves that names and tensors do not express."""

    nodes: Mapping[str, Kind]
    leaves: Mapping[str, Kind]


def write_note(note: Note) -> str | None:
    """Write the note as compact JSON; return None if it is empty."""
    if not note.nodes and not note.leaves:
        return None
    return write_json({"version": VERSION, "nodes": note.nodes, "leaves": note.leaves})


def read_note(text: str | None, file: str) -> Note:
    """Read and check a note."""
    if text is None:
        return Note({}, {})
    content = read_json(text, f"the note of {file}")
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise FileFormatError(f"the note of {file} has no version; it is damaged")
    if version > VERSION:
        raise unread(
            f"the note of {file} has version {min(version, 10**9)}, but this reader knows only version "
            f"{VERSION}; install a newer pytree2safetensors"
        )
    unknown = sorted(set(content) - {"version", "nodes", "leaves"})
    if unknown:
        raise FileFormatError(f"the note of {file} has an unknown entry {shorten(unknown[0])}")
    nodes = _checked(content.get("nodes", {}), _is_node_kind, "node", file)
    leaves = _checked(content.get("leaves", {}), _is_leaf_kind, "leaf", file)
    return Note(nodes, leaves)


def _checked(
    kinds: Any, is_kind: Callable[[Any], bool], what: str, file: str
) -> Mapping[str, Kind]:
    if not isinstance(kinds, dict):
        raise FileFormatError(f"the {what} kinds in the note of {file} are not a JSON object")
    for path, kind in kinds.items():
        if not is_kind(kind):
            raise FileFormatError(
                f"the note of {file} gives {shorten(path)} the unknown or malformed {what} kind "
                f"{_shown(kind)}"
            )
    return kinds


def _shown(kind: Any) -> str:
    word = kind[0] if isinstance(kind, list) and kind else kind
    return shorten(word) if isinstance(word, str) else f"of type {type(word).__name__}"


def _is_node_kind(kind: Any) -> bool:
    if isinstance(kind, str):
        return kind in _NODE_KINDS
    match kind:
        case ["OrderedDict", [*keys]]:
            return all(isinstance(key, str) for key in keys)
    return False


def _is_leaf_kind(kind: Any) -> bool:
    if isinstance(kind, str):
        return kind in LEAF_KINDS and kind not in _NEEDS_ARGUMENT
    match kind:
        case ["int", str(digits)]:
            return _is_big(digits)
        case ["str" | "key", str()]:
            return True
    return False


def _is_big(digits: str) -> bool:
    """Return whether a hexadecimal is canonical, and too large for a tensor of 64 bits."""
    if not _BIG.fullmatch(digits):
        return False
    sign, _, magnitude = digits.rpartition("0x")
    return len(magnitude) > 16 or not -(2**63) <= int(sign + magnitude, 16) < 2**63
