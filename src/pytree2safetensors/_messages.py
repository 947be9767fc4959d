"""How messages write names, numbers and lists.

Specification: *Errors*.
"""

import difflib
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

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
