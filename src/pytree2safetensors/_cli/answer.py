"""Answers: what each command returns to `main`, for people and for programs."""

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

DIFFERENT: Final = 1  # the exit code for what differs or is broken; argparse itself exits with 2
MOST_LINES: Final = 100  # of a list of differences or problems, unless --all is given


def left_out(number: int) -> str:
    """Say how many lines of a list are left out."""
    return f"... and {number:,} more; --all lists them"


class Answer(NamedTuple):
    """What a command found.

    Attributes:
        lines: Returns the lines for people.
        content: Returns the object for programs.
        complaint: The line for stderr. If there is one, the exit code is 1.
    """

    lines: Callable[[], Iterable[str]]
    content: Callable[[], dict[str, Any]]
    complaint: str = ""
