"""Literals: dict keys that are not strs, as Python's `ascii` writes them.

Specification: *Key paths*.
"""

import math
import re
from collections.abc import Callable

from pytree2safetensors._errors import KeyPathError
from pytree2safetensors._messages import shorten, with_type

MAX_DIGITS = 4300  # Python's default limit for conversion to and from decimal
MAX_DEPTH = 64  # of tuples inside a dict key
_TOO_LARGE = 10**MAX_DIGITS
SURROGATE = re.compile("[\ud800-\udfff]")


def write_literal(value: object) -> str:
    """Write a dict key that is not a str, as `ascii` does."""
    pending: list[tuple[object, int]] = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if type(item) is tuple:
            if depth == MAX_DEPTH:
                raise KeyPathError(f"a dict key nests tuples more than {MAX_DEPTH} deep")
            pending.extend((element, depth + 1) for element in item)
        elif type(item) is int:
            if abs(item) >= _TOO_LARGE:
                raise KeyPathError(f"a dict key is an int of more than {MAX_DIGITS} digits")
        elif type(item) is float:
            if not math.isfinite(item):
                raise KeyPathError(f"a dict key is the float {item}, which is not finite")
        elif type(item) is str:
            if SURROGATE.search(item):
                raise KeyPathError(f"a dict key holds a lone surrogate, in {shorten(item)}")
        elif item is not None and type(item) is not bool and type(item) is not bytes:
            raise KeyPathError(
                f"a dict key must be a str, None, bool, int, float, bytes or a tuple of these, "
                f"not {with_type(item)}"
            )
    try:
        return ascii(value)
    except ValueError as error:  # this process has a lower limit
        raise KeyPathError(f"a dict key cannot be written: {error}") from None


# What `ascii` writes, and a bit more, so that an error can show the canonical spelling.
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<name>None|True|False)(?!\w)
    | (?P<mark>[(),])
    | (?P<text>[bB]?(?:'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*"))
    | (?P<number>[+-]?[0-9][\w.]*(?:(?<=[eE])[+-][0-9]+)?)
    )\s*""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_NAMES = {"None": None, "True": True, "False": False}
_ESCAPE = re.compile(
    r"\\(?:([\\'\"nrt])|x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|.)", re.DOTALL
)
_CHARACTERS = {"n": "\n", "r": "\r", "t": "\t"}


def read_literal(literal: str) -> object:
    """Read a value that `write_literal` wrote, without evaluating anything."""
    frames: list[list[object]] = [[]]  # open tuples; the outermost holds the value
    commas = [False]  # whether the open tuple has a comma
    after_value = False
    position = 0
    while position < len(literal):
        found = _TOKEN.match(literal, position)
        if found is None:
            raise KeyPathError("the text in parentheses is not a dict key")
        position = found.end()
        token, mark = found.group(found.lastgroup or 0), found.group("mark")
        if mark == "(" and not after_value and len(frames) <= MAX_DEPTH:
            frames.append([])
            commas.append(False)
        elif mark == "," and after_value and len(frames) > 1:
            commas[-1], after_value = True, False
        elif mark == ")" and len(frames) > 1 and (after_value or commas[-1] or not frames[-1]):
            items, comma = frames.pop(), commas.pop()
            frames[-1].append(tuple(items) if comma or not items else items[0])
            after_value = True
        elif mark is None and not after_value:
            frames[-1].append(_read_atom(token, found.lastgroup or ""))
            after_value = True
        else:
            raise KeyPathError("the text in parentheses is not a dict key")
    if len(frames) != 1 or not after_value:
        raise KeyPathError("the text in parentheses is not a dict key")
    return frames[0][0]


def _read_atom(token: str, kind: str) -> object:
    if kind == "name":
        return _NAMES[token]
    if kind == "text":
        if token[0] in "bB":
            text = _ESCAPE.sub(_character, token[2:-1])
            if not text.isascii() and max(text) > "\xff":
                raise KeyPathError("a byte in parentheses is beyond \\xff")
            return text.encode("latin-1")
        return _ESCAPE.sub(_character, token[1:-1])
    if len(token) > MAX_DIGITS + 1:
        raise KeyPathError(f"a dict key is a number of more than {MAX_DIGITS} digits")
    if token.lstrip("+-").isdigit():
        try:
            return int(token)
        except ValueError as error:  # this process has a lower limit
            raise KeyPathError(f"a dict key cannot be read: {error}") from None
    readers: tuple[Callable[[str], object], ...] = (int, lambda text: int(text, 0), float)
    for reader in readers:
        try:
            return reader(token)
        except ValueError:
            continue
    raise KeyPathError("the text in parentheses is not a dict key")


def _character(found: re.Match[str]) -> str:
    simple, *codes = found.groups()
    if simple:
        return _CHARACTERS.get(simple, simple)
    code = int(next((digits for digits in codes if digits), "110000"), 16)
    if code > 0x10FFFF:
        raise KeyPathError("the text in parentheses has an unknown escape")
    return chr(code)
