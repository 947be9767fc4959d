"""The note: what key paths and tensors leave unsaid, as JSON in the metadata of a file."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

from pytree2safetensors._errors import FileFormatError, shorten
from pytree2safetensors._leaf import LEAF_KINDS
from pytree2safetensors._trie import Kind

VERSION: Final = 1
NOTE: Final = "pytree2safetensors"  # the entry of the metadata

_NODE_KINDS: Final = frozenset(
    {"tuple", "None", "dict", "list", "PyTreeContainer", "UnkeyedContainer"}
)
_NEEDS_ARGUMENT: Final = frozenset({"key", "str"})
_BIG: Final = re.compile(r"-?0x[1-9a-f][0-9a-f]{15,}")


def is_reserved(key: str) -> bool:
    """Whether an entry of the metadata is this package's own, of this version or another."""
    return key == NOTE or key.startswith(NOTE + ".")


class Note(NamedTuple):
    """The kinds of the nodes and leaves that differ from what names and tensors say."""

    nodes: Mapping[str, Kind]
    leaves: Mapping[str, Kind]


def write_note(note: Note) -> str | None:
    """The note as compact JSON; None where it would say nothing."""
    if not note.nodes and not note.leaves:
        return None
    content = {"version": VERSION, "nodes": note.nodes, "leaves": note.leaves}
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def read_note(text: str | None, file: str) -> Note:
    """Read a note, trusting nothing in it."""
    if text is None:
        return Note({}, {})
    content = read_json(text, f"the note of {file}")
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise FileFormatError(f"the note of {file} has no version; it is damaged")
    if version > VERSION:
        raise FileFormatError(
            f"the note of {file} is of version {min(version, 10**9)}, and this is a reader of version "
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
        raise FileFormatError(f"the note of {file} lists its {what} kinds in no object")
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
            return all(isinstance(key, str) and key[:1] == "@" for key in keys)
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
    """Whether the hexadecimal is canonical, and beyond what a tensor of 64 bits holds."""
    if not _BIG.fullmatch(digits):
        return False
    sign, _, magnitude = digits.rpartition("0x")
    return len(magnitude) > 16 or not -(2**63) <= int(sign + magnitude, 16) < 2**63


Pairs: TypeAlias = tuple[tuple[str, Any], ...]  # an object of JSON, in the order of the text


def read_json(text: str, what: str, *, keep_pairs: bool = False, fractions: bool = False) -> Any:
    """Read JSON strictly: no duplicate names, no numbers but integers; else a FileFormatError.

    With `keep_pairs` the text is an object, and objects are tuples of pairs: a fraction of the
    cost of dicts where there are many. With `fractions` there may be other numbers, too: programs
    write them where nothing here reads them.
    """
    hook: Any = tuple if keep_pairs else _object
    try:
        found = json.loads(
            text,
            object_pairs_hook=hook,
            parse_constant=_refuse,
            parse_int=float if fractions else _integer,
            parse_float=float if fractions else _refuse,
        )
        if keep_pairs:
            _check_unique(found)
    except _Duplicate as error:
        raise FileFormatError(f"{what} has {shorten(str(error))} twice") from None
    except RecursionError:
        raise FileFormatError(f"{what} is nested too deep") from None
    except ValueError as error:
        raise FileFormatError(f"{what} is not valid JSON: {error}") from None
    return found


def read_json_at(text: str, start: int) -> tuple[Pairs, int]:
    """Read the object of strings that begins at `start`, as strictly; its pairs, and its end."""
    try:
        pairs, end = _DECODER.raw_decode(text, start)
        if type(pairs) is not tuple:
            raise ValueError("no object")
        _object(pairs)
    except (ValueError, RecursionError):
        raise FileFormatError(f"no object of JSON begins at {start}") from None
    return pairs, end


class _Duplicate(ValueError):
    """A name that an object has twice."""


def _object(pairs: Collection[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Duplicate(_first_repeated(name for name, _ in pairs))
    return found


def _check_unique(pairs: Pairs) -> None:
    """Refuse duplicate names in an object, and in the objects that are its values."""
    _object(pairs)
    for _, inner in pairs:
        if type(inner) is tuple:
            _object(inner)


def _first_repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return ""


def _integer(digits: str) -> int:
    if digits == "-0":  # which is a float to other readers
        _refuse(digits)
    return int(digits)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no integer")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=tuple,
    parse_constant=_refuse,
    parse_float=_refuse,
)
