"""Matching: which stored leaf goes to which leaf of a template, and all mismatches.

Specification: *Loading into a template*.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from pytree2safetensors._leaves.families import Lost
from pytree2safetensors._leaves.renaming import Rename, renamed
from pytree2safetensors._leaves.routes import Route, Routes
from pytree2safetensors._leaves.spec import LeafSpec, TracedSpec
from pytree2safetensors._leaves.views import View
from pytree2safetensors._load.misfits import (
    has_axes,
    misfit,
    needs_value,
    origin_of,
    predicate,
    show,
    transposed,
    uneven,
)
from pytree2safetensors._load.template import TemplateLeaf
from pytree2safetensors._messages import shorten
from pytree2safetensors._tree.paths import add_prefix
from pytree2safetensors._tree.printing import array_text
from pytree2safetensors._tree.rule import Rule, parse_rule


class Options(NamedTuple):
    """How to match, and the name of the source in messages."""

    label: str
    strict: bool
    verbose: bool
    cast: bool
    prefix: str
    rename: Rename | None
    unexpected: str


# A position in the template, the name or the view that goes there, and what the leaf needs.
Found: TypeAlias = tuple[int, str | View, TemplateLeaf]


class Comparison:
    """Which leaves of a template were found, and which were not."""

    def __init__(
        self,
        paths: Sequence[str],
        needs: Sequence[TemplateLeaf | None],
        held: Mapping[int, str],
        available: Mapping[str, Any],
        options: Options,
    ) -> None:
        self.paths, self.needs, self.held, self.available = paths, needs, held, available
        self.cast, self.routes = options.cast, _routed(paths, needs, held, options)
        self.found: list[Found] = []
        self.used: set[str] = set()
        self.missing: list[tuple[str, str | None]] = []  # a path of the template, and its name
        self.mismatched: list[tuple[str, str]] = []  # a path, and why its leaf does not fit
        # Positions and names: neither the leaf nor what has its name can be stored.
        self.unstorable: list[tuple[int, str]] = []
        self.lost = False  # an abstract leaf has no value to keep
        self.castable = False

    def judge(
        self,
        position: int,
        source: str | View,
        leaf: TemplateLeaf,
        stored: LeafSpec | None,
        value: Any = None,
    ) -> bool:
        """Return whether a stored leaf fits a template leaf; `value` is that of a Python scalar."""
        if misfit(leaf, stored, value, self.cast) is None:
            self.found.append((position, source, leaf))
            return True
        origin = origin_of(source, self.paths[position])
        reason = misfit(leaf, stored, value, self.cast, origin)
        hint = transposed(leaf, stored, self.routes.rules[position])
        self.refuse(position, f"{reason}{hint}", leaf)
        self.castable |= misfit(leaf, stored, value, True) is None
        return False

    def judge_other(self, position: int, name: str) -> None:
        """Match a leaf that is not data, but may hold arrays; `name` is that of its path."""
        route, rule = self.routes.routes[position], self.routes.rules[position]
        name = route if isinstance(route, str) else name
        if name in self.available and self.available[name] is None:
            self.used.add(name)
            self.unstorable.append((position, name))
        elif position in self.held and (rule is None or route is not None):
            self.used.update(
                self._names_by_rule(rule, route) if isinstance(route, Lost) else [name]
            )
            self.mismatched.append((self.paths[position], self.held[position]))

    def judge_by_rule(self, position: int, leaf: TemplateLeaf, route: View | Lost | None) -> None:
        """Match a leaf with the tensors that a rule makes it of."""
        rule = self.routes.rules[position]
        if route is None:
            if leaf.abstract:
                reason = f"{rule!r} says that it is not in the file, {_NO_VALUE}"
                self.refuse(position, reason, leaf)
        elif isinstance(route, View):
            self.judge_view(position, leaf, route)
        elif rule is None:
            self.miss(position, None, leaf)
        else:
            names = self._names_by_rule(rule, route)
            self.used.update(names)
            tensor = [f"the tensor {shorten(n)} {predicate(self.available[n])}" for n in names[:1]]
            reasons = [f"the template has {show(leaf.spec)}", route.reason, *tensor]
            self.refuse(position, "; ".join(reasons) + uneven(names, self.available), leaf)

    def _names_by_rule(self, rule: Rule | None, lost: Lost) -> list[str]:
        """Return which tensors there are for a leaf that does not fit its rule."""
        return parse_rule(rule).names_among(self.available, lost.binding) if rule else []

    def judge_view(self, position: int, leaf: TemplateLeaf, view: View) -> None:
        """Match a leaf with the tensors of a view."""
        missing = [name for name in dict.fromkeys(view.names) if name not in self.available]
        self.used.update(name for name in view.names if name in self.available)
        for name in missing:
            self.miss(position, name, leaf)
        if missing:
            return
        dtype = None if view.names else leaf.spec.dtype  # a stack of no tensors
        for name in view.names:
            stored = self.available[name]
            if isinstance(stored, LeafSpec) and has_axes(stored) and stored.shape == view.stored:
                dtype = dtype or stored.dtype
                if stored.dtype == dtype:
                    continue
                seen = LeafSpec("array", stored.dtype, leaf.spec.shape)
                is_convertible = misfit(leaf, seen, None, True) is None
                if self.cast and is_convertible:
                    continue
                self.castable |= is_convertible
            expected = array_text("" if dtype is None else dtype, view.stored)
            reason = (
                f"the template has {show(leaf.spec)}; under {self.routes.rules[position]!r}, the tensor "
                f"{shorten(name)} would be {expected}, but it {predicate(stored)}"
            )
            if stored is not None and not isinstance(stored, str) and stored.dtype == np.complex128:
                reason += ", which no pattern can rearrange, because a file stores it as float64"
            self.refuse(position, reason + uneven(view.names, self.available), leaf)
            return
        seen = LeafSpec("array", dtype, leaf.spec.shape)
        traced = any(isinstance(self.available[name], TracedSpec) for name in view.names)
        self.judge(position, view, leaf, TracedSpec(*seen) if traced else seen)

    def refuse(self, position: int, reason: str, leaf: TemplateLeaf) -> None:
        """Record why a leaf does not get its values."""
        self.mismatched.append((self.paths[position], reason))
        self.lost = self.lost or leaf.abstract

    def miss(self, position: int, name: str | None, leaf: TemplateLeaf) -> None:
        """Record that the tensor of a leaf is missing. Without a name, no rule matches its path."""
        self.missing.append((self.paths[position], name))
        self.lost = self.lost or leaf.abstract


_NO_VALUE: Final = (
    "but the leaf of the template has no value to keep; give it one, or leave it out of the template, as "
    "nnx.split(model, nnx.Param, ...) and eqx.filter(model, eqx.is_array) do"
)


def compare(
    paths: Sequence[str],
    needs: Sequence[TemplateLeaf | None],
    held: Mapping[int, str],
    available: Mapping[str, Any],
    values: Callable[[Collection[str]], Mapping[str, Any]],
    options: Options,
) -> Comparison:
    """Find out which name or view goes to which leaf of the template.

    Args:
        paths: The spelled key paths of the template's leaves.
        needs: What these leaves need; None for leaves that are not data.
        held: Why leaves that are not data do not fit, by position, if they hold arrays.
        available: The stored leaf under each name; None for a leaf without values, or the reason
            why it cannot be loaded.
        values: Returns the Python scalars that are stored under names, or what was given there
            instead of an array. It is called if the fit, or the reason, depends on their values.
        options: How to match.
    """
    outcome = Comparison(paths, needs, held, available, options)
    routes = outcome.routes.routes
    # Leaves that wait for the value of a Python scalar, or of what is not an array.
    waiting: list[tuple[int, str, TemplateLeaf, LeafSpec | None]] = []
    fitting: set[tuple[int, int]] = set()  # template leaves and stored leaves, by identity
    for position, leaf in enumerate(needs):
        if leaf is None:
            outcome.judge_other(position, add_prefix(options.prefix, paths[position]))
            continue
        route = routes[position]
        if not isinstance(route, str):
            outcome.judge_by_rule(position, leaf, route)
            continue
        if route not in available:
            outcome.miss(position, route, leaf)
            continue
        outcome.used.add(route)
        stored = available[route]
        if isinstance(stored, str):
            origin = origin_of(route, paths[position])
            reason = f"the template has {show(leaf.spec)}, but the stored leaf{origin} {stored}"
            outcome.refuse(position, reason, leaf)
        elif (id(leaf), id(stored)) in fitting:
            outcome.found.append((position, route, leaf))
        elif stored is None or needs_value(leaf, stored):
            waiting.append((position, route, leaf, stored))
        elif outcome.judge(position, route, leaf, stored):
            fitting.add((id(leaf), id(stored)))
    scalars = values({name for _, name, _, _ in waiting})
    for position, name, leaf, stored in waiting:
        outcome.judge(position, name, leaf, stored, scalars[name])
    return outcome


def _routed(
    paths: Sequence[str],
    needs: Sequence[TemplateLeaf | None],
    held: Collection[int],
    options: Options,
) -> Routes:
    """Return where each leaf of the template is in the file; other leaves than data are nowhere.

    Objects that hold arrays have a place, too, because a rule may say that they are not in the file.
    But a function that gives names need not know them.
    """
    others = () if callable(options.rename) else held
    data = [n for n, leaf in enumerate(needs) if leaf is not None or n in others]
    shapes = [
        leaf.spec.shape if leaf is not None and leaf.spec.kind == "array" else None
        for leaf in map(needs.__getitem__, data)
    ]
    found = renamed(
        options.rename,
        [paths[position] for position in data],
        shapes,
        complete=False,
        prefix=options.prefix,
    )
    if len(data) == len(needs):
        return found
    routes: list[Route] = [None] * len(needs)
    rules: list[Rule | None] = [None] * len(needs)
    for position, route, rule in zip(data, found.routes, found.rules, strict=True):
        routes[position], rules[position] = route, rule
    return found._replace(routes=routes, rules=rules, families=())  # which only saves need
