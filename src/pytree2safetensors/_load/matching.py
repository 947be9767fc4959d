"""Matching: which stored leaf goes to which leaf of a template, and all mismatches.

Specification: *Loading into a template*.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from pytree2safetensors._errors import FileFormatError, shorten
from pytree2safetensors._leaves.families import Lost
from pytree2safetensors._leaves.renaming import Rename, renamed
from pytree2safetensors._leaves.routes import Route, Routes
from pytree2safetensors._leaves.spec import LeafSpec, TracedSpec
from pytree2safetensors._leaves.views import View
from pytree2safetensors._load.sharded import misplaced
from pytree2safetensors._load.template import TemplateLeaf, misfit, show
from pytree2safetensors._tree.paths import add_prefix
from pytree2safetensors._tree.rule import Rule


class Options(NamedTuple):
    """How to match, and the name of the source in messages."""

    label: str
    strict: bool
    verbose: bool
    cast: bool
    prefix: str
    rename: Rename | None
    unexpected: str = "raise"


class Comparison:
    """Which leaves of a template were found, and which were not."""

    def __init__(self, paths: Sequence[str], cast: bool, routes: Routes) -> None:
        self.paths, self.cast, self.routes = paths, cast, routes
        self.found: list[tuple[int, str | View]] = []
        self.used: set[str] = set()
        self.missing: list[tuple[str, str | None]] = []  # a path of the template, and its name
        self.mismatched: list[tuple[str, str]] = []  # a path, and why its leaf does not fit
        self.lost = False  # an abstract leaf has no value to keep
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
        """Return whether a stored leaf fits a template leaf; `value` is that of a Python scalar."""
        reason = _unfit(slot, stored, value, self.cast)
        if reason is None:
            self.found.append((position, source))
            return True
        self.refuse(path, reason + hint, slot)
        self.castable |= _unfit(slot, stored, value, True) is None
        return False

    def refuse(self, path: str, reason: str, slot: TemplateLeaf) -> None:
        """Record why a leaf does not get its values."""
        self.mismatched.append((path, reason))
        self.lost = self.lost or slot.abstract

    def miss(self, path: str, name: str | None, slot: TemplateLeaf) -> None:
        """Record that the tensor of a leaf is missing. Without a name, no rule matches its path."""
        self.missing.append((path, name))
        self.lost = self.lost or slot.abstract


def compare(
    paths: Sequence[str],
    slots: Sequence[TemplateLeaf | None],
    available: Mapping[str, Any],
    values: Callable[[Collection[str]], Mapping[str, Any]],
    options: Options,
) -> Comparison:
    """Find out which name or view goes to which leaf of the template.

    Args:
        paths: The spelled key paths of the template's leaves.
        slots: What these leaves need; None for leaves that are not data.
        available: The stored leaf under each name; None for a leaf without values.
        values: Returns the Python scalars that are stored under names. It is called if the fit
            depends on their values.
        options: How to match.
    """
    outcome = Comparison(paths, options.cast, _routed(paths, slots, options))
    routes, rules, _ = outcome.routes
    waiting: list[
        tuple[int, str, str, TemplateLeaf, LeafSpec]
    ] = []  # for the value of a Python scalar
    fitting: set[tuple[int, int]] = set()  # slots and stored leaves, by identity
    for position, (path, slot) in enumerate(zip(paths, slots, strict=True)):
        if slot is None:
            name = add_prefix(options.prefix, path)  # `rename` only has names for data
            if name in available and _is_empty(available, name):
                outcome.used.add(name)  # neither of them is data
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
    return outcome


def _routed(paths: Sequence[str], slots: Sequence[TemplateLeaf | None], options: Options) -> Routes:
    """Return where each leaf of the template is in the file; leaves that are not data are nowhere."""
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
    outcome: Comparison,
    position: int,
    path: str,
    slot: TemplateLeaf,
    route: View | Lost | None,
    rule: Rule | None,
    available: Mapping[str, Any],
) -> None:
    """Match a leaf with the tensors that a rule makes it of."""
    if route is None:
        if slot.abstract:
            outcome.refuse(path, f"{rule!r} says that it is not in the file, {_NO_VALUE}", slot)
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
    "but the leaf of the template has no value to keep; give it one, or leave it out of the template, as "
    "nnx.split(model, nnx.Param, ...) and eqx.filter(model, eqx.is_array) do"
)


def _judge_view(
    outcome: Comparison,
    position: int,
    path: str,
    slot: TemplateLeaf,
    view: View,
    rule: Rule | None,
    available: Mapping[str, Any],
) -> None:
    dtype: np.dtype[Any] | None = None
    for name in view.names:
        stored = available[name]
        is_array = stored is not None and stored.kind == "array" and stored.dtype != np.complex128
        if stored is not None and is_array and stored.shape == view.stored:
            dtype = dtype or stored.dtype
            if stored.dtype == dtype:
                continue
        shown = "not an array, or an array without values" if stored is None else show(stored)
        of = f"{dtype}" if dtype is not None else ""
        outcome.refuse(
            path,
            f"the template has {show(slot.leaf)}; by {rule!r} the tensor {shorten(name)} would be "
            f"{of}[{','.join(map(str, view.stored))}], but it is {shown}",
            slot,
        )
        return
    seen = LeafSpec("array", dtype, slot.leaf.shape)
    traced = any(isinstance(available[name], TracedSpec) for name in view.names)
    outcome.judge(position, path, view, slot, TracedSpec(*seen) if traced else seen, None)


def _hint(slot: TemplateLeaf, stored: LeafSpec | None, rule: Rule | None) -> str:
    """Return a hint if a rule without a pattern finds a tensor with the reversed shape of the leaf."""
    shape = slot.leaf.shape
    if rule is None or stored is None or shape == stored.shape or shape != stored.shape[::-1]:
        return ""
    axes = "o i" if len(shape) == 2 else " ".join("abcdefghijklmnopqrstuvwxyz"[: len(shape)])
    pattern = f"{axes} -> {' '.join(reversed(axes.split()))}"
    return f"; this is the transpose, so give {rule!r} the pattern {pattern!r}"


def _is_empty(available: Mapping[str, Any], name: str) -> bool:
    """Return whether the leaf under a name has no values. Every tensor of a file has values."""
    try:
        return available[name] is None
    except FileFormatError:  # a tensor of an unknown dtype
        return False


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
        return "the given value is not an array, or is an array without values"
    if isinstance(stored, TracedSpec) and slot.target != "jax":
        return "the given value is traced, so it can only replace a JAX array"
    reason = misfit(slot, stored, value, cast=cast)
    if reason is None and slot.sharding is not None and slot.target == "jax":
        reason = misplaced(slot.sharding, slot.leaf.shape)
    return reason
