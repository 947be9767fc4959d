"""Spelled key paths as strings: cutting them, moving them below a prefix or out of it, and joining keys with dots.

Specification: *Key paths*, *Rules*.
"""

import re
from collections.abc import Iterator

from pytree2safetensors._tree.keypath import read, split
from pytree2safetensors._tree.keys import GetAttrKey, Key, SequenceKey
from pytree2safetensors._tree.spelling import ATTR, INDEX, ITEM, MARKERS, join, strip_leading_dot

_STARTS = frozenset(MARKERS)
_TO_DOTS = str.maketrans(dict.fromkeys(MARKERS, ATTR))
_INT_KEY = re.compile(r"([@#])\\\((-?[0-9]+)\)")
_NOT_DOTTED = re.compile(r"[@#\\]")


def cut(string: str) -> tuple[str, str]:
    """Split a spelled path that is not empty before its last segment."""
    if "\\" not in string:
        at = max(string.rfind(ATTR), string.rfind(ITEM), string.rfind(INDEX))
        if at > 0:
            return string[:at], string[at:]
    *rest, last = split(string)
    return join("", *rest), last


def above(name: str) -> Iterator[tuple[str, str]]:
    """Yield the paths of the nodes above `name`, the nearest first, each with the segment below it."""
    while name:
        name, segment = cut(name)
        yield name, segment


def strip_prefix(prefix: str, string: str) -> str | None:
    """Return the path from `prefix` to `string`; None if it is not below."""
    if not prefix:
        return string
    if not string.startswith(prefix):
        return None
    rest = string[len(prefix) :]
    if rest and rest[0] not in MARKERS:
        return None
    return rest and strip_leading_dot(rest)


def add_prefix(prefix: str, string: str) -> str:
    """Return the path of `string`, which is relative to `prefix`: the inverse of `strip_prefix`."""
    if not prefix or not string:
        return prefix or string
    return prefix + (string if string[0] in MARKERS else ATTR + string)


def is_dotted(string: str) -> bool:
    """Return whether a path has no marker but dots."""
    return not _NOT_DOTTED.search(string)


def dotted(string: str) -> str:
    """Join the keys of a spelled path with dots, whatever their kind."""
    plain = _INT_KEY.sub(r"\1\2", string) if "\\" in string else string
    if "\\" not in plain:
        return plain.translate(_TO_DOTS)[plain[:1] in _STARTS :]
    return ATTR.join(map(_text_of, read(string)))


def _text_of(key: Key) -> str:
    if isinstance(key, GetAttrKey):
        return key.name
    value = key.idx if isinstance(key, SequenceKey) else key.key
    return value if isinstance(value, str) else ascii(value)
