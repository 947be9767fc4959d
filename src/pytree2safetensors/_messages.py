"""How messages write names, values, types, numbers and lists.

Specification: *Errors*.
"""

import difflib
import math
import reprlib
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final, cast

_LISTED: Final = 20  # items of a list


def shorten(text: str, limit: int = 200) -> str:
    """Write `text` as a literal, without its middle if it is long."""
    if len(text) <= limit:
        return repr(text)
    half = limit // 2
    return f"{text[:half]!r}...{text[-half:]!r} ({len(text):,} characters)"


def node_at(name: str) -> str:
    """Write where a node is; the empty key path is that of the root."""
    return shorten(name) if name else "the root"


def plural(number: int, one: str, many: str) -> str:
    """Write a number with its noun: `1 leaf`, `1,000 leaves`."""
    return f"{number:,} {one if number == 1 else many}"


def joined(texts: Sequence[str], limit: int = _LISTED) -> str:
    """Join the first texts with commas, and say how many more there are."""
    more = f" and {len(texts) - limit:,} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def listed(lines: Iterable[str], count: int, indent: str = "    ") -> list[str]:
    """Indent the first of `count` lines, and say how many more there are."""
    more = [f"{indent}... and {count - _LISTED:,} more"] if count > _LISTED else []
    return [*(indent + line for line in islice(lines, _LISTED)), *more]


def nearest(name: str, candidates: Sequence[str]) -> str:
    """Return a hint with the name that is most similar to a missing one."""
    near = difflib.get_close_matches(name, candidates, 1) if len(name) <= 300 else []
    return f" (nearest: {shorten(near[0])})" if near else ""


def with_type(value: object) -> str:
    """Write a value and its type for a message."""
    return f"{short_form(value)} of type {type_name(type(value))}"


def type_name(kind: type) -> str:
    """Write the full name of a type."""
    return f"{kind.__module__}.{kind.__qualname__}"


_FIRST_ELEMENTS = reprlib.Repr()  # writing all of a large collection would take long
_FIRST_ELEMENTS.maxstring = _FIRST_ELEMENTS.maxother = _FIRST_ELEMENTS.maxlong = 400
_LONG = 10**100
_COLLECTIONS = (dict, list, tuple, set, frozenset)


def short_form(value: object) -> str:
    """Write a value, and cut it if it is long."""
    try:
        if type(value) is int and abs(value) >= _LONG:
            return f"an int of {_digits(abs(value)):,} digits"
        if type(value) in _COLLECTIONS:
            first = _FIRST_ELEMENTS.repr(value)
            shown = first.encode("ascii", "backslashreplace").decode("ascii")
        else:
            cut = type(value) is str or type(value) is bytes
            shown = ascii(cast("str | bytes", value)[:100] if cut else value)
    except Exception:  # noqa: BLE001 - a foreign __repr__ may raise anything
        return "a value"
    return shown if len(shown) <= 100 else shown[:97] + "..."


def _digits(value: int) -> int:
    """Return the number of digits of a positive int, which Python may refuse to convert to a str."""
    found = int(math.log10(value))
    return found + 1 if 10**found <= value else found
