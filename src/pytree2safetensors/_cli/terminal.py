"""Text for terminals: escaped, in columns, in colors, for a screen of any width."""

import errno
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal, NamedTuple, TextIO, TypeAlias

from pytree2safetensors._messages import shorten

_NARROWEST: Final = 40  # columns that every screen takes
_LONGEST_NAME: Final = 400
_LABEL: Final = 10  # columns of the labels at the left
GLUE: Final = "\N{NO-BREAK SPACE}"  # prints as a space; no line is cut there
_FILLER: Final = "\0"  # the second column of a wide character, while a text is cut into lines

Style: TypeAlias = Literal["", "bold", "dim", "red", "green", "yellow"]
_CODES: Final[dict[Style, str]] = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
}


class Cells(NamedTuple):
    """A row of a table: a name and a detail at the left, amounts at the right."""

    name: str
    detail: str
    amounts: tuple[str, ...] = ()
    style: Style = ""


# --- text -------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return a text as it is if it is safe and unambiguous, or else as a Python literal."""
    safe = text.isprintable() and text.strip() == text and text[:1] not in {"", "'", '"'}
    return text if safe and len(text) <= _LONGEST_NAME else shorten(text, _LONGEST_NAME)


def size(nbytes: int) -> str:
    """Write a number of bytes in decimal units."""
    return f"{nbytes} B" if nbytes < 1000 else _scaled(nbytes, " kB", " MB", " GB", " TB", " PB")


def count(number: int) -> str:
    """Write a number in a few characters: `999`, `12.3k`, `6.7B`."""
    return f"{number}" if number < 1000 else _scaled(number, "k", "M", "B", "T")


def _scaled(number: int, *units: str) -> str:
    value, place = number / 1000, 0
    while value >= 999.95 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.1f}{units[place]}"


# --- lines ------------------------------------------------------------------------------------


def line(text: str, style: Style = "") -> str:
    """Make a line for the terminal: escape control characters, then add the color."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if style and _has_colors() else text


def _has_colors() -> bool:
    """Return whether stdout is a terminal whose user wants colors (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    if sys.platform == "win32" and "WT_SESSION" not in os.environ:  # older consoles print codes
        return False
    return sys.stdout is not None and sys.stdout.isatty()


def columns(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) != 0 for character in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - columns(text))


def _screen() -> int:
    """Return the width to print for; for a pipe it is 80, or what COLUMNS says."""
    return max(_NARROWEST, shutil.get_terminal_size((80, 24)).columns)


def table(rows: Sequence[Cells]) -> Iterator[str]:
    """Print rows in columns. A detail that does not fit beside its name goes below it."""
    if not rows:
        return
    screen = _screen()
    lasts = [max(map(len, column)) for column in zip(*(row.amounts for row in rows), strict=True)]
    first = max(columns(row.name) for row in rows)
    middle = max((columns(row.detail) for row in rows if any(row.amounts)), default=0)
    room = screen - sum(width + 2 for width in lasts) - 2
    if first + middle > room:  # names may take half of the room, or what the details leave
        middle = min(middle, max(room // 2, room - first))
        first = room - middle
    for name, detail, amounts, style in rows:
        width = middle if any(amounts) else screen - first - 2  # or the rest of the line
        indent, left = first, name
        if columns(name) > first or columns(detail) > width:
            yield line(name, style)
            indent, left = (first if columns(detail) <= width else 4), ""
        cells = [_padded(left, indent), _padded(detail, first + middle - indent)]
        cells += [text.rjust(last) for text, last in zip(amounts, lasts, strict=True)]
        yield line("  ".join(cells).rstrip(), style)


def labelled(label: str, text: str) -> Iterator[str]:
    """Print a text beside its label, on as many lines as it needs."""
    text = "".join(c + _FILLER * (columns(c) - 1) for c in text)
    width = _screen() - _LABEL - (_FILLER in text)  # a cut may leave the filler to the next line
    for part in textwrap.wrap(text, width, break_on_hyphens=False):
        yield line(f"{label:<{_LABEL}}{part.replace(GLUE, ' ').replace(_FILLER, '')}")
        label = ""


# --- output -----------------------------------------------------------------------------------


def write(lines: Iterable[str]) -> None:
    """Print lines on stdout, and stop quietly when nobody reads them anymore.

    Raises:
        OSError: They cannot be written, for example because the disk is full.
    """
    out = sys.stdout  # None if it was closed before the start
    try:
        for text in lines:
            if out is not None:
                out.write(_encodable(text, out.encoding) + "\n")
        if out is not None:
            out.flush()
    except OSError as error:
        _discard(out)
        # Windows says of a closed pipe that the call is invalid.
        is_closed = isinstance(error, BrokenPipeError) or (
            sys.platform == "win32" and error.errno == errno.EINVAL
        )
        if not is_closed:
            raise


def complain(message: str) -> None:
    """Print one line on stderr."""
    if sys.stderr is None:
        return
    text = "pytree2safetensors: " + line(" ".join(message.splitlines()))
    try:
        sys.stderr.write(_encodable(text, sys.stderr.encoding) + "\n")
        sys.stderr.flush()
    except OSError:  # such as a full disk; other files still get their answers
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Lose what a stream cannot write. Python flushes it once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _encodable(text: str, encoding: str | None) -> str:
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
