"""Matching: which stored leaf goes to which leaf of a template, and every reason why not."""

import difflib
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from pytree2safetensors._errors import WeightsMismatchError, shorten
from pytree2safetensors._keypath import under
from pytree2safetensors._leaf import Logical
from pytree2safetensors._slot import Slot, misfit

Rename: TypeAlias = Callable[[str], str] | Mapping[str, str]

_LISTED = 20  # of each kind of mismatch in a message
_COMPARED = 40_000  # characters of the names among which the nearest is looked for


class Options(NamedTuple):
    """How to match, and what messages call the source."""

    label: str
    strict: bool
    cast: bool
    prefix: str
    rename: Rename | None


class _Outcome:
    """What was found, and what was not."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []
        self.used: set[str] = set()
        self.missing: list[
            tuple[str, str]
        ] = []  # the path in the template, and the name looked for
        self.mismatched: list[str] = []
        self.lost = False  # an abstract leaf has no value to fall back on
        self.castable = False


def match(
    paths: Sequence[str],
    slots: Sequence[Slot | None],
    available: Mapping[str, Logical | None],
    values: Callable[[Collection[str]], Mapping[str, Any]],
    options: Options,
) -> list[tuple[int, str]]:
    """Which name goes to which leaf of the template, by position.

    Args:
        paths: The spelled key paths of the template's leaves.
        slots: What these ask for; None for what is no data.
        available: What is stored under each name; None for what is no data.
        values: Gives the Python scalars that are stored under names, for those whose fit depends
            on it.
        options: How to match.
    """
    outcome = _Outcome()
    names = [
        "" if slot is None else _renamed(path, options)
        for path, slot in zip(paths, slots, strict=True)
    ]
    scalars = values(_asked(names, slots, available))
    fitting: set[tuple[int, int]] = set()  # slots and stored leaves, by identity
    for position, (path, name, slot) in enumerate(zip(paths, names, slots, strict=True)):
        if slot is None:
            same = under(options.prefix, path)  # `rename` knows the names of data alone
            if same in available and available[same] is None:
                outcome.used.add(same)  # neither is data
            continue
        if name not in available:
            outcome.missing.append((path, name))
            outcome.lost = outcome.lost or slot.abstract
            continue
        outcome.used.add(name)
        stored = available[name]
        if (id(slot), id(stored)) in fitting:
            outcome.found.append((position, name))
            continue
        value = scalars[name] if _needs_value(slot, stored) else None
        reason = _unfit(slot, stored, value, options.cast)
        if reason is None:
            outcome.found.append((position, name))
            if value is None:
                fitting.add((id(slot), id(stored)))
        else:
            outcome.mismatched.append(f"{shorten(path)}: {reason}")
            outcome.lost = outcome.lost or slot.abstract
            outcome.castable |= _unfit(slot, stored, value, True) is None
    _check(outcome, any(slot is not None for slot in slots), available, options)
    return outcome.found


def _renamed(path: str, options: Options) -> str:
    rename = options.rename
    if rename is None:
        return under(options.prefix, path)
    if isinstance(rename, Mapping):
        name = rename[path] if path in rename else under(options.prefix, path)
    else:
        name = rename(path)
    if not isinstance(name, str):
        raise TypeError(
            f"rename= gives {shorten(path)} a name of type {type(name).__name__}, and a name is a str"
        )
    return name


def _asked(
    names: Iterable[str], slots: Iterable[Slot | None], available: Mapping[str, Logical | None]
) -> set[str]:
    """The names of scalars whose values decide whether they fit."""
    return {
        name
        for name, slot in zip(names, slots, strict=True)
        if slot is not None and name in available and _needs_value(slot, available[name])
    }


def _needs_value(slot: Slot, stored: Logical | None) -> bool:
    return (
        stored is not None
        and stored.dtype is None
        and stored.kind not in {"key", "str"}
        and (
            slot.leaf.dtype is not None
            or (stored.kind == "int" and slot.leaf.kind in {"float", "complex"})
        )
    )


def _unfit(slot: Slot, stored: Logical | None, value: Any, cast: bool) -> str | None:
    if stored is None:
        return "what is given for it is no data"
    return misfit(slot, stored, value, cast=cast)


# --- messages ---------------------------------------------------------------------------------


def _check(outcome: _Outcome, wanted: bool, available: Mapping[str, Any], options: Options) -> None:
    """Raise one error for everything that does not match, if that is too much."""
    missing, mismatched = outcome.missing, outcome.mismatched
    unexpected = [name for name in available if name not in outcome.used]
    nothing = not outcome.found and (bool(available) or wanted)
    strictly = options.strict and (missing or unexpected or mismatched)
    if not (strictly or outcome.lost or nothing):
        return
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(mismatched)} mismatched"
    candidates = _up_to(_COMPARED, unexpected)
    missing_lines = [_with_nearest(name, candidates) for _, name in missing[:_LISTED]]
    parts = [
        f"{options.label} does not fit the template: {counts}",
        *_section("missing (the template has them)", missing_lines, len(missing)),
        *_section(
            "unexpected (the template has no place for them)",
            [shorten(name) for name in unexpected[:_LISTED]],
            len(unexpected),
        ),
        *_section("mismatched", mismatched[:_LISTED], len(mismatched)),
        _remedy(options, bool(missing), outcome.castable, nothing),
    ]
    raise WeightsMismatchError(
        "\n".join(parts), [path for path, _ in missing], unexpected, mismatched
    )


def _up_to(characters: int, names: list[str]) -> list[str]:
    """As many of the first names as have so many characters together."""
    lengths = itertools.accumulate(map(len, names))
    return [name for name, length in zip(names, lengths, strict=True) if length <= characters]


def _with_nearest(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name[:300], candidates, 1) if len(name) <= 300 else []
    return shorten(name) + (f" (nearest: {shorten(near[0])})" if near else "")


def _section(title: str, lines: Iterable[str], count: int) -> list[str]:
    if not count:
        return []
    more = [f"    ... and {count - _LISTED:,} more"] if count > _LISTED else []
    return [f"  {title}:", *(f"    {line}" for line in lines), *more]


def _remedy(options: Options, missing: bool, castable: bool, nothing: bool) -> str:
    if not options.strict and not nothing:
        return (
            "strict=False keeps the template's leaves, and what is abstract has no value to keep."
        )
    remedies = ["rename= maps names", "prefix= takes a subtree"] if missing else []
    remedies += ["cast=True converts dtypes"] if castable else []
    if nothing:
        return "Nothing fits, which strict=False does not allow either" + _listed(remedies)
    return "; ".join([*remedies, "strict=False loads what fits"]) + "."


def _listed(remedies: list[str]) -> str:
    return f": {'; '.join(remedies)}." if remedies else "."
