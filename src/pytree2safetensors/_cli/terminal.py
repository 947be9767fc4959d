"""Text for terminals: names, sizes and tables, for a screen of any width."""

import shutil
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from pytree2safetensors._errors import shorten

_NARROWEST: Final = 40  # columns that every screen takes
_LONGEST_NAME: Final = 400
_UNITS: Final = ("kB", "MB", "GB", "TB", "PB")
GLUE: Final = "\N{NO-BREAK SPACE}"  # a space at which no line is cut
_LABEL: Final = 10  # columns of the labels at the left


class Cells(NamedTuple):
    """A row of a table."""

    name: str
    detail: str
    amount: str


def plain(text: str) -> str:
    """Text as it is where that is safe and unmistakable, and else as a Python literal."""
    safe = text.isprintable() and text.strip() == text and text[:1] not in {"", "'", '"'}
    return text if safe and len(text) <= _LONGEST_NAME else shorten(text, _LONGEST_NAME)


def size(nbytes: int) -> str:
    """A number of bytes, in decimal units."""
    if nbytes < 1000:
        return f"{nbytes} B"
    value, place = nbytes / 1000, 0
    while value >= 999.95 and place < len(_UNITS) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.1f} {_UNITS[place]}"


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) != 0 for character in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _columns(text))


def _screen() -> int:
    """The width to print for; that of a pipe is 80, or what COLUMNS says."""
    return max(_NARROWEST, shutil.get_terminal_size((80, 24)).columns)


def table(rows: Sequence[Cells]) -> Iterator[str]:
    """Print rows in columns; what does not fit beside its name goes below it."""
    if not rows:
        return
    screen = _screen()
    last = max(_columns(row.amount) for row in rows)
    first, middle = (max(map(_columns, column)) for column in list(zip(*rows, strict=True))[:2])
    room = screen - last - 4
    if first + middle > room:  # the names give way to half of the room, the details to the rest
        middle = min(middle, max(room // 2, room - first))
        first = room - middle
    for name, detail, amount in rows:
        left = name
        if _columns(name) > first or _columns(detail) > middle:
            yield name
            left = ""
        indent = first if _columns(detail) <= middle else 4
        rest = _padded(detail, first + middle - indent)
        yield f"{_padded(left, indent)}  {rest}  {amount:>{last}}".rstrip()


def labelled(label: str, text: str) -> Iterator[str]:
    """Print a text beside its label, on as many lines as it needs."""
    for line in textwrap.wrap(text, _screen() - _LABEL, break_on_hyphens=False):
        yield f"{label:<{_LABEL}}{line.replace(GLUE, ' ')}"
        label = ""
