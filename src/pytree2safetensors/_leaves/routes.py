"""Routes: the views that rules give the leaves of a tree.

Specification: *Rules*.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from pytree2safetensors._leaves.families import Family, Lost
from pytree2safetensors._leaves.regions import Shape
from pytree2safetensors._leaves.views import View
from pytree2safetensors._tree.placeholders import Binding, fill
from pytree2safetensors._tree.rule import ParsedRule, Rule
from pytree2safetensors._tree.rule_index import RuleIndex, describe_idle

# The name of the tensor of a leaf, its view, or None for a leaf that is not in a file.
Route: TypeAlias = str | View | Lost | None


class Routes(NamedTuple):
    """Where each leaf of a tree is in a file and by which rule, and rules that no leaf uses."""

    routes: list[Route]
    rules: list[Rule | None]  # None if no rule matches
    families: Sequence[int]  # the same for leaves that are cut from the same tensors
    idle: list[Rule]


class _Leaf(NamedTuple):
    """A leaf that is cut from tensors."""

    position: int
    binding: Binding
    shape: Shape | None  # None if it is not an array


def routes_of(
    rules: RuleIndex, paths: Sequence[str], shapes: Sequence[Shape | None], *, complete: bool
) -> Routes:
    """Find out where each leaf is in a file.

    Args:
        rules: The rules. The first one that matches is used.
        paths: The spelled key paths of all leaves.
        shapes: The shapes of the leaves; None for leaves that are not arrays.
        complete: Whether leaves that a rule cuts from one tensor must all be there.

    Raises:
        ValueError: A rule with a dotted path matches two leaves of one dotted path.
    """
    routes: list[Route] = []
    found: list[Rule | None] = []
    makers: dict[int, _Maker] = {}
    families: dict[tuple[Any, ...], list[_Leaf]] = {}  # by rule and what their tensors share
    for match, shape in zip(rules.match_paths(paths), shapes, strict=True):
        if match is None:
            routes.append(Lost("no rule has this path"))
            found.append(None)
            continue
        number, binding = match
        if number not in makers:
            makers[number] = _Maker(rules.rules[number], rules.parsed[number])
        maker = makers[number]
        found.append(maker.rule)
        if maker.parsed.cut:
            shared = [i for axis, i in binding.indices.items() if axis not in maker.parsed.cut]
            key = number, binding.text, *shared
            families.setdefault(key, []).append(_Leaf(len(routes), binding, shape))
            routes.append(None)
        else:
            routes.append(maker.route(binding, shape))
    numbers = [*range(len(routes))]
    for (number, *_), leaves in families.items():
        made = makers[number].views(leaves, complete)
        for leaf, route in zip(leaves, made, strict=True):
            routes[leaf.position] = route
            numbers[leaf.position] = leaves[0].position
    idle = [
        rule
        for number, rule in enumerate(rules.rules)
        if number not in makers and rule.path is not None
    ]
    return Routes(routes, found, numbers, idle)


def describe_unused(found: Routes, paths: Sequence[str]) -> Iterator[str]:
    """Describe the rules that no leaf uses, and say which of them repeat or are hidden by earlier ones."""
    used = {*found.rules}
    for rule in found.idle:
        if rule in used:
            yield f"{rule!r} (the same rule is there earlier; remove one of them)"
            continue
        index = RuleIndex([rule])
        users = zip(paths, found.rules, strict=True)
        earlier = next(
            (user for path, user in users if user and any(index.match_paths([path]))), None
        )
        if earlier is None:
            yield describe_idle(rule, paths)
        else:
            yield f"{rule!r} (hidden by the earlier {earlier!r}; put the more specific rule first)"


class _Maker:
    """Makes routes by one rule. Leaves of the same shapes share all that does not depend on names."""

    def __init__(self, rule: Rule, parsed: ParsedRule) -> None:
        self.rule, self.parsed = rule, parsed
        self.made: dict[tuple[Any, ...], list[View | Lost]] = {}

    def route(self, binding: Binding, shape: Shape | None) -> Route:
        """Return the route of a leaf that is not cut from tensors."""
        if self.parsed.name is None:
            return None
        if not self.rule.pattern:
            return fill(self.parsed.name, binding)
        return next(self.views([_Leaf(0, binding, shape)], True))

    def views(self, leaves: Sequence[_Leaf], complete: bool) -> Iterator[View | Lost]:
        """Yield the views of leaves that are cut from the same tensors."""
        cut = self.parsed.cut
        indices = [tuple(leaf.binding.indices[axis] for axis in cut) for leaf in leaves]
        shapes = [leaf.shape for leaf in leaves]
        key = *indices, *shapes
        made = self.made.get(key)
        if made is None:
            made = Family(self.rule, self.parsed, indices, shapes, leaves[0].binding).views(
                complete
            )
            if not any(isinstance(route, Lost) for route in made):  # a reason names a path
                self.made[key] = made
        for leaf, route in zip(leaves, made, strict=True):
            if isinstance(route, Lost):
                yield route
            else:
                sizes = dict(zip(self.parsed.stacked, route.stacked, strict=True))
                yield route._replace(names=tuple(self.parsed.names(leaf.binding, sizes)))
