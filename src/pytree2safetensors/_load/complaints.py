"""Messages about leaves that do not fit a template.

Specification: *Loading into a template*.
"""

import itertools
import logging
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from pytree2safetensors._errors import WeightsMismatchError
from pytree2safetensors._leaves.renaming import Rename, rules_in
from pytree2safetensors._leaves.routes import describe_unused
from pytree2safetensors._load.matching import Comparison, Options
from pytree2safetensors._messages import listed, nearest, shorten
from pytree2safetensors._tree.keypath import unescape
from pytree2safetensors._tree.paths import add_prefix, dotted, strip_prefix
from pytree2safetensors._tree.rule_index import RuleIndex, with_dots

_LOGGER: Final = logging.getLogger("pytree2safetensors")
_NOTHING_WANTED: Final = (
    "The template has no array, number or string: pass a model or its shapes, as from jax.eval_shape, "
    "not a class, a function, shardings, or an object whose class is not registered as a pytree node."
)
_LOST: Final = "an abstract or deleted leaf has no value to keep: give it one, from an initialized model, or load it"
_SHOWN: Final = 3  # subtrees that fit, names, or pairs of names
_COMPARED: Final = 40_000  # characters of names to search for the nearest


class Misfits(NamedTuple):
    """What a `WeightsMismatchError` lists."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]


def misfits(outcome: Comparison, options: Options) -> Misfits:
    """Return what does not fit."""
    unused = _unexpected_names(outcome, options)
    return Misfits(
        [*dict.fromkeys(path for path, _ in outcome.missing)],
        unused if options.unexpected == "raise" else [],
        [f"{path!r}: {reason}" for path, reason in outcome.mismatched],
    )


def check(outcome: Comparison, options: Options) -> None:
    """Raise one error for all mismatches, or print and log them if `strict` is False."""
    missing = outcome.missing
    lists = misfits(outcome, options)
    _, unexpected, mismatched = lists
    idle = describe_unused(outcome.routes, outcome.paths)
    wanted = any(leaf is not None for leaf in outcome.needs)
    left = bool(missing or unexpected or mismatched)
    nothing = left and not outcome.found
    fails = (options.strict and left) or outcome.lost or nothing
    is_reported = options.verbose or _LOGGER.isEnabledFor(logging.INFO)
    if not fails and not (is_reported and left):
        return
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(mismatched)} mismatched"
    candidates = _up_to(_COMPARED, _unexpected_names(outcome, options))
    missing_lines = (_missing_line(*pair, candidates) for pair in missing)
    mismatched_lines = (f"{shorten(path)}: {reason}" for path, reason in outcome.mismatched)
    parts = [
        f"{options.label} does not fit the template: {counts}",
        *_section("missing (the template has them)", missing_lines, len(missing)),
        *_section(
            "unexpected (the template does not have them)",
            (shorten(name) + _kept(name, outcome, options) for name in unexpected),
            len(unexpected),
        ),
        *_section("mismatched", mismatched_lines, len(mismatched)),
        *_useless(options.rename, outcome.paths),
        *_section("rules that no leaf of the template uses", idle, len(outcome.routes.idle)),
    ]
    if not fails:
        if options.verbose and sys.stderr is not None:  # or else `print` uses stdout
            print(*parts, sep="\n", file=sys.stderr)  # noqa: T201 - `verbose` asks for it
        _LOGGER.info("%s", "\n".join(parts), extra=lists._asdict())
        return
    is_larger = bool(unexpected) and not missing and not mismatched
    remedy = _remedy(outcome, options, nothing, is_larger)
    parts.append(remedy if wanted else _NOTHING_WANTED)
    parts += _old_names(outcome, options.rename)
    raise WeightsMismatchError("\n".join(parts), *lists)


def _unexpected_names(outcome: Comparison, options: Options) -> list[str]:
    """Return the names that are not used, except names that rules declare as unused."""
    found = [name for name in outcome.available if name not in outcome.used]
    rules = rules_in(options.rename)
    if rules is None:
        return found
    found = [name for name in found if strip_prefix(options.prefix, name) is not None]
    known = RuleIndex(rules).match_names(found)
    return [name for name in found if name not in known]


def _up_to(characters: int, names: list[str]) -> list[str]:
    """Return the first names, up to a number of characters together."""
    lengths = itertools.accumulate(map(len, names))
    return [name for name, length in zip(names, lengths, strict=True) if length <= characters]


def _missing_line(path: str, name: str | None, candidates: list[str]) -> str:
    if name is None:
        return f"{with_dots(path)}: no rule has this path"
    lacks = "" if name == path else f": there is no {shorten(name)}"
    return shorten(path) + lacks + nearest(name, candidates)


def _kept(name: str, outcome: Comparison, options: Options) -> str:
    """Return a hint if the template has a leaf at or above this name that is not data."""
    leaves = zip(outcome.paths, outcome.needs, strict=True)
    others = (add_prefix(options.prefix, path) for path, need in leaves if path and need is None)
    above = next((path for path in others if strip_prefix(path, name) is not None), None)
    if above is None:
        return ""
    if above == name:
        return " (the template has no array and no number there)"
    return f" (the template's leaf at {shorten(above)} is not a pytree node)"


def _useless(rename: Rename | None, paths: Sequence[str]) -> list[str]:
    """Explain a mapping that is the wrong way round or misspelled."""
    others = sorted(set(rename) - set(paths)) if isinstance(rename, Mapping) else []
    if not others:
        return []
    shown = _some([*map(shorten, others)])
    return [f"  rename= maps from key paths that the template lacks: {shown}"]


def _old_names(outcome: Comparison, rename: Rename | None) -> list[str]:
    """Say how to load names of version 0.1.4, which escaped nothing."""
    if not (rename is None or isinstance(rename, Mapping)):
        return []
    old = {path: unescape(name) for path, name in outcome.missing if name is not None}
    pairs = [
        f"{shorten(path)}: {shorten(name)}"
        for path, name in old.items()
        if name in outcome.available and name not in outcome.used
    ]
    shown = f"pytree2safetensors 0.1.4 escaped nothing: rename={{{_some(pairs)}}} loads its names."
    return [shown] if pairs else []


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (", ..." if len(texts) > _SHOWN else "")


def _section(title: str, lines: Iterable[str], count: int) -> list[str]:
    return [f"  {title}:", *listed(lines, count)] if count else []


def _remedy(outcome: Comparison, options: Options, nothing: bool, is_larger: bool) -> str:
    if not options.strict and not nothing:
        return f"strict=False keeps the leaves of the template, but {_LOST}."
    remedies = _remedies(outcome, options, nothing)
    if nothing:
        others = f": {'; '.join(remedies)}" if remedies else ""
        return f"No leaf fits, so strict=False does not help{others}."
    if is_larger:
        remedies.append('unexpected="skip" ignores leaves that the template does not have')
    lenient = f"does not help, because {_LOST}" if outcome.lost else "loads what fits"
    remedies.append(f"strict=False {lenient}")
    return f"{'; '.join(remedies)}."


def _remedies(outcome: Comparison, options: Options, nothing: bool) -> list[str]:
    """Return what makes leaves of the template fit."""
    if not outcome.available:
        below = f" below {shorten(options.prefix)}" if options.prefix else ""
        return [f"{options.label} has no leaves{below}"]
    paths = [path for path, _ in outcome.missing]
    prefixed = _whole_names(outcome, options)
    cast = ["cast=True converts dtypes"] if outcome.castable else []
    if rules_in(options.rename) is not None:
        kept = ["Rule(None, path) keeps a leaf of the template"] if paths else []
        change = ["change the rules or the template"] if paths or outcome.mismatched else []
        return [*prefixed, *kept, *cast, *change]
    change = ["change the template"] if outcome.mismatched and not cast else []
    names = prefixed or (["rename= maps names"] if paths else [])
    names += ["prefix= selects a subtree"] if paths and not options.prefix else []
    if nothing and paths and options.rename is None and not options.prefix:
        names = _names_that_fit(paths, outcome.available)
    return [*names, *cast, *change]


def _whole_names(outcome: Comparison, options: Options) -> list[str]:
    """Return a remedy if names that `rename` gives would be there with the prefix before them."""
    if not options.prefix or options.rename is None:
        return []
    names = (name for _, name in outcome.missing if name is not None)
    if not any(add_prefix(options.prefix, name) in outcome.available for name in names):
        return []
    return [f"names from rename= are whole names; begin them with {shorten(options.prefix)}"]


def _names_that_fit(paths: Sequence[str], names: Collection[str]) -> list[str]:
    """Return remedies if the template has none of the names."""
    if all(dotted(path) in names for path in paths):
        return ['rename=[Rule("{*}", "{*}")] maps names that are joined with dots']
    subtree = "prefix= selects a subtree"
    if inner := _tops(paths, names):
        subtree += f", such as {inner}"
    elif outer := _tops(names, paths):
        subtree = f"the names fit the subtree of the template at {outer}: load into that"
    return ["rename= maps names", subtree]


def _tops(below: Collection[str], names: Collection[str]) -> str:
    """List where a tree with leaves at `names` has a subtree with all leaves at `below`."""
    leaves, first = set(names), next(iter(below))
    starts = (name.removesuffix(first) for name in names)
    prefixes = [start.removesuffix(".") for start in starts if start not in leaves]
    fitting = [p for p in prefixes if p and all(add_prefix(p, path) in leaves for path in below)]
    return " or ".join(map(shorten, fitting[:_SHOWN]))
