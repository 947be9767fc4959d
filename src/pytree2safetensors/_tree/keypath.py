r"""The grammar: key paths and their spelling, a bijection.

    keypath  = [ first *segment ]
    first    = segment / text            ; a name alone: the "." of a leading GetAttrKey is left off
    segment  = "." text                  ; GetAttrKey(text)
             / "@" text                  ; DictKey(text)
             / "@" "\(" escaped ")"      ; DictKey(value), no str: as `ascii` writes it
             / "#" number                ; SequenceKey(number)
             / "#" "\(" number ")"       ; FlattenedIndexKey(number)
    text     = *( any character but . @ # \  /  "\" ( "." / "@" / "#" / "\" ) )
    number   = "0" / ( "1"-"9" *( "0"-"9" ) )

No other module knows a marker or the escape character.

Specification: *Key paths*.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from jax.tree_util import tree_flatten_with_path

from pytree2safetensors._errors import KeyPathError, shorten
from pytree2safetensors._tree.literal import (
    MAX_DIGITS,
    SURROGATE,
    describe,
    read_literal,
    show,
    write_literal,
)

if TYPE_CHECKING:
    # JAX declares its key classes as `Any`; this is the one place that gives them types.
    class DictKey:
        """The key of an entry of a dict."""

        key: object

        def __init__(self, key: object) -> None: ...

    class GetAttrKey:
        """The key of an attribute."""

        name: str

        def __init__(self, name: str) -> None: ...

    class SequenceKey:
        """The key of an element of a list or tuple."""

        idx: int

        def __init__(self, idx: int) -> None: ...

    class FlattenedIndexKey:
        """The key of a child of a node that was registered without keys."""

        key: int

        def __init__(self, key: int) -> None: ...
else:
    from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

Key: TypeAlias = DictKey | GetAttrKey | SequenceKey | FlattenedIndexKey
KeyPath: TypeAlias = tuple[Key, ...]

ATTR, ITEM, INDEX, UNKEYED = ".", "@", "#", r"#\("  # the markers of the kinds of nodes
MARKERS = ".@#"  # the first characters of segments
MAX_INDEX = 2**31 - 1  # what JAX's keys hold

_SHORT = 32
_ENDS = ("", ".", "@", "#")  # what may follow a text
_RESERVED = "__metadata__"  # as a tensor's name it would collide with the file's metadata

# text = *( any character but . @ # \  /  "\" ( "." / "@" / "#" / "\" ) )
_TEXT = r"[^.@#\\]*(?:\\[.@#\\][^.@#\\]*)*"
_SEGMENTS = re.compile(rf"(?:[.@#](?:\\\()?|^){_TEXT}")
_BEFORE_MARKER = re.compile(r"(?=[.@#])")  # the same cut, for strings without a backslash
# number = "0" / ( "1"-"9" *( "0"-"9" ) )
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")

_MARKERS = (".", "@", "#")
_TO_DOTS = str.maketrans("@#", "..")
_INT_KEY = re.compile(r"([@#])\\\((-?[0-9]+)\)")
_NOT_DOTTED = re.compile(r"[@#\\]")
_NEEDS_ESCAPE = re.compile(r"[.@#\\]")
_ESCAPED = re.compile(r"\\(.)")
_NO_UTF8 = "a lone surrogate has no UTF-8 spelling"
# --- spelling ---------------------------------------------------------------------------------


def keypath2string(path: KeyPath) -> str:
    """Spell a JAX key path.

    Args:
        path: The keys from the root of a tree to a leaf, as JAX gives them.

    Returns:
        The spelling, which `string2keypath` turns back into an equal path. The empty path is "".

    Raises:
        KeyPathError: A key of another type, a negative or boolean index, a name that is not a
            str, or a dict key that has no spelling.

    Specification: *Key paths*.

    >>> from jax.tree_util import DictKey, GetAttrKey, SequenceKey
    >>> keypath2string((GetAttrKey("layers"), SequenceKey(10), DictKey("query")))
    'layers#10@query'
    """
    if not isinstance(path, Iterable):
        raise KeyPathError(f"a key path is a tuple of keys, not {type(path).__name__}")
    pieces: list[str] = []
    for key in path:
        try:
            pieces.append(spell_key(key))
        except KeyPathError as error:
            so_far = shorten(join("", *pieces))
            raise KeyPathError(f"{error}, in a key path that begins {so_far}") from None
    return join("", *pieces)


def join(prefix: str, *segments: str) -> str:
    """Append segments to the spelled path `prefix`."""
    if prefix or not segments:
        return prefix + "".join(segments)
    return _without_leading_dot("".join(segments))


def _without_leading_dot(segments: str) -> str:
    # first = segment / text. A name that is empty or reserved keeps its ".": the grammar alone
    # would spell it like the empty path, or like the metadata of the file.
    if segments[0] != "." or segments[1:2] in _ENDS:
        return segments
    if segments.startswith("." + _RESERVED) and segments[1 + len(_RESERVED) :][:1] in _ENDS:
        return segments
    return segments[1:]


def spell_key(key: object) -> str:
    """Spell one key as a segment, its marker included."""
    speller = _SPELLERS.get(type(key))
    if speller is None:
        raise KeyPathError(f"cannot spell {describe(key)}: not one of JAX's own key classes")
    return speller(key)


def spell_attr(name: str) -> str:
    """Spell the segment of an attribute."""
    return "." + _escape(name, "an attribute name")


def spell_item(key: object) -> str:
    """Spell the segment of a dict key."""
    if type(key) is str:
        return "@" + _escape(key, "a dict key")
    return rf"@\({_escape(write_literal(key), 'a dict key')})"


def spell_index(index: int) -> str:
    """Spell the segment of an index."""
    return f"#{_checked_index(index)}"


def spell_flat_index(index: int) -> str:
    """Spell the segment of a child without a key."""
    return rf"#\({_checked_index(index)})"


_SPELLERS: dict[type, Callable[..., str]] = {
    GetAttrKey: lambda key: spell_attr(key.name),
    DictKey: lambda key: spell_item(key.key),
    SequenceKey: lambda key: spell_index(key.idx),
    FlattenedIndexKey: lambda key: spell_flat_index(key.key),
}


def _escape(text: str, what: str) -> str:
    if type(text) is not str:
        raise KeyPathError(f"{what} is a str, not {describe(text)}")
    if text.isidentifier():  # as most are: nothing to escape
        return text
    if not text.isascii() and SURROGATE.search(text):
        raise KeyPathError(f"{what} with a lone surrogate, {shorten(text)}, has no UTF-8 spelling")
    return _NEEDS_ESCAPE.sub(r"\\\g<0>", text)


def _checked_index(index: int) -> int:
    if type(index) is not int:
        raise KeyPathError(f"an index is an int, not {describe(index)}")
    if not 0 <= index <= MAX_INDEX:
        raise KeyPathError(f"an index is at least 0 and at most {MAX_INDEX}, not {show(index)}")
    return index


# --- reading ----------------------------------------------------------------------------------


class _Rejected(Exception):
    """Why a string is no key path: where, and what would stand there instead."""

    def __init__(self, position: int, reason: str, mend: tuple[int, int, str] | None = None):
        self.position, self.reason, self.mend = position, reason, mend


def string2keypath(string: str) -> KeyPath:
    r"""Read a spelled key path: the inverse of `keypath2string`.

    Args:
        string: A spelling, exactly as `keypath2string` writes it.

    Returns:
        The keys.

    Raises:
        KeyPathError: `string` spells no key path, or is not the canonical spelling of one. The
            message shows the position, the reason and, where there is one, that spelling.

    Specification: *Key paths*.

    >>> string2keypath(r"#2.layers@a\.b")
    (SequenceKey(idx=2), GetAttrKey(name='layers'), DictKey(key='a.b'))
    """
    if type(string) is not str:
        if not isinstance(string, str):
            raise KeyPathError(f"a spelled key path is a str, not {describe(string)}")
        string = str.__str__(string)
    try:
        return tuple(_read(string))
    except _Rejected as rejected:
        _raise(string, rejected)


def split(string: str) -> list[str]:
    """Cut a spelled path into its segments, each with its marker."""
    pieces = _pieces(string)
    try:
        _check_length(string, pieces)
        if pieces:
            _read_first(pieces[0])
    except _Rejected as rejected:
        _raise(string, rejected)
    if pieces and pieces[0][0] not in ".@#":
        pieces[0] = "." + pieces[0]
    return pieces


def cut(string: str) -> tuple[str, str]:
    """Cut the last segment, with its marker, off a spelled path that is not empty."""
    if "\\" not in string:
        at = max(string.rfind("."), string.rfind("@"), string.rfind("#"))
        if at > 0:
            return string[:at], string[at:]
    *rest, last = split(string)
    return join("", *rest), last


def strip_prefix(prefix: str, string: str) -> str | None:
    """The path from `prefix` down to `string`; None where it does not lead there."""
    if not prefix:
        return string
    if not string.startswith(prefix):
        return None
    rest = string[len(prefix) :]
    if rest and rest[0] not in ".@#":
        return None
    return rest and _without_leading_dot(rest)


def add_prefix(prefix: str, string: str) -> str:
    """The path `string`, seen from above `prefix`: the inverse of `below`."""
    if not prefix or not string:
        return prefix or string
    return prefix + (string if string[0] in ".@#" else "." + string)


def is_dotted(string: str) -> bool:
    """Whether a path is one of keys joined by dots: it has no other marker."""
    return not _NOT_DOTTED.search(string)


def dotted(string: str) -> str:
    """Join the keys of a spelled path by dots, whatever their kind."""
    plain = _INT_KEY.sub(r"\1\2", string) if "\\" in string else string
    if "\\" not in plain:
        return plain.translate(_TO_DOTS)[plain[:1] in _MARKERS :]
    return ".".join(map(_text_of, _read(string)))


def _text_of(key: Key) -> str:
    if isinstance(key, GetAttrKey):
        return key.name
    value = key.idx if isinstance(key, SequenceKey) else key.key
    return value if isinstance(value, str) else ascii(value)


def read_segment(segment: str) -> Key:
    """Read one segment, its marker included."""
    try:
        if not segment.isascii() and (found := SURROGATE.search(segment)):
            raise _Rejected(found.start(), _NO_UTF8)
        return _read_piece(segment)
    except _Rejected as rejected:
        _raise(segment, rejected)


def _read(string: str) -> list[Key]:
    if not string.isascii() and (found := SURROGATE.search(string)):
        raise _Rejected(found.start(), _NO_UTF8)
    pieces = _pieces(string)
    _check_length(string, pieces)
    keys: list[Key] = []
    try:
        for piece in pieces:
            if not keys:
                keys.append(_read_first(piece))
            else:
                keys.append(_read_short(piece) if len(piece) <= _SHORT else _read_piece(piece))
    except _Rejected as rejected:
        read, piece = pieces[: len(keys)], pieces[len(keys)]
        raise _shift(rejected, piece, string, sum(map(len, read))) from None
    return keys


def _pieces(string: str) -> list[str]:
    if "\\" not in string:
        return list(filter(None, _BEFORE_MARKER.split(string)))
    return list(filter(None, _SEGMENTS.findall(string)))


def _check_length(string: str, pieces: list[str]) -> None:
    if sum(map(len, pieces)) != len(string):
        reason = r"a backslash stands before one of . @ # \, or after @ or # as \("
        raise _Rejected(_gap(string), reason)


def _gap(string: str) -> int:
    """Where the first backslash stands that escapes nothing."""
    position = 0
    for found in _SEGMENTS.finditer(string):
        if found.start() != position:
            break
        position = found.end()
    return position


def _shift(rejected: _Rejected, piece: str, string: str, offset: int) -> _Rejected:
    """Turn positions in a piece into positions in the string."""
    mend = rejected.mend if piece.endswith(")") else rejected.mend or _closed(string[offset:])
    if mend is not None:
        mend = (mend[0] + offset, mend[1] + offset, mend[2])
    return _Rejected(rejected.position + offset, rejected.reason, mend)


def _read_first(piece: str) -> Key:
    if piece[0] in "@#":
        return _read_piece(piece)
    # first = segment / text
    if piece == _RESERVED:
        raise _Rejected(0, "this name is reserved by the file format", (0, 0, "."))
    if piece[0] != ".":
        return GetAttrKey(_unescape(piece))
    if piece[1:] not in ("", _RESERVED) and not piece.startswith(r".\("):
        raise _Rejected(0, "a leading name stands without its '.'", (0, 1, ""))
    return _read_piece(piece)


def _read_piece(piece: str) -> Key:
    marker, text = piece[0], piece[1:]
    if text.startswith(r"\("):
        return _read_parenthesis(piece)
    if marker == "@":
        return DictKey(_unescape(text))
    if marker == "#":
        return SequenceKey(_read_number(text, piece, "#{}"))
    return GetAttrKey(_unescape(text))


@lru_cache(maxsize=4096)
def _read_short(piece: str) -> Key:
    """Read a segment of at most `_SHORT` characters: most are met again and again."""
    return _read_piece(piece)


def _unescape(text: str) -> str:
    return _ESCAPED.sub(r"\1", text) if "\\" in text else text


def _read_number(text: str, piece: str, spelling: str) -> int:
    if _NUMBER.fullmatch(text) and int(text) <= MAX_INDEX:
        return int(text)
    reason = f"an index is a decimal number from 0 to {MAX_INDEX}, without sign or leading zero"
    try:
        number = int(text) if len(text) <= MAX_DIGITS else -1
    except ValueError:
        number = -1
    mend = (0, len(piece), spelling.format(number)) if 0 <= number <= MAX_INDEX else None
    raise _Rejected(1, reason, mend)


def _read_parenthesis(piece: str) -> Key:
    r"""Read `@\(value)` or `#\(number)`."""
    marker, text = piece[0], piece[3:]
    if marker == ".":
        raise _Rejected(1, r"an attribute has no \(...) form")
    if not text.endswith(")"):
        raise _Rejected(len(piece), r"a \( is closed by ) at the end of its segment")
    if marker == "#":
        return FlattenedIndexKey(_read_number(text[:-1], piece, r"#\({})"))
    try:
        value = read_literal(_unescape(text[:-1]))
        spelling = spell_item(value)
    except KeyPathError as error:
        raise _Rejected(3, str(error)) from None
    if spelling != piece:
        reason = "a dict key in parentheses is written as Python's ascii() writes it, and is no str"
        raise _Rejected(3, reason, (0, len(piece), spelling))
    return item_key(value)


def item_key(value: object) -> DictKey:
    """The key of a dict's entry."""
    if value is not None:
        return DictKey(value)
    # From JAX 0.4.36 to 0.6 flattening a plain dict makes this key, and the class refuses to.
    (((key,), _),), _ = tree_flatten_with_path({None: 0})
    found: DictKey = key
    return found


def _closed(string: str) -> tuple[int, int, str] | None:
    r"""Mend a `@\(1.5)` in which the literal was not escaped."""
    close = string.find(")", 3, MAX_DIGITS)
    if not string.startswith(r"@\(") or close < 0:
        return None
    try:
        return 0, close + 1, spell_item(read_literal(string[3:close]))
    except KeyPathError:
        return None


def _raise(string: str, rejected: _Rejected) -> NoReturn:
    position, reason = rejected.position, rejected.reason
    message = f"{shorten(string)} spells no key path: at position {position}, {reason}"
    canonical = _mend(string, rejected) if len(string) <= MAX_DIGITS else None
    if canonical is not None:
        message += f"; the canonical spelling is {shorten(canonical)}"
    raise KeyPathError(message) from None


def _mend(string: str, rejected: _Rejected) -> str | None:
    """The canonical spelling of what was meant, where a few local changes lead to one."""
    for _ in range(16):
        if rejected.mend is None:
            return None
        start, stop, replacement = rejected.mend
        string = string[:start] + replacement + string[stop:]
        try:
            _read(string)
        except _Rejected as again:
            rejected = again
        else:
            return string
    return None
