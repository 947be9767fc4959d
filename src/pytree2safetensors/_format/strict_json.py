"""Strict JSON, to read: no duplicate names, and only integers unless a caller allows others; compact JSON, to write.

Specification: *Files*.
"""

import json
from collections import Counter
from collections.abc import Collection
from typing import Any, Final, TypeAlias

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._messages import shorten

_MEMBERS: Final = 3  # of a tensor's entry

Pairs: TypeAlias = tuple[tuple[str, Any], ...]  # a JSON object, in the order of the text

# Makes compact JSON with sorted names, so that the same content has the same text.
write_json: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def read_json(text: str, what: str, *, keep_pairs: bool = False, fractions: bool = False) -> Any:
    """Read JSON; raise a FileFormatError for duplicate names and numbers that are not integers.

    With `keep_pairs`, the text is an object, and objects become tuples of pairs, which cost much
    less than dicts. With `fractions`, any number is allowed, because other programs write members
    with such numbers, which are ignored here. Numbers that are not 64-bit integers become floats.
    """
    hook: Any = tuple if keep_pairs else _object
    try:
        found = json.loads(
            text,
            object_pairs_hook=hook,
            parse_constant=_refuse,
            parse_int=_number if fractions else _integer,
            parse_float=float if fractions else _refuse,
        )
        if keep_pairs:
            _check_unique(found)
    except _Duplicate as error:
        raise FileFormatError(f"{what} has {shorten(str(error))} twice") from None
    except RecursionError:
        raise FileFormatError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise FileFormatError(f"{what} is not valid JSON: {error}") from None
    return found


def read_json_at(text: str, start: int) -> tuple[Pairs, int]:
    """Read the object of strings that begins at `start`; return its pairs and its end."""
    try:
        pairs, end = _DECODER.raw_decode(text, start)
        if type(pairs) is not tuple:
            raise ValueError("no object")
        _object(pairs)
    except (ValueError, RecursionError):
        raise FileFormatError(f"no JSON object begins at {start}") from None
    return pairs, end


class _Duplicate(ValueError):
    """An object has a name twice."""


def _object(pairs: Collection[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _Duplicate(next(name for name in counts if counts[name] > 1))
    return found


def _check_unique(pairs: Pairs) -> None:
    """Raise an error if an object, or an object anywhere in it, has a name twice."""
    _object(pairs)
    others: list[Any] = []  # members that no reader knows, and what is in them
    for _, inner in pairs:
        if type(inner) is tuple:
            _object(inner)
            if len(inner) > _MEMBERS:
                others.extend(value for _, value in inner)
    while others:
        value = others.pop()
        if type(value) is tuple:
            _object(value)
            others.extend(inner for _, inner in value)
        elif type(value) is list:
            others.extend(value)


def _integer(digits: str) -> int:
    if digits == "-0":  # other readers make it a float
        _refuse(digits)
    return int(digits)


def _number(digits: str) -> int | float:
    return float(digits) if digits == "-0" or len(digits) > 20 else int(digits)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{shorten(constant)} is not an integer")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=tuple,
    parse_constant=_refuse,
    parse_float=_refuse,
)
