"""Writing: a key path as a string, in the grammar of `keypath`.

Specification: *Key paths*.
"""

import re
from collections.abc import Callable, Iterable

from pytree2safetensors._errors import KeyPathError
from pytree2safetensors._messages import short_form, shorten, with_type
from pytree2safetensors._tree.keys import (
    MAX_INDEX,
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    KeyPath,
    SequenceKey,
)
from pytree2safetensors._tree.literal import SURROGATE, write_literal

ATTR, ITEM, INDEX, UNKEYED = ".", "@", "#", r"#\("  # the markers of the kinds of nodes
MARKERS = ".@#"  # the first characters of segments
RESERVED = "__metadata__"  # the name of a tensor must differ from that of the file's metadata

_ENDS = ("", ".", "@", "#")  # what may follow a text
_NEEDS_ESCAPE = re.compile(r"[.@#\\]")


def keypath2string(path: KeyPath) -> str:
    """Spell a JAX key path.

    Args:
        path: The keys from the root of a tree to a leaf, as JAX returns them.

    Returns:
        The spelling. `string2keypath` reads it back as an equal path. The empty path is spelled "".

    Raises:
        KeyPathError: A key cannot be spelled: it is of another type, an index is negative, too large
            or a bool, a name is not a str, a text has a lone surrogate, or a dict key is not a
            literal.

    Specification: *Key paths*.

    >>> from jax.tree_util import DictKey, GetAttrKey, SequenceKey
    >>> keypath2string((GetAttrKey("layers"), SequenceKey(10), DictKey("query")))
    'layers#10@query'
    """
    if not isinstance(path, Iterable):
        raise TypeError(f"keypath2string: path must be a tuple of keys, not {type(path).__name__}")
    pieces: list[str] = []
    for key in path:
        try:
            pieces.append(spell_key(key))
        except KeyPathError as error:
            raise located(error, join("", *pieces)) from None
    return join("", *pieces)


def located(error: KeyPathError, above: str) -> KeyPathError:
    """Add to the error of a key which keys are before it."""
    where = (
        f"in a key path that begins {shorten(above)}" if above else "in the first key of a key path"
    )
    return KeyPathError(f"{error}, {where}")


def join(prefix: str, *segments: str) -> str:
    """Append segments to the spelled path `prefix`."""
    if prefix or not segments:
        return prefix + "".join(segments)
    return strip_leading_dot("".join(segments))


def strip_leading_dot(segments: str) -> str:
    """Return segments as they are at the start of a key path: mostly without a leading "."."""
    # first = segment / text. A name that is empty or reserved keeps its ".", because it would be
    # the empty path or the name of the metadata without it.
    if segments[0] != "." or segments[1:2] in _ENDS:
        return segments
    if segments.startswith("." + RESERVED) and segments[1 + len(RESERVED) :][:1] in _ENDS:
        return segments
    return segments[1:]


def spell_key(key: object) -> str:
    """Spell one key as a segment, including its marker."""
    speller = _SPELLERS.get(type(key))
    if speller is None:
        error = f"cannot spell {with_type(key)}: not one of JAX's own key classes"
        if type(key) not in _INSTEAD:
            raise KeyPathError(error)
        remedy = f"give a {_INSTEAD[type(key)]} instead of this {type(key).__name__}"
        raise KeyPathError(f"{error} (where the node type is registered, {remedy})")
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


# The key classes of JAX for keys of some types.
_INSTEAD = {str: "GetAttrKey", int: "SequenceKey", tuple: "DictKey"}

_SPELLERS: dict[type, Callable[..., str]] = {
    GetAttrKey: lambda key: spell_attr(key.name),
    DictKey: lambda key: spell_item(key.key),
    SequenceKey: lambda key: spell_index(key.idx),
    FlattenedIndexKey: lambda key: spell_flat_index(key.key),
}


def _escape(text: str, what: str) -> str:
    if type(text) is not str:
        raise KeyPathError(f"{what} must be a str, not {with_type(text)}")
    if text.isidentifier():  # most need no escape
        return text
    if not text.isascii() and SURROGATE.search(text):
        raise KeyPathError(f"{what} with a lone surrogate, {shorten(text)}, has no UTF-8 spelling")
    return _NEEDS_ESCAPE.sub(r"\\\g<0>", text)


def _checked_index(index: int) -> int:
    if type(index) is not int:
        # Keys of JAX before 0.4.36 take any value.
        raise KeyPathError(  # pragma: no cover - coverage is measured with a newer JAX
            f"an index must be an int, not {with_type(index)}"
        )
    if not 0 <= index <= MAX_INDEX:
        raise KeyPathError(
            f"an index is at least 0 and at most {MAX_INDEX}, not {short_form(index)}"
        )
    return index
