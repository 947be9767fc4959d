r"""The grammar of key paths, and reading them; `spelling` writes them. Both form a bijection.

    keypath  = [ first *segment ]
    first    = segment / character text  ; a name alone: the "." of a leading GetAttrKey is left off
    segment  = "." text                  ; GetAttrKey(text)
             / "@" text                  ; DictKey(text)
             / "@" "\(" escaped ")"      ; DictKey(value), no str: as `ascii` writes it
             / "#" number                ; SequenceKey(number)
             / "#" "\(" number ")"       ; FlattenedIndexKey(number)
    text     = *character
    character = any character but . @ # \  /  "\" ( "." / "@" / "#" / "\" )
    number   = "0" / ( "1"-"9" *( "0"-"9" ) )

The markers are defined in `spelling`.

Specification: *Key paths*.
"""

import re
from functools import lru_cache
from typing import NoReturn

from pytree2safetensors._errors import KeyPathError
from pytree2safetensors._messages import shorten
from pytree2safetensors._tree.keys import (
    MAX_INDEX,
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    Key,
    KeyPath,
    SequenceKey,
    item_key,
)
from pytree2safetensors._tree.literal import MAX_DIGITS, SURROGATE, read_literal
from pytree2safetensors._tree.spelling import ATTR, MARKERS, RESERVED, spell_item

_SHORT = 32

# text = *( any character but . @ # \  /  "\" ( "." / "@" / "#" / "\" ) )
_TEXT = r"[^.@#\\]*(?:\\[.@#\\][^.@#\\]*)*"
_SEGMENTS = re.compile(rf"(?:[.@#](?:\\\()?|^){_TEXT}")
_BEFORE_MARKER = re.compile(r"(?=[.@#])")  # splits strings without a backslash in the same way
# number = "0" / ( "1"-"9" *( "0"-"9" ) )
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")

_ESCAPED = re.compile(r"\\(.)")
_NO_UTF8 = "a lone surrogate has no UTF-8 spelling"


class Rejected(Exception):
    """Why a string is not a key path: the position, the reason, and a correction."""

    def __init__(self, position: int, reason: str, fix: tuple[int, int, str] | None = None):
        self.position, self.reason, self.fix = position, reason, fix


def string2keypath(string: str) -> KeyPath:
    r"""Read a spelled key path: the inverse of `keypath2string`.

    Args:
        string: A spelling, exactly as `keypath2string` writes it.

    Returns:
        The keys.

    Raises:
        KeyPathError: `string` is not the canonical spelling of a key path. The message gives the
            position, the reason and, if there is one, the canonical spelling.

    Specification: *Key paths*.

    >>> string2keypath(r"#2.layers@a\.b")
    (SequenceKey(idx=2), GetAttrKey(name='layers'), DictKey(key='a.b'))
    """
    if type(string) is not str:
        if not isinstance(string, str):
            raise TypeError(
                f"string2keypath: string must be a spelled key path, which is a str, not "
                f"{type(string).__name__}"
            )
        string = str.__str__(string)
    try:
        return tuple(read(string))
    except Rejected as rejected:
        _refuse(string, rejected)


def split(string: str) -> list[str]:
    """Split a spelled path into segments, each with its marker."""
    pieces = _pieces(string)
    try:
        _check_length(string, pieces)
        if pieces:
            _read_first(pieces[0])
    except Rejected as rejected:
        _refuse(string, rejected)
    if pieces and pieces[0][0] not in MARKERS:
        pieces[0] = ATTR + pieces[0]
    return pieces


def read_segment(segment: str) -> Key:
    """Read one segment, including its marker."""
    try:
        if not segment.isascii() and (found := SURROGATE.search(segment)):
            raise Rejected(found.start(), _NO_UTF8)
        return _read_piece(segment)
    except Rejected as rejected:
        _refuse(segment, rejected)


def read(string: str) -> list[Key]:
    """Read a spelled key path. Raise `Rejected` if it is not one."""
    if not string.isascii() and (found := SURROGATE.search(string)):
        raise Rejected(found.start(), _NO_UTF8)
    pieces = _pieces(string)
    _check_length(string, pieces)
    keys: list[Key] = []
    try:
        for piece in pieces:
            if not keys:
                keys.append(_read_first(piece))
            else:
                keys.append(_read_short(piece) if len(piece) <= _SHORT else _read_piece(piece))
    except Rejected as rejected:
        offset = sum(map(len, pieces[: len(keys)]))
        raise _shift(rejected, pieces[len(keys)], string, offset) from None
    return keys


def _pieces(string: str) -> list[str]:
    if "\\" not in string:
        return list(filter(None, _BEFORE_MARKER.split(string)))
    return list(filter(None, _SEGMENTS.findall(string)))


def has_stray_backslash(string: str) -> bool:
    """Return whether a backslash escapes nothing, as in names of version 0.1.4."""
    return sum(map(len, _pieces(string))) != len(string)


def _check_length(string: str, pieces: list[str]) -> None:
    if sum(map(len, pieces)) != len(string):
        reason = r"a backslash must be before one of . @ # \, or after @ or # as \("
        raise Rejected(_gap(string), reason)


def _gap(string: str) -> int:
    """Find the first backslash that escapes nothing."""
    position = 0
    for found in _SEGMENTS.finditer(string):
        if found.start() != position:
            break
        position = found.end()
    return position


def _shift(rejected: Rejected, piece: str, string: str, offset: int) -> Rejected:
    """Convert positions in a piece to positions in the string."""
    fix = rejected.fix if piece.endswith(")") else rejected.fix or _closed(string[offset:])
    if fix is not None:
        fix = (fix[0] + offset, fix[1] + offset, fix[2])
    return Rejected(rejected.position + offset, rejected.reason, fix)


def _read_first(piece: str) -> Key:
    if piece[0] in "@#":
        return _read_piece(piece)
    # first = segment / character text
    if piece == RESERVED:
        raise Rejected(0, "this name is reserved by the file format", (0, 0, "."))
    if piece[0] != ".":
        return GetAttrKey(unescape(piece))
    if piece[1:] not in ("", RESERVED) and not piece.startswith(r".\("):
        raise Rejected(0, "a leading name has no '.'", (0, 1, ""))
    return _read_piece(piece)


def _read_piece(piece: str) -> Key:
    marker, text = piece[0], piece[1:]
    if text.startswith(r"\("):
        return _read_parenthesis(piece)
    if marker == "@":
        return DictKey(unescape(text))
    if marker == "#":
        return SequenceKey(_read_number(text, piece, "#{}"))
    return GetAttrKey(unescape(text))


@lru_cache(maxsize=4096)
def _read_short(piece: str) -> Key:
    """Read a segment of at most `_SHORT` characters; most occur many times."""
    return _read_piece(piece)


def unescape(text: str) -> str:
    """Remove the escapes of a text, or of a spelled path: version 0.1.4 wrote paths without them."""
    return _ESCAPED.sub(r"\1", text) if "\\" in text else text


def _read_number(text: str, piece: str, spelling: str) -> int:
    if _NUMBER.fullmatch(text) and int(text) <= MAX_INDEX:
        return int(text)
    reason = f"an index is a decimal number from 0 to {MAX_INDEX}, without sign or leading zero"
    try:
        number = int(text) if len(text) <= MAX_DIGITS else -1
    except ValueError:
        number = -1
    fix = (0, len(piece), spelling.format(number)) if 0 <= number <= MAX_INDEX else None
    raise Rejected(1, reason, fix)


def _read_parenthesis(piece: str) -> Key:
    r"""Read `@\(value)` or `#\(number)`."""
    marker, text = piece[0], piece[3:]
    if marker == ".":
        raise Rejected(1, r"an attribute has no \(...) form")
    if not text.endswith(")"):
        raise Rejected(len(piece), r"a \( needs a ) at the end of its segment")
    if marker == "#":
        return FlattenedIndexKey(_read_number(text[:-1], piece, r"#\({})"))
    try:
        value = read_literal(unescape(text[:-1]))
        spelling = spell_item(value)
    except KeyPathError as error:
        raise Rejected(3, str(error)) from None
    if spelling != piece:
        reason = (
            "a dict key in parentheses is written as Python's ascii() writes it, and is not a str"
        )
        raise Rejected(3, reason, (0, len(piece), spelling))
    return item_key(value)


def _closed(string: str) -> tuple[int, int, str] | None:
    r"""Fix a `@\(1.5)` in which the literal was not escaped."""
    close = string.find(")", 3, MAX_DIGITS)
    if not string.startswith(r"@\(") or close < 0:
        return None
    try:
        return 0, close + 1, spell_item(read_literal(string[3:close]))
    except KeyPathError:
        return None


# --- errors -----------------------------------------------------------------------------------


def _refuse(string: str, rejected: Rejected) -> NoReturn:
    message = (
        f"{shorten(string)} is not a key path: at position {rejected.position}, {rejected.reason}"
    )
    canonical = _fixed(string, rejected) if len(string) <= MAX_DIGITS else None
    if canonical is not None:
        message += f"; the canonical spelling is {shorten(canonical)}"
    raise KeyPathError(message) from None


def _fixed(string: str, rejected: Rejected) -> str | None:
    """Return the canonical spelling that a few local changes give, if there is one."""
    for _ in range(16):
        if rejected.fix is None:
            return None
        start, stop, replacement = rejected.fix
        string = string[:start] + replacement + string[stop:]
        try:
            read(string)
        except Rejected as again:
            rejected = again
        else:
            return string
    return None
