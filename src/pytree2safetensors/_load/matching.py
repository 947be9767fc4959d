"""Matching: which stored leaf goes to which leaf of a template, and every reason why not.

Specification: *Loading into a template*.
"""

import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from pytree2safetensors._errors import WeightsMismatchError, nearest, shorten
from pytree2safetensors._leaves.families import Lost
from pytree2safetensors._leaves.renaming import Rename, renamed, rules_in
from pytree2safetensors._leaves.routes import Route, Routes
from pytree2safetensors._leaves.spec import LeafSpec, TracedSpec
from pytree2safetensors._leaves.views import View
from pytree2safetensors._load.sharded import misplaced
from pytree2safetensors._load.template import TemplateLeaf, misfit, show
from pytree2safetensors._tree.paths import add_prefix, dotted, strip_prefix
from pytree2safetensors._tree.rule import Rule
from pytree2safetensors._tree.rule_index import RuleIndex

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
        self.found: list[tuple[int, str | View]] = []
        self.used: set[str] = set()
        self.missing: list[tuple[str, str | None]] = []  # a path of the template, and its name
        self.mismatched: list[str] = []
        self.lost = False  # an abstract leaf has no value to fall back on
        self.castable = False

    def judge(
        self,
        position: int,
        path: str,
        source: str | View,
        slot: TemplateLeaf,
        stored: LeafSpec | None,
        value: Any,
        hint: str = "",
    ) -> bool:
        """Whether a stored leaf fits a slot; `value` is that of a Python scalar."""
        reason = _unfit(slot, stored, value, self.cast)
        if reason is None:
            self.found.append((position, source))
            return True
        self.refuse(path, reason + hint, slot)
        self.castable |= _unfit(slot, stored, value, True) is None
        return False

    def refuse(self, path: str, reason: str, slot: TemplateLeaf) -> None:
        """Note why a leaf does not get its values."""
        self.mismatched.append(f"{shorten(path)}: {reason}")
        self.lost = self.lost or slot.abstract

    def miss(self, path: str, name: str | None, slot: TemplateLeaf) -> None:
        """Note that what a leaf needs is not there; without a name no rule has its path."""
        self.missing.append((path, name))
        self.lost = self.lost or slot.abstract


def match(
    paths: Sequence[str],
    slots: Sequence[TemplateLeaf | None],
    available: Mapping[str, LeafSpec | None],
    values: Callable[[Collection[str]], Mapping[str, Any]],
    options: Options,
) -> list[tuple[int, str | View]]:
    """Which name or view goes to which leaf of the template, by position.

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
    routes, rules, idle = _routed(paths, slots, options)
    for position, (path, slot) in enumerate(zip(paths, slots, strict=True)):
        if slot is None:
            name = add_prefix(options.prefix, path)  # `rename` knows the names of data alone
            if name in available and available[name] is None:
                outcome.used.add(name)  # neither is data
            continue
        route, rule = routes[position], rules[position]
        if not isinstance(route, str):
            _judge_by_rule(outcome, position, path, slot, route, rule, available)
            continue
        name = route
        if name not in available:
            outcome.miss(path, name, slot)
            continue
        outcome.used.add(name)
        stored = available[name]
        if (id(slot), id(stored)) in fitting:
            outcome.found.append((position, name))
        elif stored is not None and _needs_value(slot, stored):
            waiting.append((position, path, name, slot, stored))
        elif outcome.judge(position, path, name, slot, stored, None, _hint(slot, stored, rule)):
            fitting.add((id(slot), id(stored)))
    scalars = values({name for _, _, name, _, _ in waiting})
    for position, path, name, slot, stored in waiting:
        outcome.judge(position, path, name, slot, stored, scalars[name])
    _check(outcome, any(slot is not None for slot in slots), available, options, idle)
    return outcome.found


def _routed(paths: Sequence[str], slots: Sequence[TemplateLeaf | None], options: Options) -> Routes:
    """Where each leaf of the template is in the file; what is no data is nowhere."""
    data = [position for position, slot in enumerate(slots) if slot is not None]
    shapes = [slot.leaf.shape if slot.leaf.kind == "array" else None for slot in slots if slot]
    found = renamed(
        options.rename,
        [paths[position] for position in data],
        shapes,
        complete=False,
        prefix=options.prefix,
    )
    if len(data) == len(slots):
        return found
    routes: list[Route] = [None] * len(slots)
    rules: list[Rule | None] = [None] * len(slots)
    for position, route, rule in zip(data, found.routes, found.rules, strict=True):
        routes[position], rules[position] = route, rule
    return Routes(routes, rules, found.idle)


def _judge_by_rule(
    outcome: _Outcome,
    position: int,
    path: str,
    slot: TemplateLeaf,
    route: View | Lost | None,
    rule: Rule | None,
    available: Mapping[str, LeafSpec | None],
) -> None:
    """Whether the tensors fit of which a rule makes a leaf, or why it makes none."""
    if route is None:
        if slot.abstract:
            outcome.refuse(path, f"by {rule!r} no file has it, {_NO_VALUE}", slot)
    elif isinstance(route, Lost):
        if rule is None:
            outcome.miss(path, None, slot)
        else:
            outcome.refuse(path, f"the template has {show(slot.leaf)}; {route.reason}", slot)
    else:
        missing = [name for name in route.names if name not in available]
        outcome.used.update(name for name in route.names if name in available)
        for name in missing:
            outcome.miss(path, name, slot)
        if not missing:
            _judge_view(outcome, position, path, slot, route, rule, available)


_NO_VALUE: Final = (
    "and the template's leaf has no value to keep; give it one, or leave it out of the template, as "
    "nnx.split(model, nnx.Param, ...) and eqx.filter(model, eqx.is_array) do"
)


def _judge_view(
    outcome: _Outcome,
    position: int,
    path: str,
    slot: TemplateLeaf,
    view: View,
    rule: Rule | None,
    available: Mapping[str, LeafSpec | None],
) -> None:
    dtype: np.dtype[Any] | None = None
    for name in view.names:
        stored = available[name]
        is_array = stored is not None and stored.kind == "array" and stored.dtype != np.complex128
        if stored is not None and is_array and stored.shape == view.stored:
            dtype = dtype or stored.dtype
            if stored.dtype == dtype:
                continue
        shown = "no array, or one without values" if stored is None else show(stored)
        of = f"{dtype}" if dtype is not None else ""
        outcome.refuse(
            path,
            f"the template has {show(slot.leaf)}; by {rule!r} the tensor {shorten(name)} would be "
            f"{of}[{','.join(map(str, view.stored))}], and it is {shown}",
            slot,
        )
        return
    seen = LeafSpec("array", dtype, slot.leaf.shape)
    traced = any(isinstance(available[name], TracedSpec) for name in view.names)
    outcome.judge(position, path, view, slot, TracedSpec(*seen) if traced else seen, None)


def _hint(slot: TemplateLeaf, stored: LeafSpec | None, rule: Rule | None) -> str:
    """What to say of a tensor by a rule without a pattern whose shape is the transpose of the leaf's."""
    shape = slot.leaf.shape
    if rule is None or stored is None or shape == stored.shape or shape != stored.shape[::-1]:
        return ""
    axes = "o i" if len(shape) == 2 else " ".join("abcdefghijklmnopqrstuvwxyz"[: len(shape)])
    pattern = f"{axes} -> {' '.join(reversed(axes.split()))}"
    return f"; that is its transpose, which {rule!r} makes with the pattern {pattern!r}"


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


def _check(
    outcome: _Outcome,
    wanted: bool,
    available: Mapping[str, Any],
    options: Options,
    idle: Sequence[Rule],
) -> None:
    """Raise one error for everything that does not match, if that is too much; or tell it."""
    missing, mismatched = outcome.missing, outcome.mismatched
    unexpected = _unexpected(outcome.used, available, options)
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
        *_section("rules that match no path of the template", map(repr, idle[:_LISTED]), len(idle)),
    ]
    if not fails:
        print(*parts, sep="\n", file=sys.stderr)  # noqa: T201 - what `verbose` asks for
        return
    parts.append(_remedy(options, bool(missing), outcome.castable, nothing))
    paths = list(dict.fromkeys(path for path, _ in missing))
    raise WeightsMismatchError("\n".join(parts), paths, unexpected, mismatched)


def _unexpected(used: set[str], available: Mapping[str, Any], options: Options) -> list[str]:
    """The names that nothing uses, and that ought to be used."""
    found = [name for name in available if name not in used]
    rules = rules_in(options.rename)
    if rules is None:
        return found
    found = [name for name in found if strip_prefix(options.prefix, name) is not None]
    known = RuleIndex(rules).match_names(found)
    return [name for name in found if name not in known]


def _up_to(characters: int, names: list[str]) -> list[str]:
    """As many of the first names as have so many characters together."""
    lengths = itertools.accumulate(map(len, names))
    return [name for name, length in zip(names, lengths, strict=True) if length <= characters]


def _missing_line(path: str, name: str | None, options: Options, candidates: list[str]) -> str:
    if name is None:
        dots = dotted(path)
        return f"{shorten(path)}{f', dotted {shorten(dots)}' if dots != path else ''}: no rule has this path"
    if rules_in(options.rename) is not None:
        return f"{shorten(path)}: there is no {shorten(name)}{nearest(name, candidates)}"
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
