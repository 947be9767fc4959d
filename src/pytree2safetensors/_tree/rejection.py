"""Why a string is not a key path, and the spelling that may have been meant.

Specification: *Key paths*.
"""

from collections.abc import Callable
from typing import NoReturn

from pytree2safetensors._errors import KeyPathError, shorten
from pytree2safetensors._tree.literal import MAX_DIGITS


class Rejected(Exception):
    """Why a string is not a key path: the position, the reason, and a correction."""

    def __init__(self, position: int, reason: str, fix: tuple[int, int, str] | None = None):
        self.position, self.reason, self.fix = position, reason, fix


def refuse(string: str, rejected: Rejected, read: Callable[[str], object]) -> NoReturn:
    position, reason = rejected.position, rejected.reason
    message = f"{shorten(string)} is not a key path: at position {position}, {reason}"
    canonical = _fixed(string, rejected, read) if len(string) <= MAX_DIGITS else None
    if canonical is not None:
        message += f"; the canonical spelling is {shorten(canonical)}"
    raise KeyPathError(message) from None


def _fixed(string: str, rejected: Rejected, read: Callable[[str], object]) -> str | None:
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
