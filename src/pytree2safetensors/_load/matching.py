"""Matching: which stored leaf goes to which leaf of a template, and every reason why not.

Specification: *Loading into a template*.
"""

import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from pytree2safetensors._errors import WeightsMismatchError, nearest, shorten
from pytree2safetensors._leaves.spec import LeafSpec, TracedSpec
from pytree2safetensors._load.sharded import misplaced
from pytree2safetensors._load.template import TemplateLeaf, misfit
from pytree2safetensors._tree.paths import add_prefix

Rename: TypeAlias = Callable[[str], str] | Mapping[str, str]

_LISTED = 20  # of each kind of mismatch in a message
_COMPARED = 40_000  # characters of the names among which the nearest is looked for


class Options(NamedTuple):
    """How to match, and what messages call the source."""

    label: str
    strict: bool
    verbose: bool
    cast: bool
    prefix: str
    rename: Rename | None


class _Outcome:
    """What was found, and what was not."""

    def __init__(self, paths: Sequence[str], cast: bool) -> None:
        self.paths, self.cast = paths, cast
        self.found: list[tuple[int, str]] = []
        self.used: set[str] = set()
        self.missing: list[tuple[str, str]] = []  # a path of the template, and its name in the file
        self.mismatched: list[str] = []
        self.lost = False  # an abstract leaf has no value to fall back on
        self.castable = False

    def judge(
        self,
        position: int,
        path: str,
        name: str,
        slot: TemplateLeaf,
        stored: LeafSpec | None,
        value: Any,
    ) -> bool:
        """Whether a stored leaf fits a slot; `value` is that of a Python scalar."""
        reason = _unfit(slot, stored, value, self.cast)
        if reason is None:
            self.found.append((position, name))
            return True
        self.mismatched.append(f"{shorten(path)}: {reason}")
        self.lost = self.lost or slot.abstract
        self.castable |= _unfit(slot, stored, value, True) is None
        return False


def match(
    paths: Sequence[str],
    slots: Sequence[TemplateLeaf | None],
    available: Mapping[str, LeafSpec | None],
    values: Callable[[Collection[str]], Mapping[str, Any]],
    options: Options,
) -> list[tuple[int, str]]:
    """Which name goes to which leaf of the template, by position.

    Args:
        paths: The spelled key paths of the template's leaves.
        slots: What these ask for; None for what is no data.
        available: What is stored under each name; None for what has no values.
        values: Gives the Python scalars that are stored under names, for those whose fit depends
            on it.
        options: How to match.
    """
    outcome = _Outcome(paths, options.cast)
    waiting: list[
        tuple[int, str, str, TemplateLeaf, LeafSpec]
    ] = []  # for the value of a Python scalar
    fitting: set[tuple[int, int]] = set()  # slots and stored leaves, by identity
    for position, (path, slot) in enumerate(zip(paths, slots, strict=True)):
        if slot is None:
            name = add_prefix(options.prefix, path)  # `rename` knows the names of data alone
            if name in available and available[name] is None:
                outcome.used.add(name)  # neither is data
            continue
        name = _renamed(path, options)
        if name not in available:
            outcome.missing.append((path, name))
            outcome.lost = outcome.lost or slot.abstract
            continue
        outcome.used.add(name)
        stored = available[name]
        if (id(slot), id(stored)) in fitting:
            outcome.found.append((position, name))
        elif stored is not None and _needs_value(slot, stored):
            waiting.append((position, path, name, slot, stored))
        elif outcome.judge(position, path, name, slot, stored, None):
            fitting.add((id(slot), id(stored)))
    scalars = values({name for _, _, name, _, _ in waiting})
    for position, path, name, slot, stored in waiting:
        outcome.judge(position, path, name, slot, stored, scalars[name])
    _check(outcome, any(slot is not None for slot in slots), available, options)
    return outcome.found


def _renamed(path: str, options: Options) -> str:
    rename = options.rename
    if rename is None:
        return add_prefix(options.prefix, path)
    if isinstance(rename, Mapping):
        name = rename[path] if path in rename else add_prefix(options.prefix, path)
    else:
        name = rename(path)
    if not isinstance(name, str):
        raise TypeError(
            f"rename= gives {shorten(path)} a name of type {type(name).__name__}, and a name is a str"
        )
    return name


def _needs_value(slot: TemplateLeaf, stored: LeafSpec) -> bool:
    return (
        stored.dtype is None
        and stored.kind not in {"key", "str"}
        and (
            slot.leaf.dtype is not None
            or (stored.kind == "int" and slot.leaf.kind in {"float", "complex"})
        )
    )


def _unfit(slot: TemplateLeaf, stored: LeafSpec | None, value: Any, cast: bool) -> str | None:
    if stored is None:
        return "what is given for it is no array, or one without values"
    if isinstance(stored, TracedSpec) and slot.target != "jax":
        return "what is given for it is traced, and can only become an array that JAX holds here"
    reason = misfit(slot, stored, value, cast=cast)
    if reason is None and slot.sharding is not None and slot.target == "jax":
        reason = misplaced(slot.sharding, slot.leaf.shape)
    return reason


# --- messages ---------------------------------------------------------------------------------


def _check(outcome: _Outcome, wanted: bool, available: Mapping[str, Any], options: Options) -> None:
    """Raise one error for everything that does not match, if that is too much; or tell it."""
    missing, mismatched = outcome.missing, outcome.mismatched
    unexpected = [name for name in available if name not in outcome.used]
    nothing = not outcome.found and (wanted or bool(unexpected))
    left = bool(missing or unexpected or mismatched)
    fails = (options.strict and left) or outcome.lost or nothing
    if not fails and not (options.verbose and left):
        return
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(mismatched)} mismatched"
    candidates = _up_to(_COMPARED, unexpected)
    missing_lines = [_missing_line(*pair, options, candidates) for pair in missing[:_LISTED]]
    parts = [
        f"{options.label} does not fit the template: {counts}",
        *_section("missing (the template has them)", missing_lines, len(missing)),
        *_section(
            "unexpected (the template has no place for them)",
            [shorten(name) for name in unexpected[:_LISTED]],
            len(unexpected),
        ),
        *_section("mismatched", mismatched[:_LISTED], len(mismatched)),
        *_useless(options.rename, outcome.paths),
    ]
    if not fails:
        print(*parts, sep="\n", file=sys.stderr)  # noqa: T201 - what `verbose` asks for
        return
    parts.append(_remedy(options, bool(missing), outcome.castable, nothing))
    raise WeightsMismatchError(
        "\n".join(parts), [path for path, _ in missing], unexpected, mismatched
    )


def _up_to(characters: int, names: list[str]) -> list[str]:
    """As many of the first names as have so many characters together."""
    lengths = itertools.accumulate(map(len, names))
    return [name for name, length in zip(names, lengths, strict=True) if length <= characters]


def _missing_line(path: str, name: str, options: Options, candidates: list[str]) -> str:
    renamed = "" if name == add_prefix(options.prefix, path) else f" (renamed from {shorten(path)})"
    return shorten(name) + renamed + nearest(name, candidates)


def _useless(rename: Rename | None, paths: Sequence[str]) -> list[str]:
    """What to say of a mapping that is written the wrong way round, or misspelled."""
    others = sorted(set(rename) - set(paths)) if isinstance(rename, Mapping) else []
    if not others:
        return []
    shown = ", ".join(map(shorten, others[:3])) + (", ..." if len(others) > 3 else "")
    return [f"  rename= maps from key paths that the template lacks: {shown}"]


def _section(title: str, lines: Iterable[str], count: int) -> list[str]:
    if not count:
        return []
    more = [f"    ... and {count - _LISTED:,} more"] if count > _LISTED else []
    return [f"  {title}:", *(f"    {line}" for line in lines), *more]


def _remedy(options: Options, missing: bool, castable: bool, nothing: bool) -> str:
    if not options.strict and not nothing:
        return "strict=False keeps the template's leaves, and what is abstract or deleted has no value to keep."
    remedies = ["rename= maps names", "prefix= takes a subtree"] if missing else []
    remedies += ["cast=True converts dtypes"] if castable else []
    if nothing:
        return "Nothing fits, which strict=False does not allow either" + _listed(remedies)
    return "; ".join([*remedies, "strict=False loads what fits"]) + "."


def _listed(remedies: list[str]) -> str:
    return f": {'; '.join(remedies)}." if remedies else "."
